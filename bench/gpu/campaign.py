"""What the GPU campaigns share: the facts of a machine, a time budget, results with their evidence, the command line.

A campaign is a program of a few parts that measure one project at GPU scale: `python -m bench.gpu.<project> <part>`.
Each part is one command that ends by itself within `--minutes`, with status 0 when it is done and `UNFINISHED` when the
same command, given again, goes on.

    parser = campaign.parser("ppo", __doc__)                    # then parser.add_argument(...) of one's own
    args = campaign.settle(parser.parse_args())                 # folders made; --tiny turned away from docs/
    budget, facts = campaign.Budget.of(args), campaign.facts(choose_device(args.device))
    status = campaign.run_until([sys.executable, "-m", ...], budget.left() - 30)  # 30 s to save and leave
    total = campaign.spend(args.work, "train", budget.used())   # seconds over all commands of this part
    campaign.write_result(args.out / "speed.json", {"rows": rows}, facts, total)
    campaign.print_table("speed", rows)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import runtime
from common.files import write_json

UNFINISHED = 75  # exit status: out of time, nothing wrong; the same command goes on (EX_TEMPFAIL of sysexits.h)
STOPPED = 128 + signal.SIGTERM  # exit status of a program of ours that has saved and left on SIGTERM


def facts(device: torch.device) -> dict[str, Any]:
    """What produced a result, in JSON types: machine, driver, cuda, versions of torch, python and packages, commit,
    date, threads, command.

    The commit is git's, or the environment variable COMMIT where a copy of the files has no .git; None where neither is
    there.
    """
    known = runtime.environment(runtime.Runtime(device, None, 0, 1, None))
    packages = {name: version for name, version in known["versions"].items() if name not in ("torch", "python")}
    return {
        "machine": known["device_name"],
        "device": str(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": known["cuda"],
        "torch": str(torch.__version__),
        "python": known["versions"]["python"],
        "packages": packages,
        "platform": known["platform"],
        "commit": known["commit"] or os.environ.get("COMMIT"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "threads": known["threads"],
        "command": known["command"],
    }


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


class Budget:
    """The time that one command has; it starts when this object is made.

    Args:
        seconds: of wall time, from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()

    @classmethod
    def of(cls, args: argparse.Namespace) -> Budget:
        """The budget of `--minutes`."""
        return cls(60 * args.minutes)

    def used(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds that remain; negative once it is over."""
        return self.seconds - self.used()

    def over(self, need: float = 0.0) -> bool:
        """Whether fewer than `need` seconds remain: ask before starting something that takes so long."""
        return self.left() <= need


def run_until(command: Sequence[str], seconds: float, grace: float = 60.0, env: Mapping[str, str] | None = None) -> int:
    """Run a program that saves and leaves on SIGTERM, and send it that after `seconds`. Returns its exit status:
    STOPPED if it was sent it.

    A SIGTERM or SIGINT to this process is passed on as one SIGTERM, and then ends this process as it would have: the
    program is in a process group of its own, so that a Ctrl-C does not reach it twice. If it is still there `grace`
    seconds after its SIGTERM, it is killed (status -9). With no time left nothing is started. Its output goes where
    ours goes.

    Args:
        env: added to the environment.
    """
    if seconds <= 0:
        return STOPPED
    received: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    process = subprocess.Popen(list(command), process_group=0, env={**os.environ, **(env or {})})
    end, asked = time.monotonic() + seconds, math.inf
    try:
        while process.poll() is None:
            now = time.monotonic()
            if asked == math.inf and (received or now >= end):
                asked = now
                process.terminate()
            elif now > asked + grace:
                process.kill()
            time.sleep(0.05)
    finally:
        process.kill()  # nothing happens where it has ended
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])
    return STOPPED if process.returncode == -signal.SIGTERM else process.returncode


def spend(work: Path, part: str, seconds: float) -> float:
    """Add this command's `seconds` to what `part` has taken so far, in `<work>/seconds.json`; returns the sum over
    all its commands.
    """
    path = work / "seconds.json"
    spent = read_json(path)
    spent[part] = round(spent.get(part, 0.0) + seconds, 1)
    write_json(path, spent)
    return spent[part]


def write_result(path: Path, content: dict[str, Any], facts: dict[str, Any], seconds: float, command: str = "") -> None:
    """Write a result with its evidence to `path`, usually docs/results/<project>/gpu/<name>.json, whole or not at all.

    Args:
        content: `{"rows": [...]}` or `{"metrics": {...}}` and whatever explains them, in JSON types.
        facts: of `facts()`.
        seconds: wall time of the measurement, over all commands if there were several.
        command: what to type to get this; by default the command that is running.
    """
    facts = dict(facts)
    running = facts.pop("command")
    write_json(path, {"command": command or running, "seconds": round(seconds, 1), **content, "facts": facts})


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, such as an earlier result to go on from; {} where there is none, `ValueError`
    where it is not one.
    """
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object: delete it")
    return value


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under the keys of all of them, in order of appearance; what a row lacks, and None, stay blank."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=None if Console().is_terminal else 400).print(table)  # in a file nothing need be cut


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def parser(project: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments that every campaign has. Give the parsed ones to `settle`."""
    result = argparse.ArgumentParser(
        prog=f"python -m bench.gpu.{project}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.set_defaults(project=project)
    result.add_argument(
        "--minutes", type=float, default=9.0, help="the command ends by itself within so many (default 9)"
    )
    result.add_argument("--out", type=Path, help=f"where results go (default docs/results/{project}/gpu)")
    result.add_argument(
        "--work",
        type=Path,
        default=Path(f"runs/gpu_{project}"),
        help="checkpoints and intermediate files (default %(default)s)",
    )
    result.add_argument(
        "--tiny",
        action="store_true",
        help="rehearsal on a CPU at tiny size; results into <work>/results, never into docs/",
    )
    result.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    return result


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in `out` of parsed arguments, with --tiny <work>/results, and make both folders. Exits where --tiny would
    write into docs/.
    """
    args.out = args.out or (args.work / "results" if args.tiny else Path("docs/results") / args.project / "gpu")
    if args.tiny and args.out.resolve().is_relative_to(Path("docs").resolve()):
        raise SystemExit("error: --tiny is a rehearsal; its results do not go into docs/")
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    return args
