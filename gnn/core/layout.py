"""Places in the plane: for the nodes of a small graph, and for embeddings.

Legend: N nodes, E entries of the adjacency (both directions), D width of an embedding.
"""

from __future__ import annotations

import numpy as np


def graph_distances(rows: np.ndarray, columns: np.ndarray, num_nodes: int) -> np.ndarray:
    """Numbers of hops (N, N); between parts that are not connected, somewhat more than across the largest part."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import shortest_path

    matrix = csr_array((np.ones(len(rows)), (rows, columns)), shape=(num_nodes, num_nodes))
    hops = shortest_path(matrix, directed=False, unweighted=True)
    widest = hops[np.isfinite(hops)].max(initial=0.0)
    return np.where(np.isfinite(hops), hops, widest / 2 + 2)


def classical_scaling(distances: np.ndarray) -> np.ndarray:
    """(N, 2): the main axes of the doubly centred squared distances (N, N), as in principal component analysis
    (Torgerson 1952).
    """
    squared = distances**2
    centred = -0.5 * (squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean())
    values, vectors = np.linalg.eigh(centred)
    top = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    signs = np.sign(top[np.abs(top).argmax(axis=0), range(top.shape[1])])  # an eigenvector's sign is arbitrary: fix it
    top = top * np.where(signs == 0, 1.0, signs)
    return np.pad(top, ((0, 0), (0, 2 - top.shape[1])))


def stress_layout(rows: np.ndarray, columns: np.ndarray, num_nodes: int, steps: int = 200, seed: int = 0) -> np.ndarray:
    """Positions float (N, 2) that make sum_ij (|x_i - x_j| - d_ij)^2 / d_ij^2 small, d the numbers of hops (Gansner et
    al. 2004).

    Each round solves the majorising quadratic, so the stress never rises. Dense in N: for up to about a thousand nodes.
    """
    if num_nodes < 2:
        return np.zeros((num_nodes, 2))
    distances = graph_distances(rows, columns, num_nodes)
    # parts nodes that classical scaling puts on one spot
    noise = np.random.default_rng(seed).normal(size=(num_nodes, 2))
    x = classical_scaling(distances) + 0.05 * noise
    weights = 1 / np.where(distances > 0, distances, np.inf) ** 2  # (N, N), zero on the diagonal
    laplacian = np.diag(weights.sum(axis=1)) - weights
    inverse = np.linalg.pinv(laplacian)  # (N, N)
    for _ in range(steps):
        gaps = np.linalg.norm(x[:, None] - x[None], axis=2)  # (N, N)
        pull = -weights * distances / np.maximum(gaps, 1e-9)
        np.fill_diagonal(pull, 0.0)
        np.fill_diagonal(pull, -pull.sum(axis=1))
        x = inverse @ (pull @ x)
    return x


def spread_out(points: np.ndarray, gap: float = 0.06, steps: int = 30) -> np.ndarray:
    """Points (N, 2) with pairs that are closer than `gap` times the drawing's diagonal pushed apart, so that no node
    hides another.
    """
    x = points.copy()
    least = (
        gap * float(np.linalg.norm(np.ptp(x, axis=0))) * min(1.0, 8 / max(np.sqrt(len(x)), 1.0)) if len(x) > 1 else 0.0
    )
    for _ in range(steps):
        delta = x[:, None] - x[None]  # (N, N, 2)
        length = np.linalg.norm(delta, axis=2)
        overlap = np.maximum(least - length, 0.0)
        np.fill_diagonal(overlap, 0.0)
        if not overlap.any():
            break
        x += 0.5 * ((overlap / np.maximum(length, 1e-9))[:, :, None] * delta).sum(axis=1)
    return x


def project(hidden: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of rows (N, D): float (N, 2), a function of its arguments. `ValueError` for
    NaN or infinity.

    Starts from the principal components, so that the arrangement of the clusters says something too (Kobak & Berens
    2019).
    """
    if not np.isfinite(hidden).all():
        raise ValueError("the embeddings hold NaN or infinity: this network has diverged, so there is nothing to draw")
    x = hidden.astype(np.float64) - hidden.mean(axis=0, dtype=np.float64)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    reduced = (u * s)[:, :50]  # the main directions hold what distances between neighbours are made of
    reduced = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))
    if len(x) < 5:  # too few for neighbourhoods
        return reduced[:, :2]
    from sklearn.manifold import TSNE

    noise = np.random.default_rng(seed).normal(size=(len(x), 2))  # parts points that coincide
    start = 1e-4 * (reduced[:, :2] / max(reduced[:, 0].std(), 1e-12) + 0.01 * noise)
    return TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init=start.astype(np.float32), random_state=seed).fit_transform(
        reduced
    )
