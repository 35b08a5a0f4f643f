"""Message-passing layers: GCN, GAT, GATv2, GraphSAGE, GIN, and the propagation of APPNP and GCNII.

Each takes x (M, F) of the sources and a `Structure`, and returns (N, F') for the destinations; for a whole graph M = N.
Where features are `SparseFeatures`, only their non-zeros are touched. Each equals PyTorch Geometric's layer of the same
name with copied weights (tests/gnn/test_layers.py).

Legend: N destinations, M sources, E edges, F and F' features in and out, H heads, C channels a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnn.core.sparse import Matrix, SparseFeatures, Structure, aggregate, at_columns, at_rows, dropout, segment_softmax

Features = Tensor | SparseFeatures


def glorot(*shape: int, fan: tuple[int, int] | None = None) -> nn.Parameter:
    """Uniform weights of variance 2 / (fan in + fan out) (Glorot & Bengio 2010)."""
    fan_in, fan_out = fan or (shape[0], shape[-1])
    bound = math.sqrt(6 / (fan_in + fan_out))
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def destinations(x: Features, structure: Structure) -> Features:
    """The rows of x that receive messages: the first `num_dst`."""
    if structure.num_dst == structure.num_src:
        return x
    if isinstance(x, SparseFeatures):
        return x.rows(torch.arange(structure.num_dst, device=structure.device))
    return x[: structure.num_dst]


class GraphLayer(nn.Module):
    """A layer from `in_features` to `out_features`: what the networks in model.py rely on."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def propagate(self, matrix: Matrix, x: Features, weight: Tensor) -> Tensor:
        """matrix x weight, multiplied in the cheaper order: the product with the edges costs E times the width it is
        done at.
        """
        if isinstance(x, SparseFeatures) or self.in_features >= self.out_features:
            return matrix @ (x @ weight)
        return (matrix @ x) @ weight


class GCN(GraphLayer):
    """Graph convolution, D^-1/2 (A + I) D^-1/2 X W + b (Kipf & Welling 2017, eq. 2)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = glorot(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Features, structure: Structure) -> Tensor:
        return self.propagate(structure.gcn(), x, self.weight) + self.bias


class SAGE(GraphLayer):
    """GraphSAGE with the mean aggregator: x_i W_self + mean_j x_j W_neighbours + b (Hamilton et al. 2017, algorithm
    1).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight_self = glorot(in_features, out_features)
        self.weight_neighbours = glorot(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Features, structure: Structure) -> Tensor:
        heard = self.propagate(structure.mean(), x, self.weight_neighbours)
        return destinations(x, structure) @ self.weight_self + heard + self.bias


class GIN(GraphLayer):
    """Graph isomorphism layer: MLP((1 + eps) x_i + sum_j x_j) (Xu et al. 2019, eq. 4.1), eps learned.

    The first matrix of the MLP is applied before the sum where that is cheaper; both are linear, so the result is the
    same.
    """

    def __init__(self, in_features: int, out_features: int, norm: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.eps = nn.Parameter(torch.zeros(()))
        self.weight = glorot(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.norm = nn.BatchNorm1d(out_features) if norm else nn.Identity()
        self.second = nn.Linear(out_features, out_features)

    def forward(self, x: Features, structure: Structure) -> Tensor:
        if isinstance(x, SparseFeatures) or self.in_features >= self.out_features:
            h = x @ self.weight
            hidden = (1 + self.eps) * destinations(h, structure) + structure.sum() @ h + self.bias
        else:
            hidden = ((1 + self.eps) * destinations(x, structure) + structure.sum() @ x) @ self.weight + self.bias
        return self.second(F.relu(self.norm(hidden)))


class GAT(GraphLayer):
    """Graph attention (Velickovic et al. 2018): e_ij = LeakyReLU(a_dst . W x_i + a_src . W x_j), softmax over j, each
    node hears itself.

    All heads are one sparse matrix: their copies of the edges stand along a diagonal (`Structure.heads`), so a single
    product aggregates all of them.

    Args:
        heads: number of heads H; out_features = H C when they are concatenated, else C.
        concat: side by side; else averaged, as the last layer of the paper does.
        attention_dropout: of the weights after the softmax.
    """

    def __init__(
        self, in_features: int, out_features: int, heads: int = 1, concat: bool = True, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(in_features, out_features)
        self.heads = heads
        self.concat = concat
        self.attention_dropout = attention_dropout
        self.channels = C = out_features // heads if concat else out_features
        self.weight = glorot(in_features, heads * C)
        self.att_src = glorot(heads, C, fan=(C, 1))
        self.att_dst = glorot(heads, C, fan=(C, 1))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Features, structure: Structure) -> Tensor:
        return self.combine(*self.attend(x, structure))

    def attend(self, x: Features, structure: Structure) -> tuple[Structure, Tensor, Tensor]:
        """The structure, the attention weights (H E,), entries in the order of `structure.heads(H)`, and W x as (H,
        M, C).
        """
        H, C = self.heads, self.channels
        h = (x @ self.weight).view(-1, H, C).transpose(0, 1).contiguous()  # (M, H C) -> (H, M, C)
        from_src = torch.einsum("hmc,hc->hm", h, self.att_src).flatten()  # (H M,)
        from_dst = torch.einsum("hnc,hc->hn", h[:, : structure.num_dst], self.att_dst).flatten()  # (H N,)
        pattern = structure.heads(H)
        scores = at_columns(pattern, from_src) + at_rows(pattern, from_dst)  # (H E,)
        return structure, segment_softmax(pattern, F.leaky_relu(scores, 0.2)), h

    def combine(self, structure: Structure, weights: Tensor, h: Tensor) -> Tensor:
        """Weighted sums of h (H, M, C), heads joined: (N, H C) or (N, C)."""
        H, C = self.heads, self.channels
        weights = dropout(weights, self.attention_dropout, self.training)
        out = aggregate(structure.heads(H), weights, h.reshape(-1, C)).view(H, -1, C)  # (H, N, C)
        joined = out.transpose(0, 1).reshape(-1, H * C) if self.concat else out.mean(dim=0)
        return joined + self.bias


class GATv2(GAT):
    """Attention whose ranking of neighbours depends on the node that asks: e_ij = a . LeakyReLU(W_dst x_i + W_src x_j)
    (Brody et al. 2022, eq. 7). It needs C numbers an edge where GAT needs one."""

    def __init__(
        self, in_features: int, out_features: int, heads: int = 1, concat: bool = True, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(in_features, out_features, heads, concat, attention_dropout)
        C = self.channels
        del self.att_src, self.att_dst
        self.weight_dst = glorot(in_features, heads * C)
        self.bias_src = nn.Parameter(torch.zeros(heads * C))
        self.bias_dst = nn.Parameter(torch.zeros(heads * C))
        self.att = glorot(heads, C, fan=(C, 1))

    def attend(self, x: Features, structure: Structure) -> tuple[Structure, Tensor, Tensor]:
        """As GAT's."""
        H, C = self.heads, self.channels
        src = (x @ self.weight + self.bias_src).view(-1, H, C).transpose(0, 1).contiguous()  # (H, M, C)
        dst = (destinations(x, structure) @ self.weight_dst + self.bias_dst).view(-1, H, C).transpose(0, 1)  # (H, N, C)
        pattern = structure.heads(H)
        pairs = at_columns(pattern, src.reshape(-1, C)) + at_rows(pattern, dst.reshape(-1, C))  # (H E, C)
        # (H, E, C) (H, C, 1)
        scores = torch.bmm(F.leaky_relu(pairs, 0.2).view(H, -1, C), self.att[:, :, None]).flatten()
        return structure, segment_softmax(pattern, scores), src


class GCNIILayer(GraphLayer):
    """((1 - alpha) P h + alpha h_0) ((1 - beta) I + beta W) (Chen et al. 2020, eq. 5), P the GCN's propagation.

    The first layer's h_0 in every layer, and a weight close to the identity, are what keeps 64 layers from washing all
    nodes to one.

    Args:
        beta: log(lambda / l + 1) for layer l = 1, 2, ...
    """

    def __init__(self, features: int, alpha: float, beta: float) -> None:
        super().__init__(features, features)
        self.alpha = alpha
        self.beta = beta
        self.weight = glorot(features, features)

    def forward(self, h: Tensor, h0: Tensor, structure: Structure) -> Tensor:
        mixed = torch.lerp(structure.gcn() @ h, h0, self.alpha)  # (N, F)
        eye = torch.eye(self.in_features, dtype=h.dtype, device=h.device)
        # one product, not a product and a sum: F x F numbers are mixed, not N x F
        return mixed @ torch.lerp(eye, self.weight, self.beta)


def personalized_pagerank(h: Tensor, matrix: Matrix, hops: int, alpha: float) -> Tensor:
    """z <- (1 - alpha) P z + alpha h, `hops` times from z = h (Klicpera et al. 2019, eq. 4): (N, F)."""
    z = h
    for _ in range(hops):
        z = torch.lerp(matrix @ z, h, alpha)
    return z


def mean_of_powers(h: Tensor, matrix: Matrix, hops: int) -> Tensor:
    """(h + P h + ... + P^K h) / (K + 1) (Feng et al. 2020, section 3.1): (N, F)."""
    total = h
    power = h
    for _ in range(hops):
        power = matrix @ power
        total = total + power
    return total / (hops + 1)
