"""Images as uint8 tensors, and the order in which a training run sees them.

Legend: N images, B batch over all processes, C channels, H = W pixels.

The images of step n are a function of (seed, n) alone: position p = (n - 1) B + i of an endless sequence of shuffled
epochs. A resumed run, or one with another number of workers or processes, sees the same images.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from common.runtime import mix_seed

T = TypeVar("T")
DRAW_STREAM = 7_000_037  # keeps the generator of subsets apart from those of epochs


class Images(Protocol):
    """What a training loop and an evaluation need of a dataset."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...  # (C, H, W)
    @property
    def class_names(self) -> tuple[str, ...]: ...  # empty for unlabelled images
    def __len__(self) -> int: ...
    def batches(
        self, first_step: int, batch_size: int, seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor | None]]: ...
    def draw(self, count: int, seed: int = 0) -> MemoryImages: ...


@dataclass
class MemoryImages:
    """A labelled dataset held as tensors.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,) or None.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    def to(self, device: torch.device) -> MemoryImages:
        """The same dataset on another device."""
        return MemoryImages(
            self.name, self.images.to(device), None if self.labels is None else self.labels.to(device), self.class_names
        )

    def draw(self, count: int, seed: int = 0) -> MemoryImages:
        """`count` images drawn by seed; 0 = all, in order. Where files are sorted, a prefix is a biased sample."""
        index = draw_indices(len(self), count, seed)
        labels = None if self.labels is None else self.labels[index.to(self.labels.device)]
        return MemoryImages(self.name, self.images[index.to(self.images.device)], labels, self.class_names)

    def batches(
        self, first_step: int, batch_size: int, seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless batches from step `first_step` on: uint8 (B, C, H, W) and int64 (B,) or None, on the dataset's
        device.
        """
        data = self.to(device)
        step = first_step
        while True:
            index = batch_indices(step, batch_size, len(self), seed).to(device)
            yield data.images[index], None if data.labels is None else data.labels[index]
            step += 1

    def pixel_std(self) -> float:
        """Standard deviation of all pixels, scaled to [-1, 1]: sigma_data of Karras et al. 2022."""
        return float(self.images.double().div(127.5).std(correction=0))

    def fingerprint(self) -> str:
        """SHA-256 over shape, pixels and labels: names caches, so that other data can never be mistaken for these."""
        digest = hashlib.sha256(f"{self.name} {tuple(self.images.shape)}".encode())
        digest.update(self.images.cpu().numpy().tobytes())
        digest.update(b"" if self.labels is None else self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()


def draw_indices(size: int, count: int, seed: int) -> Tensor:
    """`count` of `size` numbers without repetition, ascending; all of them where count is 0 or too large."""
    if not 0 < count < size:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(mix_seed(seed, DRAW_STREAM))
    return torch.randperm(size, generator=generator)[:count].sort().values


@functools.lru_cache(maxsize=4)
def _epoch(epoch: int, size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


def batch_indices(step: int, batch_size: int, size: int, seed: int) -> Tensor:
    """Which images make up the batch of a step (1, 2, ...): int64 (B,). Every image once an epoch; a batch may span
    two epochs.
    """
    position = torch.arange((step - 1) * batch_size, step * batch_size)
    epochs = torch.unique(position // size).tolist()
    return torch.cat([_epoch(e, size, seed)[position[position // size == e] % size] for e in epochs])


def started(batches: Iterator[T]) -> Iterator[T]:
    """The same batches, the first one made at once: whether they can be had is known before a run begins."""
    return itertools.chain([next(batches)], batches)


def resize(data: MemoryImages, size: int) -> MemoryImages:
    """Bilinear resize with antialiasing to (size, size); unchanged if it has that size."""
    if data.shape[1:] == (size, size):
        return data
    pixels = torch.nn.functional.interpolate(
        data.images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return MemoryImages(data.name, pixels.round().clamp(0, 255).byte(), data.labels, data.class_names)


def random_flip(x: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image of (B, C, H, W) left to right with probability one half."""
    flip = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) < 0.5  # (B, 1, 1, 1)
    return torch.where(flip, x.flip(-1), x)
