"""Sparse matrices as a graph network needs them: the pattern is fixed, and every product knows its backward pass.

A message-passing step is a product with a sparse matrix, out = A x, and its backward pass is the product with the
transpose, dx = A^T dout. Gathering a vector for each edge and scattering the results would touch E x F numbers three
times; the product in compressed sparse rows (CSR) reads them once and writes N x F. Nothing here is faster by
cleverness, only by not doing that work.

Legend: N nodes (rows, destinations), M columns (sources), E entries (edges, both directions), F features, H heads.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
INT32_MAX = 2**31 - 1


class Pattern:
    """The places of the entries of a sparse (N, M) matrix, row after row, and on demand those of its transpose.

    Args:
        indptr: (N + 1,) integers; row i has the entries indptr[i] to indptr[i + 1].
        indices: (E,) columns; within a row without repetition, in any order.
        shape: (N, M).
    """

    def __init__(self, indptr: Tensor, indices: Tensor, shape: tuple[int, int]) -> None:
        # half the memory traffic where it fits
        kind = torch.int32 if max(len(indices), *shape) <= INT32_MAX else torch.int64
        self.indptr = indptr.to(kind)
        self.indices = indices.to(kind)
        self.shape = shape

    @cached_property
    def rows(self) -> Tensor:
        """(E,) row of each entry."""
        numbers = torch.arange(self.shape[0], dtype=self.indices.dtype, device=self.indices.device)
        return torch.repeat_interleave(numbers, self.indptr.diff(), output_size=len(self.indices))

    @cached_property
    def transposed(self) -> tuple[Pattern, Tensor]:
        """The pattern of the transpose, and the permutation (E,) that takes values in our order to its order."""
        order = torch.argsort(self.indices, stable=True)  # rows stay ascending within a column
        counts = torch.bincount(self.indices, minlength=self.shape[1])
        indptr = torch.zeros(self.shape[1] + 1, dtype=torch.int64, device=self.indices.device)
        torch.cumsum(counts, 0, out=indptr[1:])
        return Pattern(indptr, self.rows[order], (self.shape[1], self.shape[0])), order

    @cached_property
    def incidence(self) -> tuple[Pattern, Pattern]:
        """Row by entry (N, E) and column by entry (M, E): products with them sum what the entries carry, at either
        end.
        """
        E = len(self.indices)
        numbers = torch.arange(E, device=self.indices.device)
        transpose, order = self.transposed
        return Pattern(self.indptr, numbers, (self.shape[0], E)), Pattern(transpose.indptr, order, (self.shape[1], E))

    def times(self, values: Tensor, x: Tensor) -> Tensor:
        """The matrix with these values (E,) times a dense x (M, F): (N, F). Not differentiable by itself."""
        matrix = torch.sparse_csr_tensor(self.indptr, self.indices, values, self.shape, check_invariants=False)
        return torch.mm(matrix, x)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """For each entry (i, j) the product a_i . b_j of rows of a (N, F) and b (M, F): (E,). Not differentiable by
        itself.
        """
        zeros = torch.zeros(len(self.indices), dtype=a.dtype, device=a.device)
        matrix = torch.sparse_csr_tensor(self.indptr, self.indices, zeros, self.shape, check_invariants=False)
        return torch.sparse.sampled_addmm(matrix, a, b.T, beta=0.0).values()

    def blocks(self, count: int) -> Pattern:
        """`count` copies of the pattern along the diagonal of a (count N, count M) matrix: all heads of attention in
        one product.
        """
        num_rows, num_columns = self.shape
        step = torch.arange(count, device=self.indices.device)[:, None]  # (H, 1), int64: the sums may leave int32
        indptr = (self.indptr[:-1] + step * len(self.indices)).flatten()
        end = torch.tensor([count * len(self.indices)], device=indptr.device)
        indices = (self.indices + step * num_columns).flatten()
        return Pattern(torch.cat([indptr, end]), indices, (count * num_rows, count * num_columns))


class _FixedProduct(torch.autograd.Function):
    """matrix @ x, differentiable in x only: d x = matrix^T d out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.pattern.times(matrix.values, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transpose = ctx.matrix.T
        return transpose.pattern.times(transpose.values, grad.contiguous()), None


class _WeightedProduct(torch.autograd.Function):
    """A(values) @ x, differentiable in both: d values_ij = d out_i . x_j, and d x as above."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.pattern = pattern
        return pattern.times(values, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, x = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = ctx.pattern.dots(grad, x) if ctx.needs_input_grad[0] else None
        d_x = None
        if ctx.needs_input_grad[1]:
            transpose, order = ctx.pattern.transposed
            d_x = transpose.times(values.index_select(0, order), grad)
        return d_values, d_x, None


class _Gather(torch.autograd.Function):
    """x_i for each entry, i its row or its column; the backward pass sums over a node's entries without scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pattern: Pattern, end: int) -> Tensor:
        ctx.pattern = pattern
        ctx.end = end
        return x.index_select(0, pattern.indices if end else pattern.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        incidence = ctx.pattern.incidence[ctx.end]
        if grad.ndim == 1 and not ctx.end:  # a row's entries lie side by side
            return torch.segment_reduce(grad, "sum", offsets=incidence.indptr, unsafe=True), None, None
        ones = torch.ones(len(grad), dtype=grad.dtype, device=grad.device)
        return incidence.times(ones, grad.reshape(len(grad), -1).contiguous()).view(-1, *grad.shape[1:]), None, None


class _SegmentSoftmax(torch.autograd.Function):
    """Softmax over the entries of each row; d s = p (d p - sum_row p d p), as for any softmax."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, pattern: Pattern) -> Tensor:
        rows = pattern.rows
        top = torch.segment_reduce(scores, "max", offsets=pattern.indptr, unsafe=True)  # (N,): exp must not overflow
        weights = (scores - top.index_select(0, rows)).exp_()
        total = torch.segment_reduce(weights, "sum", offsets=pattern.indptr, unsafe=True)
        weights /= total.index_select(0, rows)
        ctx.save_for_backward(weights)
        ctx.pattern = pattern
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        flow = weights * grad
        mean = torch.segment_reduce(flow, "sum", offsets=ctx.pattern.indptr, unsafe=True)
        return flow - weights * mean.index_select(0, ctx.pattern.rows), None


def aggregate(pattern: Pattern, values: Tensor, x: Tensor) -> Tensor:
    """out_i = sum_j values_ij x_j for learned values (E,) and x (M, F): (N, F), differentiable in both."""
    return _WeightedProduct.apply(values, x, pattern)


def at_rows(pattern: Pattern, x: Tensor) -> Tensor:
    """x (N, ...) of each entry's row: (E, ...), differentiable."""
    return _Gather.apply(x, pattern, 0)


def at_columns(pattern: Pattern, x: Tensor) -> Tensor:
    """x (M, ...) of each entry's column: (E, ...), differentiable."""
    return _Gather.apply(x, pattern, 1)


def segment_softmax(pattern: Pattern, scores: Tensor) -> Tensor:
    """Scores (E,) to weights (E,) that sum to one in each row that has an entry."""
    return _SegmentSoftmax.apply(scores, pattern)


class Matrix:
    """A sparse (N, M) matrix of fixed values; `matrix @ x` is differentiable in x.

    Args:
        symmetric: the matrix is its own transpose, so that the backward pass needs no second copy.
    """

    def __init__(self, pattern: Pattern, values: Tensor, symmetric: bool = False) -> None:
        self.pattern = pattern
        self.values = values
        self.symmetric = symmetric

    @cached_property
    def T(self) -> Matrix:
        """The transpose."""
        if self.symmetric:
            return self
        pattern, order = self.pattern.transposed
        return Matrix(pattern, self.values.index_select(0, order))

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, x: Tensor) -> Tensor:
        return _FixedProduct.apply(x, self)

    def dense(self) -> Tensor:
        """The same matrix as an ordinary (N, M) tensor."""
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        out[self.pattern.rows.long(), self.pattern.indices.long()] = self.values
        return out


class SparseFeatures(Matrix):
    """Input features (N, F) of which most are zero, such as word counts. `x @ weight` costs their non-zeros only,
    and so does dropout.
    """

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseFeatures:
        """The non-zeros of x (N, F)."""
        rows, columns = x.nonzero(as_tuple=True)
        indptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(torch.bincount(rows, minlength=len(x)), 0, out=indptr[1:])
        return cls(Pattern(indptr, columns, tuple(x.shape)), x[rows, columns])

    @classmethod
    def identity(cls, size: int) -> SparseFeatures:
        """The unit matrix: each node is its own feature, and x @ weight is a table of embeddings."""
        place = torch.arange(size + 1)
        return cls(Pattern(place, place[:-1], (size, size)), torch.ones(size))

    def dropout(self, p: float, training: bool = True) -> SparseFeatures:
        """Dropout of the entries. A zero that is dropped stays zero, so this is dropout of the dense matrix at a
        hundredth of the cost.
        """
        return SparseFeatures(self.pattern, dropout(self.values, p, training)) if training and p > 0 else self

    def scale_rows(self, factors: Tensor) -> SparseFeatures:
        """Row i times factors[i]."""
        return SparseFeatures(self.pattern, self.values * factors.index_select(0, self.pattern.rows))

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` (B,) as a dense (B, F) tensor."""
        start, stop = self.pattern.indptr.long()[ids], self.pattern.indptr.long()[ids + 1]
        counts = stop - start
        row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        first = torch.cumsum(counts, 0) - counts  # where each row's entries begin in the output
        place = torch.arange(len(row), device=ids.device) + (start - first)[row]
        out = torch.zeros(len(ids), self.shape[1], dtype=self.values.dtype, device=self.values.device)
        out[row, self.pattern.indices[place].long()] = self.values[place]
        return out

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SparseFeatures:
        """On another device, or in another precision."""
        pattern = Pattern(self.pattern.indptr.to(device), self.pattern.indices.to(device), self.shape)
        return SparseFeatures(pattern, self.values.to(device, dtype or self.values.dtype))


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each number with probability p and scale the others by 1 / (1 - p) (Srivastava et al. 2014).

    One 64-bit draw decides four numbers, 16 bits each, which is several times faster on a CPU than one draw a number; p
    is rounded to a multiple of 2^-16, and the scale is that of the rounded p, so the expectation is exact.
    """
    if not training or p <= 0:
        return x
    threshold = round(p * 65536)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32768
    return x * keep.to(x.dtype).mul_(65536 / (65536 - threshold))


class Structure:
    """Who hears from whom: an edge set that never changes, with its normalisations made once each.

    Row i lists the sources whose messages destination i receives. For a whole graph the two sets are the nodes. For a
    sampled block they differ: destinations are the first `num_dst` sources. The normalisations live and die with the
    edge set they belong to, so no cached one can be used with other edges.

    Args:
        indptr, indices: CSR (num_dst + 1,), (E,), within a row without repetition.
        num_src: number of sources; default as many as destinations.
        symmetric: j is in row i exactly if i is in row j.
    """

    def __init__(self, indptr: Tensor, indices: Tensor, num_src: int | None = None, symmetric: bool = False) -> None:
        self.num_dst = len(indptr) - 1
        self.num_src = self.num_dst if num_src is None else num_src
        self.symmetric = symmetric
        self.pattern = Pattern(indptr, indices, (self.num_dst, self.num_src))

    @property
    def device(self) -> torch.device:
        return self.pattern.indices.device

    @cached_property
    def degree(self) -> Tensor:
        """(num_dst,) number of sources of each destination, int64."""
        return self.pattern.indptr.diff().long()

    @cached_property
    def with_loops(self) -> Structure:
        """The same edges and a loop at each destination that has none."""
        rows, columns = self.pattern.rows.long(), self.pattern.indices.long()
        numbers = torch.arange(self.num_dst, device=self.device)
        # sorted, each once
        keys = torch.cat([rows * self.num_src + columns, numbers * self.num_src + numbers]).unique()
        rows = torch.div(keys, self.num_src, rounding_mode="floor")
        indptr = torch.zeros(self.num_dst + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(torch.bincount(rows, minlength=self.num_dst), 0, out=indptr[1:])
        return Structure(indptr, keys - rows * self.num_src, self.num_src, self.symmetric)

    def sum(self) -> Matrix:
        """A: out_i = sum of x_j over the sources of i (GIN)."""
        return self._sum

    def mean(self) -> Matrix:
        """D^-1 A: the mean over the sources, zero where there is none (GraphSAGE)."""
        return self._mean

    def gcn(self) -> Matrix:
        """D^-1/2 (A + I) D^-1/2 with the degrees of A + I (Kipf & Welling 2017, the renormalisation trick). Square
        structures only.
        """
        return self._gcn

    def heads(self, count: int) -> Pattern:
        """The pattern with loops, `count` times along a diagonal: entry (h N + i, h M + j) for head h."""
        if count not in self._heads:
            self._heads[count] = self.with_loops.pattern.blocks(count)
        return self._heads[count]

    @cached_property
    def _heads(self) -> dict[int, Pattern]:
        return {}

    @cached_property
    def _sum(self) -> Matrix:
        ones = torch.ones(len(self.pattern.indices), dtype=torch.get_default_dtype(), device=self.device)
        return Matrix(self.pattern, ones, self.symmetric)

    @cached_property
    def _mean(self) -> Matrix:
        weight = 1 / self.degree.clamp(min=1).to(torch.get_default_dtype())
        return Matrix(self.pattern, weight.index_select(0, self.pattern.rows))

    @cached_property
    def _gcn(self) -> Matrix:
        if self.num_src != self.num_dst:
            raise ValueError(
                "the symmetric normalisation needs the degrees of all sources, which a sampled block does not hold: "
                "use model.layer=sage, gat or gin, or cluster batches"
            )
        looped = self.with_loops
        rows, columns = looped.pattern.rows, looped.pattern.indices
        scale = looped.degree.to(torch.get_default_dtype()).rsqrt()
        # directed edges: both ends by the in-degree, PyG's convention
        return Matrix(looped.pattern, scale.index_select(0, rows) * scale.index_select(0, columns), self.symmetric)
