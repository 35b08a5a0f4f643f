"""The command line of `python -m common.report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.errors import ProjectError, exits_cleanly
from common.report.page import MOST_RUNS, build


@exits_cleanly
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m common.report", description="One self-contained HTML page about runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; files among them are passed over")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/report.html"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--title", default="Training report")
    parser.add_argument("--most", type=int, default=MOST_RUNS, help="runs shown, the newest (default: %(default)s)")
    args = parser.parse_args()
    if args.most < 1:
        parser.error("--most must be at least 1")
    folders = [path for path in args.runs if not path.is_file()]
    if not any(path.is_dir() for path in folders):
        raise ProjectError(f"no run folder among {' '.join(map(str, args.runs))}")
    print(build(folders, args.out, args.title, args.most))


if __name__ == "__main__":
    main()
