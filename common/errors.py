"""Failures that a person can act on: they end a program with one line on stderr and status 1, never a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from common.config import ConfigError
from common.processes import JOINED, leave
from common.remedies import remedy
from common.terminal import accept_any_letter, imports_are_done, reader_gone

P = ParamSpec("P")


class ProjectError(RuntimeError):
    """Something outside the code is wrong (a file, a disk, a dataset, a diverged run); the message says what to do."""


def exits_cleanly(function: Callable[P, None]) -> Callable[P, None]:
    """Wrap a program's main function: `ProjectError` becomes `error: ...` and exit status 1, `ConfigError` the same
    with 2. So does whatever else goes wrong, with a hint how to see where: `--debug` lets every error through.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        status = 0
        try:
            one_line(*args, **kwargs)
        except SystemExit as stop:
            if isinstance(stop.code, str) or not last_act():
                raise
            status = stop.code or 0
        if last_act():
            leave(status)

    def last_act() -> bool:  # not where somebody else has called, who goes on
        return JOINED.is_set() and function.__module__ == "__main__"

    def one_line(*args: P.args, **kwargs: P.kwargs) -> None:
        imports_are_done()
        accept_any_letter()
        if "--debug" in sys.argv:
            function(*args, **kwargs)
            return
        try:
            function(*args, **kwargs)
            if sys.stdout:
                sys.stdout.flush()
        except (ProjectError, ConfigError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and reader_gone():
                sys.exit(1)  # results are printed last, when their files are whole
            hint = remedy(error, args)
            print(f"error: {hint}{first_line(error)} (--debug shows the traceback)", file=sys.stderr)
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)

    return wrapped


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' if lines else ''}{lines[0][:300] if lines else ''}"
