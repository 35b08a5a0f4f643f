"""Louvain and Leiden against networkx, leidenalg and what the papers guarantee."""

from __future__ import annotations

import igraph
import leidenalg
import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp

from gnn.community import kernels
from gnn.community.louvain_leiden import leiden, louvain
from gnn.community.metrics import ari, as_csr, modularity, num_communities
from tests.helpers import ROOT

CORA = ROOT / "data/planetoid/Cora"
METHODS = [louvain, leiden]


def arrays(graph: nx.Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices, weights of a networkx graph on nodes 0 ... N-1."""
    matrix = sp.csr_array(nx.to_scipy_sparse_array(graph, nodelist=range(len(graph)), dtype=float))
    return matrix.indptr, matrix.indices, matrix.data


def groups(labels: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(labels == c).tolist()) for c in np.unique(labels)]


def random_graph(seed: int, nodes: int = 60, p: float = 0.1, weighted: bool = True) -> nx.Graph:
    rng = np.random.default_rng(seed)
    graph = nx.gnp_random_graph(nodes, p, seed=seed)
    for _, _, data in graph.edges(data=True):
        data["weight"] = float(rng.gamma(0.7)) + 1e-3 if weighted else 1.0
    return graph


def planted(seed: int, blocks: int = 8, size: int = 40) -> nx.Graph:
    return nx.convert_node_labels_to_integers(nx.planted_partition_graph(blocks, size, 0.25, 0.01, seed=seed))


def karate() -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(34))
    graph.add_edges_from(nx.karate_club_graph().edges())  # without weights
    return graph


def cora() -> nx.Graph:
    if not (CORA / "raw/ind.cora.graph").is_file():
        pytest.skip("data/planetoid/Cora is not there")
    from torch_geometric.datasets import Planetoid

    data = Planetoid(str(CORA.parent), "Cora")[0]
    graph = nx.Graph()
    graph.add_nodes_from(range(data.num_nodes))
    graph.add_edges_from(data.edge_index.T.tolist())
    return graph


def peer_leiden(graph: nx.Graph, **options: object) -> float:
    """The modularity that leidenalg finds."""
    peer = igraph.Graph(len(graph), list(graph.edges()))
    weights = [data.get("weight", 1.0) for _, _, data in graph.edges(data=True)]
    found = leidenalg.find_partition(peer, leidenalg.ModularityVertexPartition, weights=weights, seed=0, **options)
    return nx.community.modularity(graph, map(set, found))


def connected(graph: nx.Graph, labels: np.ndarray) -> bool:
    return all(nx.is_connected(graph.subgraph(group)) for group in groups(labels))


# -- algorithms against their peers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_karate_optimum(method):
    """The best partition of the karate club has Q = 0.4198 (Brandes et al. 2008)."""
    indptr, indices, _ = arrays(karate())
    result = method(indptr, indices, restarts=20)
    assert result.modularity == pytest.approx(0.4197896, abs=1e-6)
    assert result.num_communities == 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_recovered(method, seed):
    graph = planted(seed)
    indptr, indices, _ = arrays(graph)
    truth = np.repeat(np.arange(8), 40)
    result = method(indptr, indices, seed=seed)
    assert ari(result.labels, truth) > 0.99
    assert result.modularity >= modularity(indptr, indices, truth) - 1e-12


@pytest.mark.parametrize("weighted", [False, True])
def test_modularity_reaches_that_of_the_peers(weighted):
    """On random graphs, where many partitions are nearly as good and greedy methods differ by luck: means over
    graphs and seeds.
    """
    found = []
    for seed in range(4):
        graph = random_graph(seed, 200, 0.03, weighted)
        indptr, indices, weights = arrays(graph)
        found.append(
            [
                np.mean([louvain(indptr, indices, weights, seed=s).modularity for s in range(40)]),
                np.mean(
                    [nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=s)) for s in range(10)]
                ),
                np.mean([leiden(indptr, indices, weights, seed=s).modularity for s in range(20)]),
                peer_leiden(graph, n_iterations=-1),
            ]
        )
    ours, peer, ours_leiden, leiden_peer = np.mean(found, axis=0)
    assert ours >= peer - 0.003
    assert ours_leiden >= leiden_peer - 0.003 and ours_leiden > ours + 0.002


@pytest.mark.parametrize("resolution", [0.5, 2.0])
def test_resolution_reaches_that_of_networkx(resolution):
    graph = planted(0)
    indptr, indices, weights = arrays(graph)
    peer = nx.community.louvain_communities(graph, resolution=resolution, seed=0)
    best = nx.community.modularity(graph, peer, resolution=resolution)
    for method in METHODS:
        result = method(indptr, indices, weights, resolution=resolution, restarts=5)
        assert result.modularity == pytest.approx(
            modularity(indptr, indices, result.labels, resolution=resolution), abs=1e-12
        )
        assert result.modularity >= 0.995 * best


def test_resolution_sets_the_number_of_communities():
    indptr, indices, _ = arrays(planted(1))
    for method in METHODS:
        counts = [method(indptr, indices, resolution=gamma).num_communities for gamma in (0.02, 1.0, 6.0)]
        assert counts == sorted(set(counts))


def test_cora():
    """The published figures, over seeds: no worse than networkx's Louvain, and as good as leidenalg iterated until
    it is stable.
    """
    graph = cora()
    indptr, indices, _ = arrays(graph)
    ours = [louvain(indptr, indices, seed=seed, restarts=10).modularity for seed in range(5)]
    assert min(ours) >= 0.8146
    singles = np.mean([louvain(indptr, indices, seed=seed).modularity for seed in range(20)])
    peers = np.mean(
        [nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=seed)) for seed in range(4)]
    )
    assert singles == pytest.approx(peers, abs=0.002)
    ours = [leiden(indptr, indices, seed=seed).modularity for seed in range(10)]
    assert min(ours) >= 0.823
    assert np.mean(ours) >= peer_leiden(graph, n_iterations=-1) - 0.002


@pytest.mark.parametrize("method", METHODS)
def test_scaling_all_weights_changes_nothing(method):
    indptr, indices, weights = arrays(random_graph(3, 100, 0.06))
    powers = [method(indptr, indices, weights * scale, seed=1).labels.tolist() for scale in (1.0, 2.0**-30, 2.0**30)]
    assert powers[0] == powers[1] == powers[2]


# -- what the papers guarantee -----------------------------------------------------------------------------------------


def bridge_graph() -> tuple[nx.Graph, np.ndarray]:
    """Traag et al. 2019, figure 2 in spirit: two halves of a community that touch only through node 0, which belongs
    elsewhere.
    """
    graph = nx.disjoint_union(nx.complete_graph(6), nx.complete_graph(6))
    graph = nx.disjoint_union(nx.empty_graph(1), graph)
    labels = np.array([1] + [0] * 12)
    graph.add_edges_from([(0, 1), (0, 7)])
    return graph, labels


def test_connected_parts_finds_the_broken_community():
    graph, labels = bridge_graph()
    assert not connected(graph, labels)
    parts, count = kernels.connected_parts(tuple(as_csr(*arrays(graph))), labels)
    assert count == 3 and len({*parts[1:7]}) == len({*parts[7:]}) == 1


def test_leiden_repairs_a_broken_community():
    graph, labels = bridge_graph()
    result = leiden(*arrays(graph), start=labels)
    assert connected(graph, result.labels)
    assert result.history[0] == pytest.approx(nx.community.modularity(graph, groups(labels)))
    assert result.labels[1] != result.labels[7]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("resolution", [0.1, 1.0])
def test_every_community_of_leiden_is_connected(seed, resolution):
    graph = nx.convert_node_labels_to_integers(
        nx.barabasi_albert_graph(400, 2, seed=seed) if seed % 2 else random_graph(seed, 400, 0.006)
    )
    result = leiden(*arrays(graph), seed=seed, resolution=resolution, iterations=1 + seed % 3)
    assert connected(graph, result.labels)


@pytest.mark.parametrize("seed", range(5))
def test_refinement_leaves_connected_parts_inside_communities(seed):
    """Also where the communities it is given are arbitrary, which repairs broken ones without a separate pass."""
    graph = random_graph(seed, 300, 0.02)
    csr, rng = as_csr(*arrays(graph)), np.random.default_rng(seed)
    labels = rng.integers(0, 4, 300)
    g = 1 / csr.weights.sum()
    parts = kernels.refine(tuple(csr), csr.strength(), g, labels, rng.permutation(300), rng.random(300), 0.01)
    assert 4 < num_communities(parts) < 300
    assert connected(graph, parts)
    strength, matrix = csr.strength(), nx.to_numpy_array(graph, nodelist=range(300))
    for group in map(list, groups(parts)):
        assert len(np.unique(labels[group])) == 1
        whole = np.flatnonzero(labels == labels[group[0]])
        rest = np.setdiff1d(whole, group)
        if len(group) > 1:  # a part that merged was well connected when its last member came
            before = [matrix[np.ix_(np.setdiff1d(group, [v]), np.union1d(rest, [v]))].sum() for v in group]
            need = [g * strength[np.setdiff1d(group, [v])].sum() * strength[np.union1d(rest, [v])].sum() for v in group]
            assert any(have >= least - 1e-9 for have, least in zip(before, need))


def test_random_merges_follow_their_probabilities():
    """Staying alone, and gains 0 and theta ln 2, stand in the ratio 1 : 1 : 2; a negative gain is never drawn."""
    gains = np.array([0.0, -1.0, 0.01 * np.log(2)])
    draws = np.array([kernels._draw(gains, (i + 0.5) / 400, 0.01) for i in range(400)])
    assert [int((draws == j).sum()) for j in (-1, 0, 1, 2)] == [100, 100, 0, 200]
    assert kernels._draw(np.empty(0), 0.999, 0.01) == -1
    assert {kernels._draw(np.array([0.0, 50.0]), u, 0.01) for u in (0.0, 0.5, 0.999999)} == {1}  # no overflow


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_modularity_never_falls_and_is_what_it_says(method, seed):
    indptr, indices, weights = arrays(random_graph(seed, 150, 0.05))
    result = method(indptr, indices, weights, seed=seed)
    assert (np.diff(result.history) >= -1e-12).all() and len(result.history) > 2
    assert result.history[0] == pytest.approx(modularity(indptr, indices, np.arange(150), weights), abs=1e-12)
    assert (
        result.modularity
        == result.history[-1]
        == pytest.approx(modularity(indptr, indices, result.labels, weights), abs=1e-12)
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_single_move_gains(method):
    """The result is a local optimum: any node, any other community or an empty one. Louvain's first level is one,
    too.
    """
    indptr, indices, weights = arrays(random_graph(7, 60, 0.08))
    csr = as_csr(indptr, indices, weights)
    labels = np.arange(60)
    while kernels.local_moving(tuple(csr), csr.strength(), 1 / csr.weights.sum(), labels, np.arange(60), 1e-10):
        pass
    if method is leiden:
        labels = leiden(indptr, indices, weights, iterations=100).labels.copy()
    best = modularity(indptr, indices, labels, weights)
    for node in range(60):
        for target in [*np.unique(labels), 999]:
            other = labels.copy()
            other[node] = target
            assert modularity(indptr, indices, other, weights) <= best + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(method):
    graph = random_graph(0, 300, 0.02)
    results = [method(*arrays(graph), seed=seed).labels.tolist() for seed in (5, 5, 6)]
    assert results[0] == results[1] != results[2]
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    method(*arrays(graph), seed=5, restarts=3)
    assert (np.random.get_state()[1] == state).all()  # the global generator is left alone


@pytest.mark.parametrize("method", METHODS)
def test_restarts_keep_the_best(method):
    indptr, indices, weights = arrays(random_graph(0, 200, 0.03, False))
    found = [method(indptr, indices, weights, seed=3, restarts=count).modularity for count in (1, 4, 12)]
    assert found == sorted(found) and found[0] < found[2]


# -- edges of the input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_tiny_graphs(method):
    for nodes in (0, 1, 3):  # without edges everyone is alone
        result = method(np.zeros(nodes + 1, int), np.array([], int))
        assert result.labels.tolist() == list(range(nodes)) and result.labels.dtype == np.int64
        assert result.modularity == 0 and result.num_communities == nodes
    pair = method(np.array([0, 1, 2]), np.array([1, 0]))
    assert pair.labels.tolist() == [0, 0] and pair.modularity == 0


@pytest.mark.parametrize("method", METHODS)
def test_isolated_nodes_stay_alone_and_ids_are_dense(method):
    graph = nx.disjoint_union(planted(0, 3, 20), nx.empty_graph(5))
    labels = method(*arrays(graph)).labels
    assert sorted(set(labels)) == list(range(num_communities(labels)))
    counts = np.bincount(labels)
    assert (counts[labels[-5:]] == 1).all() and (np.diff(counts) <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_edges_of_weight_zero_are_no_edges(method):
    graph = nx.disjoint_union(nx.complete_graph(5), nx.complete_graph(5))
    nx.set_edge_attributes(graph, 1.0, "weight")
    graph.add_weighted_edges_from([(i, 5 + j, 0.0) for i in range(5) for j in range(5)])
    assert sorted(map(sorted, groups(method(*arrays(graph)).labels))) == [list(range(5)), list(range(5, 10))]


PATH = {"indptr": np.array([0, 1, 3, 4]), "indices": np.array([1, 0, 2, 1]), "weights": np.ones(4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.array([1, -1, -1, 1.0])}, "not negative"),
        ({"weights": np.array([1, np.nan, 1, 1])}, "finite"),
        ({"weights": np.array([1, np.inf, 1, 1])}, "finite"),
        ({"weights": np.ones(3)}, "one number for each"),
        ({"weights": np.array([1, 2, 1, 1.0])}, "not symmetric"),
        ({"indices": np.array([1, 0, 3, 1])}, "0 to 2"),
        ({"indices": np.array([1, -1, 2, 1])}, "0 to 2"),
        ({"indices": np.array([0, 0, 2, 1])}, "self-loops"),
        ({"indices": np.array([2, 0, 2, 1])}, "not symmetric"),
        ({"indices": np.array([1.0, 0, 2, 1])}, "integers"),
        ({"indices": np.array([[1, 0, 2, 1]])}, "one dimension"),
        ({"indptr": np.array([0, 3, 1, 4])}, "rise from 0"),
        ({"indptr": np.array([0, 1, 3])}, "rise from 0"),
        ({"indptr": np.array([], int)}, "rise from 0"),
    ],
)
def test_bad_graphs(change, message):
    words = {**PATH, **change}
    for method in METHODS:
        with pytest.raises(ValueError, match=message):
            method(**words)
    with pytest.raises(ValueError, match=message):
        modularity(words["indptr"], words["indices"], np.zeros(3, int), words["weights"])


def test_bad_options():
    graph = (PATH["indptr"], PATH["indices"])
    for method in METHODS:
        for words in ({"resolution": 0.0}, {"resolution": np.nan}, {"restarts": 0}):
            with pytest.raises(ValueError, match=next(iter(words))):
                method(*graph, **words)
    for words in ({"iterations": 0}, {"randomness": 0.0}):
        with pytest.raises(ValueError, match=next(iter(words))):
            leiden(*graph, **words)
    with pytest.raises(ValueError, match="each of the 3 nodes"):
        leiden(*graph, start=np.zeros(2, int))
