"""Cluster batches (Chiang et al. 2019, "Cluster-GCN"): cut a graph into many small parts once, train on a few of them
at a time.

Legend: N nodes, E directed edges, P parts, q parts a batch.

Cluster-GCN cuts with METIS. This packs the communities that Louvain finds into parts of equal size, then moves single
nodes by linear deterministic greedy streaming (Stanton & Kliot 2012), again and again (Nishimura & Ugander 2013).
Streaming alone needs O(E) a round and no more memory than the graph, but left 67 % of the edges cut where Louvain's
communities leave 10 % (20 planted parts of 10,000 nodes, 10 % of the edges drawn at random).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnn.community.louvain_leiden import louvain
from gnn.core.compiled import compiled
from gnn.node.neighbours import Block, InducedSubgraphs, epoch_batch


def partition(
    indptr: NDArray, indices: NDArray, parts: int, rounds: int = 3, slack: float = 0.05, seed: int = 0
) -> NDArray:
    """int32 (N,): the part of every node, 0 .. P - 1; no part has more than (1 + slack) N / P nodes, rounded up.

    The nodes stand in a row, community after community and breadth-first within each; the row is cut into P equal
    pieces. Then, in `rounds` rounds, each node goes where its number of neighbours times (1 - filling of the part) is
    largest.

    Raises:
        ValueError: parts is not between 1 and N.
    """
    num_nodes = len(indptr) - 1
    if not 1 <= parts <= num_nodes:
        raise ValueError(f"parts={parts} must be at least 1 and at most the number of nodes, {num_nodes}")
    order = _breadth_first(indptr, indices)
    order = order[np.argsort(louvain(indptr, indices, seed=seed).labels[order], kind="stable")]
    part = np.empty(num_nodes, np.int32)
    part[order] = np.arange(num_nodes) * parts // num_nodes
    size = np.bincount(part, minlength=parts)
    capacity = int(np.ceil((1 + slack) * num_nodes / parts))
    for _ in range(rounds):
        _stream(indptr, indices, order, part, size, capacity)
    return part


@compiled(nogil=True)
def _breadth_first(indptr: NDArray, indices: NDArray) -> NDArray:
    """int32 (N,): all nodes, component after component, each in breadth-first order from its lowest number."""
    n = len(indptr) - 1
    order = np.empty(n, np.int32)
    seen = np.zeros(n, np.bool_)
    count = 0
    for root in range(n):
        if seen[root]:
            continue
        seen[root] = True
        order[count] = root
        head = count
        count += 1
        while head < count:
            v = order[head]
            head += 1
            for e in range(indptr[v], indptr[v + 1]):
                u = indices[e]
                if not seen[u]:
                    seen[u] = True
                    order[count] = u
                    count += 1
    return order


@compiled(nogil=True)
def _stream(indptr: NDArray, indices: NDArray, order: NDArray, part: NDArray, size: NDArray, capacity: int) -> None:
    """One round: take each node of `order` out of its part and place it greedily; it stays where no other part suits
    it better.
    """
    neighbours = np.zeros(len(size), np.int64)  # of the node at hand, in each part
    for v in order:
        size[part[v]] -= 1
        best = part[v]
        best_score = 0.0
        for e in range(indptr[v], indptr[v + 1]):
            neighbours[part[indices[e]]] += 1
        for e in range(indptr[v], indptr[v + 1]):
            r = part[indices[e]]
            score = neighbours[r] * (1 - size[r] / capacity)
            if score > best_score:  # a full part has score 0
                best = r
                best_score = score
            neighbours[r] = 0
        part[v] = best
        size[best] += 1


def cut_share(indptr: NDArray, indices: NDArray, part: NDArray) -> float:
    """Share of the edges whose ends lie in different parts; 1 - 1 / P is what random parts give."""
    return float(_cut(indptr, indices, part)) / max(1, len(indices))


@compiled(nogil=True)
def _cut(indptr: NDArray, indices: NDArray, part: NDArray) -> int:
    cut = 0
    for v in range(len(indptr) - 1):
        for e in range(indptr[v], indptr[v + 1]):
            cut += part[v] != part[indices[e]]
    return cut


class ClusterBatches:
    """Batches of q random parts with all edges among them, those between the parts included (Cluster-GCN, section
    3.2).
    """

    def __init__(
        self, indptr: Tensor | NDArray, indices: Tensor | NDArray, parts: int, per_batch: int, seed: int = 0
    ) -> None:
        """
        Args:
            parts: P, into which the graph is cut.
            per_batch: q, parts of a batch; a batch has about q N / P nodes.

        Raises:
            ValueError: per_batch is not between 1 and parts, or parts does not fit the graph.
        """
        if not 1 <= per_batch <= parts:
            raise ValueError(f"per_batch={per_batch} must be at least 1 and at most parts={parts}")
        self.subgraphs = InducedSubgraphs(indptr, indices)
        self.part = partition(self.subgraphs.indptr, self.subgraphs.indices, parts)
        self.per_batch = per_batch
        self.seed = seed
        self._members = np.argsort(self.part, kind="stable")
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(self.part, minlength=parts))])
        self._parts = torch.arange(parts)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._parts) // self.per_batch

    def batch(self, step: int) -> tuple[Tensor, Block]:
        """Node numbers int64 (n,) and the edges among them, for step 1, 2, ...: a function of (seed, step), see
        `epoch_batch`.
        """
        chosen = epoch_batch(self._parts, self.per_batch, self.seed, step)
        nodes = np.concatenate([self._members[self._ends[p] : self._ends[p + 1]] for p in chosen.tolist()])
        return torch.from_numpy(nodes), self.subgraphs.induce(nodes)
