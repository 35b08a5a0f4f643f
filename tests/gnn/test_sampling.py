"""Sampled blocks against brute-force neighbourhoods, induced subgraphs against scipy, partitions, and graphs on
disk.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from common.errors import ProjectError
from gnn.data import storage
from gnn.data.csr import undirected_csr
from gnn.data.synthetic import dcsbm, plant, rmat
from gnn.node import neighbours as sampling
from gnn.node.clusters import ClusterBatches, cut_share, partition
from gnn.node.neighbours import InducedSubgraphs, NeighborSampler, edge_chunks, epoch_batch


@pytest.fixture(scope="module")
def graph():
    """A skewed graph of 400 nodes with hubs; nodes 400 to 404 are isolated."""
    indptr, indices, _ = rmat(400, 3000, seed=1)
    return np.concatenate([indptr, [indptr[-1]] * 5]), indices


def neighbours(graph, v):
    indptr, indices = graph
    return set(indices[indptr[v] : indptr[v + 1]].tolist())


def assert_block(graph, block, nodes, fanout):
    """Every row holds real edges, none twice, min(degree, fanout) of them."""
    ends, local = block.indptr.numpy(), block.indices.numpy()
    assert ends.dtype == np.int64 and local.dtype == np.int32
    assert ends[0] == 0 and ends[-1] == len(local)
    for i in range(block.num_dst):
        row = local[ends[i] : ends[i + 1]]
        found, real = [int(nodes[j]) for j in row], neighbours(graph, int(nodes[i]))
        assert len(set(found)) == len(found)
        assert set(found) <= real
        assert len(found) == (len(real) if fanout == sampling.ALL else min(len(real), fanout))
        assert (row < block.num_src).all()


@pytest.mark.parametrize("fanouts", [[5], [5, 3], [10, 10, 2], [-1, 4], [4, -1], [200, 100]])
def test_blocks_against_brute_force(graph, fanouts):
    sampler = NeighborSampler(*graph, fanouts, seed=3)
    seeds = np.array([7, 0, 401, 399, 123, 50, 8])  # 0 or its like is a hub, 401 is isolated
    sample = sampler.sample(seeds, step=9)
    nodes = sample.nodes.numpy()
    assert nodes.dtype == np.int64 and len(np.unique(nodes)) == len(nodes)
    assert nodes[: len(seeds)].tolist() == seeds.tolist()
    assert len(sample.blocks) == len(fanouts)
    for block, fanout in zip(reversed(sample.blocks), fanouts, strict=True):  # hop 1 is the last layer's
        assert_block(graph, block, nodes, fanout)
    sizes = [len(seeds), *(block.num_src for block in reversed(sample.blocks))]
    assert [block.num_dst for block in reversed(sample.blocks)] == sizes[:-1] and sizes[-1] == len(nodes)
    for block in sample.blocks:  # no source that is neither a destination nor somebody's neighbour
        assert set(range(block.num_dst, block.num_src)) <= set(block.indices.tolist())
    assert sample.num_edges == sum(int(block.indptr[-1]) for block in sample.blocks)


def test_all_neighbours_are_the_whole_neighbourhood(graph):
    sample = NeighborSampler(*graph, [-1, -1]).sample(np.array([3]))
    one = neighbours(graph, 3) | {3}
    two = one.union(*(neighbours(graph, v) for v in one))
    assert set(sample.nodes.tolist()) == two


@pytest.mark.parametrize("fanout", [1, 3, 7, 63, 64, 65, 90, 99])
def test_every_neighbour_equally_likely(fanout):
    """A hub of degree 100, both methods of drawing: single inclusion, by chi-square, and pairs."""
    star = undirected_csr(np.zeros(100, np.int64), np.arange(1, 101), 101)
    sampler, draws = NeighborSampler(*star, [fanout], seed=fanout), 4000
    chosen = np.zeros((draws, 100), bool)
    for step in range(draws):
        chosen[step, sampler.sample(np.array([0]), step).nodes.numpy()[1:] - 1] = True
    assert (chosen.sum(1) == fanout).all()
    p = fanout / 100
    # counts have variance draws p (1 - p) and sum to a constant: the statistic is about chi-square with 99 degrees of
    # freedom
    statistic = ((chosen.sum(0) - draws * p) ** 2).sum() / (draws * p * (1 - p)) * 99 / 100
    assert 99 - 5 * 14.1 < statistic < 99 + 5 * 14.1
    if 1 < fanout < 99:
        both, pair = (chosen[:, :-1] & chosen[:, 1:]).mean(), p * (fanout - 1) / 99
        assert both == pytest.approx(pair, abs=5 * np.sqrt(pair * (1 - pair) / draws / 99) * 2)


def test_hops_and_steps_draw_independently():
    star = undirected_csr(np.zeros(50, np.int64), np.arange(1, 51), 51)
    sampler = NeighborSampler(*star, [10, 10])
    overlap = []
    for step in range(300):
        sample = sampler.sample(np.array([0]), step)
        nodes = sample.nodes.numpy()
        first, second = (set(nodes[b.indices[: b.indptr[1]].numpy()].tolist()) for b in reversed(sample.blocks))
        overlap.append(len(first & second))
    assert np.mean(overlap) == pytest.approx(2.0, abs=0.4)  # 10 of 50 twice


def test_reproducible_and_a_function_of_seed_and_step(graph):
    def drawn(seed, step, seeds=(1, 2, 3)):
        sample = NeighborSampler(*graph, [3, 3], seed=seed).sample(np.array(seeds), step)
        return [sample.nodes, *(t for b in sample.blocks for t in (b.indptr, b.indices))]

    assert all(map(torch.equal, drawn(1, 5), drawn(1, 5)))
    sampler = NeighborSampler(*graph, [3, 3], seed=1)
    for step in (1, 2, 3):
        sampler.sample(np.arange(20), step)
    again = sampler.sample(np.array([1, 2, 3]), 5)  # what was drawn before does not matter
    assert torch.equal(again.nodes, drawn(1, 5)[0])
    for other in (drawn(2, 5), drawn(1, 6)):
        assert len(other[0]) != len(again.nodes) or not torch.equal(other[0], again.nodes)


def test_a_node_keeps_its_neighbours_in_any_batch(graph):
    """So that processes with different seed nodes agree on the neighbours of nodes they share."""

    def rows(seeds):
        sample = NeighborSampler(*graph, [4, 4], seed=2).sample(np.array(seeds), 7)
        found = []
        for block in sample.blocks:
            parts = np.split(sample.nodes.numpy()[block.indices.numpy()], block.indptr.numpy()[1:-1])
            found.append({int(v): sorted(part.tolist()) for v, part in zip(sample.nodes, parts)})
        return found

    whole, left, right = rows([5, 6, 7, 8]), rows([5, 6]), rows([8, 7])
    for hop in range(2):
        assert whole[hop] == left[hop] | right[hop]


def test_seeds_may_be_empty_or_all(graph):
    sampler = NeighborSampler(*graph, [2, 2])
    empty = sampler.sample(np.empty(0, np.int64))
    assert len(empty.nodes) == 0 and [b.num_dst for b in empty.blocks] == [0, 0]
    everything = sampler.sample(np.arange(405))
    assert len(everything.nodes) == 405 and everything.blocks[0].num_src == 405


@pytest.mark.parametrize(
    ("seeds", "words"),
    [([-1], "node -1 is not"), ([3, 405], "node 405 is not"), ([3, 4, 3], "named twice"), ([0.5], "integers")],
)
def test_bad_seeds(graph, seeds, words):
    sampler, subgraphs = NeighborSampler(*graph, [3]), InducedSubgraphs(*graph)
    for call in (sampler.sample, subgraphs.induce):
        with pytest.raises(ValueError, match=words):
            call(np.array(seeds))
    assert len(sampler.sample(np.array([3, 4])).nodes) >= 2  # the scratch memory was left clean
    assert (sampler._position == -1).all() and (subgraphs._position == -1).all()


@pytest.mark.parametrize("fanouts", [[], [0], [5, 0], [-2]])
def test_bad_fanouts(graph, fanouts):
    with pytest.raises(ValueError, match="fanouts"):
        NeighborSampler(*graph, fanouts)


def test_bad_arrays(graph):
    indptr, indices = graph
    with pytest.raises(ValueError, match="int64 indptr and int32"):
        NeighborSampler(indptr, indices.astype(np.int64), [1])
    with pytest.raises(ValueError, match="end at the number of edges"):
        NeighborSampler(indptr, indices[:-1], [1])


def test_induced_subgraph_against_scipy(graph):
    indptr, indices = graph
    a = sp.csr_matrix((np.ones(len(indices)), indices, indptr), shape=(405, 405))
    nodes = np.random.default_rng(0).permutation(405)[:150]
    block = InducedSubgraphs(*graph).induce(nodes)
    assert block.num_src == block.num_dst == 150
    ours = sp.csr_matrix((np.ones(len(block.indices)), block.indices, block.indptr), shape=(150, 150))
    expected = a[nodes][:, nodes]
    assert (ours != expected).nnz == 0 and ours.nnz == expected.nnz > 0


def test_epoch_batches():
    nodes = torch.arange(100, 203)
    epoch = [epoch_batch(nodes, 10, seed=1, step=step) for step in range(1, 11)]
    together = torch.cat(epoch)
    # 3 are left out of this epoch
    assert len(together.unique()) == 100 and set(together.tolist()) <= set(nodes.tolist())
    second = torch.cat([epoch_batch(nodes, 10, seed=1, step=step) for step in range(11, 21)])
    assert len(second.unique()) == 100 and not torch.equal(together, second)
    assert set(together.tolist()) != set(second.tolist())  # others
    assert torch.equal(epoch_batch(nodes, 10, 1, 13), epoch_batch(nodes, 10, 1, 13))
    assert sorted(epoch_batch(nodes, 1000, 1, 4).tolist()) == nodes.tolist()
    with pytest.raises(ValueError, match="no nodes"):
        epoch_batch(nodes[:0], 10, 1, 1)


def test_edge_chunks(graph):
    indptr = graph[0]
    for limit in (1, 50, 10**9):
        ranges = edge_chunks(indptr, limit)
        assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])] and ranges[-1][1] == 405
        assert all(indptr[b] - indptr[a] <= limit or b == a + 1 for a, b in ranges)
    assert edge_chunks(indptr, 10**9) == [(0, 405)]


# -- cluster batches ---------------------------------------------------------------------------------------------------


def test_partition_finds_planted_communities():
    p = plant(4000, 60_000, 8, 0.1, seed=0)
    indptr, indices = dcsbm(p, 60_000)
    part = partition(indptr, indices, 8)
    sizes = np.bincount(part, minlength=8)
    assert sizes.sum() == 4000 and sizes.max() <= np.ceil(1.05 * 500)
    assert cut_share(indptr, indices, part) < 0.2  # planted: 0.09; random parts: 0.875
    shuffled = np.random.default_rng(0).permutation(part)
    assert cut_share(indptr, indices, shuffled) == pytest.approx(0.875, abs=0.01)


def test_partition_edge_cases(graph):
    for parts in (1, 2, 100, 405):
        part = partition(*graph, parts)
        assert part.min() >= 0 and part.max() < parts
        assert np.bincount(part, minlength=parts).max() <= np.ceil(1.05 * 405 / parts)
    for parts in (0, 406):
        with pytest.raises(ValueError, match="parts"):
            partition(*graph, parts)


def test_cluster_batches(graph):
    batches = ClusterBatches(*graph, parts=12, per_batch=3, seed=1)
    assert batches.steps_per_epoch == 4
    seen = []
    for step in range(1, 5):
        nodes, block = batches.batch(step)
        assert block.num_dst == block.num_src == len(nodes)
        ends, local = block.indptr.numpy(), block.indices.numpy()
        inside = set(nodes.tolist())
        for i in range(0, len(nodes), 10):
            found = {int(nodes[j]) for j in local[ends[i] : ends[i + 1]]}
            assert found == neighbours(graph, int(nodes[i])) & inside
        seen += nodes.tolist()
    assert sorted(seen) == list(range(405))  # an epoch sees every node once
    with pytest.raises(ValueError, match="per_batch"):
        ClusterBatches(*graph, parts=3, per_batch=4)


# -- graphs on disk ----------------------------------------------------------------------------------------------------


def test_memory_map_equals_memory(graph, tmp_path):
    indptr, indices = graph
    x = np.random.default_rng(0).standard_normal((405, 3)).astype(np.float32)
    storage.save_arrays(
        tmp_path / "g", {"indptr": indptr, "indices": indices, "features": x, "train": np.arange(5)}, "toy", 4
    )
    arrays, manifest = storage.open_arrays(tmp_path / "g")
    assert manifest["name"] == "toy" and manifest["num_classes"] == 4 and manifest["num_nodes"] == 405
    assert np.array_equal(arrays["features"], x) and np.array_equal(arrays["train"], np.arange(5))
    assert isinstance(arrays["indices"].base, np.memmap)
    one = NeighborSampler(indptr, indices, [4, 4]).sample(np.arange(30), 2)
    two = NeighborSampler(arrays["indptr"], arrays["indices"], [4, 4]).sample(np.arange(30), 2)
    assert torch.equal(one.nodes, two.nodes) and all(
        torch.equal(a.indices, b.indices) for a, b in zip(one.blocks, two.blocks)
    )
    arrays["features"][0] = 7  # a private copy of the page
    assert np.array_equal(storage.open_arrays(tmp_path / "g", in_memory=True)[0]["features"], x)


def test_damaged_folders(graph, tmp_path):
    indptr, indices = graph
    folder = tmp_path / "g"
    with pytest.raises(ProjectError, match="no graph here"):
        storage.open_arrays(folder)
    with pytest.raises(ValueError, match="int64"):
        storage.save_arrays(folder, {"indptr": indptr.astype(np.int32), "indices": indices})
    with pytest.raises(ValueError, match="needs indptr"):
        storage.save_arrays(folder, {"indices": indices})
    storage.save_arrays(folder, {"indptr": indptr, "indices": indices})
    np.save(folder / "indices.npy", indices[:-1])
    with pytest.raises(ProjectError, match=r"indices\.npy is int32"):
        storage.open_arrays(folder)
    (folder / "indices.npy").write_bytes(b"nonsense")
    with pytest.raises(ProjectError, match="cannot be read"):
        storage.open_arrays(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 99, "arrays": {"indptr": {}, "indices": {}}}))
    with pytest.raises(ProjectError, match="format 1"):
        storage.open_arrays(folder)
