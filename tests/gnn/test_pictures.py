"""Pictures: every function writes a whole PNG of a sane size for the smallest inputs; layouts and entropies against
what they must be.
"""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from PIL import Image

from common.report.pictures import embed
from gnn.config import ModelConfig
from gnn.core import layout, pictures
from gnn.core.graph import Graph, build_graph
from gnn.model import build_model
from gnn.node.pictures import attention_of, draw_attention, row_entropy


def check(path: Path) -> np.ndarray:
    """The pixels (H, W, 3), after the file has been found whole, of a sane size and not blank."""
    assert embed(path).chart, "reports tell charts by this"
    with Image.open(path) as image:
        image.load()
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    assert 700 <= width <= 900 and 250 <= height <= 1200
    assert 1_000 < path.stat().st_size < 300_000
    assert (pixels.reshape(-1, 3).max(axis=0) == 255).all() and pixels.std() > 2, "something is drawn on white"
    assert list(path.parent.glob(".tmp-*")) == []
    return pixels


def ring(n: int = 8, isolated: int = 0, classes: int = 2) -> Graph:
    """A cycle with isolated nodes after it."""
    ids = torch.arange(n)
    labels = torch.arange(n + isolated) % classes
    features = torch.randn(n + isolated, 5, generator=torch.Generator().manual_seed(0))
    return build_graph(
        torch.stack([ids, (ids + 1) % n]), n + isolated, features, labels, classes, "ring", train=torch.tensor([0])
    )


@pytest.mark.parametrize("n", [1, 2, 4, 30])
@pytest.mark.parametrize("classes", [0, 1, 3, 42])
def test_embedding(tmp_path, n, classes):
    hidden = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    labels = None if classes == 0 else torch.arange(n) % classes
    if classes == 3:
        labels[0] = -1
    pictures.draw_embedding(tmp_path / "new/folder/a.png", hidden, labels, "title")
    check(tmp_path / "new/folder/a.png")


def test_embedding_of_degenerate_rows(tmp_path):
    """One column, and rows that are all the same."""
    for i, hidden in enumerate(
        (torch.linspace(0, 1, 20)[:, None], torch.ones(20, 4), torch.ones(20, 4, requires_grad=True))
    ):
        pictures.draw_embedding(tmp_path / f"{i}.png", hidden, torch.zeros(20, dtype=torch.int64), "flat")
        check(tmp_path / f"{i}.png")


def test_embedding_refuses_nan_and_leaves_no_file(tmp_path):
    hidden = torch.randn(20, 4)
    hidden[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pictures.draw_embedding(tmp_path / "a.png", hidden, None, "nan")
    assert list(tmp_path.iterdir()) == []


def test_large_embeddings_are_thinned(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "project", lambda rows: seen.append(rows.shape) or rows[:, :2])
    hidden = torch.randn(5_000, 3, generator=torch.Generator().manual_seed(0))
    pictures.draw_embedding(tmp_path / "a.png", hidden, torch.arange(5_000) % 42, "many")
    assert seen == [(pictures.MAX_POINTS, 3)]
    check(tmp_path / "a.png")


def test_projection_keeps_clusters_and_repeats_itself():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(40, 8)), rng.normal(size=(40, 8)) + 12])
    first, again = layout.project(rows), layout.project(rows)
    assert np.array_equal(first, again)
    a, b = first[:40], first[40:]
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > 2 * max(a.std(), b.std())


@pytest.mark.parametrize("classes", [1, 2, 7, 42])
def test_confusion(tmp_path, classes):
    labels = torch.arange(90) % classes
    predicted = labels.roll(1)
    labels[0] = -1  # unknown
    pictures.draw_confusion(tmp_path / "a.png", predicted, labels, classes)
    check(tmp_path / "a.png")


def test_confusion_of_nothing(tmp_path):
    none = torch.empty(0, dtype=torch.int64)
    pictures.draw_confusion(tmp_path / "a.png", none, none, 3)
    check(tmp_path / "a.png")


@pytest.mark.parametrize(("n", "isolated", "classes"), [(8, 0, 2), (8, 2, 1), (3, 1, 3), (90, 3, 12)])
def test_graph(tmp_path, n, isolated, classes):
    graph = ring(n, isolated, classes)
    pictures.draw_graph(tmp_path / "a.png", graph, graph.labels.roll(1))
    check(tmp_path / "a.png")


def test_graph_without_labels_or_edges(tmp_path):
    for i, nodes in enumerate((1, 5)):
        graph = build_graph(torch.empty(2, 0, dtype=torch.int64), nodes)
        pictures.draw_graph(tmp_path / f"{i}.png", graph, torch.zeros(nodes, dtype=torch.int64))
        check(tmp_path / f"{i}.png")


def test_right_and_wrong_predictions_look_different(tmp_path):
    graph = ring(8, 0, 2)
    pictures.draw_graph(tmp_path / "right.png", graph, graph.labels)
    pictures.draw_graph(tmp_path / "wrong.png", graph, 1 - graph.labels)
    assert (check(tmp_path / "right.png") != check(tmp_path / "wrong.png")).any()


@pytest.mark.parametrize("layer", ["gat", "gatv2"])
@pytest.mark.parametrize(("n", "isolated", "classes"), [(8, 0, 2), (8, 2, 1), (3, 0, 3)])
def test_attention(tmp_path, layer, n, isolated, classes):
    graph = ring(n, isolated, classes)
    model = build_model(ModelConfig(layer=layer, hidden=8, heads=2), 5, classes).eval()
    draw_attention(tmp_path / "a.png", model, graph, graph.structure())
    check(tmp_path / "a.png")


def test_attention_without_edges(tmp_path):
    graph = build_graph(torch.empty(2, 0, dtype=torch.int64), 4, torch.randn(4, 5))
    model = build_model(ModelConfig(layer="gat", hidden=8, heads=2), 5, 2).eval()
    draw_attention(tmp_path / "a.png", model, graph, graph.structure())
    check(tmp_path / "a.png")


def test_entropy_of_attention():
    """Weights of the first layer sum to one in each row; uniform ones have the entropy log(degree + 1), learned ones
    at most that.
    """
    graph = ring(9, 1)
    model = build_model(ModelConfig(layer="gat", hidden=8, heads=2), 5, 2).eval()
    rows, columns, weights = attention_of(model, graph, graph.structure())
    assert weights.shape == (2, 9 * 3 + 1) and len(columns) == len(rows)
    np.testing.assert_allclose(np.stack([np.bincount(rows, weights=w) for w in weights]), 1, rtol=1e-5)
    most = np.log(np.bincount(rows))
    entropy = row_entropy(rows, weights, 10)
    assert (entropy <= most + 1e-6).all() and (entropy[:, :9] < most[:9] - 1e-9).any()
    with torch.no_grad():
        model.layers[0].att_src.zero_()
        model.layers[0].att_dst.zero_()
    rows, _, uniform = attention_of(model, graph, graph.structure())
    np.testing.assert_allclose(row_entropy(rows, uniform, 10), np.tile(most, (2, 1)), atol=1e-6)


FALLING = {step: [10.0**-step, 1.1 * 10.0**-step] for step in range(1, 5)}


@pytest.mark.parametrize(
    "series",
    [{"loss": {1: [1.0]}}, {"loss": FALLING, "val_loss": {1: [0.0]}, "val_accuracy": {1: [0.3, 0.4], 2: [0.5]}}],
)
def test_bands(tmp_path, series):
    pictures.draw_bands(tmp_path / "a.png", series)
    check(tmp_path / "a.png")


def test_depth(tmp_path):
    pictures.draw_depth(
        tmp_path / "a.png", {"GCN": {2: (0.8, 0.01), 64: (0.2, 0.0)}, "GCNII": {2: (0.8, 0.01), 16: (0.84, 0.0)}}
    )
    check(tmp_path / "a.png")
    pictures.draw_depth(tmp_path / "one.png", {"GCN": {2: (0.8, 0.0)}})
    check(tmp_path / "one.png")


def test_an_earlier_picture_survives_a_failure(tmp_path):
    path = tmp_path / "a.png"
    pictures.draw_depth(path, {"GCN": {2: (0.8, 0.0)}})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), pictures.canvas(path):
        raise RuntimeError
    assert path.read_bytes() == before


def test_layout_of_trees_and_paths():
    """Where the plane can hold all distances, the layout does; a star's leaves all lie apart."""
    path = nx.path_graph(6)
    edges = np.array(path.edges()).T
    points = layout.stress_layout(*np.concatenate([edges, edges[::-1]], axis=1), 6)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.testing.assert_allclose(gaps, np.abs(np.subtract.outer(range(6), range(6))), atol=0.02)
    star = np.array(nx.star_graph(10).edges()).T
    points = layout.stress_layout(*np.concatenate([star, star[::-1]], axis=1), 11)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(11)
    assert gaps.min() > 0.3


def test_layout_lowers_the_stress_of_classical_scaling():
    graph = nx.karate_club_graph()
    edges = np.array(graph.edges()).T
    rows, columns = np.concatenate([edges, edges[::-1]], axis=1)
    d = layout.graph_distances(rows, columns, 34)
    assert np.array_equal(d, nx.floyd_warshall_numpy(graph, weight="none"))

    def stress(x: np.ndarray) -> float:
        gaps = np.linalg.norm(x[:, None] - x[None], axis=2)
        return float((((gaps - d) / np.where(d > 0, d, 1)) ** 2).sum())

    assert stress(layout.stress_layout(rows, columns, 34)) < 0.8 * stress(layout.classical_scaling(d))


def test_spread_out_parts_coinciding_neighbours():
    points = np.array([[0.0, 0.0], [0.001, 0.0], [10.0, 10.0]])
    apart = layout.spread_out(points)
    assert np.linalg.norm(apart[0] - apart[1]) > 0.5
    assert np.isfinite(layout.spread_out(np.zeros((1, 2)))).all()
