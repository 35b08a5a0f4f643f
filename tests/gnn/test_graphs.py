"""Whole graphs: batches against one graph at a time, pooling and GIN against PyTorch Geometric, folds."""

from __future__ import annotations

import copy
import dataclasses

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch_geometric.data import Batch as PyGBatch
from torch_geometric.data import Data
from torch_geometric.nn import GINConv, global_add_pool, global_max_pool, global_mean_pool

from common.config import ConfigError
from common.errors import ProjectError
from gnn.config import GraphConfig, ModelConfig
from gnn.core.sparse import Structure
from gnn.whole_graph.data import GraphSet, join_graphs, spans, stratified_folds
from gnn.whole_graph.model import GraphNet, pool


def some_graphs(count: int = 12, features: int = 4, seed: int = 0) -> tuple[GraphSet, list[Data]]:
    """Random graphs of 1 to 12 nodes, some without edges, ours and PyG's."""
    rng = np.random.default_rng(seed)
    ours, items = [], []
    for g in range(count):
        n = int(rng.integers(1, 13))
        graph = nx.gnp_random_graph(n, 0.35, seed=seed + g)
        edges = torch.tensor(list(graph.edges()), dtype=torch.int64).reshape(-1, 2).T
        x = torch.tensor(rng.normal(size=(n, features)), dtype=torch.get_default_dtype())
        ours.append(edges)
        items.append(Data(x=x, edge_index=torch.cat([edges, edges.flip(0)], dim=1), num_nodes=n))
    labels = torch.arange(count) % 2
    return join_graphs(ours, [item.num_nodes for item in items], [item.x for item in items], labels), items


def network(layer: str = "gin", features: int = 4, classes: int = 3, norm: str = "batch", **graph: object) -> GraphNet:
    torch.manual_seed(1)
    return GraphNet(ModelConfig(layer=layer, hidden=8, layers=3, norm=norm), GraphConfig(**graph), features, classes)


def warmed(model: GraphNet, graphs: GraphSet) -> GraphNet:
    """In evaluation mode, with batch statistics that are not the initial ones."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(graphs.batch(torch.arange(len(graphs))))
    return model.eval()


# -- batches -----------------------------------------------------------------------------------------------------------


def test_spans():
    start, count = torch.tensor([5, 0, 7, 7]), torch.tensor([2, 0, 3, 1])
    assert spans(start, count).tolist() == [5, 6, 7, 8, 9, 7]
    assert spans(start[:0], count[:0]).tolist() == []


@pytest.mark.parametrize("ids", [[0], [3, 1, 2], [5, 5, 0], list(range(12))])
def test_a_batch_is_pygs_batch(ids):
    graphs, items = some_graphs()
    batch, peer = graphs.batch(torch.tensor(ids)), PyGBatch.from_data_list([items[i] for i in ids])
    assert torch.equal(batch.x, peer.x) and torch.equal(batch.owner, peer.batch)
    assert batch.sizes.tolist() == [items[i].num_nodes for i in ids] and torch.equal(
        batch.labels, torch.tensor(ids) % 2
    )
    dense = torch.zeros(len(peer.x), len(peer.x), dtype=batch.x.dtype)
    dense[peer.edge_index[0], peer.edge_index[1]] = 1
    assert torch.equal(batch.structure.sum().dense().to(dense.dtype), dense)


@pytest.mark.parametrize("layer", ["gin", "gcn", "sage", "mlp"])
@pytest.mark.parametrize("readout", ["sum", "mean", "max"])
def test_batched_equals_one_by_one(layer, readout):
    graphs, _ = some_graphs()
    model = warmed(network(layer, readout=readout), graphs)
    together = model(graphs.batch(torch.arange(12)))
    alone = torch.cat([model(graphs.batch(torch.tensor([g]))) for g in range(12)])
    assert together.shape == (12, 3)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["gin", "gcn", "sage"])
def test_permuting_nodes_leaves_the_prediction(layer):
    graphs, items = some_graphs()
    rng, edges, x = torch.Generator().manual_seed(3), [], []
    for item in items:
        order = torch.randperm(item.num_nodes, generator=rng)
        place = torch.argsort(order)
        edges.append(place[item.edge_index])
        x.append(item.x[order])
    shuffled = join_graphs(edges, [item.num_nodes for item in items], x, graphs.labels)
    assert not torch.equal(shuffled.features, graphs.features)
    model, ids = warmed(network(layer), graphs), torch.arange(12)
    torch.testing.assert_close(model(shuffled.batch(ids)), model(graphs.batch(ids)), rtol=1e-5, atol=1e-5)
    batch = graphs.batch(ids)  # a canary: without its edges, the prediction is another
    nothing = Structure(
        torch.zeros(len(batch.x) + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), symmetric=True
    )
    assert not torch.allclose(model(dataclasses.replace(batch, structure=nothing)), model(batch), atol=1e-2)


def test_degrees_stand_in_for_missing_features():
    star = torch.tensor([[0, 0, 0], [1, 2, 3]])
    graphs = join_graphs([star, star[:, :1]], [5, 2], None, torch.tensor([0, 1]), max_degree=2)
    assert graphs.features.argmax(dim=1).tolist() == [2, 1, 1, 1, 0, 1, 1]  # degree 3 counts as 2
    assert graphs.features.sum(dim=1).eq(1).all()


def test_broken_graphs_are_refused():
    edge, y = torch.tensor([[0], [1]]), torch.tensor([0, 1])
    with pytest.raises(ProjectError, match="graph 1 names a node outside 0 to 0"):
        join_graphs([edge, edge], [2, 1], None, y)
    with pytest.raises(ProjectError, match="graph 0 has no nodes"):
        join_graphs([edge[:, :0], edge], [0, 2], None, y)
    with pytest.raises(ProjectError, match="NaN"):
        join_graphs([edge, edge], [2, 2], [torch.ones(2, 1), torch.full((2, 1), torch.nan)], y)


# -- pooling and GIN against PyTorch Geometric -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "peer"), [("sum", global_add_pool), ("mean", global_mean_pool), ("max", global_max_pool)]
)
def test_pooling(kind, peer):
    sizes = torch.tensor([3, 1, 5])
    owner = torch.repeat_interleave(torch.arange(3), sizes)
    h = torch.randn(9, 4, requires_grad=True)
    ours, theirs = pool(h, owner, sizes, kind), peer(h, owner)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(3, 4)
    (a,), (b,) = torch.autograd.grad((ours * weight).sum(), h), torch.autograd.grad((theirs * weight).sum(), h)
    torch.testing.assert_close(a, b)


class Peer(nn.Module):
    """The network of Xu et al. 2019 with PyTorch Geometric's GINConv, weights copied from ours."""

    def __init__(self, ours: GraphNet) -> None:
        super().__init__()
        self.norms, self.head, self.convs = copy.deepcopy(ours.norms), copy.deepcopy(ours.head), nn.ModuleList()
        for layer in ours.layers:
            first, second = nn.Linear(*layer.weight.shape), nn.Linear(*layer.second.weight.T.shape)
            # draws weights
            conv = GINConv(nn.Sequential(first, nn.BatchNorm1d(first.out_features), nn.ReLU(), second), train_eps=True)
            with torch.no_grad():
                first.weight.copy_(layer.weight.T)
                first.bias.copy_(layer.bias)
                conv.eps.copy_(layer.eps)
            second.load_state_dict(layer.second.state_dict())
            self.convs.append(conv)

    def forward(self, data: Data) -> Tensor:
        h, reads = data.x, [global_add_pool(data.x, data.batch)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = norm(conv(h, data.edge_index)).relu()
            reads.append(global_add_pool(h, data.batch))
        return self.head(torch.cat(reads, dim=1))


def in_doubles(test):
    def wrapped(*args: object) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            test(*args)
        finally:
            torch.set_default_dtype(torch.float32)

    wrapped.__name__ = test.__name__
    return wrapped


@in_doubles
def test_gin_is_pygs():
    """Logits in training and evaluation mode, and the gradients of all weights, with epsilon away from zero and
    batch norm in use.
    """
    graphs, items = some_graphs()
    graphs = graphs.to("cpu")  # features in doubles
    model = network(learn_eps=True).double()
    model.config = dataclasses.replace(model.config, dropout=0.0)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.eps.fill_(0.3 * (i + 1))
    peer = Peer(model).double()
    batch, data = graphs.batch(torch.arange(12)), PyGBatch.from_data_list(items)
    data.x = batch.x
    ours, theirs = model(batch), peer(data)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    target = torch.arange(12) % 3
    nn.functional.cross_entropy(ours, target).backward()
    nn.functional.cross_entropy(theirs, target).backward()
    for layer, conv in zip(model.layers, peer.convs, strict=True):
        torch.testing.assert_close(layer.weight.grad, conv.nn[0].weight.grad.T, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(layer.second.weight.grad, conv.nn[3].weight.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(layer.eps.grad, conv.eps.grad.reshape(()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.head.weight.grad, peer.head.weight.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.eval()(batch), peer.eval()(data), rtol=1e-10, atol=1e-10)


def test_epsilon_is_zero_unless_learned():
    assert not any(layer.eps.requires_grad for layer in network().layers)
    assert all(layer.eps.requires_grad for layer in network(learn_eps=True).layers)


def test_readouts_of_every_layer_or_the_last():
    graphs, _ = some_graphs()
    batch = graphs.batch(torch.arange(12))
    assert network().hidden(batch).shape == (12, 4 + 3 * 8) and network(jumping=False).hidden(batch).shape == (12, 8)
    torch.testing.assert_close(network().hidden(batch)[:, :4], global_add_pool(batch.x, batch.owner))


def test_a_layer_that_graphs_cannot_use():
    with pytest.raises(ConfigError, match=r"model\.layer"):
        network("appnp")


def test_sum_tells_apart_what_mean_cannot():
    """Two copies of a graph against one: only the sum sees a difference (Xu et al. 2019, section 5)."""
    triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    twice = torch.cat([triangle, triangle + 3], dim=1)
    graphs = join_graphs([triangle, twice], [3, 6], [torch.ones(3, 4), torch.ones(6, 4)], torch.tensor([0, 1]))
    for readout, same in (("sum", False), ("mean", True), ("max", True)):
        logits = network(norm="none", readout=readout).eval()(graphs.batch(torch.arange(2)))
        assert torch.allclose(logits[0], logits[1], atol=1e-6) == same


# -- folds and learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "folds"), [((125, 63), 10), ((663, 450), 10), ((10, 11, 12), 10), ((7, 7), 2)])
def test_folds(counts, folds):
    """Disjoint and complete by construction (one number a graph); as even as scikit-learn's, overall and in each
    class.
    """
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])[torch.randperm(sum(counts))]
    fold_of = stratified_folds(labels, folds, seed=3)
    assert fold_of.unique().tolist() == list(range(folds))
    table = np.array([[int(((fold_of == f) & (labels == c)).sum()) for c in range(len(counts))] for f in range(folds)])
    peer = [
        np.bincount(labels[test], minlength=len(counts)) for _, test in StratifiedKFold(folds).split(labels, labels)
    ]
    assert (np.ptp(table, axis=0) <= 1).all() and np.ptp(table.sum(axis=1)) <= 1
    assert sorted(table.sum(axis=1)) == sorted(np.array(peer).sum(axis=1))
    assert torch.equal(fold_of, stratified_folds(labels, folds, seed=3))
    assert not torch.equal(fold_of, stratified_folds(labels, folds, seed=4))


def test_eight_small_graphs_can_be_learned_by_heart():
    graphs, _ = some_graphs(8)
    model = network(classes=2)
    model.config = dataclasses.replace(model.config, dropout=0.0)
    optimizer, batch = torch.optim.Adam(model.parameters(), lr=0.01), graphs.batch(torch.arange(8))
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), batch.labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 and (model(batch).argmax(dim=1) == batch.labels).all()
