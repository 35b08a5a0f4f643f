"""Pairs that are not links: uniform ones for training and evaluation, and hard ones that share an end with a link.

Pairs u < v of N nodes are numbered 0 .. N (N - 1) / 2 - 1, row by row. In that numbering "the r-th pair that is not an
edge" has a closed form, so that negatives are exactly uniform without rejection, on a dense graph as on a sparse one.

Legend: N nodes, M undirected edges, P positives, K negatives a positive. Pairs are int64 (2, M) on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gnn.link.splits import canonical


def pair_index(pairs: Tensor, num_nodes: int) -> Tensor:
    """The number of each canonical pair (2, M) among all pairs u < v of N nodes, row by row. int64 (M,)."""
    u, v = pairs
    return u * (2 * num_nodes - u - 1) // 2 + v - u - 1


def pair_at(index: Tensor, num_nodes: int) -> Tensor:
    """The inverse of `pair_index`: int64 (M,) -> (2, M)."""
    n = 2 * num_nodes - 1
    # from u (n - u) / 2 <= index; the root may round to a neighbour
    u = ((n - (n**2 - 8 * index.double()).sqrt()) / 2).long()
    u = u - (u * (n - u) // 2 > index).long()
    u = u + ((u + 1) * (n - u - 1) // 2 <= index).long()
    return torch.stack([u, index - u * (n - u) // 2 + u + 1])


class NegativeSampler:
    """Uniform pairs u < v of nodes that are not among `excluded` canonical pairs (2, M).

    Of the pairs that are not excluded, number r stands behind r + j pairs, j being the number of excluded ones before
    it, which a binary search finds. ValueError if no pair is left.
    """

    def __init__(self, excluded: Tensor, num_nodes: int) -> None:
        index = pair_index(canonical(excluded, num_nodes), num_nodes)  # (M,), ascending since the pairs are
        self.num_nodes = num_nodes
        self.total = num_nodes * (num_nodes - 1) // 2 - len(index)  # number of pairs to draw from
        self.free_before = index - torch.arange(len(index))  # (M,) free pairs before each excluded one
        if self.total < 1:
            raise ValueError(
                f"all pairs of the {num_nodes} nodes are linked: there are no negatives; use a sparser graph"
            )

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` pairs, each uniform and independent of the others (so some may repeat): for training. int64 (2,
        count).
        """
        return self._pairs(torch.randint(self.total, (count,), generator=generator))

    def draw_distinct(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` different pairs in random order: for evaluation. int64 (2, count). ValueError if there are not
        that many.
        """
        if count > self.total:
            raise ValueError(
                f"{count} different negatives were asked for, but only {self.total} pairs of the {self.num_nodes} "
                "nodes "
                "are not linked: evaluate on a smaller share of the edges, or use a sparser graph"
            )
        if count * 3 > self.total:
            return self._pairs(torch.randperm(self.total, generator=generator)[:count])
        rank = torch.empty(0, dtype=torch.int64)
        while len(rank) < count:
            rank = torch.unique(torch.cat([rank, torch.randint(self.total, (count + 16,), generator=generator)]))
        return self._pairs(rank[torch.randperm(len(rank), generator=generator)[:count]])

    def _pairs(self, rank: Tensor) -> Tensor:
        return pair_at(rank + torch.searchsorted(self.free_before, rank, right=True), self.num_nodes)


class Strangers:
    """For each node the nodes that it may be wrongly linked to: not itself, and none that it shares an edge of any part
    with.

    Args: canonical pairs `edges` (2, M) of all parts.
    """

    def __init__(self, edges: Tensor, num_nodes: int) -> None:
        both = torch.cat([edges, edges.flip(0)], 1).numpy()
        row, column = both[:, np.lexsort((both[1], both[0]))]
        self.num_nodes = num_nodes
        self.indptr = np.concatenate([[0], np.bincount(row, minlength=num_nodes).cumsum()])
        self.neighbours = column

    def mask(self, node: int) -> np.ndarray:
        """bool (N,), true for strangers of `node`."""
        mask = np.ones(self.num_nodes, dtype=bool)
        mask[self.neighbours[self.indptr[node] : self.indptr[node + 1]]] = False
        mask[node] = False
        return mask

    def require(self, nodes: np.ndarray, count: int) -> None:
        """ValueError unless each of `nodes` (any shape) has at least `count` strangers."""
        available = self.num_nodes - 1 - np.diff(self.indptr)[nodes]
        if available.size and available.min() < count:
            least = int(available.min())
            raise ValueError(
                f"node {nodes.flat[available.argmin()]} has only {least} nodes that it is not linked to, and {count} "
                f"negatives at each end of an edge were asked for: set link.num_negatives to at most {2 * least}"
                + ("" if least else ", which is none: a node linked to all others cannot be asked about")
            )


def corrupt_uniformly(positives: Tensor, edges: Tensor, num_nodes: int, count: int, seed: int) -> Tensor:
    """`count` easy negatives for each positive: half keep its first end, half its second, and the other end is a
    uniform stranger.

    Args: canonical `positives` (2, P); canonical `edges` (2, M) of all parts; `count` even. Returns int64 (2, P,
    count), end kept first; within a row all pairs differ. ValueError where a node has too few strangers.
    """
    half = _half(count)
    strangers = Strangers(edges, num_nodes)
    rng = np.random.default_rng(seed)
    strangers.require(positives.numpy(), half)
    other = np.empty((*positives.shape, half), dtype=np.int64)  # (2 ends, P, K / 2)
    for end in range(2):
        for i, node in enumerate(positives[end].tolist()):
            other[end, i] = rng.choice(np.flatnonzero(strangers.mask(node)), half, replace=False)
    return _join(positives, torch.from_numpy(other))


def corrupt_hard(positives: Tensor, edges: Tensor, num_nodes: int, count: int, seed: int, score_rows: list) -> Tensor:
    """`count` hard negatives for each positive, the hardest first at either end (Li et al. 2023, section 4).

    At each end u of a positive, every heuristic ranks the strangers w of u by its score of (u, w); equal scores share
    the best of their ranks. The ranks of a stranger are averaged, and the count / 2 best strangers are taken; what is
    still equal, such as nodes without any path to u, is decided by lot. A model must then tell the positive from pairs
    that look as likely, not from pairs far apart.
    Args: as `corrupt_uniformly`; `score_rows`: functions from nodes int64 (B,) to scores (B, N), of training edges and
        features only.
    """
    half = _half(count)
    strangers = Strangers(edges, num_nodes)
    rng = np.random.default_rng(seed)
    strangers.require(positives.numpy(), half)
    nodes, place = np.unique(positives.numpy(), return_inverse=True)
    chosen = np.empty((len(nodes), half), dtype=np.int64)
    size = max(1, 2**18 // num_nodes)  # rows of scores at a time: 2 MB for each heuristic
    for start in range(0, len(nodes), size):
        part = nodes[start : start + size]
        scores = [rows(part) for rows in score_rows]  # of (B, N)
        for i, node in enumerate(part):
            candidates = np.flatnonzero(strangers.mask(node))  # (C,)
            rank = sum(competition_rank(score[i, candidates]) for score in scores)
            best = np.lexsort((rng.random(len(candidates)), rank))[:half]
            chosen[start + i] = candidates[best]
    return _join(positives, torch.from_numpy(chosen)[torch.from_numpy(place).view(positives.shape)])


def competition_rank(scores: np.ndarray) -> np.ndarray:
    """1 + the number of entries that score higher, int64 (C,): equal scores share the best of their ranks."""
    ascending = np.sort(scores)
    return 1 + len(scores) - np.searchsorted(ascending, scores, side="right")


def _half(count: int) -> int:
    if count < 2 or count % 2:
        raise ValueError(
            f"{count} negatives a positive: half belong to each end, so set link.num_negatives to an even number above "
            "0"
        )
    return count // 2


def _join(positives: Tensor, other: Tensor) -> Tensor:
    """Ends that are kept (2, P) and nodes put at the other end, (2, P, K / 2), as pairs (2, P, K)."""
    kept = positives[:, :, None].expand_as(other)  # (2 ends, P, K / 2)
    return torch.stack([torch.cat([kept[0], kept[1]], 1), torch.cat([other[0], other[1]], 1)])
