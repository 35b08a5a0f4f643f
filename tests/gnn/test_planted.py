"""The bench of planted communities: its graphs have the densities it says, its threshold is the formula's, its score
is rescaled right.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.gnn_planted import overlap, planted_blocks, run_all, threshold


@pytest.mark.parametrize(("groups", "degree"), [(2, 3.0), (4, 8.0), (10, 20.0)])
def test_threshold_is_where_the_difference_is_q_root_c(groups, degree):
    ratio = threshold(groups, degree)
    c_in = groups * degree / (1 + (groups - 1) * ratio)
    assert c_in - ratio * c_in == pytest.approx(groups * math.sqrt(degree))


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_planted_blocks_have_the_densities_asked_for(ratio):
    graph, truth = planted_blocks(8000, 4, 8.0, ratio, 0)
    assert np.bincount(truth).tolist() == [2000] * 4
    rows, columns = graph.edges().numpy()
    assert len(rows) / 8000 == pytest.approx(8.0, rel=0.02)
    counts = np.zeros((4, 4))
    np.add.at(counts, (truth[rows], truth[columns]), 1)
    outside = counts[~np.eye(4, dtype=bool)]
    assert outside.mean() / np.diag(counts).mean() == pytest.approx(ratio, rel=0.06)
    assert outside.std() / outside.mean() < 0.1  # all pairs of groups alike


def test_overlap_at_its_ends():
    truth = np.arange(400) % 4
    assert overlap((truth + 1) % 4, truth, 4) == 1
    assert overlap(np.zeros(400, int), truth, 4) == pytest.approx(0)
    assert overlap(truth // 2, truth, 4) == pytest.approx((0.5 - 0.25) / 0.75)
    assert abs(overlap(np.random.default_rng(0).permutation(truth), truth, 4)) < 0.15


def test_every_method_finds_what_is_easy():
    graph, truth = planted_blocks(400, 2, 12.0, 0.02, 0)
    for name, labels in run_all(graph, 2, 0).items():
        table_score = overlap(labels, truth, 2)
        assert table_score > (0.6 if name in ("louvain", "leiden") else 0.9), name
