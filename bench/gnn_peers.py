"""Our layers and PyTorch Geometric's with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg

from gnn.core.layers import GAT, GCN, GIN, SAGE, GATv2


@dataclass
class Pair:
    """A layer, its peer, and the peer's name and value for each of our weights (transposed where it stores them so)."""

    ours: nn.Module
    peer: nn.Module
    names: dict[str, tuple[str, bool]]
    extra: Callable[..., dict] = lambda x: {}  # further inputs

    def __post_init__(self) -> None:
        peer = dict(self.peer.named_parameters())
        with torch.no_grad():
            for p in self.ours.parameters():
                p += 0.1 * torch.randn_like(p)  # no bias stays zero, where a mistake would not show
            for name, (other, flip) in self.names.items():
                value = self.ours.get_parameter(name)
                peer[other].copy_((value.T if flip else value).reshape(peer[other].shape))
        assert set(peer) == {other for other, _ in self.names.values()}, "each weight of the peer has its counterpart"

    def gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """Ours and the peer's, in our layout."""
        other, flip = self.names[name]
        grad, theirs = self.ours.get_parameter(name).grad, self.peer.get_parameter(other).grad
        return grad, (theirs.T if flip else theirs).reshape(grad.shape)


def pair(kind: str, a: int, b: int) -> Pair:
    """Two layers from width a to b."""
    if kind == "gcn":
        return Pair(GCN(a, b), pyg.GCNConv(a, b), {"weight": ("lin.weight", True), "bias": ("bias", False)})
    if kind == "sage":
        return Pair(
            SAGE(a, b),
            pyg.SAGEConv(a, b),
            {
                "weight_neighbours": ("lin_l.weight", True),
                "bias": ("lin_l.bias", False),
                "weight_self": ("lin_r.weight", True),
            },
        )
    if kind == "gin":
        mlp = nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, b))
        return Pair(
            GIN(a, b),
            pyg.GINConv(mlp, train_eps=True),
            {
                "eps": ("eps", False),
                "weight": ("nn.0.weight", True),
                "bias": ("nn.0.bias", False),
                "norm.weight": ("nn.1.weight", False),
                "norm.bias": ("nn.1.bias", False),
                "second.weight": ("nn.3.weight", False),
                "second.bias": ("nn.3.bias", False),
            },
        )
    if kind in ("gat", "gat_mean"):
        heads, concat = 4, kind == "gat"
        return Pair(
            GAT(a, b, heads, concat),
            pyg.GATConv(a, b // heads if concat else b, heads, concat),
            {
                "weight": ("lin.weight", True),
                "att_src": ("att_src", False),
                "att_dst": ("att_dst", False),
                "bias": ("bias", False),
            },
        )
    if kind == "gatv2":
        return Pair(
            GATv2(a, b, 4),
            pyg.GATv2Conv(a, b // 4, 4),
            {
                "weight": ("lin_l.weight", True),
                "bias_src": ("lin_l.bias", False),
                "weight_dst": ("lin_r.weight", True),
                "bias_dst": ("lin_r.bias", False),
                "att": ("att", False),
                "bias": ("bias", False),
            },
        )
    raise ValueError(kind)
