"""A clean exit on SIGTERM, SIGINT and SIGHUP: the first one asks the loop to stop, a second one leaves at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
SET_PARENT_DEATH_SIGNAL = 1  # Linux's prctl(2)
SAME_REQUEST = 0.5  # seconds: a shell, a parent and a cluster may each pass on one and the same wish to stop


class Stopped(Exception):
    """Raised between two steps of a long computation after a stop signal arrived."""


class StopSignals:
    """Remembers a stop signal for the loop to read; nothing is interrupted in the middle of a step.

    Attributes:
        received: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # the last is sent where a connection drops; Windows has none
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._when > SAME_REQUEST:
                os._exit(128 + number)  # no clean-up: the person asked twice
            return
        self.received = signal.Signals(number).name
        self._when = time.monotonic()
        with contextlib.suppress(
            OSError
        ):  # whoever read our messages may be gone: `2>&1 | tee` dies of the same Ctrl-C
            os.write(2, f"\n{self.received}: finishing this step (send it again to leave at once)\n".encode())

    @property
    def exit_code(self) -> int:
        """128 + signal number, as a shell reports a process ended by that signal."""
        return 128 + signal.Signals[self.received].value if self.received else 0


def end_with_parent() -> None:
    """From now on, where the process that started this one dies, even by kill -9, Linux sends this one SIGTERM; it
    saves and leaves, for nobody would ever stop it. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def stoppable(signals: StopSignals, items: Iterable[T]) -> Iterator[T]:
    """Iterate until a stop signal arrives; then raise `Stopped`."""
    for item in items:
        if signals.received:
            raise Stopped
        yield item
