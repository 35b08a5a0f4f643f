"""Two ranked lists made into one.

A fused score orders passages. It is no probability of being right: reciprocal ranks do not even look at the scores, and
scaled scores depend on what else was found.

Legend: Q queries, K entries of a list; a row of -1 is an empty place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def reciprocal_rank(lists: list[Array], k: int, constant: float = 60.0) -> tuple[Array, Array]:
    """Reciprocal rank fusion (Cormack, Clarke & Buettcher 2009): the sum over lists of 1 / (constant + rank), ranks
    counted from 1. A row that stands twice in one list counts where it stands first.

    Args:
        lists: rows, best first, each (Q, K_i) int64.
    Returns:
        scores (Q, k) float32 and rows (Q, k), best first, equal scores in the order of their rows; -inf and -1 where
        there are no more.
    """
    weights = [[1.0 / (constant + rank) for rank in range(1, rows.shape[1] + 1)] for rows in lists]
    scores = np.full((len(lists[0]), k), -np.inf, np.float32)
    best = np.full((len(lists[0]), k), -1, np.int64)
    for query in range(len(best)):
        total: dict[int, float] = {}
        for rows, weight in zip(lists, weights, strict=True):
            for row, value in first_of_each(rows[query], weight).items():
                total[row] = total.get(row, 0.0) + value
        keep_best(total, scores[query], best[query])
    return scores, best


def weighted_scores(lists: list[tuple[Array, Array]], weights: list[float], k: int) -> tuple[Array, Array]:
    """The weighted sum of scores, those of each query and list first brought to [0, 1]; a row that a list does not
    have gets 0 from it (Fox & Shaw 1994's CombSUM, after min-max scaling).

    Args:
        lists: scores and rows, each (Q, K_i).
    Returns:
        As `reciprocal_rank`.
    """
    queries = len(lists[0][0])
    scores = np.full((queries, k), -np.inf, np.float32)
    best = np.full((queries, k), -1, np.int64)
    for query in range(queries):
        total: dict[int, float] = {}
        for (values, rows), weight in zip(lists, weights, strict=True):
            scaled = unit_range(values[query], rows[query])
            for row, value in first_of_each(rows[query], scaled).items():
                total[row] = total.get(row, 0.0) + weight * value
        keep_best(total, scores[query], best[query])
    return scores, best


def by_turns(first: Array, second: Array, k: int) -> tuple[Array, Array]:
    """One ranking of two: the best of the first, the best of the second, the second best of the first, and so on, each
    passage once.

    Args:
        first, second: rows, best first, -1 for empty places, each (Q, K).
    Returns:
        scores (Q, k), 1 / place: they order and mean nothing else; rows (Q, k); -inf and -1 where there are no more.
    """
    scores = np.full((len(first), k), -np.inf, np.float32)
    best = np.full((len(first), k), -1, np.int64)
    for query, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        turns = [row for pair in zip(one, other, strict=True) for row in pair if row >= 0]
        keep_best(
            {row: 1 / place for place, row in enumerate(dict.fromkeys(turns), start=1)}, scores[query], best[query]
        )
    return scores, best


def unit_range(values: Array, rows: Array) -> list[float]:
    """The scores of the places that are filled, the least as 0 and the largest as 1; all alike as 1."""
    there = values[rows >= 0].astype(np.float64)
    if len(there) == 0:
        return [0.0] * len(values)
    low, high = there.min(), there.max()
    if high == low:
        return [1.0] * len(values)
    return np.where(rows >= 0, (values - low) / (high - low), 0.0).tolist()


def first_of_each(rows: Array, values: list[float]) -> dict[int, float]:
    """Row -> value, where a row that stands twice keeps the value of its first place; empty places are left out."""
    found: dict[int, float] = {}
    for row, value in zip(rows.tolist(), values, strict=True):
        if row >= 0:
            found.setdefault(row, value)
    return found


def keep_best(total: dict[int, float], scores: Array, rows: Array) -> None:
    """Write the best entries into `scores` and `rows`, both (k,)."""
    order = sorted(total.items(), key=lambda item: (-item[1], item[0]))[: len(rows)]
    for place, (row, value) in enumerate(order):
        rows[place] = row
        scores[place] = value
