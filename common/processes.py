"""One of the several processes of a run: how it ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

JOINED = threading.Event()  # set once this process is one of several


def leave(status: int) -> NoReturn:
    """End this process as an interpreter's end would, without taking the interpreter apart.

    A thread that asks for Python's lock while the interpreter is being taken apart is ended there and then, and from
    within C++ that means `terminate called without an active exception`: SIGABRT, from a process whose work was done.
    Gloo's threads do that. They let go of the tensors of a finished collective after they have said that it is
    finished, and on a busy machine so long after it that the program has come to its end. (`destroy_process_group` does
    not wait for them: a DistributedDataParallel keeps the group, and its threads, alive.)
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):  # nobody reads it any more; Python's own status for that
                status = status or 120
    os._exit(status)
