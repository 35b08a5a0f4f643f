"""The benchmark of scale: its peer is right, its check finds what is wrong, and both of its programs run at a tiny
size.
"""

from __future__ import annotations

import json

import pytest
import torch

from bench import gnn_scale
from gnn.config import SyntheticConfig
from gnn.data.synthetic import make_social
from gnn.node.neighbours import NeighborSampler


@pytest.fixture(scope="module")
def graph():
    return make_social(SyntheticConfig(nodes=400, edges=6000, features=1))


@pytest.mark.parametrize("method", [gnn_scale.floyd, gnn_scale.smallest_keys])
def test_peers_sample_what_we_sample(graph, method):
    indptr, indices = torch.from_numpy(graph["indptr"]), torch.from_numpy(graph["indices"])
    seeds = torch.arange(0, 400, 7)
    for fanouts in ((5, 3), (10, 10)):
        peer = gnn_scale.TorchSampler(indptr, indices, fanouts, method)
        gnn_scale.check(graph, peer.sample(seeds, 1), seeds, fanouts)
        gnn_scale.check(graph, peer.sample(seeds, 2), seeds, fanouts)
    everything = int(indptr.diff().max()) + 1  # nothing to draw: the same nodes in any order
    blocks, nodes = gnn_scale.TorchSampler(indptr, indices, (everything, everything), method).sample(seeds, 1)
    ours = NeighborSampler(indptr, indices, [everything, everything]).sample(seeds, 1)
    assert set(nodes.tolist()) == set(ours.nodes.tolist())
    assert [len(b[1]) for b in blocks] == [len(b.indices) for b in ours.blocks]
    hub = int(indptr.diff().argmax())
    peer = gnn_scale.TorchSampler(indptr, indices, (5,), method)
    assert 0.6 < gnn_scale.check_frequencies(peer.sample, hub, int(indptr.diff()[hub]), 5) < 1.5


def test_check_finds_errors(graph):
    seeds, fanouts = torch.arange(50), (5, 3)
    sampler = NeighborSampler(graph["indptr"], graph["indices"], fanouts)

    def broken(change):
        blocks, nodes = gnn_scale.plain(sampler.sample(seeds, 1))
        change(blocks, nodes)
        return blocks, nodes

    gnn_scale.check(graph, broken(lambda blocks, nodes: None), seeds, fanouts)
    changes = [
        lambda blocks, nodes: nodes.__setitem__(0, int(nodes[1])),  # a node twice
        lambda blocks, nodes: blocks[1][1].__setitem__(0, int(blocks[1][1][1])),  # an edge twice
        lambda blocks, nodes: blocks[0][1].add_(1).remainder_(len(nodes)),  # wrong neighbours
        lambda blocks, nodes: blocks[1][0].__setitem__(1, 1),  # a row too short
    ]
    for change in changes:
        with pytest.raises(SystemExit, match="wrong"):
            gnn_scale.check(graph, broken(change), seeds, fanouts)
    first = [[graph["indptr"][v], graph["indptr"][v + 1]] for v in range(400)]
    hub = max(range(400), key=lambda v: first[v][1] - first[v][0])
    degree = int(first[hub][1] - first[hub][0])
    same = NeighborSampler(graph["indptr"], graph["indices"], [5])
    always = gnn_scale.check_frequencies(lambda seeds, step: gnn_scale.plain(same.sample(seeds, 0)), hub, degree, 5)
    assert always > 10  # the same five every time


def test_comparison(capsys):
    gnn_scale.main(["--edges", "20000", "--rounds", "2", "--steps", "2", "--batch", "64"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"ratio", "aa_ratio", "ours", "peer", "unit"} <= result.keys() and result["ours"] > 0 < result["peer"]


def test_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(gnn_scale, "RESULTS", tmp_path)
    monkeypatch.setattr(gnn_scale, "run_alone", gnn_scale.measure)
    monkeypatch.setattr(gnn_scale, "SIZES", (2000, 4000))
    gnn_scale.main(["--curve", "--edges", "4000"])
    points = json.loads((tmp_path / "scale.json").read_text())["points"]
    assert [point["edges"] for point in points] == [2000, 4000]
    assert all(
        point[phase]["seconds"] > 0 and point[phase]["peak_gib"] > 0 for point in points for phase in gnn_scale.PHASES
    )
    assert (tmp_path / "scale.png").stat().st_size > 5000


def test_a_measurement_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gnn_scale, "TIME_LIMIT", 0.2)
    assert gnn_scale.run_alone("generate", 10_000, tmp_path) == "stopped: time"
    monkeypatch.setattr(gnn_scale, "LEAVE_FREE", 1e6)
    assert gnn_scale.run_alone("generate", 10_000, tmp_path) == "stopped: memory"
