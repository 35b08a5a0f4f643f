"""How good a partition of a graph is, and how alike two partitions are.

Legend: N nodes, E edges counted in both directions, k communities of one partition, l of another.

A graph is a CSR matrix: `indptr` (N + 1,) and `indices` (E,), symmetric, without self-loops, with optional `weights`
(E,) >= 0. Write A_ij for its entries, s_i = sum_j A_ij for the strength (the degree without weights), 2m = sum_i s_i,
and for a community c vol(c) = sum of s_i inside, in(c) = sum of A_ij with both ends inside (each edge twice), cut(c) =
vol(c) - in(c).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray


class Csr(NamedTuple):
    """A checked graph: `indptr` int64 (N + 1,), `indices` int32 (E,), `weights` float64 (E,)."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    weights: NDArray[np.float64]

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1

    def rows(self) -> NDArray[np.int64]:
        """The row of each entry, (E,)."""
        return np.repeat(np.arange(self.num_nodes), np.diff(self.indptr))

    def strength(self) -> NDArray[np.float64]:
        """s_i = sum_j A_ij, (N,)."""
        return np.bincount(self.rows(), weights=self.weights, minlength=self.num_nodes)


def as_csr(indptr: ArrayLike, indices: ArrayLike, weights: ArrayLike | None = None) -> Csr:
    """Check a graph and bring it to the types the kernels are compiled for.

    Raises `ValueError` for arrays that are no CSR matrix, ids out of range, self-loops, weights that are negative or
    not finite, and a matrix that is not symmetric.
    """
    indptr = _integers(indptr, "indptr", np.int64)
    wide = _integers(indices, "indices", np.int64)
    if len(indptr) < 1 or indptr[0] != 0 or indptr[-1] != len(wide) or (np.diff(indptr) < 0).any():
        raise ValueError(f"indptr must rise from 0 to the {len(wide)} entries of indices")
    size = len(indptr) - 1
    if len(wide) and not (wide.min() >= 0 and wide.max() < size):
        raise ValueError(f"indices must name nodes 0 to {size - 1}, found {wide.min()} to {wide.max()}")
    values = np.ones(len(wide)) if weights is None else np.ascontiguousarray(weights, dtype=np.float64)
    if values.shape != wide.shape:
        raise ValueError(
            f"weights must hold one number for each of the {len(wide)} entries, found shape {values.shape}"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("weights must be finite and not negative")
    graph = Csr(indptr, wide.astype(np.int32), values)
    if (graph.rows() == wide).any():
        raise ValueError("the graph has self-loops; remove them first")
    matrix = sp.csr_array((values, graph.indices, indptr), shape=(size, size))
    gap = abs(matrix - matrix.T)
    if gap.nnz and gap.max() > 1e-9 * values.max():
        raise ValueError(
            "the matrix is not symmetric; store every undirected edge in both directions with the same weight"
        )
    return graph


def as_labels(labels: ArrayLike, num_nodes: int | None = None) -> NDArray[np.int64]:
    """Renumber community ids to 0 ... k-1 in the order of the ids, int64 (N,). `ValueError` unless they are N
    integers.
    """
    labels = _integers(labels, "labels", np.int64)
    if num_nodes is not None and len(labels) != num_nodes:
        raise ValueError(f"labels must hold one community for each of the {num_nodes} nodes, found {len(labels)}")
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _integers(values: ArrayLike, name: str, dtype: type) -> NDArray:
    """A one-dimensional, contiguous integer array."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, found shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, found {array.dtype}")
    return np.ascontiguousarray(array, dtype=dtype)


# -- quality of one partition ------------------------------------------------------------------------------------------


class Volumes(NamedTuple):
    """Of each community: `inside` in(c), `volume` vol(c), both float64 (k,); `total` is 2m."""

    inside: NDArray[np.float64]
    volume: NDArray[np.float64]
    total: float


def volumes(graph: Csr, labels: NDArray[np.int64]) -> Volumes:
    """in(c) and vol(c) of the communities 0 ... k-1 of `labels` (N,), as `as_labels` numbers them."""
    size = int(labels.max()) + 1 if len(labels) else 0
    left, right = labels[graph.rows()], labels[graph.indices]  # (E,)
    inside = np.bincount(left, weights=np.where(left == right, graph.weights, 0.0), minlength=size)
    volume = np.bincount(left, weights=graph.weights, minlength=size)
    return Volumes(inside, volume, float(graph.weights.sum()))


def modularity(
    indptr: ArrayLike, indices: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, resolution: float = 1.0
) -> float:
    """Q = sum_c [in(c) / 2m - gamma (vol(c) / 2m)^2] (Newman & Girvan 2004; gamma: Reichardt & Bornholdt 2006). 0
    without edges.
    """
    graph = as_csr(indptr, indices, weights)
    return modularity_of(volumes(graph, as_labels(labels, graph.num_nodes)), resolution)


def modularity_of(parts: Volumes, resolution: float = 1.0) -> float:
    """`modularity` from the volumes."""
    if parts.total <= 0:
        return 0.0
    return float((parts.inside / parts.total - resolution * (parts.volume / parts.total) ** 2).sum())


def conductance(indptr: ArrayLike, indices: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean over communities of cut(c) / min(vol(c), 2m - vol(c)); lower is better.

    A community without edges has no conductance and is left out of the mean, so that isolated nodes do not flatter it.
    One that nothing leaves has conductance 0. Without any edge: 0.
    """
    graph = as_csr(indptr, indices, weights)
    inside, volume, total = volumes(graph, as_labels(labels, graph.num_nodes))
    used = volume > 0
    if not used.any():
        return 0.0
    cut = np.maximum(volume - inside, 0.0)[used]
    smaller = np.minimum(volume, total - volume)[used]
    return float(np.divide(cut, smaller, out=np.zeros_like(cut), where=smaller > 1e-12 * total).mean())


def coverage(indptr: ArrayLike, indices: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Share of the edge weight that lies inside communities, sum_c in(c) / 2m. Without edges: 1, as nothing is cut."""
    graph = as_csr(indptr, indices, weights)
    inside, _, total = volumes(graph, as_labels(labels, graph.num_nodes))
    return float(inside.sum() / total) if total > 0 else 1.0


def num_communities(labels: ArrayLike) -> int:
    """Number of different ids."""
    return len(np.unique(np.asarray(labels)))


# -- two partitions compared -------------------------------------------------------------------------------------------


class Contingency(NamedTuple):
    """The non-zero cells of the (k, l) table of two partitions: `cells` counts at (`rows`, `columns`); `left` (k,),
    `right` (l,) sums.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    cells: NDArray[np.float64]
    left: NDArray[np.float64]
    right: NDArray[np.float64]


def contingency(first: ArrayLike, second: ArrayLike) -> Contingency:
    """How many nodes lie in community i of the first and j of the second partition. `ValueError` when their lengths
    differ.
    """
    a = as_labels(first)
    b = as_labels(second, len(a))
    left, right = np.bincount(a), np.bincount(b)
    pairs, cells = np.unique(a * max(len(right), 1) + b, return_counts=True)
    rows, columns = np.divmod(pairs, max(len(right), 1))
    return Contingency(rows, columns, cells.astype(float), left.astype(float), right.astype(float))


def nmi(first: ArrayLike, second: ArrayLike) -> float:
    """Mutual information over the arithmetic mean of the two entropies, in [0, 1] (Danon et al. 2005; scikit-learn's
    default).

    Two partitions with one community each are equal: 1. No correction for chance: many small communities raise it,
    which `ari` corrects.
    """
    table = contingency(first, second)
    if len(table.left) == len(table.right) <= 1:
        return 1.0
    count = table.left.sum()
    information = (
        table.cells / count * np.log(table.cells * count / (table.left[table.rows] * table.right[table.columns]))
    ).sum()
    return float(np.clip(2 * information / (_entropy(table.left) + _entropy(table.right)), 0.0, 1.0))


def _entropy(counts: NDArray[np.float64]) -> float:
    """-sum p log p in nats, for counts that are all positive."""
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def ari(first: ArrayLike, second: ArrayLike) -> float:
    """Adjusted Rand index (Hubert & Arabie 1985): agreement on pairs of nodes, 0 in the mean for random partitions,
    1 for equal ones.
    """
    table = contingency(first, second)
    together, left, right = (_pairs(counts) for counts in (table.cells, table.left, table.right))
    if left == right == together:
        return 1.0  # equal partitions; among them those without any pair, where the formula reads 0 / 0
    expected = left * right / _pairs(table.left.sum())
    return float((together - expected) / (0.5 * (left + right) - expected))


def _pairs(counts: NDArray[np.float64]) -> float:
    """Number of unordered pairs within groups of these sizes."""
    return float((counts * (counts - 1) / 2).sum())
