"""Graph autoencoders: parity with PyTorch Geometric, what the encoder sees, determinism, chance, overfitting."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError, resolve
from common.errors import ProjectError
from gnn.config import Config
from gnn.core.graph import Graph, build_graph
from gnn.core.sparse import SparseFeatures
from gnn.link import task as link_module
from gnn.link.model import LinkModel, TrainingEdges, kl_divergence, reconstruction_loss
from gnn.link.splits import canonical
from gnn.link.task import LinkTask
from tests.helpers import ROOT

CPU = torch.device("cpu")
DATA = Path(os.environ.get("DATA_ROOT") or ROOT / "data")
SMALL = [
    "task=link",
    "link.num_negatives=20",
    "model.hidden=16",
    "link.embedding=8",
    "model.dropout=0.3",
    "train.weight_decay=0",
]
METHODS = {
    "gae": ["link.method=gae"],
    "vgae": ["link.method=vgae"],
    "vgae_mlp": ["link.method=vgae", "link.decoder=mlp"],
    "maskgae": ["link.method=maskgae", "link.decoder=mlp", "link.embedding_norm=true", "model.layers=1"],
    "maskgae_path": ["link.method=maskgae", "link.decoder=mlp", "link.mask=path", "link.embedding_dropout=0.2"],
    "supervised": ["link.method=supervised", "link.decoder=mlp", "train.batch_size=40", "model.layer=sage"],
}


def small_graph(seed: int = 0) -> Graph:
    """96 nodes in 12 groups, features that say a little about the group."""
    graph = nx.relaxed_caveman_graph(12, 8, 0.1, seed=seed)
    labels = torch.arange(96) // 8
    features = F.one_hot(labels, 12) + 0.5 * torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
    return build_graph(torch.tensor(list(graph.edges)).T, 96, features, labels)


def make(monkeypatch, graph: Graph | None = None, *words: str) -> LinkTask:
    graph = graph or small_graph()
    monkeypatch.setattr(link_module, "load_graph", lambda config: graph)
    return LinkTask(resolve(Config, None, [*SMALL, *words]), CPU)


def fit(task: LinkTask, steps: int, trial: int = 0) -> tuple[LinkModel, list[float]]:
    torch.manual_seed(trial)
    model = task.build(trial)
    optimizer, losses = task.optimizer(model), []
    for step in range(1, steps + 1):
        torch.manual_seed(1000 * trial + step)
        model.train()
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


class Spy(torch.nn.Module):
    """Stands in front of a model and keeps what training shows it."""

    def __init__(self, model: LinkModel) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x, structure, pairs):
        self.seen.append((structure, pairs))
        return self.model(x, structure, pairs)


def pairs_of(structure) -> set[tuple[int, int]]:
    pattern = structure.pattern
    return set(zip(pattern.rows.tolist(), pattern.indices.tolist()))


# Parity


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("torch_geometric.nn")


def test_vgae_matches_pytorch_geometric(peer, monkeypatch):
    """Same mean and log sigma: the same divergence, decoder, reconstruction loss on the same pairs, and gradients."""
    torch.manual_seed(1)  # theirs adds 1e-15 to a rounded probability, which shows in float32 for large scores
    task = make(monkeypatch)
    model = task.build(0)
    mean, log_sigma = (
        part.detach().requires_grad_() for part in model.distribution(task.features, task.trial.train_edges.whole)
    )
    vgae = peer.VGAE(encoder=lambda: (mean, log_sigma))
    z = vgae.encode()
    positive, negative = task.trial.split.train, task.trial.negatives.draw(300)
    theirs = vgae.recon_loss(z, positive, negative) + vgae.kl_loss() / 96
    logits = model.score(z, torch.cat([positive, negative], 1))
    ours = reconstruction_loss(logits, positive.shape[1]) + kl_divergence(mean, log_sigma) / 96
    torch.testing.assert_close(logits.sigmoid(), vgae.decode(z, torch.cat([positive, negative], 1)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (mean, log_sigma), retain_graph=True), torch.autograd.grad(theirs, (mean, log_sigma))
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_divergence_is_that_of_torch_distributions():
    mean, log_sigma = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_sigma.exp()),
        torch.distributions.Normal(torch.zeros(5).double(), torch.ones(5).double()),
    )
    torch.testing.assert_close(kl_divergence(mean, log_sigma), expected.sum(1).mean())


def test_vgae_encoder_matches_pytorch_geometric(peer, monkeypatch):
    """One last layer for both heads is the same as two GCN layers on a shared hidden one."""
    task = make(monkeypatch, None, "model.dropout=0")
    model = task.build(0)
    first, last = model.encoder.layers
    convs = [peer.GCNConv(12, 16), peer.GCNConv(16, 8), peer.GCNConv(16, 8)]
    halves = zip(last.weight.chunk(2, 1), last.bias.chunk(2))
    with torch.no_grad():
        for conv, (weight, bias) in zip(convs, [(first.weight, first.bias), *halves]):
            conv.lin.weight.copy_(weight.T)
            conv.bias.copy_(bias)
    edges = task.trial.split.message_edges
    hidden = convs[0](task.graph.features, edges).relu()
    for ours, conv in zip(model.distribution(task.features, task.trial.train_edges.whole), convs[1:]):
        torch.testing.assert_close(ours, conv(hidden, edges), rtol=1e-5, atol=1e-6)


def test_vgae_loss_of_a_step_is_the_formula(monkeypatch):
    """The reparametrised sample, fresh negatives, and 1 / N before the divergence."""
    task = make(monkeypatch, None, "model.dropout=0", "link.kl_weight=3")
    model = task.build(0).train()
    torch.manual_seed(5)
    loss = task.loss(model, 1)
    torch.manual_seed(5)
    negative = task.trial.negatives.draw(task.trial.split.train.shape[1])
    mean, log_sigma = model.distribution(task.features, task.trial.train_edges.whole)
    z = mean + torch.randn_like(mean) * log_sigma.exp()
    logits = [(z[a] * z[b]).sum(1) for a, b in (task.trial.split.train, negative)]
    cross_entropy = sum(
        F.binary_cross_entropy_with_logits(x, torch.full_like(x, target)) for x, target in zip(logits, (1.0, 0.0))
    )
    torch.testing.assert_close(loss, cross_entropy + 3 / 96 * kl_divergence(mean, log_sigma))
    torch.manual_seed(6)
    assert task.loss(model, 2).item() != loss.item()  # other negatives, other noise


def test_decoders_do_not_care_for_the_order_of_the_ends(monkeypatch):
    for words in METHODS.values():
        task = make(monkeypatch, None, *words)
        model = task.build(0).eval()
        z = model.embed(task.features, task.trial.train_edges.whole)
        assert z.shape == (96, 8)
        torch.testing.assert_close(
            model.score(z, task.trial.split.test), model.score(z, task.trial.split.test.flip(0)), rtol=0, atol=0
        )


# What the encoder sees


@pytest.mark.parametrize("name", ["maskgae", "maskgae_path", "supervised"])
def test_scored_edges_leave_message_passing_in_both_directions(name, monkeypatch):
    task = make(monkeypatch, None, *METHODS[name])
    spy = Spy(task.build(0))
    training = {tuple(pair) for pair in task.trial.split.train.T.tolist()}
    sizes = []
    for step in range(1, 9):
        torch.manual_seed(step)
        task.loss(spy, step)
        structure, pairs = spy.seen[-1]
        half = pairs.shape[1] // 2
        positive, negative = ({tuple(pair) for pair in part.T.tolist()} for part in (pairs[:, :half], pairs[:, half:]))
        visible = pairs_of(structure)
        assert visible == {(v, u) for u, v in visible}
        assert positive and positive <= training and not negative & training
        assert not visible & (positive | {(v, u) for u, v in positive})
        assert {(u, v) for u, v in visible if u < v} == training - positive  # nothing else is lost
        sizes.append(len(positive))
        columns = structure.pattern.indices.split(structure.degree.tolist())
        assert all(torch.equal(c, c.sort().values) for c in columns)
        assert torch.equal(structure.gcn().dense(), structure.gcn().dense().T)
    share = np.mean(sizes) / len(training)
    assert {"maskgae": 0.64 < share < 0.76, "maskgae_path": 0.1 < share < 0.7, "supervised": set(sizes) == {40}}[name]
    assert len({frozenset(pairs_of(s)) for s, _ in spy.seen}) == 8  # another mask each step


@pytest.mark.parametrize("name", METHODS)
def test_neither_training_nor_validation_see_test_edges(name, monkeypatch):
    """With other test edges in the graph, every weight and embedding is the same to the last bit."""
    task = make(monkeypatch, None, *METHODS[name])
    first, losses = fit(task, 5)
    embeddings = first.embed(task.features, task.trial.train_edges.whole)
    hidden = {tuple(pair) for part in (task.trial.split.val, task.trial.split.test) for pair in part.T.tolist()}
    split = task.trial.split
    for trial_split in (
        dataclasses.replace(split, test=split.test[:, :0]),
        dataclasses.replace(split, test=split.val, val=split.test),
    ):
        monkeypatch.setattr(link_module, "split_edges", lambda *args, s=trial_split: s)
        monkeypatch.setattr(link_module, "require", lambda *args: None)  # of an empty part
        other = LinkTask(task.config, CPU)
        second, again = fit(other, 5)
        assert again == losses
        assert torch.equal(second.embed(other.features, other.trial.train_edges.whole), embeddings)
    assert not pairs_of(task.trial.train_edges.whole) & (hidden | {(v, u) for u, v in hidden})


def test_paths_follow_edges_and_degrees_count_hidden_ones():
    graph = nx.path_graph(7)
    graph.add_node(7)
    edges = TrainingEdges(canonical(torch.tensor(list(graph.edges)).T, 8), 8)
    assert pairs_of(edges.whole) == {pair for u, v in graph.edges for pair in ((u, v), (v, u))}
    torch.manual_seed(0)
    # one start each, the node without edges among them
    lengths = [int(edges.mask_paths(0.125, 3).sum()) for _ in range(200)]
    assert set(lengths) == {0, 1, 2, 3}
    hidden = torch.tensor([True, True, False, False, True, False])
    assert edges.degrees(hidden).tolist() == [1, 2, 1, 0, 1, 1, 0, 0]
    assert pairs_of(edges.without(hidden)) == {(2, 3), (3, 2), (3, 4), (4, 3), (5, 6), (6, 5)}
    assert edges.without(torch.ones(6, dtype=torch.bool)).gcn().dense().equal(torch.eye(8))  # only the loops are left
    assert edges.mask_batch(4).sum() == 4 and edges.mask_batch(100).sum() == 5
    share = torch.stack([edges.mask_edges(0.7) for _ in range(500)]).float().mean(0)
    assert bool((share - 0.7).abs().max() < 0.08)


def test_degree_decoder_is_trained_on_the_hidden_degrees(monkeypatch):
    task = make(
        monkeypatch, None, *METHODS["maskgae"], "link.degree_weight=0.5", "model.dropout=0", "link.decoder_dropout=0"
    )
    model = task.build(0).train()
    torch.manual_seed(3)
    loss = task.loss(model, 1)
    torch.manual_seed(3)
    hidden = task.hide()
    positive = task.trial.split.train[:, hidden]
    negative = task.trial.negatives.draw(positive.shape[1])
    out = model(task.features, task.trial.train_edges.without(hidden), torch.cat([positive, negative], 1))
    target = torch.zeros(96).index_add_(0, positive.flatten(), torch.ones(positive.numel()))
    expected = reconstruction_loss(out.logits, positive.shape[1]) + 0.5 * (out.degree - target).square().mean()
    torch.testing.assert_close(loss, expected)
    assert make(monkeypatch, None, *METHODS["maskgae"], "link.degree_weight=0").build(0).degree is None


# Behaviour


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_run(name, monkeypatch):
    results = []
    for words in ([], [], ["seed=1"]):
        task = make(monkeypatch, None, *METHODS[name], *words)
        for trial in (1, 0):  # whatever ran before
            model, losses = fit(task, 4, trial)
        results.append((losses, task.test(model), task.validate(model)))
    assert results[0] == results[1]
    assert results[0] != results[2]
    task = make(monkeypatch, None, *METHODS[name])
    assert fit(task, 4)[1] == results[0][0]
    assert not torch.equal(task.trial.split.test, make(monkeypatch, None, "seed=1").trial.split.test)


@pytest.mark.parametrize("name", METHODS)
def test_learns_a_small_graph(name, monkeypatch):
    """Training links stand above most other pairs, and test links are found, since the groups are plain. One edge in
    ten is random.
    """
    task = make(monkeypatch, None, *METHODS[name], "model.dropout=0", "train.lr=0.03")
    before = link_module.auc(*train_scores(task, task.build(0).eval()))
    model, losses = fit(task, 150)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert link_module.auc(*train_scores(task, model)) > max(0.88, before + 0.1)
    found = task.test(model)
    assert found["auc"] > 0.85
    assert found["mrr_hard"] < found["mrr"]
    names = ("auc", "ap", "mrr", "hits_at_1", "hits_at_10")  # hits_at_50 of 20 negatives would say nothing
    assert set(found) == {*names, *(f"{name}_hard" for name in names), "val_auc", "val_ap"}


def train_scores(task: LinkTask, model: LinkModel):
    with torch.no_grad():
        z = model.embed(task.features, task.trial.train_edges.whole)
        return model.score(z, task.trial.split.train), model.score(
            z, task.trial.negatives.draw(2000, torch.Generator().manual_seed(0))
        )


@pytest.mark.parametrize("name", ["vgae", "maskgae"])
def test_random_edges_cannot_be_predicted(name, monkeypatch):
    """A canary: edges drawn at random, unrelated to the features. Any score far from one half would be a leak."""
    scores = []
    for seed in range(4):
        graph = nx.gnm_random_graph(96, 400, seed=seed)
        graph = build_graph(torch.tensor(list(graph.edges)).T, 96, small_graph().features)
        task = make(monkeypatch, graph, *METHODS[name], "link.test_share=0.3")
        scores.append(task.test(fit(task, 60)[0])["auc"])
    assert abs(np.mean(scores) - 0.5) < 0.06, scores


def test_a_model_without_training_and_random_features_is_at_chance(monkeypatch):
    graph = dataclasses.replace(small_graph(), features=torch.randn(96, 12, generator=torch.Generator().manual_seed(0)))
    task = make(monkeypatch, graph, "link.method=gae", "model.layer=mlp", "link.test_share=0.3")
    found = task.test(task.build(0).eval())
    assert found["auc"] == pytest.approx(0.5, abs=0.1)
    assert found["auc_hard"] < 0.55


def test_tables_and_figures(monkeypatch, tmp_path):
    graph = small_graph()
    sparse = dataclasses.replace(graph, features=SparseFeatures.from_dense(graph.features))
    found = []
    for version in (graph, sparse):
        task = make(monkeypatch, version, *METHODS["maskgae"])
        model = task.build(0).eval()
        found.append(task.tables(model))
    assert found[0] == pytest.approx(found[1])
    assert {
        f"{metric}_{name}"
        for metric in ("auc", "ap", "mrr", "auc_hard", "ap_hard", "mrr_hard")
        for name in (
            "common_neighbours",
            "adamic_adar",
            "resource_allocation",
            "preferential_attachment",
            "katz",
            "ppr",
            "features",
        )
    } == set(found[0])
    assert found[0]["mrr_hard_resource_allocation"] < found[0]["mrr_resource_allocation"]
    with torch.no_grad():
        task.figures(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "thresholds.png", "embedding.png"}
    assert any("training" in line for line in task.describe())


def test_what_cannot_be_split_is_refused(monkeypatch):
    with pytest.raises(ProjectError, match="too few"):
        make(monkeypatch, build_graph(torch.tensor(list(nx.path_graph(5).edges)).T, features=torch.eye(5)))
    with pytest.raises(ConfigError, match=r"link\.val_share: leaves no edge"):
        make(monkeypatch, None, "link.val_share=0.001")
    with pytest.raises(ProjectError, match=r"link\.num_negatives to at most"):
        make(monkeypatch, None, "link.num_negatives=190")  # before any training
    for word in (
        "link.test_share=0.97",
        "link.num_negatives=7",
        "link.mask_share=1",
        "link.embedding=0",
        "link.kl_weight=-1",
    ):
        with pytest.raises(ConfigError, match=word.split("=")[0]):
            resolve(Config, None, ["task=link", word])


@pytest.mark.skipif(not (DATA / "planetoid/Cora/raw").is_dir(), reason="Cora is not in the data folder")
def test_vgae_on_cora_reaches_what_the_paper_reports():
    """One seed and half the steps; the paper's mean is 91.4 and 92.6."""
    task = LinkTask(resolve(Config, ROOT / "configs/vgae_cora.yaml", [f"data_root={DATA}"]), CPU)
    assert [part.shape[1] for part in (task.trial.split.train, task.trial.split.val, task.trial.split.test)] == [
        4488,
        263,
        527,
    ]
    model, _ = fit(task, 100)
    found = task.test(model)
    assert found["auc"] > 0.89 and found["ap"] > 0.9
    assert found["mrr_hard"] < found["mrr"]
