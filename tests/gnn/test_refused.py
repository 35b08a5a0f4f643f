"""What can never work is refused before training, by the check that evaluation makes, too; and what other people's
libraries and machines do ends as one line.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import types

import networkx as nx
import numba
import numpy as np
import pytest
import torch

import gnn.eval
from common.config import Options
from common.errors import ProjectError
from common.files import sha256
from common.provenance import config_hash
from gnn.core.compiled import compiled
from gnn.data import datasets
from tests.gnn.helpers import config, evaluate, train
from tests.helpers import errors, status


def write_edges(folder, graph):
    (folder / "edges.csv").write_text("\n".join(f"{u},{v}" for u, v in graph.edges))
    return ["data.dataset=files", "data.edges=edges.csv", f"data_root={folder}", "train.steps=2", "eval.figures=false"]


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (nx.star_graph(40), "a node linked to all others cannot be asked about"),
        (nx.complete_graph(12), "all pairs of the 12 nodes are linked"),
        (nx.gnp_random_graph(30, 0.5, seed=0), "set link.num_negatives to at most"),
        (nx.gnp_random_graph(30, 0.97, seed=0), "different negatives were asked for"),
    ],
    ids=["star", "complete", "small", "dense"],
)
def test_links_that_cannot_be_evaluated_are_not_trained(graph, message, tmp_path, capsys):
    made = config(tmp_path / "run", "task=link", *write_edges(tmp_path, graph))
    assert train(made) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "run/models").exists()


def test_links_of_a_small_graph_with_fewer_negatives(tmp_path):
    words = write_edges(tmp_path, nx.gnp_random_graph(40, 0.15, seed=0))
    made = config(tmp_path / "run", "task=link", "link.num_negatives=10", "train.seeds=2", *words)
    assert train(made) == 0 and evaluate(made) == 0
    lines = (tmp_path / "run/predictions.csv").read_text().splitlines()
    assert lines[0] == "source,target,linked,probability" and len(lines) > 2


def test_more_clusters_than_nodes(tmp_path, capsys):
    """34 nodes and the default of 100 clusters."""
    assert train(config(tmp_path / "run", "sampling.kind=clusters", "model.layer=sage", "train.steps=2")) == 2
    assert "sampling.clusters: must be at most the 34 nodes" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["train.steps=40", "data.split=random", "seed=3"])
def test_what_would_make_seeds_unlike_is_refused_on_resume(word, tmp_path, capsys):
    """Twice the steps would give the seeds that are done half the training of those to come."""
    small = ("train.steps=20", "train.seeds=3", "train.save_every=20")
    run = tmp_path / "run"
    assert train(config(run, *small)) == 0
    before = {path.name: path.read_bytes() for path in (run / "models").iterdir()}
    assert train(config(run, *small, word, "data.train_per_class=1", "data.val_per_class=1"), resume=True) == 1
    assert word.split("=")[0] in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "models").iterdir()} == before
    assert train(config(run, *small, "train.seeds=4", "train.lr=0.02"), resume=True) == 0
    assert "train.lr was 0.01 and is now 0.02" in capsys.readouterr().err
    assert len(list((run / "models").iterdir())) == 4


def test_other_data_under_the_same_name_are_refused_on_resume(tmp_path, capsys):
    """Own files that have changed since the run began."""
    graph = nx.gnp_random_graph(40, 0.15, seed=0)
    words = ("task=link", "link.num_negatives=10", *write_edges(tmp_path, graph), "train.seeds=1")
    assert train(config(tmp_path / "run", *words)) == 0
    assert train(config(tmp_path / "run", *words, "train.seeds=2"), resume=True) == 0
    graph.add_edge(*next(nx.non_edges(graph)))
    write_edges(tmp_path, graph)
    assert train(config(tmp_path / "run", *words, "train.seeds=3"), resume=True) == 1
    assert "data.content: was" in capsys.readouterr().err
    assert len(list((tmp_path / "run/models").iterdir())) == 2


def test_compiled_without_a_place_for_the_cache(monkeypatch):
    """A read-only home: no cache, the same function."""
    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(lambda x: x + 1)
    assert compiled()(lambda x: x + 1)(2) == 3


def fake_ogb(monkeypatch, dataset):
    """A package ogb with this dataset class."""
    module = types.ModuleType("ogb.nodeproppred")
    module.NodePropPredDataset = dataset
    monkeypatch.setitem(sys.modules, "ogb", types.ModuleType("ogb"))
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", module)


def test_ogb_is_read_a_second_time(tmp_path, monkeypatch):
    """It keeps what it has read as a pickle, which torch.load refuses since 2.6."""

    class Dataset:
        def __init__(self, name, root):
            path = tmp_path / "ogb/ogbn_toy/processed/data_processed"
            if path.exists():
                torch.load(path)  # as ogb does
            edges = np.array([[0, 1, 2], [1, 2, 3]])
            graph = {"edge_index": edges, "num_nodes": 4, "node_feat": np.ones((4, 2), dtype=np.float32)}
            self.item = (graph, np.array([[0], [1], [0], [1]]))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.item, path, pickle_protocol=4)

        def __getitem__(self, index):
            return self.item

        def get_idx_split(self):
            return {"train": np.array([0]), "valid": np.array([1]), "test": np.array([2, 3])}

    fake_ogb(monkeypatch, Dataset)
    for _ in range(2):
        item = datasets.read_ogb("ogbn-toy", tmp_path)
        assert item["y"].tolist() == [0, 1, 0, 1] and item["splits"]["test"].tolist() == [2, 3]


def test_a_library_that_asks_is_not_waited_for(tmp_path, monkeypatch):
    class Dataset:
        def __init__(self, name, root):
            if input("This will download 1.38GB. Will you proceed? (y/N)").lower() != "y":
                raise SystemExit(-1)

    fake_ogb(monkeypatch, Dataset)
    stdin = sys.stdin
    with pytest.raises(ProjectError, match="say yes to it once by hand"):
        datasets.read_ogb("products", tmp_path)
    assert sys.stdin is stdin


@pytest.mark.parametrize(("number", "message"), [(errno.EROFS, "cannot write"), (errno.ENOENT, "is not there")])
def test_a_folder_that_cannot_be_written_is_not_missing_files(number, message):
    def read():
        raise OSError(number, "reason", "/data/cora/processed")

    with pytest.raises(ProjectError, match=message):
        datasets.fetch(read, "some files")


SMALL = ("train.steps=6", "train.seeds=2", "eval.figures=false", "eval.tables=false")


def test_seeds_that_another_config_has_trained_are_not_reported(tmp_path, capsys):
    """A run that went on with another learning rate: its first seed is none of this config. With the first config's
    learning rate it is the only one.
    """
    run = tmp_path / "run"
    assert train(config(run, *SMALL, "train.seeds=1")) == 0
    assert train(config(run, *SMALL, "train.lr=0.02"), resume=True) == 0
    capsys.readouterr()
    assert evaluate(config(run, *SMALL, "train.lr=0.02")) == 0
    said = capsys.readouterr()
    assert "0000.safetensors was trained with train.lr=0.01, not 0.02: left out" in said.err
    assert json.loads(said.out.splitlines()[-1])["seeds"] == [1]
    assert evaluate(config(run, *SMALL)) == 0
    assert json.loads((run / "eval.json").read_text())["seeds"] == [0]
    assert evaluate(config(run, *SMALL, "model.dropout=0.1")) == 1
    assert "trained with model.dropout=0.5, not 0.1" in capsys.readouterr().err


def test_every_output_speaks_of_the_newest_weights(tmp_path):
    """eval.json names the hashes of config, weights and files; what an earlier evaluation left goes."""
    run = tmp_path / "run"
    assert train(config(run, *SMALL)) == 0
    assert evaluate(config(run, *SMALL, "eval.figures=true")) == 0
    first = json.loads((run / "eval.json").read_text())
    for name in ("seeds.csv", "predictions.csv", "embeddings.npz"):
        assert first["outputs"][name] == sha256(run / name)
    assert list((run / "figures").glob("*.png"))
    assert first["config_sha256"] == config_hash(config(tmp_path / "elsewhere", *SMALL, "eval.figures=true"))
    assert train(config(run, *SMALL, "seed=5"), overwrite=True) == 0
    (run / "communities.csv").write_text("of another config")
    assert evaluate(config(run, *SMALL, "seed=5", "eval.outputs=false")) == 0
    second = json.loads((run / "eval.json").read_text())
    assert list(second["outputs"]) == ["seeds.csv"]
    assert {path.name for path in run.glob("*.csv")} == {"seeds.csv"}
    assert not (run / "embeddings.npz").exists()
    assert not list((run / "figures").glob("*.png"))
    assert first["weights_sha256"] != second["weights_sha256"]
    assert first["config_sha256"] != second["config_sha256"]


def test_flipped_bits_in_kept_weights_are_noticed(tmp_path, capsys):
    """Anywhere in the file: evaluation ends with one line and leaves no result."""
    made = config(tmp_path / "run", *SMALL, "train.seeds=1")
    assert train(made) == 0
    path = tmp_path / "run/models/0000.safetensors"
    whole = path.read_bytes()
    capsys.readouterr()
    for place in np.linspace(0, len(whole) - 1, 12).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        assert evaluate(made) == 1, place
        (line,) = errors(capsys.readouterr().err)
        assert str(path) in line
    assert not (tmp_path / "run/eval.json").exists()


def test_a_checkpoint_that_evaluation_would_not_use_is_refused(tmp_path, capsys):
    made = config(tmp_path / "run", *SMALL)
    assert train(made) == 0
    assert status(gnn.eval.main, made, Options("eval", checkpoint="nonsense")) == 1
    assert "takes no --checkpoint" in capsys.readouterr().err


def test_results_of_an_earlier_run_are_not_taken_over(tmp_path, capsys):
    """Its checkpoints are gone, its seeds and tables are not: a new run beside them would be reported with them."""
    run = tmp_path / "run"
    assert train(config(run, *SMALL)) == 0
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(config(run, *SMALL, "train.seeds=1", "train.lr=0.5")) == 1
    assert "holds 0000.safetensors of an earlier run: add --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(config(run, *SMALL, "train.seeds=1", "train.lr=0.5"), overwrite=True) == 0
    assert [path.name for path in (run / "models").iterdir()] == ["0000.safetensors"]
