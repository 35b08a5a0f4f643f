"""Runs in, one HTML page out."""

from __future__ import annotations

import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from common.errors import first_line
from common.files import write_text
from common.report.reading import RunView, read_run
from common.report.text import duration

MOST_RUNS = 30  # on a page, unless told otherwise: more take minutes to draw, and nobody reads them
MAX_PAGE = 20 * 2**20  # bytes of curves and pictures; a larger page is slow to open


def build(folders: list[Path], out: Path, title: str = "Training report", most: int = MOST_RUNS) -> Path:
    """Write one page about the runs in `folders`, of more than `most` the newest ones, to `out`; returns `out`."""
    chosen = newest(folders, most)
    runs = [read_anything(folder) for folder in chosen]
    keep_small(runs)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "thousands": lambda n: f"{n:,}"}
    page = environment.get_template("report.html.j2").render(
        title=title, runs=runs, given=len(folders), written=time.strftime("%Y-%m-%d %H:%M")
    )
    write_text(out, page)
    return out


def newest(folders: list[Path], most: int) -> list[Path]:
    """At most so many of the run folders, those that were trained last, in the order in which they were given."""

    def last_written(folder: Path) -> float:
        times = [path.stat().st_mtime for path in (folder / "metrics.jsonl", folder) if path.exists()]
        return times[0] if times else 0.0

    kept = set(sorted(folders, key=last_written)[-most:])
    return [folder for folder in folders if folder in kept]


def read_anything(folder: Path) -> RunView:
    """`read_run`; where a folder is damaged in a way that nobody thought of, that costs its part of the page."""
    try:
        return read_run(folder)
    except Exception as error:
        return RunView(folder.name, folder.name, missing=[f"everything, for it cannot be read ({first_line(error)})"])


def keep_small(runs: list[RunView]) -> None:
    """Leave out pictures once there are `MAX_PAGE` bytes; a run's newest sample comes before its other pictures."""
    left = MAX_PAGE - sum(len(light) + len(dark) for run in runs for _, light, dark in run.curves)
    for run in runs:
        dropped = 0
        for pictures in (run.samples, run.figures):
            for picture in reversed(list(pictures)):
                if len(picture.source) <= left:
                    left -= len(picture.source)
                else:
                    pictures.remove(picture)
                    dropped += 1
        if dropped:
            run.missing.append(f"{dropped} pictures, for which the page has no room")
