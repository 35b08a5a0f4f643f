"""Texts with classes as the tensors of a training step.

Legend: B texts, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from common.runtime import mix_seed
from lora.config import Config
from lora.data.batches import ORDER_STREAM, ROUND
from lora.data.classes import Labelled
from lora.data.templates import encode_texts


@dataclass(frozen=True)
class ClassBatch:
    """Tensors of some texts.

    Attributes:
        tokens: (B, T) int64.
        present: (B, T) bool, False where a row is filled up.
        labels: (B,) int64.
    """

    tokens: Tensor
    present: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> ClassBatch:
        """The same on another device."""
        tokens, present, labels = (t.to(device, non_blocking=True) for t in (self.tokens, self.present, self.labels))
        return ClassBatch(tokens, present, labels)


def collate_texts(rows: Sequence[Sequence[int]], labels: Sequence[int]) -> ClassBatch:
    """Token rows of any lengths, filled up behind."""
    length = -(max(map(len, rows)) // -ROUND) * ROUND
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    present = torch.zeros(len(rows), length, dtype=torch.bool)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = torch.tensor(row)
        present[r, : len(row)] = True
    return ClassBatch(tokens, present, torch.tensor(labels))


class TextBatches:
    """The training texts, of which every step has a batch that depends on nothing but (seed, step)."""

    def __init__(self, labelled: Labelled, tokenizer: Any, config: Config) -> None:
        self.rows = encode_texts(labelled.texts, tokenizer, config.data.max_length)
        self.labels = labelled.labels
        self.batch_size = config.train.batch_size
        self.seed = config.seed
        self.classes = labelled.classes
        self.cut = sum(len(row) == config.data.max_length for row in self.rows)
        self.order = lru_cache(maxsize=2)(self._order)  # a batch may reach into the next epoch

    def _order(self, epoch: int) -> list[int]:
        rng = torch.Generator().manual_seed(mix_seed(self.seed, ORDER_STREAM, epoch))
        return torch.randperm(len(self.rows), generator=rng).tolist()

    def rows_of(self, step: int) -> list[int]:
        """Indices of the texts of step 1, 2, ...: every text once an epoch, in an order drawn for each epoch. Within a
        step short ones come first, so that a microbatch has texts of like length and little that is filled up.
        """
        chosen = []
        for place in range((step - 1) * self.batch_size, step * self.batch_size):
            epoch, number = divmod(place, len(self.rows))
            chosen.append(self.order(epoch)[number])
        return sorted(chosen, key=lambda index: len(self.rows[index]))

    def num_labels(self, rows: Sequence[int]) -> int:
        """What the loss of these texts is a mean over."""
        return len(rows)

    def units(self) -> dict[str, int]:
        """Work of a step, on average."""
        return {"texts": self.batch_size, "tokens": round(self.batch_size * sum(map(len, self.rows)) / len(self.rows))}

    def collate(self, rows: Sequence[int]) -> ClassBatch:
        """Some of a step's texts as tensors."""
        return collate_texts([self.rows[i] for i in rows], [self.labels[i] for i in rows])

    def facts(self) -> str:
        """How much there is, in words."""
        cut = f"; {self.cut:,} may be longer and were cut" if self.cut else ""
        mean = sum(map(len, self.rows)) / len(self.rows)
        return f"{len(self.rows):,} texts of {mean:.0f} tokens in {len(self.classes)} classes{cut}"
