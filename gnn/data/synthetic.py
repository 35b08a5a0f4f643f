"""Synthetic social networks of 10^3 to 10^8 edges in linear time and memory: planted communities (DC-SBM) and R-MAT.

Legend: N nodes, M edges drawn, E directed edges kept, C communities, F features.

DC-SBM   Degree-corrected stochastic block model, Karrer & Newman 2011: the number of edges between i and j is Poisson
         with mean theta_i theta_j omega_{g_i g_j}. Here omega_rs is (1 - mixing) [r = s] / W_r + mixing / W, where W_r
         is the sum of theta in community r and W that over all nodes: a share `mixing` of the edges ignores the
         communities. Given the number of edges, the model is the same as drawing each edge by itself, both of its ends
         in proportion to theta; that is what is done, by Walker's alias method (Walker 1977; Vose 1991), one table for
         each community.
         Expected degrees theta follow a bounded power law.
R-MAT    Chakrabarti, Zhan, Faloutsos 2004: each edge descends into a quadrant of the adjacency matrix, once per bit of
         a node number.

Self-loops and repeated edges are dropped, so a graph has somewhat fewer edges than were drawn. Features are drawn
around one centre for each community with unit noise. All randomness is a function of (seed, node or edge number).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ProjectError
from gnn.config import Config, SyntheticConfig
from gnn.core.compiled import compiled
from gnn.core.graph import Graph
from gnn.core.randomness import GOLDEN, below, low_unit, make_key, mix64, unit
from gnn.data.csr import undirected_csr
from gnn.data.storage import open_arrays, save_arrays

_ROWS = 1 << 16  # nodes at a time where float temporaries would be large
# the Graph500 benchmark's quadrants, close to those fitted to social networks in the R-MAT paper
RMAT = (0.57, 0.19, 0.19, 0.05)


@dataclass(frozen=True)
class Planted:
    """The hidden part of a DC-SBM: what its nodes are before any edge is drawn.

    Attributes:
        communities: int32 (N,) in 0 .. C - 1.
        theta: float64 (N,) expected degrees, self-loops and repeats counted; their sum is 2 M.
        weights: float64 (C,) sum of theta in each community.
        mixing: share of the edges that ignore the communities.
    """

    communities: NDArray
    theta: NDArray
    weights: NDArray
    mixing: float

    @property
    def within_share(self) -> float:
        """Expected share of the drawn edges that stay within a community."""
        return 1 - self.mixing + self.mixing * float(np.square(self.weights / self.weights.sum()).sum())

    @property
    def edge_evidence(self) -> NDArray:
        """float64 (C,): log omega_rr - log omega_rs, what one neighbour known to be in r says for r against any
        other community.
        """
        mixing = max(self.mixing, 1e-12)
        return np.log1p((1 - mixing) * self.weights.sum() / (mixing * np.maximum(self.weights, 1e-300)))


def plant(
    num_nodes: int,
    num_edges: int,
    communities: int,
    mixing: float,
    exponent: float = 2.5,
    max_degree: float = 0.0,
    size_skew: float = 0.0,
    seed: int = 0,
) -> Planted:
    """Draw communities and expected degrees of a DC-SBM with `num_edges` edges to be drawn.

    Args:
        exponent: density of theta falls as theta^-exponent; above 1.
        max_degree: largest theta; 0 = sqrt(2 M), above which a simple graph cannot keep the wanted degrees (structural
            cut-off).
        size_skew: the share of community c is in proportion to (c + 1)^-size_skew; 0 = equal sizes.

    Raises:
        ValueError: a number is out of range, or max_degree is not above the mean degree.
    """
    if num_nodes < 2 or num_edges < 1 or not 1 <= communities <= num_nodes:
        raise ValueError(
            f"{num_nodes} nodes, {num_edges} edges, {communities} communities: needs 2 nodes, 1 edge, and 1 to N "
            "communities"
        )
    if not 0 <= mixing <= 1 or exponent <= 1:
        raise ValueError(f"mixing={mixing} must lie in [0, 1] and exponent={exponent} above 1")
    mean = 2 * num_edges / num_nodes
    cap = max_degree or min(max((2 * num_edges) ** 0.5, 2 * mean), num_nodes - 1)
    if cap <= mean:
        raise ValueError(
            f"max_degree={cap:g} must be above the mean degree {mean:g}; draw fewer edges or allow a larger degree"
        )
    rng = np.random.Generator(np.random.PCG64(int(make_key(seed, 1))))
    shares = np.arange(1, communities + 1, dtype=np.float64) ** -size_skew
    labels = np.searchsorted(np.cumsum(shares / shares.sum())[:-1], rng.random(num_nodes), side="right").astype(
        np.int32
    )
    theta = _power_law(rng.random(num_nodes), mean, cap, exponent)
    theta *= 2 * num_edges / theta.sum()
    return Planted(labels, theta, np.bincount(labels, theta, minlength=communities), mixing)


def _power_law(u: NDArray, mean: float, cap: float, exponent: float) -> NDArray:
    """Bounded power law by inversion of uniform u; its lower end is found by bisection so that the mean is as asked."""

    def quantile(low: float, u: NDArray) -> NDArray:
        a = 1 - exponent
        return (low**a + u * (cap**a - low**a)) ** (1 / a)

    grid = (np.arange(4096) + 0.5) / 4096
    lower = mean * 1e-6
    upper = mean
    for _ in range(60):
        low = (lower * upper) ** 0.5
        lower, upper = (low, upper) if quantile(low, grid).mean() < mean else (lower, low)
    return quantile(lower, u)


def dcsbm(planted: Planted, num_edges: int, seed: int = 0) -> tuple[NDArray, NDArray]:
    """A graph of the model `planted` with `num_edges` edges drawn: indptr int64 (N + 1,), indices int32 (E,), see
    `undirected_csr`.

    Peak memory: 16 bytes for each edge drawn and about 40 for each node.
    """
    order = np.argsort(planted.communities, kind="stable").astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(planted.communities, minlength=len(planted.weights)))])
    accept, alias = _alias_tables(planted.theta[order], starts)
    src, dst = np.empty(num_edges, np.int32), np.empty(num_edges, np.int32)
    bounds = np.cumsum(planted.weights) / planted.weights.sum()
    _draw_blocks(make_key(seed, 2), src, dst, bounds, starts, accept, order, order[alias], planted.mixing)
    del accept, alias
    return undirected_csr(src, dst, len(order))


@compiled(nogil=True)
def _alias_tables(weights: NDArray, starts: NDArray) -> tuple[NDArray, NDArray]:
    """Vose's alias tables of each part weights[starts[r]:starts[r + 1]]: accept float32 (N,), alias int32 (N,)
    position in the whole.
    """
    n = len(weights)
    accept = np.ones(n, np.float32)
    alias = np.arange(n).astype(np.int32)
    scaled, stack = np.empty(n, np.float64), np.empty(n, np.int32)
    for r in range(len(starts) - 1):
        a, b = starts[r], starts[r + 1]
        scale = (b - a) / max(weights[a:b].sum(), 1e-300)
        # small entries fill the stack from the left, large ones from the right
        small = a
        large = b
        for k in range(a, b):
            scaled[k] = weights[k] * scale
            if scaled[k] < 1:
                stack[small] = k
                small += 1
            else:
                large -= 1
                stack[large] = k
        while small > a and large < b:
            small -= 1
            k, big = stack[small], stack[large]
            accept[k] = scaled[k]
            alias[k] = big
            scaled[big] -= 1 - scaled[k]
            if scaled[big] < 1:
                large += 1
                stack[small] = big
                small += 1
    return accept, alias


@compiled(nogil=True)
def _draw_blocks(
    key: int,
    src: NDArray,
    dst: NDArray,
    bounds: NDArray,
    starts: NDArray,
    accept: NDArray,
    own: NDArray,
    other: NDArray,
    mixing: float,
) -> None:
    """Edge e: a community r by weight, an end in r by theta, and the other end in r too, or (share `mixing`)
    anywhere by theta.
    """
    for e in range(len(src)):
        z = mix64(key + np.uint64(e) * GOLDEN)
        first = _pick(bounds, unit(z))
        z = mix64(z + GOLDEN)
        second = _pick(bounds, unit(z)) if low_unit(mix64(z)) < mixing else first
        z = mix64(z + GOLDEN)
        k = starts[first] + below(z, starts[first + 1] - starts[first])
        src[e] = own[k] if low_unit(z) < accept[k] else other[k]
        z = mix64(z + GOLDEN)
        k = starts[second] + below(z, starts[second + 1] - starts[second])
        dst[e] = own[k] if low_unit(z) < accept[k] else other[k]


@compiled(nogil=True)
def _pick(bounds: NDArray, u: float) -> int:
    """First position whose cumulative share exceeds u: empty communities, of share 0, are never picked."""
    low = 0
    high = len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if bounds[middle] > u:
            high = middle
        else:
            low = middle + 1
    return low


def rmat(
    num_nodes: int,
    num_edges: int,
    quadrants: tuple[float, float, float, float] = RMAT,
    seed: int = 0,
    shuffle: bool = True,
) -> tuple[NDArray, NDArray, NDArray]:
    """An R-MAT graph: indptr int64 (N + 1,), indices int32 (E,), and the address int32 (N,) of each node in the
    recursion.

    Args:
        quadrants: probabilities (a, b, c, d) of the four quadrants; they must sum to 1.
        shuffle: number the nodes at random; otherwise those of low numbers have the high degrees, and address = number.

    Raises:
        ValueError: quadrants are not probabilities, or a size is out of range.
    """
    if min(quadrants) < 0 or abs(sum(quadrants) - 1) > 1e-6:
        raise ValueError(f"quadrants={quadrants} must be four probabilities that sum to 1")
    if quadrants[0] <= 0 or num_nodes < 2 or num_edges < 1:
        raise ValueError(
            f"{num_nodes} nodes, {num_edges} edges, quadrant a={quadrants[0]}: needs 2 nodes, 1 edge and a above 0"
        )
    order = np.arange(num_nodes, dtype=np.int32)
    if shuffle:
        np.random.Generator(np.random.PCG64(int(make_key(seed, 3)))).shuffle(order)
    bits = int(num_nodes - 1).bit_length()
    cuts = (np.cumsum(quadrants)[:3] * 2**16).round().astype(np.int64)
    src, dst = np.empty(num_edges, np.int32), np.empty(num_edges, np.int32)
    _draw_quadrants(make_key(seed, 4), src, dst, bits, cuts, order)
    address = np.empty(num_nodes, np.int32)
    address[order] = np.arange(num_nodes, dtype=np.int32)
    return *undirected_csr(src, dst, num_nodes), address


@compiled(nogil=True)
def _draw_quadrants(key: int, src: NDArray, dst: NDArray, bits: int, cuts: NDArray, order: NDArray) -> None:
    """16 random bits for each level; an end beyond the last node is drawn anew."""
    for e in range(len(src)):
        z = mix64(key + np.uint64(e) * GOLDEN)
        u = v = len(order)
        while u >= len(order) or v >= len(order):
            u = v = 0
            for level in range(bits):
                if level % 4 == 0:
                    z = mix64(z + GOLDEN)
                word = np.int64((z >> np.uint64(16 * (level % 4))) & np.uint64(0xFFFF))
                # a b over c d
                quadrant = np.int64(word >= cuts[0]) + np.int64(word >= cuts[1]) + np.int64(word >= cuts[2])
                u, v = 2 * u + quadrant // 2, 2 * v + quadrant % 2
        src[e], dst[e] = order[u], order[v]


def centres(communities: int, num_features: int, signal: float, seed: int = 0) -> NDArray:
    """float32 (C, F) community centres: random directions of length `signal`, in units of the noise's standard
    deviation.
    """
    rng = np.random.Generator(np.random.PCG64(int(make_key(seed, 5))))
    points = rng.standard_normal((communities, num_features))
    return (signal * points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def features(labels: NDArray, points: NDArray, seed: int = 0) -> NDArray:
    """float32 (N, F): the centre of each node's community, plus noise of unit variance in every direction."""
    rng = np.random.Generator(np.random.PCG64(int(make_key(seed, 6))))
    x = np.empty((len(labels), points.shape[1]), np.float32)
    for i in range(0, len(x), _ROWS):
        rng.standard_normal(dtype=np.float32, out=x[i : i + _ROWS])
        x[i : i + _ROWS] += points[labels[i : i + _ROWS]]
    return x


def observed_labels(communities: NDArray, num_classes: int, noise: float, unknown: float, seed: int = 0) -> NDArray:
    """int64 (N,): the community, but a share `noise` has a random other one, and a share `unknown` has -1."""
    rng = np.random.Generator(np.random.PCG64(int(make_key(seed, 7))))
    labels = communities.astype(np.int64)
    if noise and num_classes > 1:
        wrong = np.flatnonzero(rng.random(len(labels)) < noise)
        labels[wrong] = (labels[wrong] + rng.integers(1, num_classes, len(wrong))) % num_classes
    if unknown:
        labels[rng.random(len(labels)) < unknown] = -1
    return labels


def split(labels: NDArray, shares: tuple[float, float, float], seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Disjoint random parts of the nodes whose label is known, each int64 ascending, of the given shares of them."""
    if min(shares) < 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares={shares} must not be negative and must sum to at most 1")
    known = np.flatnonzero(labels >= 0)
    order = np.random.Generator(np.random.PCG64(int(make_key(seed, 8)))).permutation(known)
    ends = (np.cumsum(shares) * len(known)).round().astype(np.int64)
    parts = np.split(order[: ends[-1]], ends[:-1])
    return tuple(np.sort(part) for part in parts)  # type: ignore[return-value]


def load_social(config: Config) -> Graph:
    """The network that `config.synthetic` describes, made anew or opened from `synthetic.folder`, where it is kept if
    that is set.

    Raises:
        ProjectError: the folder holds another graph.
    """
    settings = config.synthetic
    if not settings.folder:
        return _as_graph(make_social(settings), settings)
    folder = Path(settings.folder)
    about = repr(dataclasses.replace(settings, folder=""))
    if not (folder / "manifest.json").is_file():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        save_arrays(partial, make_social(settings), about, settings.communities)
        try:
            partial.rename(folder)
        except OSError:  # another process of this run was first, and made the same graph
            shutil.rmtree(partial)
    arrays, manifest = open_arrays(folder)
    if manifest["name"] != about:
        raise ProjectError(
            f"{folder} holds another graph than the config describes: remove the folder or change synthetic.folder"
        )
    return _as_graph(arrays, settings)


def make_social(settings: SyntheticConfig) -> dict[str, NDArray]:
    """A graph's arrays, named as in `gnn.data.storage`."""
    if settings.generator == "dcsbm":
        planted = plant_social(settings)
        communities = planted.communities
        indptr, indices = dcsbm(planted, settings.edges, settings.seed)
    else:
        indptr, indices, address = rmat(settings.nodes, settings.edges, seed=settings.seed)
        communities = (address.astype(np.int64) * settings.communities // settings.nodes).astype(np.int32)
    points = centres(settings.communities, settings.features, settings.signal, settings.seed)
    labels = observed_labels(communities, settings.communities, settings.label_noise, settings.unknown, settings.seed)
    train, val, test = split(labels, (settings.train_share, settings.val_share, settings.test_share), settings.seed)
    return {
        "indptr": indptr,
        "indices": indices,
        "features": features(communities, points, settings.seed),
        "labels": labels,
        "train": train,
        "val": val,
        "test": test,
    }


def plant_social(settings: SyntheticConfig) -> Planted:
    """The communities and expected degrees of that network, without drawing its edges."""
    return plant(
        settings.nodes,
        settings.edges,
        settings.communities,
        settings.mixing,
        settings.exponent,
        settings.max_degree,
        settings.size_skew,
        settings.seed,
    )


def _as_graph(arrays: dict[str, NDArray], settings: SyntheticConfig) -> Graph:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Graph(**tensors, num_classes=settings.communities, name=f"social-{settings.generator}")
