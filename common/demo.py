"""Train and evaluate every project at its smallest size, then write one report:

    python -m common.demo [--only PROJECT] [key=value ...]

This is what `make demo` runs. Nothing is downloaded. Each stage is a program of its own, so a project that fails does
not stop the others; the exit status is then 1 and the report says what went wrong. Ctrl-C or SIGTERM goes to the
running stage, which leaves cleanly, and the report of what there is by then is still written; `--resume` goes on from
there.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import ProjectError
from common.files import write_json
from common.projects import Demo, find_demos
from common.report import build
from common.report.text import duration
from common.signals import end_with_parent

TAIL = 4000  # characters of a failed stage's messages that the report shows


@dataclass
class Stage:
    """What became of one command; kept in `demo.json` for the report."""

    stage: str  # train, eval or sample
    status: int  # exit status; 128 + signal number for a program that a signal ended
    seconds: float
    stopped: bool = False  # by a signal to the demo rather than by a failure
    tail: str = ""  # last messages of a stage that failed


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 if a stage failed, 128 + signal number if stopped."""
    known = find_demos()
    args = parse(argv, [demo.project for demo in known])
    console = Console(highlight=False)
    runner = Runner()
    folder = args.folder
    demos = [demo for demo in known if not args.only or demo.project in args.only]
    expected = duration(sum(demo.seconds for demo in demos))
    console.print(
        f"[bold]{', '.join(demo.project for demo in demos)}[/]: about {expected} on two CPU cores. Ctrl-C stops "
        "cleanly."
    )
    notes = read_notes(folder / "demo.json")
    results: dict[str, list[Stage]] = {}
    for demo in demos:
        results[demo.project] = stages = []
        for stage in run_project(demo, args, runner, console):
            stages.append(stage)
            write_json(
                folder / "demo.json", notes | {name: [asdict(s) for s in done] for name, done in results.items()}
            )
    shown = [folder / demo.project for demo in known if demo in demos or (folder / demo.project).is_dir()]
    report = build(shown, folder / "report.html", "Demo report")
    summarise(console, results)
    console.print(f"Report: [bold]{report.resolve()}[/]", soft_wrap=True)
    if runner.received:
        return 128 + runner.received
    return int(any(stage.status for stages in results.values() for stage in stages))


def run_project(demo: Demo, args: argparse.Namespace, runner: Runner, console: Console) -> Iterator[Stage]:
    """Run the stages of one project, until a stop signal or a failed training: then there is nothing to evaluate."""
    for name, command in commands(demo, args.folder / demo.project, args.resume, args.overrides):
        if runner.received:
            return
        console.rule(f"[bold]{demo.project}: {name}[/], {demo.seconds} s for all of its stages", align="left")
        started = time.perf_counter()
        status, messages = runner.run([sys.executable, "-m", *command])
        seconds = round(time.perf_counter() - started, 1)
        yield Stage(
            name, status, seconds, stopped=bool(runner.received and status), tail=tail(messages) if status else ""
        )
        if status and name == "train":
            return


def parse(argv: list[str] | None, projects: list[str]) -> argparse.Namespace:
    """The arguments; a mistake ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m common.demo", allow_abbrev=False)
    parser.add_argument("--only", action="append", choices=projects, help="run this project; may be repeated")
    parser.add_argument("--resume", action="store_true", help="continue the last demo instead of starting afresh")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings passed to every training")
    args = parser.parse_intermixed_args(argv)
    if wrong := [item for item in args.overrides if "=" not in item]:
        parser.error(f"an override is written key=value, not {wrong[0]}")
    return args


def commands(demo: Demo, run: Path, resume: bool, overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Stages of one project and the module and arguments of each; `sample` only where the project has that program."""
    start = "--resume" if resume else "--overwrite"
    train = [f"{demo.project}.train", "--config", demo.config, f"run_dir={run}", start, *demo.overrides, *overrides]
    stages = [("train", train), ("eval", [f"{demo.project}.eval", "--run", str(run)])]
    if Path(demo.project, "sample.py").is_file():
        stages.append(("sample", [f"{demo.project}.sample", "--run", str(run)]))
    return stages


class Runner:
    """Runs one command at a time, shows its output as it comes, and hands stop signals on to it.

    Attributes:
        received: number of the stop signal that arrived, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self.child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)

    def run(self, command: list[str]) -> tuple[int, str]:
        """Exit status and everything that was written to stderr.

        stderr passes through here to be remembered; where ours is a terminal, so is the child's, and progress bars stay
        alive. The child is a process group of its own: a Ctrl-C reaches it from here, once, for a second one would mean
        "leave at once".
        """
        source, sink = pty.openpty() if sys.stderr.isatty() else os.pipe()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        sys.stdout.flush()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=sink,
            process_group=0,
            env=environment,
            preexec_fn=end_with_parent,  # noqa: PLW1509 (one thread)
        )
        self.child = child
        os.close(sink)
        if self.received:  # between the last look and the start
            child.send_signal(self.received)
        messages = b""
        while True:
            # asked before reading, so that nothing written before the end is lost
            ended = child.poll() is not None
            if select.select([source], [], [], 0.0 if ended else 0.2)[0]:
                try:
                    chunk = os.read(source, 65536)
                except OSError:  # how a pseudo-terminal says that nobody writes to it any more
                    chunk = b""
                if chunk:
                    os.write(2, chunk)
                    messages = (messages + chunk)[-8 * TAIL :]
                    continue
                child.wait()
                break
            if ended:
                break
        os.close(source)
        status = child.returncode
        return (128 - status if status < 0 else status), messages.decode(errors="replace")


def tail(messages: str) -> str:
    """The end of a program's messages as it would stand on a screen: without escape codes and overwritten progress
    bars.
    """
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", messages)
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line)[-TAIL:]


def read_notes(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What an earlier demo noted of other projects; nothing where that is missing or damaged."""
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def summarise(console: Console, results: dict[str, list[Stage]]) -> None:
    """Print how each project fared and how long its stages took."""
    table = Table("project", "result", "stages", title="demo", title_justify="left")
    table.add_column("total", justify="right")
    for project, stages in results.items():
        bad = next((stage for stage in stages if stage.status), None)
        if not stages:
            result = "[yellow]not run"
        elif not bad:
            result = "[green]ok"
        elif bad.stopped:
            result = f"[yellow]{bad.stage} stopped"
        else:
            result = f"[red]{bad.stage} failed (exit status {bad.status})"
        times = ", ".join(f"{stage.stage} {duration(stage.seconds)}" for stage in stages)
        table.add_row(project, result, times, duration(sum(stage.seconds for stage in stages)))
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
