"""Scores of predicted classes, each example's own share kept, so that examples can be drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lora.metrics.answers import Rows, Score, mean_of


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> Score:
    """Share of right classes."""
    return mean_of("accuracy", [float(a == b) for a, b in zip(predicted, labels, strict=True)])


def matthews(predicted: Sequence[int], labels: Sequence[int], num_classes: int) -> Score:
    """Matthews' correlation for any number of classes (Gorodkin 2004): 0 is chance, whatever the classes' shares.

    An example's share is its cell of the confusion matrix.
    """
    cells = np.zeros((len(labels), num_classes * num_classes))
    cells[np.arange(len(labels)), np.asarray(labels) * num_classes + np.asarray(predicted)] = 1

    def combine(total: Rows, count: int) -> float:
        table = total.reshape(num_classes, num_classes)  # [label, predicted]
        true, guessed = table.sum(1), table.sum(0)
        numerator = count * np.trace(table) - true @ guessed
        spread = (count**2 - true @ true) * (count**2 - guessed @ guessed)
        return float(numerator / math.sqrt(spread)) if spread > 0 else 0.0

    return Score("matthews", cells, combine)
