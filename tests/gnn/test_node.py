"""Node classification: metrics, canaries, and the networks above the layers."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch_geometric import nn as pyg

from gnn.config import ModelConfig
from gnn.core.graph import build_graph
from gnn.core.scores import accuracy, macro_f1
from gnn.core.sparse import SparseFeatures
from gnn.model import GRAND, build_model, consistency_loss
from gnn.node.task import NodeTask
from gnn.train import start_trial
from tests.gnn.helpers import DATA, KARATE, ROOT, config, evaluate, needs, train

LAYERS = ["gcn", "gat", "gatv2", "sage", "gin", "appnp", "gcnii", "grand", "mlp"]
CPU = torch.device("cpu")
cora = needs("planetoid/Cora")


def random_graph(n=40, features=12, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(n, features) * (torch.rand(n, features) < 0.3)
    return build_graph(torch.randint(0, n, (2, 3 * n)), n, x, torch.arange(n) % 3)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_against_scikit_learn(seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(50, 6), torch.randint(0, 4, (50,))  # classes 4 and 5 never occur, but are predicted
    predicted = logits.argmax(dim=1)
    assert accuracy(logits, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert macro_f1(logits, labels) == pytest.approx(f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_every_network_runs_learns_and_has_all_weights_trained(layer, norm):
    """Overfit twelve nodes: no dropout, no penalty, labels at random. Only a network whose every part works gets
    them all right.
    """
    graph = random_graph()
    model_config = ModelConfig(layer=layer, hidden=32, dropout=0, norm=norm, drop_node=0, hops=2, samples=1, alpha=0.5)
    torch.manual_seed(0)
    model = build_model(model_config, 12, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    nodes, labels, structure = torch.arange(12), torch.randint(0, 3, (12,)), graph.structure()
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(graph.features, structure)[nodes], labels)
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert loss < 0.2
    first, rest = model.weight_groups()
    assert {id(p) for p in first + rest} == {id(p) for p in model.parameters()}
    assert len(first + rest) == len(list(model.parameters()))
    assert model.hidden(graph.features, structure).shape == (40, 32)


@pytest.mark.parametrize("layer", LAYERS)
def test_sparse_and_dense_features_agree(layer):
    graph = random_graph()
    model = build_model(ModelConfig(layer=layer, hidden=16), 12, 3).eval()
    sparse = SparseFeatures.from_dense(graph.features)
    torch.testing.assert_close(
        model(sparse, graph.structure()), model(graph.features, graph.structure()), rtol=1e-4, atol=1e-5
    )


def test_two_layer_gcn_equals_pygs_model():
    graph = random_graph()
    ours = build_model(ModelConfig(hidden=16), 12, 3).eval()
    peer = pyg.models.GCN(12, 16, 2, 3, dropout=0.5).eval()
    with torch.no_grad():
        for mine, theirs in zip(ours.layers, peer.convs):
            theirs.lin.weight.copy_(mine.weight.T)
            theirs.bias.copy_(mine.bias)
    torch.testing.assert_close(
        ours(graph.features, graph.structure()), peer(graph.features, graph.edges()), rtol=1e-4, atol=1e-5
    )


def test_grand_in_evaluation_is_the_expectation_of_training():
    """Silence of nodes is scaled so that its mean is the plain propagation: the first, linear part must agree on
    average.
    """
    graph = random_graph()
    model = GRAND(ModelConfig(layer="grand", hidden=8, hops=3, input_dropout=0.5), 12, 3)
    with torch.no_grad():
        expected = model.eval().propagated(graph.features, graph.structure())
        model.train()
        structure = graph.structure()
        draws = torch.stack([model.propagated(graph.features, structure) for _ in range(3000)])
    error = (draws.mean(dim=0) - expected).abs() / (draws.std(dim=0) / 3000**0.5 + 1e-9)
    assert error.max() < 5.5  # standard errors, over 320 numbers


def test_consistency_loss_by_hand():
    """Two augmentations of one node, two classes: mean (.7, .3), sharpened with T = .5 to (.49, .09) / .58."""
    p = torch.tensor([[[0.8, 0.2]], [[0.6, 0.4]]])
    sharp = torch.tensor([0.49, 0.09]) / 0.58
    expected = ((p - sharp) ** 2).sum(dim=-1).mean()
    torch.testing.assert_close(consistency_loss(p.log(), 0.5), expected)
    logits = p.log().requires_grad_()
    consistency_loss(logits, 0.5).backward()
    assert logits.grad.abs().sum() > 0


# -- canaries on real data ---------------------------------------------------------------------------------------------


def cora_config(tmp_path, *overrides):
    return config(tmp_path / "run", f"data_root={DATA}", *overrides, base=ROOT / "configs/gcn_cora.yaml")


@cora
def test_public_split_of_cora():
    task = NodeTask(cora_config(DATA), CPU)
    graph = task.graph
    assert (graph.num_nodes, graph.num_edges, graph.num_features, graph.num_classes) == (2708, 5278, 1433, 7)
    assert (len(graph.train), len(graph.val), len(graph.test)) == (140, 500, 1000)
    assert torch.bincount(graph.labels[graph.train]).tolist() == [20] * 7
    assert isinstance(graph.features, SparseFeatures)
    assert len(graph.features.values) == 49216
    rows = torch.zeros(2708).index_add_(0, graph.features.pattern.rows.long(), graph.features.values)
    torch.testing.assert_close(rows, torch.ones(2708))


@needs("planetoid/CiteSeer")
def test_unknown_test_nodes_of_citeseer():
    """15 test ids have no words and no class in the files; they keep their place in the graph and belong to no part.
    48 have no edge.
    """
    task = NodeTask(cora_config(DATA, "data.dataset=citeseer"), CPU)
    graph = task.graph
    assert (graph.num_nodes, graph.num_edges, len(graph.train), len(graph.val), len(graph.test)) == (
        3327,
        4552,
        120,
        500,
        1000,
    )
    unknown = (graph.labels == -1).nonzero().flatten()
    assert len(unknown) == 15
    assert not torch.isin(unknown, torch.cat([graph.train, graph.val, graph.test])).any()
    assert (graph.structure().degree == 0).sum() == 48
    model = start_trial(task, 0).eval()
    assert torch.isfinite(model(graph.features, task.structure)).all()


@cora
def test_gcn_learns_cora(tmp_path):
    made = cora_config(tmp_path, "train.seeds=3", "eval.figures=false")
    assert train(made) == 0
    assert evaluate(made) == 0
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["metrics"]["test_accuracy"] > 0.80
    assert result["seeds"] == [0, 1, 2]
    rows = (tmp_path / "run/seeds.csv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[0].startswith("seed,step,test_accuracy")


@cora
def test_shuffled_labels_give_chance(tmp_path):
    """The largest class holds 32 % of the test papers: one who has never seen a true label can do no better than
    naming it always.
    """
    made = cora_config(tmp_path, "train.seeds=3", "data.shuffle_labels=true", "eval.figures=false")
    assert train(made) == 0
    assert evaluate(made) == 0
    assert json.loads((tmp_path / "run/eval.json").read_text())["metrics"]["test_accuracy"] < 0.34


@cora
def test_test_labels_are_never_read_in_training(tmp_path):
    """Train with the test labels as they are and with all of them overwritten: the same weights to the last bit."""
    weights = []
    for spoil in (False, True):
        task = NodeTask(cora_config(tmp_path), CPU)
        if spoil:
            task.graph.labels[task.graph.test] = 0
        model = start_trial(task, 0)
        optimizer = task.optimizer(model)
        for step in range(1, 6):
            torch.manual_seed(step)
            optimizer.zero_grad()
            task.loss(model.train(), step).backward()
            optimizer.step()
            task.validate(model.eval())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dataset_that_cannot_be_had_is_one_line(tmp_path, capsys, monkeypatch):
    from torch_geometric.datasets import Planetoid

    def no_network(self):
        raise OSError("Name or service not known")

    monkeypatch.setattr(Planetoid, "download", no_network)
    assert train(config(tmp_path / "run", f"data_root={tmp_path}", base=ROOT / "configs/gcn_cora.yaml")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    for part in ("error: ", "ind.cora.*", str(tmp_path / "planetoid/Cora/raw"), "gcn_karate.yaml"):
        assert part in line


def test_karate_from_start_to_end(tmp_path):
    made = config(tmp_path / "run", "train.seeds=3", base=KARATE)
    assert train(made) == 0
    assert evaluate(made) == 0
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["metrics"]["test_accuracy"] > 0.75
    assert {"test_accuracy_std", "test_macro_f1", "val_accuracy"} <= set(result["metrics"])
    assert {path.name for path in (tmp_path / "run/figures").glob("*.png")} >= {
        "embedding.png",
        "confusion.png",
        "graph.png",
        "curves.png",
    }
