"""Synthetic networks: the graph is simple, and degrees, communities and features are those of the model."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from gnn.core.randomness import make_key, mix64, unit
from gnn.data import synthetic
from gnn.data.csr import undirected_csr


def matrix(indptr, indices):
    n = len(indptr) - 1
    return sp.csr_matrix((np.ones(len(indices)), indices, indptr), shape=(n, n))


def assert_simple(indptr, indices):
    """Symmetric, no self-loop, rows strictly ascending."""
    assert indptr.dtype == np.int64 and indices.dtype == np.int32
    assert indptr[0] == 0 and indptr[-1] == len(indices)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    assert not (rows == indices).any()
    same_row = rows[1:] == rows[:-1]
    assert (np.diff(indices.astype(np.int64))[same_row] > 0).all()
    a = matrix(indptr, indices)
    assert (a != a.T).nnz == 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_csr_against_scipy(dtype):
    rng = np.random.default_rng(0)
    src, dst = rng.integers(0, 50, (2, 2000)).astype(dtype)
    src[:300] = 7  # a long row: the other way of sorting
    indptr, indices = undirected_csr(src, dst, 60)
    assert_simple(indptr, indices)
    a = sp.coo_matrix((np.ones(2000), (src, dst)), shape=(60, 60)).tocsr()
    a = ((a + a.T) > 0).astype(float)
    a.setdiag(0)
    a.eliminate_zeros()
    assert (matrix(indptr, indices) != a).nnz == 0


def test_csr_of_nothing():
    indptr, indices = undirected_csr(np.empty(0, np.int64), np.empty(0, np.int64), 3)
    assert indptr.tolist() == [0, 0, 0, 0] and len(indices) == 0
    indptr, indices = undirected_csr(np.array([1, 1]), np.array([1, 1]), 2)  # nothing but self-loops
    assert indptr.tolist() == [0, 0, 0] and len(indices) == 0


@pytest.mark.parametrize(
    ("src", "dst", "words"), [([0, -1], [1, 1], "nodes -1 to 1"), ([0, 5], [1, 1], "0 to 4"), ([0], [1, 1], "as many")]
)
def test_csr_refuses(src, dst, words):
    with pytest.raises(ValueError, match=words):
        undirected_csr(np.array(src), np.array(dst), 5)


def test_random_numbers_are_those_of_splitmix64():
    """First outputs of SplitMix64 for seed 1234567, as published with the reference implementation."""
    golden = 0x9E3779B97F4A7C15
    values = [int(mix64(np.uint64((1234567 + i * golden) % 2**64))) for i in (1, 2, 3)]
    assert values == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert 0 <= unit(np.uint64(0)) < unit(np.uint64(2**64 - 1)) < 1
    keys = {int(make_key(*parts)) for parts in [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1, 0), (2**40, 0)]}
    assert len(keys) == 7


def planted(**changes):
    settings = {"num_nodes": 3000, "num_edges": 30000, "communities": 6, "mixing": 0.3, "seed": 1} | changes
    p = synthetic.plant(**settings)
    return p, *synthetic.dcsbm(p, settings["num_edges"], settings["seed"])


def test_dcsbm_is_simple_and_reproducible():
    _, indptr, indices = planted()
    assert_simple(indptr, indices)
    _, again_indptr, again_indices = planted()
    assert np.array_equal(indptr, again_indptr) and np.array_equal(indices, again_indices)
    assert not np.array_equal(indices, planted(seed=2)[2])


def test_expected_degrees():
    """Of many drawn edges, ends fall on nodes in proportion to theta and on pairs of communities as omega says;
    repeats are kept here.
    """
    p = synthetic.plant(200, 2000, 4, 0.4, seed=3)
    order = np.argsort(p.communities, kind="stable").astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(p.communities, minlength=4))])
    accept, alias = synthetic._alias_tables(p.theta[order], starts)
    edges = 400_000
    src, dst = np.empty(edges, np.int32), np.empty(edges, np.int32)
    bounds = np.cumsum(p.weights) / p.weights.sum()
    synthetic._draw_blocks(make_key(5), src, dst, bounds, starts, accept, order, order[alias], p.mixing)
    share = p.theta / p.theta.sum()
    for ends in (src, dst):  # chi-square with 199 degrees of freedom: mean 199, standard deviation 20
        observed = np.bincount(ends, minlength=200)
        assert ((observed - edges * share) ** 2 / (edges * share)).sum() < 199 + 5 * 20
    # pairs of communities: omega_rs = (1 - mixing) [r = s] / W_r + mixing / W
    pairs = np.bincount(p.communities[src] * 4 + p.communities[dst], minlength=16).reshape(4, 4) / edges
    w = p.weights / p.weights.sum()
    expected = 0.6 * np.diag(w) + 0.4 * np.outer(w, w)
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(0.25 / edges)


def test_degrees_and_blocks_of_the_graph():
    p, indptr, indices = planted(num_nodes=20000, num_edges=200_000)
    degree = np.diff(indptr)
    assert abs(degree.sum() / p.theta.sum() - 1) < 0.03  # few repeats at this density
    low = p.theta < 40  # the largest degrees lose most to repeats
    z = (degree - p.theta)[low] / np.sqrt(p.theta[low])
    assert abs(z.mean()) < 0.15 and abs(z.std() - 1) < 0.1  # Poisson around theta
    rows = np.repeat(np.arange(len(degree)), degree)
    assert abs((p.communities[rows] == p.communities[indices]).mean() - p.within_share) < 0.02
    assert np.bincount(p.communities).min() > 20000 / 6 * 0.9


def test_power_law():
    p = synthetic.plant(200_000, 2_000_000, 1, 1.0, exponent=2.5, seed=0)
    theta = np.sort(p.theta)
    assert theta.mean() == pytest.approx(20) and theta[-1] < 1.05 * 2000  # sqrt(2 M)
    low = theta[0]  # survival function is theta^-1.5 away from the cut-off: slope from two quantiles
    tenth, hundredth = theta[-20_000], theta[-2_000]
    assert np.log(10) / np.log(hundredth / tenth) == pytest.approx(1.5, abs=0.12)
    assert 5 < low < 9
    assert synthetic.plant(1000, 5000, 2, 0.5, max_degree=30).theta.max() < 33


def test_no_mixing_and_skewed_sizes():
    p, indptr, indices = planted(mixing=0.0, size_skew=1.0)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    assert (p.communities[rows] == p.communities[indices]).all() and p.within_share == 1
    sizes = np.bincount(p.communities)
    assert sizes[0] / sizes[5] == pytest.approx(6, rel=0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixing": 1.5},
        {"mixing": -0.1},
        {"exponent": 1.0},
        {"num_nodes": 1},
        {"communities": 0},
        {"communities": 4000},
        {"num_edges": 0},
        {"max_degree": 10.0},
    ],
)
def test_plant_refuses(changes):
    with pytest.raises(ValueError, match=r"mixing|exponent|nodes|max_degree"):
        planted(**changes)


def test_rmat_levels():
    """Unshuffled, the share of edges in each quadrant at every level is the model's (drawn with repeats kept)."""
    edges, bits, quadrants = 200_000, 6, (0.5, 0.1, 0.25, 0.15)
    src, dst = np.empty(edges, np.int32), np.empty(edges, np.int32)
    cuts = (np.cumsum(quadrants)[:3] * 2**16).round().astype(np.int64)
    synthetic._draw_quadrants(make_key(1), src, dst, bits, cuts, np.arange(64, dtype=np.int32))
    for level in range(bits):
        u, v = (src >> level) & 1, (dst >> level) & 1
        share = np.bincount(2 * u + v, minlength=4) / edges
        assert np.abs(share - quadrants).max() < 5 * np.sqrt(0.25 / edges)


def test_rmat_graph():
    n = 1 << 12
    indptr, indices, address = synthetic.rmat(n, 40_000, seed=4)
    assert_simple(indptr, indices)
    assert sorted(address) == list(range(n))
    degree = np.diff(indptr)
    assert degree.max() > 15 * degree.mean() and (degree <= 2).mean() > 0.1  # skewed, many nodes almost alone
    assert degree[address < 64].mean() > 8 * degree.mean()  # low addresses are the hubs, wherever they are numbered
    assert np.array_equal(indices, synthetic.rmat(n, 40_000, seed=4)[1])
    flat = np.diff(synthetic.rmat(n, 40_000, quadrants=(0.25, 0.25, 0.25, 0.25), seed=4)[0])
    assert flat.max() < 3 * flat.mean()  # equal quadrants: a uniform random graph
    odd = synthetic.rmat(3001, 9000, seed=4)  # not a power of two
    assert_simple(*odd[:2])
    assert len(odd[0]) == 3002 and np.diff(odd[0])[odd[2] >= 2048].sum() > 0


@pytest.mark.parametrize("quadrants", [(0.5, 0.5, 0.5, 0.5), (-0.1, 0.5, 0.5, 0.1), (0.0, 0.5, 0.5, 0.0)])
def test_rmat_refuses(quadrants):
    with pytest.raises(ValueError, match="quadrant"):
        synthetic.rmat(16, 10, quadrants)


def test_features():
    points = synthetic.centres(5, 8, 2.0)
    assert points.dtype == np.float32 and np.linalg.norm(points, axis=1) == pytest.approx(2.0)
    labels = np.arange(100_000, dtype=np.int32) % 5
    x = synthetic.features(labels, points)
    assert x.dtype == np.float32 and x.shape == (100_000, 8)
    for c in range(5):
        assert np.abs(x[labels == c].mean(0) - points[c]).max() < 0.05
        assert np.abs(x[labels == c].std(0) - 1).max() < 0.05
    assert np.array_equal(x, synthetic.features(labels, points)) and not np.array_equal(
        x, synthetic.features(labels, points, seed=1)
    )


def test_labels_and_split():
    communities = (np.arange(50_000) % 5).astype(np.int32)
    labels = synthetic.observed_labels(communities, 5, noise=0.2, unknown=0.1)
    known = labels >= 0
    assert (~known).mean() == pytest.approx(0.1, abs=0.01)
    wrong = labels[known] != communities[known]
    assert wrong.mean() == pytest.approx(0.2, abs=0.01)
    shift = (labels[known] - communities[known])[wrong] % 5
    assert np.bincount(shift, minlength=5)[1:] / wrong.sum() == pytest.approx(0.25, abs=0.02)
    parts = synthetic.split(labels, (0.5, 0.1, 0.2))
    assert [len(part) / known.sum() for part in parts] == pytest.approx([0.5, 0.1, 0.2], abs=1e-4)
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together) and known[together].all()
    with pytest.raises(ValueError, match="at most 1"):
        synthetic.split(labels, (0.5, 0.5, 0.2))
