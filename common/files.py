"""Files that are either complete or absent."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import ProjectError

TEMPORARY = ".tmp-"  # prefix of unfinished files


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` only once all of it is on the disk.

    The bytes go to a temporary file in the same folder, then fsync, then `os.replace`, then fsync of the folder. After
    a crash at any moment `path` holds either its old content or its new one. `ProjectError` for a full disk or a
    read-only folder.
    """
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise ProjectError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_open(path) as file:
        file.write(text.encode())


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib to `path` as PNG, atomically."""
    with atomic_open(path) as file:
        figure.savefig(file, format="png")


def place_of(name: str, root: Path | str) -> Path:
    """A person's own file or folder: as it stands where it is absolute or begins with ~; else in `root`; or, where
    nothing of that name is there, seen from the folder that the program was started in. What is in neither place is
    said to be missing in `root`.
    """
    path = Path(name).expanduser()
    inside = Path(root) / path
    return path if name and path.exists() and not inside.exists() else inside


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where that is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that fit a pattern, sorted by name; none that are hidden, as unfinished ones are."""
    return sorted(path for path in folder.glob(pattern) if path.name[0] != "." and path.is_file())


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries (a rename, a deletion) on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as comma-separated values under one header, whole or not at all; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n", restval=""
    )
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
