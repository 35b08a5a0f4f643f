"""The processes of a sweep: some at a time, stopped together, and never two sweeps in one folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from common.errors import ProjectError
from common.signals import end_with_parent


@dataclass
class Job:
    """Commands of one seed, run one after the other.

    Attributes:
        commands: (name of the log file, arguments of the interpreter).
        process: the one at work.
    """

    seed: int
    folder: Path
    commands: list[tuple[str, list[str]]]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start_next(self, lock: int) -> bool:
        """Start the next command; false if there is none. Its process holds the sweep's lock while it lives."""
        if not self.commands:
            return False
        name, words = self.commands.pop(0)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C goes to the sweep alone, which passes it on
                preexec_fn=end_with_parent,  # noqa: PLW1509 (one thread)
            )
        return True

    def stop(self) -> None:
        """Ask the process to save and leave. Asked a second time, it leaves at once."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


class StopRequests:
    """Stop signals that have arrived, for a loop to read."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def run_jobs(jobs: list[Job], at_a_time: int, lock: int) -> int:
    """Run them all; returns the stop signal that ended it, 0 if none.

    A signal is passed on to every process once, so that each saves; a second one is passed on again, and they leave at
    once. `ProjectError` if a command fails, after the others have saved.
    """
    requests = StopRequests()
    waiting = list(jobs)
    running: list[Job] = []
    passed_on = 0
    while waiting or running:
        if len(requests.received) > passed_on:
            passed_on += 1
            waiting.clear()
            for job in running:
                job.stop()
        while waiting and len(running) < at_a_time:
            job = waiting.pop(0)
            job.start_next(lock)
            running.append(job)
        time.sleep(0.2)
        for job in [job for job in running if job.process and job.process.poll() is not None]:
            running.remove(job)
            status = job.process.returncode if job.process else 0
            if passed_on:
                continue
            if status:
                end_all(running)
                raise ProjectError(f"seed {job.seed} failed with exit status {status}; see {job.folder}/*.log")
            if job.start_next(lock):
                running.append(job)
            else:
                print(f"seed {job.seed} is done", file=sys.stderr, flush=True)
    return requests.received[0] if requests.received else 0


def end_all(jobs: list[Job]) -> None:
    """Stop them, and wait until each has saved."""
    for job in jobs:
        job.stop()
    for job in jobs:
        if job.process:
            job.process.wait()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock on the folder, for as long as one of the processes that were given it lives."""
    descriptor = lock_folder(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> int:
    """A lock on the folder, as a file descriptor; it ends with the last process that holds it. `ProjectError` where
    somebody has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".sweep.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ProjectError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ProjectError(
            f"{folder} is in use by another sweep, or by a run that one left behind and that is saving; "
            "wait for it, or choose another --folder"
        ) from None
    except OSError as error:
        print(f"note: {folder} cannot be locked ({error.strerror}): start no second sweep there", file=sys.stderr)
    return descriptor
