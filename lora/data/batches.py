"""Rows of tokens as the tensors of a training step.

Packed rows hold several examples. Three things keep them apart: a token sees only tokens of its own example
(block-diagonal attention), positions start again at 0 with each, and the first token of an example is never the label
of the last one of another. So a packed example gives the same logits as one alone, which a test compares.

Legend: B rows, T tokens of each, N tokens with a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from common.errors import ProjectError
from common.runtime import mix_seed
from lora.data.packing import pack
from lora.data.templates import Tokens

ROUND = 8  # rows are filled up to a multiple of it: fewer different shapes, and tensor cores like them
ORDER_STREAM = 5_000_011  # keeps the random numbers of the order apart


@dataclass(frozen=True)
class Batch:
    """Tensors of some rows.

    Attributes:
        tokens: (B, T) int64.
        positions: (B, T) int64, of each token in its own example.
        segments: (B, T) int64, which example of the row a token is of; 0 where the row is filled up. None where every
            row holds one example, filled up behind: then looking back is enough.
        where: (N,) int64, places in the flattened (B T) whose next token is a label.
        labels: (N,) int64, those tokens.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor | None
    where: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        segments = None if self.segments is None else self.segments.to(device, non_blocking=True)
        others = (self.tokens, self.positions, self.where, self.labels)
        tokens, positions, where, labels = (tensor.to(device, non_blocking=True) for tensor in others)
        return Batch(tokens, positions, segments, where, labels)


def collate(rows: Sequence[Sequence[Tokens]], length: int = 0) -> Batch:
    """Rows of examples as tensors.

    The labels are known by place, never by token: whatever a tokenizer fills up with, even its end-of-sequence token,
    an answer's own last token stays a label.

    Args:
        length: T; 0 = as long as the longest row, rounded up.
    """
    longest = max(sum(map(len, row)) for row in rows)
    length = length or -(longest // -ROUND) * ROUND
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    segments = torch.zeros_like(tokens)
    where: list[int] = []
    labels: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            ids = [*example.prompt, *example.answer]
            end = start + len(ids)
            tokens[r, start:end] = torch.tensor(ids)
            positions[r, start:end] = torch.arange(len(ids))
            segments[r, start:end] = number
            first = r * length + start + len(example.prompt) - 1  # whose next token is the answer's first
            # an empty prompt leaves the answer's first token without anything to be told from
            skipped = 0 if example.prompt else 1
            where += range(first + skipped, first + len(example.answer))
            labels += example.answer[skipped:]
            start = end
    several = any(len(row) > 1 for row in rows)
    return Batch(tokens, positions, segments if several else None, torch.tensor(where), torch.tensor(labels))


def visible(segments: Tensor) -> Tensor:
    """Which tokens see which: those of the same example that do not come later. (B, T) -> bool (B, 1, T, T)"""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return same & earlier


class Batches:
    """The training examples, of which every step has a batch that depends on nothing but (seed, step).

    Args:
        capacity: tokens of a row.
        packed: whether a row may hold several examples.
    Attributes:
        rows: indices of the examples of each row.
        kept: the examples that fit; the others are counted in `too_long`.
    """

    def __init__(self, examples: Sequence[Tokens], capacity: int, packed: bool, batch_size: int, seed: int) -> None:
        self.kept = [example for example in examples if len(example) <= capacity]
        self.too_long = len(examples) - len(self.kept)
        if not self.kept:
            shortest = min(map(len, examples), default=0)
            raise ProjectError(
                f"no example fits into data.max_length={capacity}: the shortest has {shortest} tokens with its prompt"
            )
        self.capacity = capacity
        self.packed = packed
        self.batch_size = batch_size
        self.seed = seed
        lengths = [len(example) for example in self.kept]
        self.rows = pack(lengths, capacity) if packed else [[i] for i in range(len(lengths))]
        self.order = lru_cache(maxsize=2)(self._order)  # a batch may reach into the next epoch

    def _order(self, epoch: int) -> list[int]:
        rng = torch.Generator().manual_seed(mix_seed(self.seed, ORDER_STREAM, epoch))
        return torch.randperm(len(self.rows), generator=rng).tolist()

    def rows_of(self, step: int) -> list[list[Tokens]]:
        """The rows of step 1, 2, ...: every row once an epoch, in an order drawn for each epoch. Within a step short
        ones come first, so that a microbatch has rows of like length; packed ones are all the same.
        """
        chosen = []
        for place in range((step - 1) * self.batch_size, step * self.batch_size):
            epoch, number = divmod(place, len(self.rows))
            chosen.append([self.kept[i] for i in self.rows[self.order(epoch)[number]]])
        return chosen if self.packed else sorted(chosen, key=lambda row: len(row[0]))

    def collate(self, rows: Sequence[Sequence[Tokens]]) -> Batch:
        """Some of a step's rows as tensors; packed ones all have the same length."""
        return collate(rows, self.capacity if self.packed else 0)

    def num_labels(self, rows: Sequence[Sequence[Tokens]]) -> int:
        """What the loss of these rows is a mean over, as `collate` finds it."""
        return sum(len(example.answer) - (0 if example.prompt else 1) for row in rows for example in row)

    def units(self) -> dict[str, int]:
        """Work of a step, on average."""
        share = self.batch_size / len(self.rows)
        labels = sum(len(example.answer) for example in self.kept)
        return {"tokens": round(share * sum(map(len, self.kept))), "labels": round(share * labels)}

    def facts(self) -> str:
        """How much there is and how well it fits, in words."""
        used = sum(map(len, self.kept))
        share = used / (len(self.rows) * self.capacity)
        packed = f" in {len(self.rows):,} rows of {self.capacity}, {share:.1%} of them full" if self.packed else ""
        left = f"; {self.too_long:,} are longer than {self.capacity} tokens and left out" if self.too_long else ""
        return f"{len(self.kept):,} examples of {used / max(1, len(self.kept)):.0f} tokens{packed}{left}"
