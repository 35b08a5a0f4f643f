"""A clean exit on SIGTERM and SIGINT: the first one asks the loop to stop, a second one leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Raised between two steps of a long computation after a stop signal arrived."""


class StopSignals:
    """Remembers a stop signal for the loop to read; nothing is interrupted in the middle of a step.

    Attributes:
        received: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)  # no clean-up: the person asked twice
        self.received = signal.Signals(number).name
        os.write(2, f"\n{self.received}: finishing this step (send it again to leave at once)\n".encode())

    @property
    def exit_code(self) -> int:
        """128 + signal number, as a shell reports a process ended by that signal."""
        return 128 + signal.Signals[self.received].value if self.received else 0


def stoppable(signals: StopSignals, items: Iterable[T]) -> Iterator[T]:
    """Iterate until a stop signal arrives; then raise `Stopped`."""
    for item in items:
        if signals.received:
            raise Stopped
        yield item
