"""DMoN's loss against PyTorch Geometric's and networkx, what its penalty means, the task from end to end, and
spectral baselines.
"""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.nn import DMoNPooling
from torch_geometric.utils import to_dense_adj

from common.config import ConfigError
from gnn.community.dmon import DMoN, collapse_penalty, dmon_loss, harden, soft_modularity
from gnn.community.metrics import ari, modularity
from gnn.community.pictures import by_size, draw_against_classes, draw_communities
from gnn.community.spectral import bethe_hessian_communities, spectral_communities
from gnn.community.task import CommunityTask, measure
from gnn.config import CommunityConfig, Config, DataConfig, ModelConfig
from gnn.core.graph import Graph, build_graph
from tests.helpers import ROOT

CPU = torch.device("cpu")
KARATE = Config(
    task="community",
    data=DataConfig(dataset="karate"),
    model=ModelConfig(hidden=8, layers=1, activation="selu", dropout=0.0),
    community=CommunityConfig(restarts=2),
)


def random_graph(seed: int = 0, nodes: int = 40, p: float = 0.15) -> Graph:
    edges = torch.tensor(list(nx.gnp_random_graph(nodes, p, seed=seed).edges())).T
    rng = torch.Generator().manual_seed(seed)
    return build_graph(edges, nodes, torch.randn(nodes, 6, generator=rng))


def assignment(seed: int, nodes: int = 40, k: int = 5) -> torch.Tensor:
    return torch.randn(nodes, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(dim=1)


@pytest.fixture
def double():
    """Float64 by default, within one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_pyg(seed, double):
    """Batch size 1 (larger ones are broadcast wrongly there): value and gradient with respect to the logits'
    weights.
    """
    graph = random_graph(seed)
    pool = DMoNPooling(6, 5)
    x = graph.features.double()
    _, _, _, spectral, _, cluster = pool(x[None], to_dense_adj(graph.edges(), max_num_nodes=40))
    weight = pool.mlp.lins[0].weight
    (expected,) = torch.autograd.grad(spectral + 0.7 * cluster, weight)
    ours = torch.softmax(x @ weight.T + pool.mlp.lins[0].bias, dim=1)
    structure = graph.structure()
    assert soft_modularity(ours, structure).item() == pytest.approx(-spectral.item(), abs=1e-12)
    assert collapse_penalty(ours).item() == pytest.approx(cluster.item(), abs=1e-12)
    (found,) = torch.autograd.grad(dmon_loss(ours, structure, 0.7), weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_soft_modularity_is_the_formula_with_the_dense_matrix(seed, double):
    graph, c = random_graph(seed), assignment(seed)
    dense = to_dense_adj(graph.edges(), max_num_nodes=40)[0].double()
    degrees = dense.sum(dim=1)
    b = dense - torch.outer(degrees, degrees) / degrees.sum()
    assert soft_modularity(c, graph.structure()).item() == pytest.approx(
        torch.trace(c.T @ b @ c).item() / degrees.sum().item(), abs=1e-12
    )


def test_at_hard_assignments_it_is_newmans_modularity(double):
    graph = random_graph(1)
    labels = np.arange(40) % 3
    c = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).double()
    expected = nx.community.modularity(
        nx.Graph(graph.edges().T.tolist()), [set(np.flatnonzero(labels == i)) for i in range(3)]
    )
    assert (graph.structure().degree > 0).all()
    assert soft_modularity(c, graph.structure()).item() == pytest.approx(expected, abs=1e-12)
    assert modularity(graph.indptr.numpy(), graph.indices.numpy(), labels) == pytest.approx(expected, abs=1e-12)


def test_gradients_are_those_of_finite_differences(double):
    structure = random_graph(2, 12, 0.3).structure()
    logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: dmon_loss(z.softmax(dim=1), structure, 0.8), (logits,))


@pytest.mark.parametrize("k", [2, 5, 16])
def test_collapse_penalty_at_its_extremes(k):
    balanced = torch.eye(k).repeat(3, 1)
    collapsed = torch.eye(k)[torch.zeros(30, dtype=torch.int64)]
    assert collapse_penalty(balanced).item() == pytest.approx(0, abs=1e-6)
    assert collapse_penalty(torch.full((30, k), 1 / k)).item() == pytest.approx(0, abs=1e-6)
    assert collapse_penalty(collapsed).item() == pytest.approx(math.sqrt(k) - 1, abs=1e-5)
    assert 0 < collapse_penalty(assignment(0, 30, k)).item() < math.sqrt(k) - 1


def test_no_edges_no_modularity():
    graph = build_graph(torch.empty(2, 0, dtype=torch.int64), 4, torch.eye(4))
    value = soft_modularity(torch.eye(4), graph.structure())
    assert value.item() == 0


@pytest.mark.parametrize("layer", ["gcn", "appnp"])
def test_permuting_nodes_permutes_assignments(layer, double):
    graph = random_graph(3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    place = torch.argsort(order)
    other = build_graph(place[graph.edges()], 40, graph.features[order])
    torch.manual_seed(0)
    model = (
        DMoN(ModelConfig(layer=layer, hidden=8, layers=1, activation="selu"), CommunityConfig(), 6, 4).double().eval()
    )
    first, second = model(graph.features.double(), graph.structure()), model(other.features.double(), other.structure())
    torch.testing.assert_close(second, first[order])
    torch.testing.assert_close(first.sum(dim=1), torch.ones(40))
    assert dmon_loss(first, graph.structure(), 1.0).item() == pytest.approx(
        dmon_loss(second, other.structure(), 1.0).item(), abs=1e-12
    )


def test_dropout_acts_in_training_only():
    graph = random_graph(0)
    model = DMoN(ModelConfig(hidden=8, layers=1, dropout=0.0), CommunityConfig(dropout=0.5), 6, 4)
    torch.nn.init.normal_(model.assign.bias)
    x, structure = graph.features, graph.structure()
    assert not torch.equal(model.train()(x, structure), model(x, structure))
    assert torch.equal(model.eval()(x, structure), model(x, structure))


# -- the task ----------------------------------------------------------------------------------------------------------


def fit(task: CommunityTask, steps: int, lr: float = 0.02) -> DMoN:
    torch.manual_seed(0)
    model = task.build(0)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        model.train()
        optimizer.zero_grad()
        task.loss(model, step).backward()
        optimizer.step()
    return model.eval()


def test_karate_from_end_to_end(tmp_path):
    task = CommunityTask(KARATE, CPU)
    model = fit(task, 200)
    with torch.no_grad():
        logged, found, others = task.validate(model), task.test(model), task.tables(model)
        task.figures(model, tmp_path)
    assert found["modularity"] > 0.36  # the optimum is 0.4198
    assert logged["criterion"] == -logged["val_modularity"] == pytest.approx(-found["modularity"], abs=1e-6)
    assert set(found) == {"modularity", "conductance", "num_communities", "nmi", "ari"}
    assert set(others) == {f"{name}_{method}" for name in found for method in ("louvain", "leiden", "spectral")}
    assert others["modularity_leiden"] == pytest.approx(0.4198, abs=5e-4)
    for name in ("communities.png", "communities_classes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size < 300_000
    assert "34 nodes" in task.describe()[0]


def test_planted_communities_are_found_from_edges_alone():
    """Node ids are the only features."""
    edges = torch.tensor(list(nx.planted_partition_graph(4, 30, 0.4, 0.02, seed=0).edges())).T
    graph = build_graph(edges, 120, torch.eye(120))
    torch.manual_seed(0)
    model = DMoN(ModelConfig(hidden=32, layers=1, activation="selu", dropout=0.0), CommunityConfig(), 120, 4)
    optimizer, structure = torch.optim.Adam(model.parameters(), 0.01), graph.structure()
    for _ in range(200):
        optimizer.zero_grad()
        dmon_loss(model(graph.features, structure), structure, 1.0).backward()
        optimizer.step()
    labels = harden(model.eval()(graph.features, structure)).numpy()
    assert ari(labels, np.repeat(np.arange(4), 30)) > 0.9


def test_labels_are_never_read_in_training():
    """With other labels, the weights come out bit for bit the same."""
    results = []
    for shuffled in (False, True):
        task = CommunityTask(
            Config(task="community", data=DataConfig(dataset="karate", shuffle_labels=shuffled), model=KARATE.model),
            CPU,
        )
        model = fit(task, 5)
        with torch.no_grad():
            results.append((model.state_dict(), task.validate(model), task.test(model)))
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name])
    assert results[0][1] == results[1][1] and results[0][2]["nmi"] != results[1][2]["nmi"]


def test_unknown_labels_do_not_count():
    graph = random_graph(0)
    labels = torch.arange(40) % 4
    known = build_graph(graph.edges(), 40, labels=torch.where(torch.arange(40) < 20, labels, -1))
    found = (labels.numpy() + np.where(np.arange(40) < 20, 0, np.arange(40) % 3)) % 4
    assert measure(known, found)["nmi"] == pytest.approx(1) and measure(known, found)["ari"] == 1
    assert "nmi" not in measure(graph, found)


def test_configs_that_cannot_work():
    with pytest.raises(ConfigError, match="num_communities"):
        CommunityTask(
            Config(task="community", data=DataConfig(dataset="karate"), community=CommunityConfig(num_communities=1)),
            CPU,
        )
    with pytest.raises(ConfigError, match="at most 34"):
        CommunityTask(
            Config(task="community", data=DataConfig(dataset="karate"), community=CommunityConfig(num_communities=35)),
            CPU,
        )
    for words in ({"collapse": -1.0}, {"dropout": 1.0}, {"resolution": 0.0}, {"restarts": 0}, {"num_communities": -1}):
        with pytest.raises(ConfigError, match=f"community.{next(iter(words))}"):
            CommunityConfig(**words)


def test_pictures_of_many_communities_without_classes(tmp_path):
    graph, labels = random_graph(0), np.arange(40) // 2
    draw_communities(tmp_path / "a.png", graph, graph.features.numpy(), labels, "many")
    draw_against_classes(tmp_path / "b.png", labels, np.full(40, -1), "none known")
    assert (tmp_path / "a.png").exists() and not (tmp_path / "b.png").exists()
    assert by_size(np.array([7, 3, 3, 9, 9, 9])).tolist() == [2, 1, 1, 0, 0, 0]


# -- spectral baselines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [spectral_communities, bethe_hessian_communities])
def test_spectral_methods_recover_planted_blocks(method):
    edges = torch.tensor(list(nx.planted_partition_graph(3, 100, 0.1, 0.01, seed=1).edges())).T
    graph = build_graph(edges, 303)  # and three nodes without edges
    indptr, indices = graph.indptr.numpy(), graph.indices.numpy()
    labels = method(indptr, indices, 3)
    assert labels.dtype == np.int64 and labels.shape == (303,)
    assert ari(labels[:300], np.repeat(np.arange(3), 100)) > 0.9
    assert (labels == method(indptr, indices, 3)).all()
    assert method(indptr, indices, 1).tolist() == [0] * 303
    with pytest.raises(ValueError, match="1 to 303"):
        method(indptr, indices, 304)


@pytest.mark.parametrize("method", [spectral_communities, bethe_hessian_communities])
def test_spectral_methods_on_tiny_graphs(method):
    """As many communities as nodes, and two triangles."""
    graph = build_graph(torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]]))
    indptr, indices = graph.indptr.numpy(), graph.indices.numpy()
    assert ari(method(indptr, indices, 2), np.repeat([0, 1], 3)) == 1
    assert len(method(indptr, indices, 6)) == 6


# -- real data ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (ROOT / "data/planetoid/Cora/raw/ind.cora.graph").is_file(), reason="data/planetoid/Cora is not there"
)
def test_loss_on_cora_falls():
    config = Config(
        task="community", data_root=str(ROOT / "data"), model=KARATE.model, community=CommunityConfig(dropout=0.0)
    )
    task = CommunityTask(config, CPU)
    assert task.num_communities == 7
    with torch.no_grad():
        before = task.validate(task.build(0).eval())["val_loss"]
    after = fit(task, 80, 0.02)
    with torch.no_grad():
        assert task.validate(after)["val_loss"] < before - 0.1
