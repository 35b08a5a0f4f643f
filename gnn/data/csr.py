"""Compressed sparse rows (CSR) in compiled loops: from edge lists to a simple undirected graph, in linear time and
memory.

Legend: N nodes, M edges as drawn or read, E directed edges kept (both directions of each undirected edge).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gnn.core.compiled import compiled


def undirected_csr(src: NDArray, dst: NDArray, num_nodes: int) -> tuple[NDArray, NDArray]:
    """Symmetrise an edge list and drop self-loops and repeats: indptr int64 (N + 1,), indices int32 (E,), rows
    ascending.

    A counting sort by row, then each short row sorted by itself: O(M + E log d) time. Peak memory beyond the edge list
    is 8 M bytes for the columns and 8 N for the row ends.

    Args:
        src, dst: int32 or int64 (M,) ends of edges, each edge once or twice.

    Raises:
        ValueError: an end is negative or not below num_nodes, or num_nodes does not fit in int32.
    """
    if not 0 <= num_nodes < 2**31:
        raise ValueError(f"num_nodes={num_nodes} must be at least 0 and below 2^31: column numbers are int32")
    if len(src) != len(dst):
        raise ValueError(f"{len(src)} sources but {len(dst)} destinations: an edge list needs as many of each")
    low, high = _range(src, dst)
    if len(src) and (low < 0 or high >= num_nodes):
        raise ValueError(f"edges name nodes {low} to {high}, but nodes are numbered 0 to {num_nodes - 1}")
    indptr = np.zeros(num_nodes + 1, np.int64)
    _count(src, dst, indptr)
    np.cumsum(indptr, out=indptr)
    indices = np.empty(indptr[-1], np.int32)
    _fill(src, dst, indptr[:-1].copy(), indices)
    kept = _unique_rows(indptr, indices)
    return indptr, indices[:kept]


@compiled(nogil=True)
def _range(src: NDArray, dst: NDArray) -> tuple[int, int]:
    low, high = np.int64(0), np.int64(-1)
    for e in range(len(src)):
        low = min(low, src[e], dst[e])
        high = max(high, src[e], dst[e])
    return low, high


@compiled(nogil=True)
def _count(src: NDArray, dst: NDArray, indptr: NDArray) -> None:
    for e in range(len(src)):
        if src[e] != dst[e]:
            indptr[src[e] + 1] += 1
            indptr[dst[e] + 1] += 1


@compiled(nogil=True)
def _fill(src: NDArray, dst: NDArray, cursor: NDArray, indices: NDArray) -> None:
    for e in range(len(src)):
        u, v = src[e], dst[e]
        if u != v:
            indices[cursor[u]] = v
            cursor[u] += 1
            indices[cursor[v]] = u
            cursor[v] += 1


@compiled(nogil=True)
def _unique_rows(indptr: NDArray, indices: NDArray) -> int:
    """Sort every row and drop repeats, moving rows to the left in place; returns the number of entries kept."""
    write = start = 0
    for row in range(len(indptr) - 1):
        end = indptr[row + 1]
        _sort(indices[start:end])
        last = -1
        for e in range(start, end):
            if indices[e] != last:
                last = indices[e]
                indices[write] = last
                write += 1
        indptr[row + 1] = write
        start = end
    return write


@compiled(nogil=True)
def _sort(values: NDArray) -> None:
    if len(values) > 48:
        values.sort()
        return
    for i in range(1, len(values)):  # insertion sort: the fastest for a few values
        value = values[i]
        j = i
        while j > 0 and values[j - 1] > value:
            values[j] = values[j - 1]
            j -= 1
        values[j] = value
