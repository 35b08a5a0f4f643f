"""What a run says while it trains: `metrics.jsonl` always, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.errors import ProjectError
from common.files import write_text

T = TypeVar("T")


class MetricLog:
    """`metrics.jsonl` of one run, one object a logged step, and its optional mirrors.

    Args:
        folder: the run folder.
        first_step: lines of this step and later are dropped: they were written after the checkpoint that a resumed run
            continues from.
        tensorboard: also write TensorBoard events into the folder.
        wandb: also log to this Weights & Biases project, if not empty.
    """

    def __init__(self, folder: Path, first_step: int = 1, tensorboard: bool = False, wandb: str = "") -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] < first_step]
        write_text(self.path, "".join(strict_json(line) + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self.board = self.wandb = None
        check_trackers(tensorboard, wandb)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=first_step)
        if wandb:
            import wandb as client

            name = wandb_id(folder, fresh=first_step == 1)
            self.wandb = client.init(project=wandb, name=folder.name, dir=str(folder), id=name, resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        try:
            self.file.write(strict_json({"step": step, **values}) + "\n")
        except OSError as error:
            raise ProjectError(f"cannot write {self.path}: {error.strerror}") from error
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def flush(self) -> None:
        """Put the lines so far on the disk: with a checkpoint, so that a resumed run finds those before it."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise ProjectError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def check_trackers(tensorboard: bool, wandb: str) -> None:
    """`ProjectError` where a tracker is asked for that is not installed."""
    if tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise ProjectError("tensorboard=true needs: pip install tensorboard") from None
    if wandb:
        try:
            import wandb as _  # noqa: F401
        except ImportError:
            raise ProjectError("wandb=... needs: pip install wandb") from None


def wandb_id(folder: Path, fresh: bool) -> str:
    """The identity of a run at Weights & Biases: random, for folders of one name are many, and kept in the folder, so
    that a resumed run goes on where it was.
    """
    path = folder / "wandb_id.txt"
    if fresh or not path.is_file():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a missing file has none.

    A null stands for a number that was not finite and becomes NaN again. A last line cut short by a crash is left out;
    so is any other that is damaged, with one warning that counts them.
    """
    lines = []
    bad = 0
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    for i, text in enumerate(texts):
        try:
            line = json.loads(text.decode())
        except (UnicodeDecodeError, RecursionError):  # nothing that we write, whole or cut
            bad += 1
            continue
        except ValueError:
            bad += bool(text) and i < len(texts) - 1  # what ends without a line break was cut short
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append({name: math.nan if value is None else value for name, value in line.items()})
    if bad:
        warnings.warn(f"{path}: {bad} damaged line{'s' if bad > 1 else ''} left out", stacklevel=2)
    return lines


def strict_json(line: dict[str, Any]) -> str:
    """One line of JSON that every reader takes: what is not finite becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }
    return json.dumps(finite, allow_nan=False)


class LastingConsole(Console):
    """A console whose reader may go away: it falls silent, where rich would end the program and lose a checkpoint."""

    def on_broken_pipe(self) -> None:
        """Called by rich when nobody reads any more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Display:
    """A `rich` progress bar on a terminal; one plain line a logged step, or every few seconds, where output goes to
    a file.
    """

    def __init__(self, enabled: bool) -> None:
        self.console = LastingConsole(file=sys.stderr, quiet=not enabled)
        self.live = enabled and self.console.is_terminal
        self.enabled = enabled

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Iterable[T], total: int, label: str, done: int = 0, every: float = 10.0) -> Iterator[T]:
        """Iterate with a bar; without a terminal, a line about every `every` seconds (0 = none)."""
        if self.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                self.bar = bar
                self.task = bar.add_task(label, total=total, completed=done, note="")
                for item in items:
                    yield item
                    bar.advance(self.task)
            return
        last = time.monotonic()
        for count, item in enumerate(items, done + 1):
            yield item
            if every and time.monotonic() - last > every:
                last = time.monotonic()
                self.say(f"{label}: {count} of {total}")

    def note(self, step: int, total: int, values: dict[str, float], seconds_left: float) -> None:
        """Show the values of a logged step: beside the bar, or as a line."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "time")
        if self.live and hasattr(self, "bar"):
            self.bar.update(self.task, note=text)
        else:
            self.say(f"step {step}/{total}  {text}  {_duration(seconds_left)} left")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
