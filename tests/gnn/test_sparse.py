"""Sparse products, softmax over neighbourhoods, dropout and normalisations, against dense arithmetic and PyTorch
Geometric.
"""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import softmax as pyg_softmax

from gnn.core.sparse import (
    Matrix,
    Pattern,
    SparseFeatures,
    Structure,
    aggregate,
    at_columns,
    at_rows,
    dropout,
    segment_softmax,
)


def random_pattern(n: int, m: int, density: float, seed: int = 0) -> Pattern:
    """Entries at random; some rows are empty."""
    rng = torch.Generator().manual_seed(seed)
    present = torch.rand(n, m, generator=rng) < density
    present[n // 2] = False
    rows, columns = present.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=n).cumsum(0)])
    return Pattern(indptr, columns, (n, m))


def symmetric_structure(n: int = 30, density: float = 0.15, seed: int = 0) -> Structure:
    rng = torch.Generator().manual_seed(seed)
    present = torch.rand(n, n, generator=rng) < density
    present = (present | present.T).fill_diagonal_(False)
    present[3], present[:, 3] = False, False  # an isolated node
    rows, columns = present.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=n).cumsum(0)])
    return Structure(indptr, columns, symmetric=True)


def test_transpose_and_blocks_are_those_of_the_dense_matrix():
    pattern = random_pattern(17, 11, 0.3)
    values = torch.randn(len(pattern.indices))
    dense = Matrix(pattern, values).dense()
    assert torch.equal(Matrix(pattern, values).T.dense(), dense.T)
    twice = pattern.blocks(2)
    assert twice.shape == (34, 22)
    assert torch.equal(Matrix(twice, torch.cat([values, 2 * values])).dense(), torch.block_diag(dense, 2 * dense))
    assert torch.equal(pattern.rows.long(), dense.nonzero()[:, 0])


def test_products_and_their_gradients():
    pattern = random_pattern(9, 7, 0.4)
    values = torch.randn(len(pattern.indices), dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Matrix(pattern, values.detach()) @ x, (x,))
    assert torch.autograd.gradcheck(lambda v, x: aggregate(pattern, v, x), (values, x))
    assert torch.autograd.gradcheck(lambda v: segment_softmax(pattern, v), (values,))
    for gather, index, n in ((at_rows, pattern.rows, 9), (at_columns, pattern.indices, 7)):
        for shape in ((n,), (n, 2), (n, 2, 3)):
            nodes = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            assert torch.equal(gather(pattern, nodes), nodes[index.long()])
            assert torch.autograd.gradcheck(lambda x, gather=gather: gather(pattern, x), (nodes,))
    torch.testing.assert_close(aggregate(pattern, values, x), Matrix(pattern, values.detach()).dense() @ x)


def test_symmetric_matrix_needs_no_transpose():
    structure = symmetric_structure()
    matrix = structure.gcn()
    assert matrix.T is matrix
    torch.testing.assert_close(matrix.dense(), matrix.dense().T)


def test_gradient_arriving_in_another_layout():
    """The gradient of a sum is an expanded scalar, that of a transposed use is strided: both must be handled."""
    pattern = random_pattern(9, 7, 0.4)
    matrix, x = Matrix(pattern, torch.randn(len(pattern.indices))), torch.randn(7, 4, requires_grad=True)
    (matrix @ x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.dense().T @ torch.ones(9, 4))
    x.grad = None
    out = torch.randn(4, 9)
    ((matrix @ x).T * out).sum().backward()
    torch.testing.assert_close(x.grad, matrix.dense().T @ out.T)


def test_segment_softmax_against_pyg_with_large_scores():
    pattern = random_pattern(12, 12, 0.4)
    scores = 300 * torch.randn(len(pattern.indices))  # exp overflows without the maximum
    weights = segment_softmax(pattern, scores)
    torch.testing.assert_close(weights, pyg_softmax(scores, pattern.rows.long(), num_nodes=12))
    sums = torch.zeros(12).index_add_(0, pattern.rows.long(), weights)
    torch.testing.assert_close(sums, (torch.bincount(pattern.rows, minlength=12) > 0).float())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_the_expectation(p):
    torch.manual_seed(0)
    x = torch.ones(401, 503)  # not a multiple of four
    out = dropout(x, p)
    kept = out != 0
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * sigma
    torch.testing.assert_close(out[kept].unique(), torch.tensor([1 / (1 - round(p * 65536) / 65536)]))
    for stride in (1, 2, 3):  # the four numbers that share a draw are independent, and so are neighbouring columns
        a, b = kept.flatten()[:-stride].float(), kept.flatten()[stride:].float()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / x.numel() ** 0.5
    assert dropout(x, p, training=False) is x
    assert dropout(x, 0.0) is x


def test_dropout_repeats_with_the_seed_and_its_gradient_uses_the_same_mask():
    x = torch.randn(50, 7, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.5))
    first.sum().backward()
    assert torch.equal(x.grad != 0, first != 0)


def test_sparse_features_are_the_dense_ones():
    torch.manual_seed(0)
    dense = torch.randn(20, 15) * (torch.rand(20, 15) < 0.2)
    dense[4] = 0
    x = SparseFeatures.from_dense(dense)
    assert torch.equal(x.dense(), dense)
    weight = torch.randn(15, 6, requires_grad=True)
    (x @ weight).square().sum().backward()
    expected = torch.autograd.grad((dense @ weight).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)
    ids = torch.tensor([4, 19, 0, 0, 7])
    assert torch.equal(x.rows(ids), dense[ids])
    factors = torch.rand(20)
    torch.testing.assert_close(x.scale_rows(factors).dense(), dense * factors[:, None])
    dropped = x.dropout(0.5).dense()
    assert torch.equal(dropped[dense == 0], torch.zeros((dense == 0).sum()))
    torch.testing.assert_close(dropped[dropped != 0], 2 * dense[dropped != 0])
    assert 0.2 < (dropped != 0).sum() / (dense != 0).sum() < 0.8
    assert x.to("cpu", torch.float64).dense().dtype == torch.float64


def test_gcn_normalisation_is_pygs():
    structure = symmetric_structure()
    edges = structure.sum().dense().nonzero().T
    index, weight = gcn_norm(edges, num_nodes=30, dtype=torch.float32)
    expected = torch.zeros(30, 30)
    expected[index[1], index[0]] = weight
    torch.testing.assert_close(structure.gcn().dense(), expected)


def test_loops_are_added_only_where_missing_and_count_in_the_degree():
    edges = torch.tensor([[0, 0, 1, 2], [0, 1, 0, 2]])  # nodes 0 and 2 have a loop, node 1 has none
    indptr = torch.tensor([0, 2, 3, 4])
    looped = Structure(indptr, edges[1], symmetric=True)
    assert torch.equal(looped.with_loops.sum().dense(), torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    half = 0.5
    torch.testing.assert_close(looped.gcn().dense(), torch.tensor([[half, half, 0], [half, half, 0], [0, 0, 1.0]]))


def test_mean_of_an_isolated_node_is_zero():
    structure = symmetric_structure()
    rows = structure.mean().dense().sum(dim=1)
    assert rows[3] == 0
    torch.testing.assert_close(rows[structure.degree > 0], torch.ones(int((structure.degree > 0).sum())))


def test_normalisations_belong_to_their_edges():
    """Two structures never share a cached matrix; one structure makes each once."""
    one, other = symmetric_structure(seed=0), symmetric_structure(seed=1)
    assert one.gcn() is one.gcn()
    assert one.heads(4) is one.heads(4)
    assert not torch.equal(one.gcn().dense(), other.gcn().dense())


def test_sampled_blocks_have_no_symmetric_normalisation():
    block = Structure(torch.tensor([0, 1, 2]), torch.tensor([2, 3]), num_src=4)
    with pytest.raises(ValueError, match="sampled block"):
        block.gcn()
    assert block.with_loops.sum().dense().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
