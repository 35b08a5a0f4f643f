"""Batches of images and captions: drawn or decoded and tokenised by worker processes, ready when the model is.

An image that cannot be used is named once, and the next one takes its place; above one percent of such images the run
stops, because by then something is wrong with the folder and not with a file.

Legend: B images of this process, K captions of each, T tokens of the longest, S pixels of a side.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip.data.pairs import NO_CROP, Crop, Pairs
from clip.model.images import Preprocess
from clip.model.tokenizer import Tokenizer, trim
from common.errors import ProjectError
from common.images.folder import EXHAUSTED, FORGIVEN, MOST_BAD, alive
from common.images.memory import batch_indices

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else the library warns of every worker process


class Batch(NamedTuple):
    """What a step reads. Texts of an image carry its number, so that none of them counts as a mistake."""

    images: Tensor  # uint8 (B, 3, S, S), or features of a locked tower
    ids: Tensor  # int64 (B K, T), or features
    image_ids: Tensor  # int64 (B,)
    text_ids: Tensor  # int64 (B K,)


class Order(NamedTuple):
    """Which images a step takes, and in which epoch of theirs: numbers of this process's share of the batch."""

    numbers: list[int]
    epochs: list[int]


def order_of(step: int, batch_size: int, size: int, seed: int, rank: int = 0, world: int = 1, family: int = 1) -> Order:
    """A function of (seed, step): positions (step - 1) batch_size ... of an endless row of shuffled epochs. With
    `family`, so many neighbours stay together.
    """
    first = batch_indices(step, batch_size // family, size // family, seed)
    index = (first[:, None] * family + torch.arange(family)).flatten().tolist()
    epoch = [((step - 1) * batch_size + i) // size for i in range(batch_size)]
    share = batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    return Order(index[mine], epoch[mine])


class _Worker(Dataset[Any]):
    """(index, epoch) -> one image with its captions, made in whichever process asks."""

    def __init__(
        self, pairs: Pairs, tokenizer: Tokenizer, preprocess: Preprocess, crop: Crop, captions: int, seed: int
    ) -> None:
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.crop = crop
        self.num_captions = captions
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int, list[tuple[int, str]]]:
        """Pixels uint8 (3, S, S), ids int64 (K, context), the number of the image, and what was wrong with others."""
        first, epoch = item
        faults: list[tuple[int, str]] = []
        for step in range(len(self.pairs)):
            index = (first + step) % len(self.pairs)
            try:
                pixels = self.pairs.pixels(index, self.preprocess, self.crop, epoch, self.seed)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if getattr(error, "errno", None) in EXHAUSTED:
                    raise
                faults.append((index, reason_of(error)))
                if len(faults) > max(MOST_BAD * len(self.pairs), FORGIVEN):
                    break
                continue
            texts = self.pairs.draw_captions(index, epoch, self.num_captions, self.seed)
            return pixels, self.tokenizer(texts).numpy(), index, faults
        size = self.preprocess.size
        empty = np.zeros((self.num_captions, self.tokenizer.context), np.int64)
        empty[:, 0] = self.tokenizer.end_id
        return np.zeros((3, size, size), np.uint8), empty, first, faults


def reason_of(error: Exception) -> str:
    """In a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image"
    return str(error).split("\n")[0] or type(error).__name__


class BadImages:
    """Counts the images that could not be used; `ProjectError` when they are too many."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.bad: set[int] = set()

    def note(self, faults: list[tuple[int, str]]) -> None:
        """Name each once."""
        for index, why in faults:
            if index not in self.bad:
                self.bad.add(index)
                print(f"skipping {self.pairs.image_name(index)}: {why}", file=sys.stderr, flush=True)
        if len(self.bad) > max(MOST_BAD * len(self.pairs), FORGIVEN):
            raise ProjectError(
                f"{len(self.bad)} of {len(self.pairs)} files are not usable images, more than {MOST_BAD:.0%}; remove "
                "them or choose another folder"
            )


def batches(
    pairs: Pairs,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    *,
    first_step: int,
    batch_size: int,
    seed: int,
    captions: int = 1,
    crop: Crop = NO_CROP,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    family: int = 1,
    whole_context: bool = False,
) -> Iterator[Batch]:
    """Endless batches on the CPU from step `first_step` on.

    Args:
        batch_size: images over all processes.
        whole_context: keep the padding of texts (for pool="last").
    """

    def order() -> Iterator[list[tuple[int, int]]]:
        step = first_step
        while True:
            chosen = order_of(step, batch_size, len(pairs), seed, rank, world, family)
            yield list(zip(chosen.numbers, chosen.epochs, strict=True))
            step += 1

    worker = _Worker(pairs, tokenizer, preprocess, crop, captions, seed)
    bad = BadImages(pairs)
    for pixels, ids, index, faults in load(worker, order(), workers):
        bad.note(faults)
        numbers = torch.from_numpy(index)
        tokens = torch.from_numpy(ids).flatten(0, 1)  # (B, K, context) -> (B K, context)
        tokens = tokens if whole_context else trim(tokens, tokenizer.end_id)
        yield Batch(torch.from_numpy(pixels), tokens, numbers, numbers.repeat_interleave(captions))


def in_order(
    pairs: Pairs, preprocess: Preprocess, batch_size: int, workers: int, crop: Crop = NO_CROP, epoch: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every usable image once: uint8 (n, 3, S, S), and which they are, int64 (n,)."""
    worker = _Pixels(pairs, preprocess, crop, epoch)
    chunks = ([(i, 0) for i in range(s, min(s + batch_size, len(pairs)))] for s in range(0, len(pairs), batch_size))
    bad = BadImages(pairs)
    for pixels, _, index, faults in load(worker, chunks, workers):
        bad.note(faults)
        usable = torch.from_numpy(index) >= 0
        yield torch.from_numpy(pixels)[usable], torch.from_numpy(index)[usable]


class _Pixels(Dataset[Any]):
    """As `_Worker`, one image without captions; a bad one has the number -1 and no stand-in."""

    def __init__(self, pairs: Pairs, preprocess: Preprocess, crop: Crop, epoch: int) -> None:
        self.pairs = pairs
        self.preprocess = preprocess
        self.crop = crop
        self.epoch = epoch

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int, list[tuple[int, str]]]:
        index = item[0]
        try:
            pixels = self.pairs.pixels(index, self.preprocess, self.crop, self.epoch, 0)
            return pixels, np.empty(0), index, []
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if getattr(error, "errno", None) in EXHAUSTED:
                raise
            size = self.preprocess.size
            return np.zeros((3, size, size), np.uint8), np.empty(0), -1, [(index, reason_of(error))]


def load(dataset: Dataset[Any], order: Iterator[list[tuple[int, int]]], workers: int) -> Iterator[Any]:
    """Batches of arrays in the order asked for. Arrays go through a pipe: see `common.images.folder`."""
    apart = torch.Generator()  # DataLoader draws a seed for its workers; from the global generator that shifts dropout
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=order,  # of pairs of numbers instead of numbers
        num_workers=workers,
        collate_fn=_collate,
        generator=apart,
        worker_init_fn=_prepare_worker if workers else None,
    )
    yield from alive(loader)


def _collate(items: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, str]]]:
    pixels, ids, index, faults = zip(*items, strict=True)
    return np.stack(pixels), np.stack(ids), np.array(index), [fault for each in faults for fault in each]


def _prepare_worker(number: int) -> None:
    """One thread, and stop signals are the main process's to handle; `end_workers` ends the workers."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
