"""Graphs from outside: what is wrong is named in one line; what is right becomes a clean undirected graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import ProjectError
from gnn.config import DataConfig
from gnn.core.graph import build_graph, choose_storage, normalize_rows
from gnn.core.sparse import SparseFeatures
from gnn.data.datasets import random_split
from gnn.data.files import from_files
from tests.gnn.helpers import config, ring, train


def test_edges_become_symmetric_unique_and_sorted():
    messy = torch.tensor([[2, 0, 0, 1, 3, 0], [0, 2, 1, 0, 3, 2]])  # both directions, repeated, and a loop
    graph = build_graph(messy, 5)
    assert graph.indptr.tolist() == [0, 2, 3, 4, 4, 4]
    assert graph.indices.tolist() == [1, 2, 0, 0]
    assert (graph.num_nodes, graph.num_edges) == (5, 2)
    assert graph.edges().tolist() == [[0, 0, 1, 2], [1, 2, 0, 0]]


def test_number_of_nodes_is_taken_from_what_is_known():
    assert build_graph(ring(4)).num_nodes == 4
    assert build_graph(ring(4), labels=torch.zeros(7, dtype=torch.int64)).num_nodes == 7
    assert build_graph(ring(4), features=torch.zeros(9, 2)).num_nodes == 9
    assert build_graph(torch.empty(2, 0, dtype=torch.int64), 3).num_edges == 0  # nodes without edges are a graph


@pytest.mark.parametrize(
    ("edges", "kwargs", "message"),
    [
        ([[0, 1], [1, 9]], {"num_nodes": 3}, "names node 9, but there are 3 nodes"),
        ([[0, -2], [1, 0]], {}, "node id -2 is negative"),
        ([[], []], {}, "the graph is empty"),
        ([[0, 1], [1, 0]], {"features": torch.tensor([[1.0], [float("nan")]])}, "features of node 1 hold NaN"),
        (
            [[0, 1], [1, 0]],
            {"features": torch.tensor([[1.0], [float("inf")]])},
            "features of node 1 hold NaN or infinity",
        ),
        (
            [[0, 1], [1, 0]],
            {"features": SparseFeatures.from_dense(torch.tensor([[1.0], [float("nan")]]))},
            "features of node 1 hold NaN",
        ),
        ([[0, 1], [1, 0]], {"num_nodes": 2, "labels": torch.tensor([0, 1, 0])}, "3 labels for 2 nodes"),
        ([[0, 1], [1, 0]], {"num_nodes": 2, "features": torch.zeros(5, 2)}, "5 features for 2 nodes"),
        ([[0, 1], [1, 0]], {"labels": torch.tensor([0, -3])}, "label -3 is negative"),
        ([[0, 1], [1, 0]], {"train": torch.tensor([7])}, "the train split names nodes outside"),
    ],
)
def test_bad_graphs_are_refused(edges, kwargs, message):
    with pytest.raises(ProjectError, match=message):
        build_graph(torch.tensor(edges, dtype=torch.int64), name="mine", **kwargs)


def test_shapes_and_types_of_edges():
    with pytest.raises(ProjectError, match="two rows of node ids"):
        build_graph(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ProjectError, match="must be integers"):
        build_graph(torch.zeros(2, 3))


def test_storage_follows_the_share_of_non_zeros():
    thin = torch.zeros(20, 30)
    thin[3, 4] = 2
    assert isinstance(choose_storage(thin), SparseFeatures)
    assert isinstance(choose_storage(torch.ones(20, 30)), torch.Tensor)
    assert isinstance(choose_storage(thin, "dense"), torch.Tensor)
    rows = normalize_rows(torch.tensor([[1.0, 3], [0, 0]]))
    assert rows.tolist() == [[0.25, 0.75], [0, 0]]


# -- your own files ----------------------------------------------------------------------------------------------------


def write_files(folder, kind="csv"):
    """A ring of twelve with two features and three classes."""
    edges, x, y = ring().T.numpy(), np.random.default_rng(0).random((12, 2), dtype=np.float32), np.arange(12) % 3
    if kind == "csv":
        np.savetxt(folder / "edges.csv", edges, fmt="%d", delimiter=",")
        np.savetxt(folder / "features.csv", x, delimiter=",")
        np.savetxt(folder / "labels.csv", y, fmt="%d")
        return DataConfig(dataset="files", edges="edges.csv", features="features.csv", labels="labels.csv")
    if kind == "txt":
        (folder / "edges.txt").write_text("# FromNodeId ToNodeId\n" + "\n".join(f"{u}\t{v}" for u, v in edges))
        return DataConfig(dataset="files", edges="edges.txt")
    np.savez(folder / "all.npz", edges=edges.T, features=x, labels=y)
    return DataConfig(dataset="files", edges="all.npz", features="all.npz", labels="all.npz")


@pytest.mark.parametrize("kind", ["csv", "npz", "txt"])
def test_own_files(kind, tmp_path):
    graph = from_files(write_files(tmp_path, kind), tmp_path)
    assert torch.equal(graph.edges(), build_graph(ring()).edges())
    if kind != "txt":
        assert graph.features.shape == (12, 2)
        assert graph.num_classes == 3


OWN = (
    *("data.dataset=files", "data.edges=edges.csv", "data.features=features.csv", "data.labels=labels.csv"),
    *("data.split=random", "data.train_per_class=1", "data.val_per_class=1"),
)


def test_own_files_train_and_evaluate(tmp_path):
    write_files(tmp_path)
    assert train(config(tmp_path / "run", *OWN, f"data_root={tmp_path}", "train.steps=2", "train.seeds=1")) == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("edges.csv", "0,1\n1,x\n", "edges.csv"),
        ("edges.csv", "0,1\n1,99\n", "names node 99, but there are 12 nodes"),
        ("edges.csv", "0,1\n1,-1\n", "node id -1 is negative"),
        ("edges.csv", "0,1,2\n3,4,5\n6,7,8\n", "two columns"),
        ("features.csv", "1,nan\n" * 12, "NaN or infinity"),
        ("features.csv", "1,2\n" * 11, "there are 11 nodes (0 to 10): as many as features"),
        ("labels.csv", "0\n1\n", "2 labels for 12 nodes"),
        ("labels.csv", "0,1,2\n" * 12, "one column (a class a line, in the order of the nodes) or two (id, class)"),
        ("labels.csv", "0.5\n" * 12, "labels are classes"),
        ("edges.csv", "", "is empty"),
    ],
)
def test_broken_files_are_one_line(file, text, message, tmp_path, capsys):
    write_files(tmp_path)
    (tmp_path / file).write_text(text)
    assert train(config(tmp_path / "run", *OWN, f"data_root={tmp_path}")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line


def test_missing_files_and_arrays(tmp_path):
    data = write_files(tmp_path, "npz")
    (tmp_path / "all.npz").unlink()
    with pytest.raises(ProjectError, match="no such file"):
        from_files(data, tmp_path)
    np.savez(tmp_path / "all.npz", links=np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(ProjectError, match="no array `edges`, only links"):
        from_files(data, tmp_path)
    np.savez(tmp_path / "all.npz", edges=np.zeros((2, 2)))
    with pytest.raises(ProjectError, match="must be integers"):
        from_files(data, tmp_path)


# -- splits ------------------------------------------------------------------------------------------------------------


def test_random_split_is_balanced_disjoint_and_a_function_of_the_seed():
    labels = torch.arange(90) % 3
    labels[5] = -1  # unknown: in no part
    graph = build_graph(ring(90), labels=labels)
    data = DataConfig(train_per_class=4, val_per_class=5)
    split = random_split(graph, data, seed=1)
    assert torch.bincount(labels[split.train]).tolist() == [4, 4, 4]
    assert torch.bincount(labels[split.val]).tolist() == [5, 5, 5]
    everything = torch.cat([split.train, split.val, split.test])
    assert sorted(everything.tolist()) == [i for i in range(90) if i != 5]
    assert torch.equal(split.train, random_split(graph, data, seed=1).train)
    assert not torch.equal(split.train, random_split(graph, data, seed=2).train)


def test_split_with_too_few_nodes():
    graph = build_graph(ring(6), labels=torch.tensor([0, 0, 0, 0, 0, 1]))
    with pytest.raises(ProjectError, match="class 1 has 1 nodes"):
        random_split(graph, DataConfig(train_per_class=2), seed=0)
    with pytest.raises(ProjectError, match="no labels"):
        random_split(build_graph(ring(6)), DataConfig(), seed=0)
