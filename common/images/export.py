"""Images and codes as files: PNG, and npz archives that are written row by row; and many of them in shards.

A folder that is written to is claimed first: its `manifest.json` says by which weights and settings its files are made,
and nothing is ever written beside files of others.

Legend: N rows, C channels, H = W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from common.errors import ProjectError
from common.files import TEMPORARY, atomic_open, read_json, sha256, write_json
from common.lock import NAME as LOCK
from common.lock import FolderLock

MANIFEST = "manifest.json"


@contextlib.contextmanager
def claimed(folder: Path, key: dict[str, Any], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The manifest of a folder that is ours to write to: a new one, or one begun with an equal `key`, which has "key"
    and whatever was added then.

    Raises:
        ProjectError: something else is in it, or it is of another key; nothing was changed. Or somebody else writes
            there now.
    """
    if folder.exists() and not folder.is_dir():
        raise ProjectError(f"{folder} is not a folder; choose another --out")
    known = (folder / MANIFEST).is_file()
    if folder.exists() and not known and any(not is_passing(path) for path in folder.iterdir()):
        raise ProjectError(f"{folder} is not empty and has no {MANIFEST}; choose another --out")
    key = json.loads(json.dumps(key))  # tuples as lists, as they come back from a file
    if known and read_json(folder / MANIFEST).get("key") != key:
        raise ProjectError(f"{folder} is of other weights or settings; delete it or choose another --out")
    lock = FolderLock(folder, say)
    try:
        for path in folder.glob(f"{TEMPORARY}*"):  # what an interruption left half written
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        manifest = {**read_json(folder / MANIFEST), "key": key}
        write_json(folder / MANIFEST, manifest)  # before anything else: the folder is known as ours from here on
        yield manifest
    finally:
        lock.release()


def is_passing(path: Path) -> bool:
    """Whether a file is a lock or half written, and so nobody's work."""
    return path.name == LOCK or path.name.startswith(TEMPORARY)


def save_png(image: Tensor, path: Path) -> None:
    """One image uint8 (1 or 3, H, W), whole or not at all.

    Not flushed to the disk, which for many small files would take longer than drawing them. `ProjectError` for a full
    disk or a read-only folder.
    """
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)  # (H, W) or (C, H, W) -> (H, W, C)
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise ProjectError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class NpzWriter:
    """Arrays that grow by rows on the disk and end in one archive; see `npz_writer`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}  # name -> rows, shape of one, type
        self.whole: dict[str, np.ndarray] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Append rows (n, ...) to an array; all of its rows have one shape and type."""
        count, shape, kind = self.rows.get(name, (0, values.shape[1:], values.dtype))
        assert (shape, kind) == (values.shape[1:], values.dtype)
        with (self.folder / name).open("ab") as file:
            file.write(np.ascontiguousarray(values).tobytes())
        self.rows[name] = (count + len(values), shape, kind)

    def put(self, name: str, values: np.ndarray) -> None:
        """A whole array, of any kind but objects."""
        self.whole[name] = values

    def finish(self, path: Path) -> None:
        """Write the archive, atomically."""
        with atomic_open(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name, (count, shape, kind) in self.rows.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    about = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
                    np.lib.format.write_array_header_2_0(member, about | {"shape": (count, *shape)})
                    with (self.folder / name).open("rb") as rows:
                        shutil.copyfileobj(rows, member)
            for name, values in self.whole.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)


@contextlib.contextmanager
def npz_writer(path: Path) -> Iterator[NpzWriter]:
    """An archive that takes the place of `path` at the end of the block, and of which an interrupted block leaves
    nothing. In memory there is never more than what is added at once. `ProjectError` for a full disk or a read-only
    folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
            writer = NpzWriter(Path(folder))
            yield writer
            writer.finish(path)
    except OSError as error:
        raise ProjectError(f"cannot write {path}: {error.strerror or error}") from error


def to_rows(images: Tensor) -> np.ndarray:
    """uint8 (N, C, H, W) on any device -> (N, H, W, C), the order in which others keep images."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


class Shards:
    """Images that a folder holds in files of `shard` images each, or as PNGs of which so many are finished together.

    A shard counts as finished only once its files are in place and the manifest holds their hash.

    Args:
        manifest: what `claimed` gave; it is written anew after each shard.
        count: images in all.
        form: npz or png.

    Attributes:
        total: number of shards.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], count: int, shard: int, form: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.count = count
        self.shard = shard
        self.form = form
        self.total = -(-count // shard)
        self.finished: dict[str, Any] = manifest.setdefault("shards", {})

    def size(self, number: int) -> int:
        """Images of a shard."""
        return min(self.shard, self.count - number * self.shard)

    def missing(self) -> list[int]:
        """The shards that are not finished, or are no longer as they were written."""
        return [number for number in range(self.total) if not self.has(number)]

    def has(self, number: int) -> bool:
        """Whether a shard is finished, long enough, and as it was written."""
        entry = self.finished.get(str(number), {})
        count = entry.get("count", 0)
        return count >= self.size(number) and digest(self.paths(number, count)) == entry.get("sha256")

    def paths(self, number: int, count: int) -> list[Path]:
        """The files of a shard's first `count` images."""
        if self.form == "npz":
            return [self.folder / f"images-{number:05d}.npz"]
        first = number * self.shard
        return [self.folder / f"{i:08d}.png" for i in range(first, first + count)]

    def write(self, number: int, images: Tensor, labels: Tensor | None = None) -> None:
        """Files, then their hash. uint8 (at least `size`, C, H, W); labels (at least `size`,) go into an npz."""
        count = self.size(number)
        paths = self.paths(number, count)
        if self.form == "npz":
            with npz_writer(paths[0]) as archive:
                archive.add("images", to_rows(images[:count]))
                if labels is not None:
                    archive.add("labels", labels[:count].cpu().numpy())
        else:
            for image, path in zip(images, paths, strict=False):
                save_png(image, path)
        self.finished[str(number)] = {"count": count, "sha256": digest(paths)}
        write_json(self.folder / MANIFEST, self.manifest)


def digest(paths: list[Path]) -> str:
    """SHA-256 over the hashes of files; empty where one is missing."""
    total = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            return ""
        total.update(sha256(path).encode())
    return total.hexdigest()
