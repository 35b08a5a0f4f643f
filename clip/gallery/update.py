"""The store follows the folder: what is new, what has changed, what is gone."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clip.gallery.store import Entry, Stamp, Store
from clip.model.images import Preprocess
from common.images.folder import EXHAUSTED
from common.images.listing import walk
from common.images.reading import SUFFIXES, decode_image
from common.logging import Display

BATCH = 64  # images embedded, and committed, at once
# what Pillow's readers raise on damaged files, beside what they are documented to
FAULTS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)


@dataclass
class Report:
    """What an update found, in files."""

    new: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    embedded: int = 0  # contents that were not known
    broken: list[tuple[Path, str]] = field(default_factory=list)  # path, why

    @property
    def usable(self) -> int:
        return self.new + self.changed + self.unchanged


class Read(NamedTuple):
    """A file after it was looked at."""

    path: Path
    stamp: Stamp
    digest: bytes
    pixels: Tensor | None  # uint8 (3, S, S); None where the content is known
    fault: str  # why it is no image, or empty


def update(
    store: Store,
    folder: Path,
    embed: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    workers: int,
    display: Display,
    verify: bool = False,
    skip: Collection[Path] = (),
) -> Report:
    """Bring the store up to the folder, `BATCH` images at a time.

    A file of known size and time of change is taken to be unchanged. Of any other the content is read: only one that
    was never seen is embedded. Files that cannot be used are counted, listed, forgotten, and tried again the next time.

    Args:
        embed: uint8 (B, 3, S, S) -> float32 (B, E).
        workers: threads that read and decode.
        verify: read all files, as if none could be trusted to tell that it has changed.
        skip: files of the folder that are no images of the person's, such as our own contact sheet.
    """
    files = {below(path, folder): path for path in walk(folder) if path.suffix.lower() in SUFFIXES and path not in skip}
    known = store.stamps()
    digests = store.digests()
    report = Report()
    suspects = {}
    for key, path in files.items():
        stamp = stamp_of(path)
        if verify or stamp is None or known.get(key) != stamp:
            suspects[key] = path
        else:
            report.unchanged += 1
    batch: list[Read] = []
    contents = set(digests.values())
    reads = read_all(list(suspects.values()), preprocess, contents, workers)
    for read in display.track(reads, len(suspects), "images"):
        key = below(read.path, folder)
        if read.fault:
            report.broken.append((read.path, read.fault))
            files.pop(key)
            continue
        if key not in known:
            report.new += 1
        elif digests[key] == read.digest:
            report.unchanged += 1  # touched, not changed
        else:
            report.changed += 1
        batch.append(read)
        if len(batch) == BATCH:
            report.embedded += keep(store, folder, batch, embed, contents)
            batch = []
    report.embedded += keep(store, folder, batch, embed, contents)
    gone = [key for key in known if key not in files]
    report.removed = len(gone) - sum(below(path, folder) in known for path, _ in report.broken)
    store.drop(gone)
    return report


def keep(store: Store, folder: Path, batch: list[Read], embed: Callable[[Tensor], Tensor], contents: set[bytes]) -> int:
    """Embed the new contents of a batch and commit it; how many there were. `contents` grows by them."""
    fresh = {read.digest: read.pixels for read in batch if read.pixels is not None and read.digest not in contents}
    vectors = {}
    if fresh:
        pixels = torch.stack([p for p in fresh.values() if p is not None])  # (B, 3, S, S)
        vectors = dict(zip(fresh, embed(pixels).numpy(), strict=True))
    store.put([Entry(below(r.path, folder), r.stamp, r.digest, vectors.get(r.digest)) for r in batch])
    contents.update(fresh)
    return len(fresh)


def below(path: Path, folder: Path) -> bytes:
    """The path below the folder, as the file system has it."""
    return os.fsencode(path.relative_to(folder))


def stamp_of(path: Path) -> Stamp | None:
    """Size and time of the last change; None for a file that is not there or not ours to see."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns)


def read_all(paths: list[Path], preprocess: Preprocess, contents: set[bytes], workers: int) -> Iterator[Read]:
    """Read and decode in threads (Pillow lets go of Python's lock), at most three batches ahead of what is asked
    for.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        ahead: deque[Future[Read]] = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(read_file, path, preprocess, contents))
                if len(ahead) > 3 * BATCH:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def read_file(path: Path, preprocess: Preprocess, contents: set[bytes]) -> Read:
    """One file: its content's hash, and where that is new its pixels."""
    stamp, digest = Stamp(0, 0), b""
    try:
        # before the content is read: a file that changes in between is read again the next time
        status = path.stat()
        stamp = Stamp(status.st_size, status.st_mtime_ns)
        if stamp.size == 0:
            raise ValueError("empty file")
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        pixels = None if digest in contents else decode(data, preprocess)
    except (*FAULTS, Image.DecompressionBombError) as error:
        if getattr(error, "errno", None) in EXHAUSTED:  # the machine's fault, not the file's
            raise
        return Read(path, stamp, digest, None, why(error))
    return Read(path, stamp, digest, pixels, "")


def decode(data: bytes, preprocess: Preprocess) -> Tensor:
    """The bytes of an image file -> uint8 (3, S, S)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of images that are merely large
        return preprocess(decode_image(io.BytesIO(data)))


def why(error: BaseException) -> str:
    """A reason without addresses of Python objects."""
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image"
    if isinstance(error, OSError) and error.errno:
        return errno.errorcode.get(error.errno, "") + " " + os.strerror(error.errno)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
