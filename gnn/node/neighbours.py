"""Parts of a graph that fit in a training step: sampled neighbourhoods, blocks for layer-wise inference, induced
subgraphs.

Legend: N nodes, E directed edges, B seeds, n_k nodes after k hops.

Neighbour sampling is GraphSAGE's (Hamilton, Ying, Leskovec 2017, algorithm 2) without replacement. Which neighbours of
node v are kept at hop k is a function of (seed, step, k, v) alone: two processes that meet the same node in one step
keep the same neighbours, so a batch split over processes gives the same gradient as the whole.

Compiled loops over int64 indptr and int32 indices, which may lie in a memory-mapped file (`gnn.data.storage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnn.core.compiled import compiled
from gnn.core.randomness import GOLDEN, below, make_key, mix64

ALL = -1  # as a fanout: keep every neighbour
_FLOYD = 64  # largest fanout for which Floyd's method, quadratic in the fanout, is used
_OK = 0
_OUTSIDE = 1
_REPEATED = 2


@dataclass(frozen=True)
class Block:
    """The edges of one layer of a batch, in local numbers; destinations are the first `num_dst` sources.

    Attributes:
        indptr: int64 (num_dst + 1,).
        indices: int32 (E_k,) local numbers of the sources, below num_src.
        num_src: number of sources.
    """

    indptr: Tensor
    indices: Tensor
    num_src: int

    @property
    def num_dst(self) -> int:
        return len(self.indptr) - 1


@dataclass(frozen=True)
class Sample:
    """A batch: its blocks in the order in which layers use them, and the graph's number of every local node.

    Attributes:
        blocks: the first reads the features of all `nodes`; the last writes the seeds.
        nodes: int64 (n_L,); those of block k's sources are nodes[:blocks[k].num_src], and the seeds are nodes[:B].
    """

    blocks: list[Block]
    nodes: Tensor

    @property
    def num_edges(self) -> int:
        return sum(len(block.indices) for block in self.blocks)


class NeighborSampler:
    """Multi-hop neighbour sampling over a CSR graph. Not safe for two threads at once: it keeps 4 N bytes of scratch
    memory.
    """

    def __init__(
        self, indptr: Tensor | NDArray, indices: Tensor | NDArray, fanouts: Sequence[int], seed: int = 0
    ) -> None:
        """
        Args:
            indptr, indices: int64 (N + 1,) and int32 (E,); neighbours of a row distinct.
            fanouts: largest number of neighbours kept for each seed, then for each node met at hop 1, and so on; -1 =
                all.

        Raises:
            ValueError: no fanout, or one that is neither positive nor -1; arrays that are not a CSR graph.
        """
        if not fanouts or any(f != ALL and f < 1 for f in fanouts):
            raise ValueError(f"fanouts={list(fanouts)} must be a list of positive numbers, or -1 for all neighbours")
        self.indptr, self.indices = _as_csr(indptr, indices)
        self.fanouts = tuple(fanouts)
        self.seed = seed
        self.num_nodes = len(self.indptr) - 1
        self._position = np.full(self.num_nodes, -1, np.int32)  # local number of each node in the batch being made

    def sample(self, seeds: Tensor | NDArray, step: int = 0) -> Sample:
        """The sampled neighbourhood of distinct int64 `seeds` (B,) for training step `step`.

        Raises:
            ValueError: a seed is not a node, or is repeated.
        """
        nodes = _as_nodes(seeds)
        _register(nodes, self._position, self.num_nodes)
        blocks: list[Block] = []
        try:
            for hop, fanout in enumerate(self.fanouts):
                key = make_key(self.seed, step, hop)
                indptr, picked = _pick_edges(self.indptr, nodes, fanout, key)
                indices, nodes = _relabel(self.indices, picked, nodes, self._position)
                blocks.append(Block(torch.from_numpy(indptr), torch.from_numpy(indices), len(nodes)))
        finally:
            _forget(nodes, self._position)
        return Sample(blocks[::-1], torch.from_numpy(nodes))


class InducedSubgraphs:
    """Subgraphs on chosen nodes, edges between them only, as in Cluster-GCN (Chiang et al. 2019) and GraphSAINT's
    node sampler.
    """

    def __init__(self, indptr: Tensor | NDArray, indices: Tensor | NDArray) -> None:
        self.indptr, self.indices = _as_csr(indptr, indices)
        self.num_nodes = len(self.indptr) - 1
        self._position = np.full(self.num_nodes, -1, np.int32)

    def induce(self, nodes: Tensor | NDArray) -> Block:
        """The edges among distinct int64 `nodes` (n,), local number i for nodes[i]; as many sources as destinations.

        Raises:
            ValueError: a number is not a node, or is repeated.
        """
        chosen = _as_nodes(nodes)
        _register(chosen, self._position, self.num_nodes)
        indptr, indices = _induce(self.indptr, self.indices, chosen, self._position)
        _forget(chosen, self._position)
        return Block(torch.from_numpy(indptr), torch.from_numpy(indices), len(chosen))


def epoch_batch(nodes: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """int64 (batch_size,): the batch of step 1, 2, ..., drawn without replacement within an epoch; a function of (seed,
    step).

    An epoch is len(nodes) // batch_size steps; the rest of a shuffle, smaller than a batch, is left out of that epoch.
    With fewer nodes than batch_size every batch is all of them.
    """
    if not len(nodes):
        raise ValueError(
            "there are no nodes to draw a batch from: give some nodes a label and put them in the training split"
        )
    epoch, index = divmod(step - 1, max(1, len(nodes) // batch_size))
    generator = torch.Generator().manual_seed(int(make_key(seed, epoch)) >> 1)
    order = torch.randperm(len(nodes), generator=generator)
    return nodes[order[index * batch_size : (index + 1) * batch_size]]


def edge_chunks(indptr: Tensor | NDArray, max_edges: int) -> list[tuple[int, int]]:
    """Ranges of rows that cover all N rows in order, each of at most `max_edges` edges (a single larger row stands
    alone).
    """
    ends = np.asarray(indptr)
    ranges = []
    start = 0
    while start < len(ends) - 1:
        stop = int(np.searchsorted(ends, ends[start] + max_edges, side="right")) - 1
        stop = min(max(stop, start + 1), start + max_edges)  # rows cost memory, too
        ranges.append((start, stop))
        start = stop
    return ranges


def _as_csr(indptr: Tensor | NDArray, indices: Tensor | NDArray) -> tuple[NDArray, NDArray]:
    ends, columns = (part.numpy() if isinstance(part, Tensor) else np.asarray(part) for part in (indptr, indices))
    if ends.dtype != np.int64 or columns.dtype != np.int32:
        raise ValueError(f"a graph has int64 indptr and int32 indices, not {ends.dtype} and {columns.dtype}")
    if ends.ndim != 1 or not len(ends) or ends[0] != 0 or ends[-1] != len(columns):
        raise ValueError(f"indptr must start at 0 and end at the number of edges, {len(columns)}")
    return ends, columns


def _as_nodes(nodes: Tensor | NDArray) -> NDArray:
    array = nodes.numpy() if isinstance(nodes, Tensor) else np.asarray(nodes)
    if array.dtype.kind not in "iu" and len(array):
        raise ValueError(f"node numbers must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, np.int64)


def _register(nodes: NDArray, position: NDArray, num_nodes: int) -> None:
    """Give nodes[i] the local number i, or raise and leave `position` clean."""
    status, at = _number(nodes, position)
    if status == _OUTSIDE:
        raise ValueError(f"node {nodes[at]} is not in the graph: nodes are numbered 0 to {num_nodes - 1}")
    if status == _REPEATED:
        raise ValueError(f"node {nodes[at]} is named twice: the nodes of a batch must be distinct")


@compiled(nogil=True)
def _number(nodes: NDArray, position: NDArray) -> tuple[int, int]:
    for i in range(len(nodes)):
        v = nodes[i]
        outside = v < 0 or v >= len(position)
        if outside or position[v] >= 0:
            _forget(nodes[:i], position)
            return (_OUTSIDE if outside else _REPEATED), i
        position[v] = i
    return _OK, 0


@compiled(nogil=True)
def _forget(nodes: NDArray, position: NDArray) -> None:
    for v in nodes:
        position[v] = -1


@compiled(nogil=True)
def _pick_edges(indptr: NDArray, nodes: NDArray, fanout: int, key: int) -> tuple[NDArray, NDArray]:
    """Row ends (n + 1,) and, row by row, the places in `indices` of the edges kept: a loop of its own, so that loads
    overlap.
    """
    n = len(nodes)
    first = np.empty(n, np.int64)
    degree = np.empty(n, np.int64)
    ends = np.zeros(n + 1, np.int64)
    for i in range(n):
        first[i] = indptr[nodes[i]]
        degree[i] = indptr[nodes[i] + 1] - first[i]
        ends[i + 1] = ends[i] + (degree[i] if fanout < 0 else min(degree[i], fanout))
    picked = np.empty(ends[n], np.int64)
    for i in range(n):
        row = picked[ends[i] : ends[i + 1]]
        z = mix64(key ^ (np.uint64(nodes[i]) * GOLDEN))
        if len(row) == degree[i]:
            for j in range(len(row)):
                row[j] = first[i] + j
        elif fanout <= _FLOYD:
            _floyd(row, degree[i], first[i], z)
        else:
            _selection(row, degree[i], first[i], z)
    return ends, picked


@compiled(nogil=True)
def _floyd(row: NDArray, degree: int, first: int, z: int) -> None:
    """len(row) distinct numbers below `degree`, every set equally likely (Floyd; Bentley 1987), shifted by `first`."""
    for j in range(len(row)):
        top = degree - len(row) + j
        z = mix64(z + GOLDEN)
        draw = first + below(z, top + 1)
        for k in range(j):
            if row[k] == draw:
                draw = first + top  # taken: the newest number, which nobody before could draw
                break
        row[j] = draw


@compiled(nogil=True)
def _selection(row: NDArray, degree: int, first: int, z: int) -> None:
    """The same by one pass over the candidates (Knuth, volume 2, algorithm S)."""
    chosen = 0
    for candidate in range(degree):
        z = mix64(z + GOLDEN)
        if below(z, degree - candidate) < len(row) - chosen:
            row[chosen] = first + candidate
            chosen += 1
            if chosen == len(row):
                return


@compiled(nogil=True)
def _relabel(indices: NDArray, picked: NDArray, nodes: NDArray, position: NDArray) -> tuple[NDArray, NDArray]:
    """Local numbers int32 of the neighbours at places `picked`, and `nodes` continued by those met for the first
    time.
    """
    local = np.empty(len(picked), np.int32)
    for e in range(len(picked)):  # independent loads: the processor keeps several on their way
        local[e] = indices[picked[e]]
    count = len(nodes)
    longer = np.empty(min(count + len(picked), len(position)), np.int64)
    longer[:count] = nodes
    for e in range(len(local)):
        v = local[e]
        at = position[v]
        if at < 0:
            at = position[v] = count
            longer[count] = v
            count += 1
        local[e] = at
    return local, longer[:count].copy()


@compiled(nogil=True)
def _induce(indptr: NDArray, indices: NDArray, nodes: NDArray, position: NDArray) -> tuple[NDArray, NDArray]:
    n = len(nodes)
    ends = np.zeros(n + 1, np.int64)
    for i in range(n):
        count = 0
        for e in range(indptr[nodes[i]], indptr[nodes[i] + 1]):
            count += position[indices[e]] >= 0
        ends[i + 1] = ends[i] + count
    local = np.empty(ends[n], np.int32)
    at = 0
    for i in range(n):
        for e in range(indptr[nodes[i]], indptr[nodes[i] + 1]):
            if position[indices[e]] >= 0:
                local[at] = position[indices[e]]
                at += 1
    return ends, local
