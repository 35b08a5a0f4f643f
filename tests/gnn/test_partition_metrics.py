"""Modularity, conductance, coverage, NMI and ARI against networkx and scikit-learn, on random graphs and partitions."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from gnn.community.metrics import ari, conductance, coverage, modularity, nmi, num_communities


def arrays(graph: nx.Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices, weights of a networkx graph on nodes 0 ... N-1."""
    matrix = sp.csr_array(nx.to_scipy_sparse_array(graph, nodelist=range(len(graph)), dtype=float))
    return matrix.indptr, matrix.indices, matrix.data


def groups(labels: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(labels == c).tolist()) for c in np.unique(labels)]


def random_graph(seed: int, weighted: bool = True) -> nx.Graph:
    rng = np.random.default_rng(seed)
    graph = nx.gnp_random_graph(60, 0.1, seed=seed)
    for _, _, data in graph.edges(data=True):
        data["weight"] = float(rng.gamma(0.7)) + 1e-3 if weighted else 1.0
    return graph


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("resolution", [0.3, 1.0, 2.5])
def test_modularity_is_that_of_networkx(seed, weighted, resolution):
    graph = random_graph(seed, weighted=weighted)
    labels = np.random.default_rng(seed).integers(0, 7, len(graph)) * 3 - 5  # ids need not be 0 ... k-1
    indptr, indices, weights = arrays(graph)
    ours = modularity(indptr, indices, labels, weights, resolution)
    assert ours == pytest.approx(nx.community.modularity(graph, groups(labels), resolution=resolution), abs=1e-12)
    if not weighted:
        assert modularity(indptr, indices, labels, resolution=resolution) == pytest.approx(ours, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_conductance_and_coverage_are_those_of_networkx(seed):
    graph = random_graph(seed)
    labels = np.random.default_rng(seed).integers(0, 5, len(graph))
    indptr, indices, weights = arrays(graph)
    expected = [nx.conductance(graph, group, weight="weight") for group in groups(labels)]
    assert conductance(indptr, indices, labels, weights) == pytest.approx(np.mean(expected), abs=1e-12)
    plain = random_graph(seed, weighted=False)
    assert coverage(indptr, indices, labels) == pytest.approx(
        nx.community.partition_quality(plain, groups(labels))[0], abs=1e-12
    )
    inside = sum(graph.subgraph(group).size("weight") for group in groups(labels))
    assert coverage(indptr, indices, labels, weights) == pytest.approx(inside / graph.size("weight"), abs=1e-12)


def test_conductance_leaves_communities_without_edges_out():
    graph = nx.disjoint_union(nx.path_graph(4), nx.empty_graph(3))
    indptr, indices, _ = arrays(graph)
    assert conductance(indptr, indices, np.array([0, 0, 1, 1, 2, 3, 4])) == pytest.approx(1 / 3)
    assert conductance(indptr, indices, np.zeros(7, int)) == 0  # nothing leaves
    assert coverage(indptr, indices, np.zeros(7, int)) == 1


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("k", "l"), [(1, 4), (4, 1), (3, 3), (10, 4), (200, 200)])
def test_nmi_and_ari_are_those_of_scikit_learn(seed, k, l):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, k, 200)
    second = np.where(rng.random(200) < 0.5, first % l, rng.integers(0, l, 200)) - 3
    assert nmi(first, second) == pytest.approx(normalized_mutual_info_score(first, second), abs=1e-12)
    assert ari(first, second) == pytest.approx(adjusted_rand_score(first, second), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0, 0, 0], [5, 5, 5]),
        ([0, 1, 2], [2, 0, 1]),
        ([0, 0, 0], [0, 1, 2]),
        ([3], [9]),
        ([], []),
        ([0, 0, 1, 1], [0, 1, 0, 1]),
    ],
)
def test_nmi_and_ari_at_the_edges(first, second):
    first, second = np.array(first, int), np.array(second, int)
    assert nmi(first, second) == pytest.approx(normalized_mutual_info_score(first, second), abs=1e-12)
    assert ari(first, second) == pytest.approx(adjusted_rand_score(first, second), abs=1e-12)


def test_chance_and_equality():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 5000)
    names = rng.permutation(6)[labels]
    assert nmi(labels, names) == pytest.approx(1) and ari(labels, names) == 1
    assert nmi(labels, rng.permutation(labels)) < 0.01 and abs(ari(labels, rng.permutation(labels))) < 0.01


def test_numbers_of_communities():
    assert num_communities(np.array([4, -1, 4, 9])) == 3 and num_communities(np.array([], int)) == 0


def test_bad_labels():
    graph = (np.array([0, 1, 3, 4]), np.array([1, 0, 2, 1]))  # a path
    for metric in (modularity, conductance, coverage):
        for bad, message in (
            (np.zeros(2, int), "each of the 3 nodes"),
            (np.zeros(3), "integers"),
            (np.zeros((3, 1), int), "dimension"),
        ):
            with pytest.raises(ValueError, match=message):
                metric(*graph, bad)
        with pytest.raises(ValueError, match="not negative"):
            metric(*graph, np.zeros(3, int), np.array([1, -1, -1, 1.0]))
    for metric in (nmi, ari):
        with pytest.raises(ValueError, match="each of the 3 nodes"):
            metric(np.zeros(3, int), np.zeros(4, int))
