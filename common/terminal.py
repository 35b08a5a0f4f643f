"""A program and its terminal: letters that it cannot show, a reader that goes away, Ctrl-C before anything begins."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from types import FrameType


def leave_while_importing() -> None:
    """Until `imports_are_done`, Ctrl-C ends the program with one line: nothing has begun that could be saved."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, _leave)


def imports_are_done() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt` again, so that what has been begun is put in order."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted while starting\n")
    os._exit(128 + number)  # an exception could be swallowed, or shown, by whatever is being imported


def accept_any_letter() -> None:
    """Print a question mark for a letter that the terminal cannot show, where Python would end the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def reader_gone() -> bool:
    """Whether nobody reads our output any more, as after `| head -1`; what is left of it then goes nowhere."""
    if sys.stdout is None:
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def show_metrics(metrics: dict[str, float], title: str) -> None:
    """Print metrics as a table, with four digits."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", title=title)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
