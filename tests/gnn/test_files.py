"""Other people's files: whatever says clearly what it means is read, and what was decided is said; the rest is refused
in one line with the remedy.
"""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import torch

from common.errors import ProjectError
from gnn.config import Config, DataConfig
from gnn.core.graph import build_graph
from gnn.core.sparse import SparseFeatures
from gnn.data.datasets import load_graph, prepare_features
from gnn.data.files import from_files
from tests.gnn.helpers import config, evaluate, ring, train

RING = "\n".join(f"{u},{v}" for u, v in ring().T.tolist())
WORDS = [f"node{i:02d}" for i in range(12)]


def read(folder, edges=RING, name="edges.csv", **others):
    """A graph from texts or bytes; others: labels, features, splits, and settings such as weights."""
    files = {"edges": (name, edges)}
    settings = {}
    for key, value in others.items():
        if key in ("labels", "features", "splits"):
            files[key] = (f"{key}.csv", value)
        else:
            settings[key] = value
    for path, content in files.values():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / path).write_bytes(data)
    return from_files(
        DataConfig(dataset="files", **{key: path for key, (path, _) in files.items()}, **settings), folder
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("edges.csv", "source,target\n" + RING),
        ("edges.csv", "\ufeff" + RING),
        ("edges.csv", RING.replace(",", ";")),
        ("edges.csv", "u;v\n" + RING.replace(",", " ; ")),
        ("edges.txt", "% a comment\n# another\n\n" + RING.replace(",", "   ")),
        ("edges.tsv", RING.replace(",", "\t")),
        ("edges.csv.gz", gzip.compress(RING.encode())),
        ("edges.edgelist", "\n".join(f"{line} {{}}" for line in RING.replace(",", " ").splitlines())),
        ("edges.csv", "source,target,weight\n" + "\n".join(f"{line},1.0" for line in RING.splitlines())),
    ],
    ids=["header", "bom", "semicolon", "spaces", "comments", "tabs", "gz", "networkx", "equal weights"],
)
def test_edge_lists_as_people_have_them(name, text, tmp_path):
    graph = read(tmp_path, text, name)
    assert torch.equal(graph.edges(), build_graph(ring()).edges())
    assert graph.ids is None and graph.num_nodes == 12


def test_sparse_matrices(tmp_path):
    u, v = ring().numpy()
    matrix = sp.coo_array((np.ones(12), (u, v)), shape=(14, 14))
    scipy.io.mmwrite(tmp_path / "m.mtx", matrix)
    sp.save_npz(tmp_path / "m.npz", matrix)
    for name in ("m.mtx", "m.npz"):
        graph = from_files(DataConfig(dataset="files", edges=name), tmp_path)
        assert graph.num_nodes == 14 and graph.num_edges == 12  # two without edges: the matrix knows them


def test_weights_are_refused_or_said(tmp_path):
    text = "\n".join(f"{line},{i}" for i, line in enumerate(RING.splitlines()))
    with pytest.raises(ProjectError, match=r"data\.weights=ignore"):
        read(tmp_path, text)
    graph = read(tmp_path, text, weights="ignore")
    assert graph.num_edges == 12 and "weights of the edges are not used" in graph.notes[0]
    with pytest.raises(ProjectError, match="this has 4 columns"):
        read(tmp_path, "\n".join(f"{line},1,2" for line in RING.splitlines()))


def test_huge_ids_gaps_and_words(tmp_path):
    """Memory goes by the number of nodes, not by the largest id."""
    graph = read(tmp_path, "5,100000000000\n100000000000,7\n")
    assert graph.num_nodes == 3 and graph.names().tolist() == [5, 7, 10**11]
    assert "with gaps" in graph.notes[0]
    graph = read(tmp_path, "99999999999999999999,1\n1,2\n")
    assert graph.names().tolist() == ["1", "2", "99999999999999999999"]
    graph = read(tmp_path, "alice,bob\nbob,carol\n")
    assert graph.names().tolist() == ["alice", "bob", "carol"] and "words" in graph.notes[0]


def test_ids_from_one(tmp_path):
    text = "\n".join(f"{u + 1},{v + 1}" for u, v in ring().T.tolist())
    graph = read(tmp_path, text, labels="\n".join(str(i % 3) for i in range(12)))
    assert torch.equal(graph.edges(), build_graph(ring()).edges())
    assert graph.names().tolist() == list(range(1, 13)) and "count from 1" in graph.notes[0]


def test_directed_lists_are_said(tmp_path):
    graph = read(tmp_path, "0,1\n1,0\n1,2\n2,2\n")
    assert graph.num_edges == 2
    assert any("in one direction only" in note for note in graph.notes)
    assert any("from a node to itself" in note for note in graph.notes)


def test_labels_with_ids(tmp_path):
    """Pairs (id, class) in any order, words as classes, missing ones: never flattened to twice as many nodes."""
    lines = [f"{i} {'abc'[i % 3]}" for i in reversed(range(12))]
    graph = read(tmp_path, labels="\n".join(["# node label", *lines]))
    assert graph.labels.tolist() == [i % 3 for i in range(12)]
    assert graph.class_names == ("a", "b", "c")
    graph = read(tmp_path, labels="id,label\n0,4\n1,\n2,2\n3,4\n4,?\n")
    assert graph.labels.tolist() == [1, -1, 0, 1, *[-1] * 8] and graph.class_names == ("2", "4")
    assert any("9 of 12 nodes have no label" in note for note in graph.notes)
    for text, message in (
        ("0 1\n" * 2, "more than one line"),
        (" ".join("0" * 12) + "\n", "this has 12 columns"),
        ("0,1,2\n1,1,2\n", "this has 3 columns"),
    ):
        with pytest.raises(ProjectError, match=message):
            read(tmp_path, labels=text)


def test_features_with_ids(tmp_path):
    edges = "\n".join(f"{WORDS[u]},{WORDS[v]}" for u, v in ring().T.tolist())
    features = "id,a,b\n" + "\n".join(f"{WORDS[i]},{i},0.5" for i in reversed(range(12)))
    graph = read(tmp_path, edges, features=features)
    assert graph.features[:, 0].tolist() == list(range(12))
    with pytest.raises(ProjectError, match="must say which node a line is"):
        read(tmp_path, edges, labels="0\n1\n" * 6)
    with pytest.raises(ProjectError, match="1 nodes have no features"):
        read(tmp_path, edges, features=features.rsplit("\n", 1)[0])


def test_own_splits(tmp_path):
    splits = "id,part\n" + "\n".join(f"{i},{('train', 'valid', 'test')[i // 4]}" for i in range(12))
    graph = read(tmp_path, splits=splits)
    assert [part.tolist() for part in (graph.train, graph.val, graph.test)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    for text, message in ((splits + "\n3,test", "in two parts"), (splits.replace("valid", "dev"), "not dev")):
        with pytest.raises(ProjectError, match=message):
            read(tmp_path, splits=text)
    mask = np.arange(12) // 4
    np.savez(tmp_path / "s.npz", train=mask == 0, val=mask == 1, test=np.array([8, 9]))
    graph = from_files(DataConfig(dataset="files", edges="edges.csv", splits="s.npz"), tmp_path)
    assert graph.val.tolist() == [4, 5, 6, 7] and graph.test.tolist() == [8, 9]


@pytest.mark.parametrize("cut", [0, 10, 200])
@pytest.mark.parametrize("name", ["edges.npz", "edges.npy", "edges.csv.gz"])
def test_empty_and_truncated_files(name, cut, tmp_path):
    np.savez(tmp_path / "edges.npz", edges=np.arange(400).reshape(200, 2))
    np.save(tmp_path / "edges.npy", np.arange(400).reshape(200, 2))
    (tmp_path / "edges.csv.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(999).hex().encode()))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:cut])
    with pytest.raises(ProjectError, match=r"cannot be read|is empty"):
        from_files(DataConfig(dataset="files", edges=name), tmp_path)


def test_only_counts_are_divided_by_their_sum():
    """Real-valued features, of which a sum may be near zero or negative, stay as they are, and that is said."""
    real = torch.tensor([[1.0, -1.0001], [0.5, 2.0]])
    edges = torch.tensor([[0], [1]])
    graph = prepare_features(build_graph(edges, features=real), DataConfig(dataset="files", edges="-"))
    assert torch.equal(graph.features, real) and "not counts" in graph.notes[0]
    counts = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    graph = prepare_features(build_graph(edges, features=counts), DataConfig(dataset="files", edges="-"))
    assert graph.features.tolist() == [[0.25, 0.75], [0.0, 1.0]] and not graph.notes


def test_no_features_are_a_sparse_unit_matrix(tmp_path):
    (tmp_path / "edges.csv").write_text("\n".join(f"{i},{i + 1}" for i in range(199_999)))
    words = ["task=community", "data.dataset=files", "data.edges=edges.csv", f"data_root={tmp_path}"]
    graph = load_graph(config(tmp_path / "run", *words))
    assert isinstance(graph.features, SparseFeatures) and graph.features.shape == (200_000, 200_000)
    assert len(graph.features.values) == 200_000
    x = SparseFeatures.identity(5)
    assert torch.equal(x.dense(), torch.eye(5))
    weight = torch.randn(5, 3)
    assert torch.equal(x @ weight, weight)


def test_predictions_carry_the_persons_own_names(tmp_path):
    """From files with words to predictions.csv and embeddings.npz with the same words."""
    edges = "\n".join(f"{WORDS[u]},{WORDS[v]}" for u, v in ring().T.tolist())
    (tmp_path / "edges.csv").write_text(edges)
    (tmp_path / "labels.csv").write_text("\n".join(f"{word},{('even', 'odd')[i % 2]}" for i, word in enumerate(WORDS)))
    (tmp_path / "splits.csv").write_text(
        "\n".join(f"{word},{('train', 'val', 'test')[i // 4]}" for i, word in enumerate(WORDS))
    )
    made: Config = config(
        tmp_path / "run",
        *("data.dataset=files", "data.edges=edges.csv", "data.labels=labels.csv", "data.splits=splits.csv"),
        *(f"data_root={tmp_path}", "train.steps=3", "train.seeds=2", "eval.figures=false"),
    )
    assert train(made) == 0 and evaluate(made) == 0
    table = pd.read_csv(tmp_path / "run/predictions.csv")
    assert table["node"].tolist() == WORDS
    assert table["label"].tolist() == ["even", "odd"] * 6 and set(table["predicted"]) <= {"even", "odd"}
    assert table["part"].tolist() == ["train"] * 4 + ["val"] * 4 + ["test"] * 4
    accuracy = (table["label"] == table["predicted"])[8:].mean()
    first = pd.read_csv(tmp_path / "run/seeds.csv")["test_accuracy"][0]
    assert accuracy == pytest.approx(first)
    with np.load(tmp_path / "run/embeddings.npz") as kept:
        assert kept["ids"].tolist() == WORDS and len(kept["embeddings"]) == 12


@pytest.mark.parametrize("labels", [None, "0\n" * 12, "-1\n" * 12], ids=["none", "one class", "unknown"])
def test_agreement_with_no_classes_is_left_out_with_a_reason(labels, tmp_path, capsys):
    (tmp_path / "edges.csv").write_text(RING)
    words = ["task=community", "community.num_communities=3", "data.dataset=files", "data.edges=edges.csv"]
    if labels is not None:
        (tmp_path / "labels.csv").write_text(labels)
        words.append("data.labels=labels.csv")
    made = config(tmp_path / "run", *words, f"data_root={tmp_path}", "train.steps=2", "train.seeds=1")
    assert train(made) == 0 and evaluate(made) == 0
    out = capsys.readouterr()
    metrics = json.loads(out.out.splitlines()[-1])["metrics"]
    assert "modularity" in metrics and not [name for name in metrics if name.startswith(("nmi", "ari"))]
    assert "nmi and ari are left out" in out.err
    table = pd.read_csv(tmp_path / "run/communities.csv")
    assert {"node", "dmon", "louvain", "leiden", "spectral"} <= set(table) and len(table) == 12
