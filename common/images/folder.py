"""Datasets too large for memory: image files on disk, decoded by worker processes.

A file that cannot be used is named once and another image of its batch takes its place; above one percent of such files
the run stops, because by then something is wrong with the folder and not with a file.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import ProjectError
from common.images.listing import Listing
from common.images.memory import MemoryImages, batch_indices, draw_indices
from common.images.reading import read_image

MOST_BAD = 0.01
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the file's
SECONDS_TO_DIE = 5.0  # for a process that has been killed
FORGIVEN = 3  # bad files that never stop a run: one percent of a small folder is less than a file


class FolderImages:
    """Images from files.

    Args:
        name: of the dataset, for metrics.
        listing: files and classes.
        size: pixels a side that they are brought to.
        workers: processes that decode; 0 = this one.
        crop: side of the centre square taken before resizing; 0 = the shorter side.
        grey: one channel instead of three.
        patience: seconds that the processes may take for a batch before the run ends; 0 = wait for ever.
    """

    def __init__(
        self,
        name: str,
        listing: Listing,
        size: int,
        workers: int,
        crop: int = 0,
        grey: bool = False,
        patience: int = 0,
    ) -> None:
        self.name = name
        self.files = listing.files
        self.labels = None if listing.labels is None else torch.tensor(listing.labels)
        self.class_names = listing.classes
        self.shape = (1 if grey else 3, size, size)
        self.workers = workers
        self.crop = crop
        self.patience = patience
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, first_step: int, batch_size: int, seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless batches from step `first_step` on: uint8 (B, 3, H, W) and int64 (B,) or None, on `device`."""

        def order() -> Iterator[list[int]]:
            step = first_step
            while True:
                yield batch_indices(step, batch_size, len(self), seed).tolist()
                step += 1

        for images, index in self._decode(order(), device):
            yield images, self._labels_of(index, device)

    def in_order(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Every usable image once, in the order of `files`: uint8 (B, C, H, W) on `device`, and which it is, int64
        (B,).
        """
        chunks = [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]
        for chunk, (images, index) in zip(chunks, self._decode(iter(chunks), device), strict=True):
            usable = index == torch.tensor(chunk)  # elsewhere another image stands in
            yield images[usable.to(device)], index[usable]

    def draw(self, count: int, seed: int = 0) -> MemoryImages:
        """`count` images drawn by seed (0 = all, in order) and decoded into memory, bad ones replaced by others."""
        chosen = draw_indices(len(self), count, seed).tolist()
        chunks = [chosen[i : i + 256] for i in range(0, len(chosen), 256)]
        parts = list(self._decode(iter(chunks), torch.device("cpu")))
        labels = self._labels_of(torch.cat([index for _, index in parts]), torch.device("cpu"))
        return MemoryImages(self.name, torch.cat([images for images, _ in parts]), labels, self.class_names)

    def reject(self, index: int, why: str) -> None:
        """Note a bad file, once; `ProjectError` when there are too many."""
        if index in self.bad:
            return
        self.bad.add(index)
        print(f"skipping {self.files[index]}: {why}", file=sys.stderr, flush=True)
        if len(self.bad) > max(MOST_BAD * len(self.files), FORGIVEN):
            raise ProjectError(
                f"{len(self.bad)} of {len(self.files)} files are not usable images, more than {MOST_BAD:.0%}; "
                "remove them or choose another folder"
            )

    def _labels_of(self, index: Tensor, device: torch.device) -> Tensor | None:
        return None if self.labels is None else self.labels[index].to(device)

    def _decode(self, order: Iterator[list[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, and which they are in the end, for each list of numbers."""
        decoder = _Decoder(self.files, self.shape[1], self.crop, self.shape[0] == 1)
        # DataLoader draws a seed for its workers; from the global generator that would shift dropout
        apart = torch.Generator()
        loader = DataLoader(
            decoder,
            batch_sampler=order,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=apart,
            worker_init_fn=_ignore_signals if self.workers else None,
            timeout=self.patience if self.workers else 0,
        )
        for arrays, numbers, faults in alive(loader):
            images = torch.from_numpy(arrays)
            index = torch.from_numpy(numbers)
            for i, fault in enumerate(faults):
                if fault:
                    self.reject(int(index[i]), fault)
                    images[i], index[i] = self._stand_in(decoder, int(index[i]))
            yield images.to(device), index

    def _stand_in(self, decoder: _Decoder, index: int) -> tuple[Tensor, int]:
        """The next usable image after a bad one: the same with any batch size and any number of workers."""
        for step in range(1, len(self.files)):
            image, other, fault = decoder[(index + step) % len(self.files)]
            if not fault:
                return torch.tensor(image), other
            self.reject(other, fault)
        raise ProjectError(f"no usable image among {len(self.files)} files, the first is {self.files[0]}")


def alive(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; `ProjectError` where its processes cannot be started, or one of them has died."""
    if not loader.num_workers:
        yield from loader
        return
    try:
        batches = iter(loader)
    except OSError as error:  # no handle, no process or no semaphore left
        end_workers()
        with contextlib.redirect_stderr(io.StringIO()):  # the half-made iterator complains when it is deleted: here
            error.__traceback__ = None
        raise ProjectError(
            f"cannot start {loader.num_workers} processes that decode images ({error.strerror or error}); "
            "try a smaller data.workers, 0 for none"
        ) from None
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            end_workers()  # else each is waited for
            if "timed out" in str(error):  # DataLoader's own words; a network file system that is gone never answers
                raise ProjectError(
                    f"no batch of images has come for {loader.timeout:g} seconds: the disk or network file system does "
                    "not answer; data.patience is how long to wait, 0 for ever"
                ) from None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ProjectError(
                "a process that decodes images has died: killed, or no memory or file handle left for it; try a "
                f"smaller data.workers, 0 for none ({lines[-1][:200]})"
            ) from None
        yield batch


class _Decoder(Dataset[tuple[np.ndarray, int, str]]):
    def __init__(self, files: list[Path], size: int, crop: int, grey: bool) -> None:
        self.files = files
        self.size = size
        self.crop = crop
        self.grey = grey

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, str]:
        try:
            return read_image(self.files[index], self.size, self.crop, self.grey), index, ""
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            if getattr(error, "errno", None) in EXHAUSTED:
                raise
            reason = "not a readable image" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
            return (
                np.zeros((1 if self.grey else 3, self.size, self.size), np.uint8),
                index,
                reason or type(error).__name__,
            )


def _collate(items: list[tuple[np.ndarray, int, str]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A batch in arrays, which go through a pipe. Tensors would go through /dev/shm, of which a container has 64 MB,
    and take a file handle each: where either runs out, a worker falls silent and the training waits for ever.
    """
    images, index, faults = zip(*items, strict=True)
    return np.stack(images), np.array(index), list(faults)


def _ignore_signals(worker: int) -> None:
    """A stop signal sent to the whole process group is the main process's to handle; `end_workers` ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the processes that decode, whatever ends this one.

    They ignore the polite signals, and Python would wait for them for ever at its exit after an error.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises an error for each that dies
    for process in multiprocessing.active_children():
        process.kill()


@atexit.register
def leave_who_cannot_be_killed() -> None:
    """End them, and leave without those that even a kill does not reach, for they wait for a file system that is gone:
    Python's exit would wait for them, and so for ever. Registered after multiprocessing's own handler, so it comes
    before that.
    """
    end_workers()
    limit = time.monotonic() + SECONDS_TO_DIE
    for process in multiprocessing.active_children():
        process.join(max(0.0, limit - time.monotonic()))
    if multiprocessing.active_children():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)
