"""One owner a run folder: a lock that the operating system lets go when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from common.errors import ProjectError

NAME = ".lock"
BUSY = (errno.EACCES, errno.EAGAIN)


class FolderLock:
    """The right to write into a folder, held from here to `release` or to the end of this process.

    It is a POSIX record lock on a file in the folder: forked workers do not inherit it, and it holds between machines
    on a network file system that has locks. Where there are none, `say` is told so and nothing is held. Readers do not
    ask. `ProjectError` names the owner when there is one.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ProjectError(f"cannot write to {folder}: {error.strerror}") from error
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
            os.close(self.descriptor)
            self.descriptor = -1
            if error.errno in BUSY:
                raise ProjectError(
                    f"{folder} is in use by {owner or 'another process'}; wait, or choose run_dir=..."
                ) from None
            say(f"note: {folder} cannot be locked ({error.strerror}); see to it that nobody else writes there")
            return
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; the file stays, for deleting it would let two processes lock two files of one name."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
