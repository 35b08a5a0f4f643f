"""Every layer against PyTorch Geometric's with copied weights: outputs, gradients of the input and of every weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch_geometric import nn as pyg

from bench.gnn_peers import pair
from gnn.core.graph import build_graph
from gnn.core.layers import GAT, GCN, SAGE, GATv2, GCNIILayer, mean_of_powers, personalized_pagerank
from gnn.core.sparse import SparseFeatures, Structure

KINDS = ["gcn", "sage", "gin", "gat", "gat_mean", "gatv2"]


@pytest.fixture
def graph():
    torch.manual_seed(0)
    edges = torch.randint(0, 25, (2, 60))  # node 25 is isolated
    return build_graph(edges, 26)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)


def peer_edges(graph):
    """PyTorch Geometric's order: source above destination."""
    return graph.edges().flip(0)


def compare(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a", "b"), [(12, 8), (4, 8)], ids=["narrower", "wider"])  # the two orders of multiplication
def test_layer_equals_pyg(kind, a, b, graph):
    both = pair(kind, a, b)
    x = torch.randn(26, a, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mine, theirs = both.ours(x, graph.structure()), both.peer(y, peer_edges(graph))
    compare(mine, theirs)
    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    compare(x.grad, y.grad)
    for name in both.names:
        compare(*both.gradient(name))


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_features_change_nothing(kind, graph):
    both = pair(kind, 12, 8)
    x = torch.randn(26, 12) * (torch.rand(26, 12) < 0.2)
    dense = both.ours(x, graph.structure())
    grads = torch.autograd.grad(dense.square().sum(), list(both.ours.parameters()))
    sparse = both.ours(SparseFeatures.from_dense(x), graph.structure())
    compare(sparse, dense)
    for mine, theirs in zip(torch.autograd.grad(sparse.square().sum(), list(both.ours.parameters())), grads):
        compare(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_nodes_permute_the_output(kind, graph):
    layer, order = pair(kind, 6, 8).ours.eval(), torch.randperm(26)
    x = torch.randn(26, 6)
    where = torch.argsort(order)  # new id of each old node
    moved = build_graph(where[graph.edges()], 26)
    compare(layer(x[order], moved.structure()), layer(x, graph.structure())[order])


@pytest.mark.parametrize("layer", [SAGE(6, 8), GAT(6, 8, 2), GATv2(6, 8, 2)], ids=["sage", "gat", "gatv2"])
def test_a_block_with_all_neighbours_equals_the_whole_graph(layer, graph):
    """Destinations 0 to 9 with all their edges, sources renumbered so that the destinations come first: here, they
    already do.
    """
    layer = layer.double()
    x, whole = torch.randn(26, 6), graph.structure()
    end = int(graph.indptr[10])
    block = Structure(graph.indptr[:11], graph.indices[:end], num_src=26)
    compare(layer(x, block), layer(x, whole)[:10])


def test_gcnii_equals_pyg(graph):
    alpha, theta = 0.1, 0.5
    x, x0 = torch.randn(26, 8), torch.randn(26, 8)
    for number in (1, 7):
        ours = GCNIILayer(8, alpha, math.log(theta / number + 1))
        peer = pyg.GCN2Conv(8, alpha, theta, number)
        with torch.no_grad():
            peer.weight1.copy_(ours.weight)
        compare(ours(x, x0, graph.structure()), peer(x, x0, peer_edges(graph)))


def test_appnp_equals_pyg(graph):
    x = torch.randn(26, 5, requires_grad=True)
    mine, theirs = personalized_pagerank(x, graph.structure().gcn(), 10, 0.1), pyg.APPNP(10, 0.1)(x, peer_edges(graph))
    compare(mine, theirs)
    compare(torch.autograd.grad(mine.square().sum(), x)[0], torch.autograd.grad(theirs.square().sum(), x)[0])


def test_appnp_converges_to_personalised_pagerank(graph):
    """With many hops it is alpha (I - (1 - alpha) P)^-1 h (Klicpera et al. 2019, eq. 3)."""
    x, matrix = torch.randn(26, 5), graph.structure().gcn()
    limit = 0.1 * torch.linalg.solve(torch.eye(26) - 0.9 * matrix.dense(), x)
    compare(personalized_pagerank(x, matrix, 400, 0.1), limit)


def test_mean_of_powers_is_the_mean_of_the_powers(graph):
    x, matrix = torch.randn(26, 5), graph.structure().gcn()
    P = matrix.dense()
    compare(mean_of_powers(x, matrix, 3), (x + P @ x + P @ P @ x + P @ P @ P @ x) / 4)


def test_attention_sums_to_one_and_is_dropped_in_training_only(graph):
    layer = GAT(6, 8, 4, attention_dropout=0.6)
    x, structure = torch.randn(26, 6), graph.structure()
    _, weights, _ = layer.eval().attend(x, structure)
    pattern = structure.heads(4)
    compare(torch.zeros(4 * 26).index_add_(0, pattern.rows.long(), weights), torch.ones(4 * 26))
    assert torch.equal(layer(x, structure), layer(x, structure))
    layer.train()
    assert not torch.equal(layer(x, structure), layer(x, structure))


def test_an_isolated_node_hears_itself_alone(graph):
    x = torch.randn(26, 6)
    gcn = GCN(6, 8)
    compare(gcn(x, graph.structure())[25], x[25] @ gcn.weight + gcn.bias)
    gat = GAT(6, 8, 2)
    compare(gat(x, graph.structure())[25], x[25] @ gat.weight + gat.bias)
