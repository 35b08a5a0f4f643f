"""Datasets too large for memory: image files on disk, decoded by worker processes.

A file that cannot be used is named once and another image of its batch takes its place; above one percent of such files
the run stops, because by then something is wrong with the folder and not with a file.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import ProjectError
from common.images.memory import MemoryImages, batch_indices

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SMALLEST = 4  # pixels: an image with a shorter side says nothing at any size that we train at
MOST_BAD = 0.01


class FolderImages:
    """RGB images from files; sub-folders of the top folder are the classes, if there are at least two."""

    def __init__(
        self,
        name: str,
        files: list[Path],
        labels: Tensor | None,
        classes: tuple[str, ...],
        size: int,
        workers: int,
        crop: int,
    ) -> None:
        self.name, self.files, self.labels, self.class_names = name, files, labels, classes
        self.shape, self.workers, self.crop = (3, size, size), workers, crop
        self.bad: set[int] = set()

    @classmethod
    def open(cls, name: str, folder: Path, files: list[Path], size: int, workers: int, crop: int = 0) -> FolderImages:
        """Args: crop: side of the centre square taken before resizing; 0 = the shorter side."""
        tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
        classes = tuple(sorted(set(tops) - {""}))
        labels = torch.tensor([classes.index(top) for top in tops]) if len(classes) > 1 and "" not in tops else None
        data = cls(name, files, labels, classes if labels is not None else (), size, workers, crop)
        for i, path in enumerate(files):
            if path.suffix.lower() not in SUFFIXES:
                data.reject(i, "not an image file")
        return data

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

        yield from self._decode(order(), device)

    def head(self, count: int) -> MemoryImages:
        """The first `count` images (0 = all) decoded into memory, bad ones replaced by their neighbours."""
        end = min(count or len(self), len(self))
        chunks = [list(range(i, min(i + 256, end))) for i in range(0, end, 256)]
        parts = list(self._decode(iter(chunks), torch.device("cpu")))
        labels = None if self.labels is None else torch.cat([label for _, label in parts])  # type: ignore[misc]
        return MemoryImages(self.name, torch.cat([images for images, _ in parts]), labels, self.class_names)

    def reject(self, index: int, why: str) -> None:
        """Note a bad file, once; `ProjectError` when there are too many."""
        if index in self.bad:
            return
        self.bad.add(index)
        print(f"skipping {self.files[index]}: {why}", file=sys.stderr, flush=True)
        if len(self.bad) > MOST_BAD * len(self.files):
            raise ProjectError(
                f"{len(self.bad)} of {len(self.files)} files are not usable images, more than {MOST_BAD:.0%}; "
                "remove them or choose another folder"
            )

    def _decode(self, order: Iterator[list[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        decoder = _Decoder(self.files, self.shape[1], self.crop)
        # DataLoader draws a seed for its workers; from the global generator that would shift dropout
        apart = torch.Generator()
        loader = DataLoader(
            decoder,
            batch_sampler=order,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=apart,
            worker_init_fn=_ignore_signals if self.workers else None,
        )
        for images, index, faults in loader:
            good = [i for i, fault in enumerate(faults) if not fault]
            for i, fault in enumerate(faults):
                if fault:
                    self.reject(int(index[i]), fault)
                    if not good:
                        raise ProjectError(
                            f"a whole batch of unusable images, the first is {self.files[int(index[0])]}"
                        )
                    # the next good one: the same with any number of workers
                    other = min(good, key=lambda g: (g - i) % len(faults))
                    images[i], index[i] = images[other], index[other]
            yield images.to(device, non_blocking=True), None if self.labels is None else self.labels[index].to(device)


class _Decoder(Dataset[tuple[np.ndarray, int, str]]):
    def __init__(self, files: list[Path], size: int, crop: int) -> None:
        self.files, self.size, self.crop = files, size, crop

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, str]:
        try:
            return read_image(self.files[index], self.size, self.crop), index, ""
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            reason = "not a readable image" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
            return np.zeros((3, self.size, self.size), np.uint8), index, reason or type(error).__name__


def read_image(path: Path, size: int, crop: int = 0) -> np.ndarray:
    """Decode, centre-crop to a square, resize: uint8 (3, size, size). Raises `OSError` or `ValueError` for a bad
    file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError("not an image file")
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(crop or min(image.size), *image.size)
    if side < SMALLEST:
        raise ValueError(f"only {image.size[0]}x{image.size[1]} pixels")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (size, size),
        Image.Resampling.BOX if side >= 2 * size else Image.Resampling.BILINEAR,
        box=(left, top, left + side, top + side),
        reducing_gap=None,
    )
    return np.asarray(image).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def list_images(folder: Path, key: str, otherwise: str = "") -> list[Path]:
    """Every file below a folder but hidden ones, sorted by path.

    Args:
        key: the setting that names the folder, for messages.
        otherwise: what a person can do instead, for the message that there is no such folder.
    """
    if not folder.is_dir():
        raise ProjectError(
            f"{key}: {folder} is not a folder; put the images there{f', or {otherwise}' if otherwise else ''}"
        )
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not files:
        raise ProjectError(f"{key}: {folder} has no files")
    return files


def _collate(items: list[tuple[np.ndarray, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    images, index, faults = zip(*items, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(index), list(faults)


def _ignore_signals(worker: int) -> None:
    """A stop signal sent to the whole process group is the main process's to handle; its workers end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
