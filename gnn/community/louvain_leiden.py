"""Communities by greedy optimisation of modularity: Louvain (Blondel et al. 2008) and Leiden (Traag, Waltman & van Eck
2019).

Both alternate two steps: move single nodes while modularity rises, then merge nodes into one and repeat on the smaller
graph. Louvain merges the communities it found, which can leave one that is not connected inside. Leiden first refines
each community into well-connected parts and merges those, so that a later level can still take a community apart; its
communities are always connected.

Legend: N nodes, E edges counted in both directions, n and k nodes of one level and of the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnn.community import kernels
from gnn.community.metrics import Csr, as_csr, as_labels

MARGIN = 1e-10  # in mean edge weights: gains below it are rounding


@dataclass(frozen=True)
class Partition:
    """A result: `labels` int64 (N,) numbered 0 ... k-1 from the largest community to the smallest, with their
    modularity.

    `history` is the modularity after each level of the run that won, over all its iterations; it never falls.
    """

    labels: NDArray[np.int64]
    modularity: float
    history: tuple[float, ...]

    @property
    def num_communities(self) -> int:
        return int(self.labels.max()) + 1 if len(self.labels) else 0


def louvain(
    indptr: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resolution: float = 1.0,
    seed: int = 0,
    restarts: int = 1,
) -> Partition:
    """Louvain's algorithm on a symmetric CSR graph (N nodes) without self-loops, with weights (E,) >= 0 or none.

    `resolution` is gamma > 0 of `gnn.community.metrics.modularity`: higher means more and smaller communities. The best
    of `restarts` runs in different random orders is returned, a function of `seed` alone. Raises `ValueError` for a
    graph that `as_csr` refuses.
    """
    graph = _prepare(indptr, indices, weights, resolution, restarts)
    return _best_of([_louvain_once(graph, resolution, rng) for rng in _generators(seed, restarts)])


def leiden(
    indptr: ArrayLike,
    indices: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resolution: float = 1.0,
    seed: int = 0,
    restarts: int = 1,
    iterations: int = 10,
    randomness: float = 0.01,
    start: ArrayLike | None = None,
) -> Partition:
    """Leiden's algorithm; arguments and errors as `louvain`.

    A run repeats up to `iterations` times, each from the partition before (the first from `start`, int (N,), or single
    nodes), and ends at the first that gains nothing. `randomness` is theta of the refinement's random merges, in mean
    edge weights.
    """
    graph = _prepare(indptr, indices, weights, resolution, restarts)
    if iterations < 1 or not randomness > 0:
        raise ValueError(f"iterations must be at least 1 and randomness positive, found {iterations} and {randomness}")
    first = np.arange(graph.num_nodes) if start is None else as_labels(start, graph.num_nodes)
    return _best_of(
        [_leiden_once(graph, resolution, rng, iterations, randomness, first) for rng in _generators(seed, restarts)]
    )


def _prepare(indptr: ArrayLike, indices: ArrayLike, weights: ArrayLike | None, resolution: float, restarts: int) -> Csr:
    """A checked graph without edges of weight 0, which connect nothing."""
    if not 0 < resolution < np.inf:
        raise ValueError(f"resolution must be positive and finite, found {resolution}")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, found {restarts}")
    graph = as_csr(indptr, indices, weights)
    keep = graph.weights > 0
    if keep.all():
        return graph
    degrees = np.bincount(graph.rows()[keep], minlength=graph.num_nodes)
    return Csr(np.concatenate([[0], np.cumsum(degrees)]), graph.indices[keep], graph.weights[keep])


def _generators(seed: int, count: int) -> Iterator[np.random.Generator]:
    """One generator a restart."""
    return (np.random.default_rng((seed, restart)) for restart in range(count))


def _best_of(results: list[Partition]) -> Partition:
    """The highest modularity, the first of equals; communities renumbered by falling size."""
    best = max(results, key=lambda result: result.modularity)
    if not len(best.labels):
        return best
    rank = np.argsort(np.argsort(-np.bincount(best.labels), kind="stable"), kind="stable")  # new id of each old one
    return Partition(rank[best.labels], best.modularity, best.history)


def _louvain_once(graph: Csr, resolution: float, rng: np.random.Generator) -> Partition:
    """One run: levels of moving and merging, until a level moves nothing."""
    level = tuple(graph)
    strength = graph.strength()
    g, margin = _constants(graph, resolution)
    flat = np.arange(graph.num_nodes)  # the level's node of each original node, (N,)
    history = [kernels.quality(level, strength, flat, resolution)]
    while len(strength):
        labels = np.arange(len(strength))
        sweeps = 0
        while kernels.local_moving(level, strength, g, labels, rng.permutation(len(labels)), margin):
            sweeps += 1  # the queue returns neighbours only, though S_C changed for all of C: look at every node again
        if not sweeps:
            break
        labels, k = kernels.renumber(labels, len(labels))
        flat = labels[flat]
        history.append(kernels.quality(level, strength, labels, resolution))
        level, strength = kernels.aggregate(level, strength, labels, k)
    return Partition(flat, history[-1], tuple(history))


def _leiden_once(
    graph: Csr,
    resolution: float,
    rng: np.random.Generator,
    iterations: int,
    randomness: float,
    start: NDArray[np.int64],
) -> Partition:
    """One run of at most `iterations` iterations from the communities `start` (N,)."""
    flat = start
    history = [kernels.quality(tuple(graph), graph.strength(), start, resolution)]
    g, margin = _constants(graph, resolution)
    theta = randomness * (graph.weights.mean() if len(graph.weights) else 1.0)
    for _ in range(iterations):
        before = history[-1]
        flat = _leiden_iteration(graph, resolution, rng, (g, margin, theta), flat, history)
        if history[-1] <= before + 1e-12:
            break
    parts, k = kernels.connected_parts(tuple(graph), flat)
    if k > flat.max(initial=-1) + 1:  # `start` was optimal but for parts that touch nothing, or rounding hid a move
        flat = parts
        history.append(kernels.quality(tuple(graph), graph.strength(), flat, resolution))
    return Partition(flat, history[-1], tuple(history))


def _leiden_iteration(
    graph: Csr,
    resolution: float,
    rng: np.random.Generator,
    constants: tuple[float, float, float],
    flat: NDArray[np.int64],
    history: list[float],
) -> NDArray[np.int64]:
    """Levels of moving, refining and merging from the communities `flat` (N,) until each is a single node; the new
    ones, (N,).

    Appends each level's modularity to `history`.
    """
    g, margin, theta = constants
    level = tuple(graph)
    strength = graph.strength()
    node = np.arange(graph.num_nodes)  # the level's node of each original node, (N,)
    labels = flat.copy()  # the community of each of the level's nodes, (n,)
    while len(strength):
        n = len(strength)
        kernels.local_moving(level, strength, g, labels, rng.permutation(n), margin)
        labels, k = kernels.renumber(labels, n)
        history.append(kernels.quality(level, strength, labels, resolution))
        if k == n:
            break
        parts = kernels.refine(level, strength, g, labels, rng.permutation(n), rng.random(n), theta)
        parts, k = kernels.renumber(parts, n)
        if k == n:
            break  # no merge was drawn
        level, strength = kernels.aggregate(level, strength, parts, k)
        merged = np.empty(k, np.int64)
        merged[parts] = labels  # all of a part lies in one community
        node = parts[node]
        labels = merged
    return labels[node]


def _constants(graph: Csr, resolution: float) -> tuple[float, float]:
    """gamma / 2m, and the gain below which a move counts as rounding."""
    total = float(graph.weights.sum())
    return (resolution / total, MARGIN * total / len(graph.weights)) if total > 0 else (0.0, 0.0)
