"""A folder that changes from one whole state to the next, whenever its process may be killed.

index/
    current.json     which generation counts; replaced atomically, and last of all
    000003/          a generation; never changed once it counts
    .building-...    the next one, in work; what is whole in it is used again after an interruption
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import ProjectError
from common.files import read_json, sync_folder, write_json

CURRENT = "current.json"
BUILDING = ".building-"


class Generations:
    """The states of an index.

    Args:
        folder: where they are; made when the first is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def current(self) -> Path | None:
        """The folder of the generation that counts; None before the first."""
        name = read_json(self.folder / CURRENT).get("generation")
        path = self.folder / str(name)
        return path if name and path.is_dir() else None

    def facts(self) -> dict[str, Any]:
        """What was noted about the current generation."""
        return read_json(self.folder / CURRENT)

    @contextlib.contextmanager
    def next(self, key: str, facts: dict[str, Any]) -> Iterator[Path]:
        """A folder to write the next generation into. When the block ends well it becomes the current one, and the one
        before is deleted; until then, and if it does not, nothing has changed.

        Args:
            key: what the generation is made from. Where a folder of the same key was left behind by an interruption,
                that one is given, with what is in it; those of other keys are deleted.
            facts: noted in current.json; may be filled until the block ends.
        """
        building = self.folder / f"{BUILDING}{key}"
        try:
            building.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(f"{BUILDING}*"):
                if old != building:
                    shutil.rmtree(old)
        except OSError as error:
            raise ProjectError(f"cannot write to {self.folder}: {error.strerror}") from error
        yield building
        before = self.current()
        number = int(before.name) + 1 if before is not None else 1
        path = self.folder / f"{number:06d}"
        try:
            if path.exists():  # renamed by a process that was killed before it could say so
                shutil.rmtree(path)
            sync_files(building)
            os.replace(building, path)
            sync_folder(self.folder)
            write_json(self.folder / CURRENT, {**facts, "generation": path.name})
            for old in self.folder.iterdir():
                if old.name.isdecimal() and old != path:
                    shutil.rmtree(old)
        except OSError as error:
            raise ProjectError(f"cannot write to {self.folder}: {error.strerror}") from error


def sync_files(folder: Path) -> None:
    """Put every file below a folder on the disk."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where a file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
