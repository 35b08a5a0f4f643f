"""How sure one may be that one model is better than another on the same examples: the paired bootstrap.

Examples are drawn with replacement, the same ones for both models, and the metric is computed anew for each draw
(Koehn 2004). The interval says what another test set of this size would give.
"""

from __future__ import annotations

import numpy as np

from lora.metrics.answers import Rows, Score

LEVEL = 0.95


def intervals(score: Score, resamples: int, seed: int) -> tuple[float, float]:
    """The middle 95 percent of a metric over draws of its examples."""
    values = [score.combine(total, len(score.shares)) for total in draws(score.shares, resamples, seed)]
    return bounds(values)


def compare(ours: Score, other: Score, resamples: int, seed: int) -> tuple[float, float]:
    """The middle 95 percent of `ours` minus `other` over draws of the examples that both answered."""
    count = len(ours.shares)
    assert count == len(other.shares)
    pairs = zip(draws(ours.shares, resamples, seed), draws(other.shares, resamples, seed), strict=True)
    return bounds([ours.combine(a, count) - other.combine(b, count) for a, b in pairs])


def draws(shares: Rows, resamples: int, seed: int) -> list[Rows]:
    """Summed shares of each draw; the same examples for the same seed and number of examples."""
    rng = np.random.default_rng(seed)
    totals = []
    for _ in range(resamples):
        weights = np.bincount(rng.integers(len(shares), size=len(shares)), minlength=len(shares))
        totals.append(weights @ shares)
    return totals


def bounds(values: list[float]) -> tuple[float, float]:
    """Where the middle 95 percent begin and end."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
