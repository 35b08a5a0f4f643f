"""The inner loops of BM25, compiled by numba: nothing here knows what a weight means.

Legend: T terms, P postings, Q queries, R rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(cache=True, nogil=True)
def invert(tokens: Array, starts: Array, num_terms: int) -> tuple[Array, Array, Array]:
    """From terms by passage to passages by term, in two passes: count, then place.

    Args:
        tokens: int32, the terms of all passages one after the other.
        starts: int64 (R + 1,), where each passage's begin.
    Returns:
        indptr (T + 1,), rows (P,) ascending within a term, counts (P,).
    """
    seen = np.full(num_terms, -1, np.int64)  # the last passage with this term
    indptr = np.zeros(num_terms + 1, np.int64)
    for row in range(len(starts) - 1):
        for i in range(starts[row], starts[row + 1]):
            term = tokens[i]
            if seen[term] != row:
                seen[term] = row
                indptr[term + 1] += 1
    for term in range(num_terms):
        indptr[term + 1] += indptr[term]
    rows = np.empty(indptr[num_terms], np.int32)
    counts = np.empty(indptr[num_terms], np.int32)
    free = indptr[:-1].copy()  # the next empty place of each term
    seen[:] = -1
    for row in range(len(starts) - 1):
        for i in range(starts[row], starts[row + 1]):
            term = tokens[i]
            if seen[term] != row:
                seen[term] = row
                rows[free[term]] = row
                counts[free[term]] = 1
                free[term] += 1
            else:
                counts[free[term] - 1] += 1
    return indptr, rows, counts


@njit(cache=True, nogil=True)
def merge(
    indptr1: Array, rows1: Array, counts1: Array, indptr2: Array, rows2: Array, counts2: Array, alive: Array
) -> tuple[Array, Array, Array]:
    """The postings of two ranges of rows, the second after the first, as one; those of dead rows are left out."""
    terms = len(indptr1) - 1
    rows = np.empty(len(rows1) + len(rows2), np.int32)
    counts = np.empty(len(rows), np.int32)
    indptr = np.zeros(terms + 1, np.int64)
    free = 0
    for term in range(terms):
        for i in range(indptr1[term], indptr1[term + 1]):
            if alive[rows1[i]]:
                rows[free] = rows1[i]
                counts[free] = counts1[i]
                free += 1
        for i in range(indptr2[term], indptr2[term + 1]):
            if alive[rows2[i]]:
                rows[free] = rows2[i]
                counts[free] = counts2[i]
                free += 1
        indptr[term + 1] = free
    return indptr, rows[:free].copy(), counts[:free].copy()


@njit(cache=True, nogil=True)
def living(indptr: Array, rows: Array, alive: Array) -> Array:
    """Number of postings of each term whose row is alive. int64 (T,)"""
    found = np.zeros(len(indptr) - 1, np.int64)
    for term in range(len(found)):
        for i in range(indptr[term], indptr[term + 1]):
            found[term] += alive[rows[i]]
    return found


@njit(cache=True, nogil=True)
def worse(score1: float, row1: int, score2: float, row2: int) -> bool:
    """Whether the first stands behind the second: a lower score, or the same and a later row."""
    return score1 < score2 or (score1 == score2 and row1 > row2)


@njit(cache=True, nogil=True)
def sink(scores: Array, rows: Array, size: int, score: float, row: int) -> None:
    """Put an entry at the root of a heap whose root is its worst, and let it sink to where it belongs."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and worse(scores[child + 1], rows[child + 1], scores[child], rows[child]):
            child += 1
        if not worse(scores[child], rows[child], score, row):
            break
        scores[place] = scores[child]
        rows[place] = rows[child]
        place = child
    scores[place] = score
    rows[place] = row


@njit(cache=True, nogil=True)
def top_k(
    tokens: Array, starts: Array, indptr: Array, rows: Array, impacts: Array, first: int, size: int, k: int
) -> tuple[Array, Array]:
    """Add up the columns of each query's terms, and keep the k largest sums above zero.

    Args:
        tokens, starts: terms of all queries one after the other, and where each query's begin.
        first, size: the range of rows.
    Returns:
        scores (Q, k) and rows (Q, k), best first; -inf and -1 where there are no more.
    """
    queries = len(starts) - 1
    best_scores = np.full((queries, k), -np.inf, np.float32)
    best_rows = np.full((queries, k), -1, np.int64)
    sums = np.zeros(size, np.float32)
    heap_scores = np.empty(k, np.float32)
    heap_rows = np.empty(k, np.int64)
    for query in range(queries):
        for i in range(starts[query], starts[query + 1]):
            for place in range(indptr[tokens[i]], indptr[tokens[i] + 1]):
                sums[rows[place] - first] += impacts[place]
        heap_scores[:] = 0.0  # k entries that anything beats
        heap_rows[:] = first + size
        least = np.float32(0.0)
        for row in range(size):
            score = sums[row]
            sums[row] = 0.0
            if score > least:
                sink(heap_scores, heap_rows, k, score, first + row)
                least = heap_scores[0]
        for left in range(k - 1, -1, -1):  # the worst comes out first
            if heap_scores[0] > 0:
                best_scores[query, left] = heap_scores[0]
                best_rows[query, left] = heap_rows[0]
            sink(heap_scores, heap_rows, left, heap_scores[left], heap_rows[left])
    return best_scores, best_rows
