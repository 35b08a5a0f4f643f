"""Communities from eigenvectors, to compare with: regularised spectral clustering and the Bethe-Hessian.

Legend: N nodes, k communities, d_i degrees, c their mean.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as la
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans

from gnn.community.metrics import Csr, as_csr


def spectral_communities(
    indptr: ArrayLike, indices: ArrayLike, num_communities: int, seed: int = 0
) -> NDArray[np.int64]:
    """Normalised spectral clustering with c / N added to every entry of the adjacency (Amini et al. 2013); int64 (N,).

    Without the addition, the leading eigenvectors of a sparse graph belong to its small components and dangling trees.
    K-means runs on the rows of the k leading eigenvectors, scaled to length one (Ng, Jordan & Weiss 2002). `ValueError`
    unless 1 <= k <= N.
    """
    graph, matrix = _matrix(indptr, indices, num_communities)
    size = graph.num_nodes
    tau = float(graph.weights.sum()) / max(graph.num_nodes, 1)
    if num_communities == 1 or tau == 0:
        return np.zeros(size, np.int64)
    scale = 1 / np.sqrt(graph.strength() + tau)

    def times(x: NDArray) -> NDArray:
        y = scale * x.ravel()
        return scale * (matrix @ y + tau / size * y.sum())

    operator = la.LinearOperator((size, size), matvec=times, dtype=np.float64)
    vectors = _eigenvectors(operator, num_communities, "LA", seed)  # (N, k)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _k_means(vectors / np.maximum(length, 1e-12), num_communities, seed)


def bethe_hessian_communities(
    indptr: ArrayLike, indices: ArrayLike, num_communities: int, seed: int = 0
) -> NDArray[np.int64]:
    """K-means on the k lowest eigenvectors of H(r) = (r^2 - 1) I - r A + D at r = sqrt(c) (Saade, Krzakala & Zdeborova
    2014); int64 (N,).

    On sparse random graphs it finds planted blocks down to the detectability threshold, where the adjacency's own
    eigenvectors fail. `ValueError` unless 1 <= k <= N.
    """
    graph, matrix = _matrix(indptr, indices, num_communities)
    degrees = graph.strength()
    if num_communities == 1 or not degrees.any():
        return np.zeros(graph.num_nodes, np.int64)
    r = np.sqrt(max(degrees.mean(), 1.0))
    hessian = sp.csr_array(sp.diags_array(r**2 - 1 + degrees) - r * matrix)
    return _k_means(_eigenvectors(hessian, num_communities, "SA", seed), num_communities, seed)


def _matrix(indptr: ArrayLike, indices: ArrayLike, num_communities: int) -> tuple[Csr, sp.csr_array]:
    """The checked graph, and the same as a scipy matrix."""
    graph = as_csr(indptr, indices)
    if not 1 <= num_communities <= graph.num_nodes:
        raise ValueError(
            f"num_communities must be 1 to {graph.num_nodes}, the number of nodes; found {num_communities}"
        )
    return graph, sp.csr_array((graph.weights, graph.indices, graph.indptr), shape=(graph.num_nodes, graph.num_nodes))


def _eigenvectors(matrix: la.LinearOperator | sp.csr_array, count: int, which: str, seed: int) -> NDArray[np.float64]:
    """`count` eigenvectors (N, count) of the largest ("LA") or smallest ("SA") eigenvalues of a symmetric matrix."""
    size = matrix.shape[0]
    if count >= size - 1:  # too many for the iteration
        dense = matrix @ np.eye(size)
        vectors = np.linalg.eigh((dense + dense.T) / 2)[1]
        return vectors[:, -count:] if which == "LA" else vectors[:, :count]
    start = np.random.default_rng(seed).standard_normal(size)
    return la.eigsh(matrix, count, which=which, v0=start, tol=1e-4, ncv=min(size - 1, max(4 * count, 40)))[1]


def _k_means(points: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Labels of the best of ten runs."""
    return KMeans(count, n_init=10, random_state=seed).fit(points).labels_.astype(np.int64)
