"""Networks of the layers in layers.py. Pure: no files, no command line, no device.

Legend: N nodes, M sources of a block, F features in, D width, K outputs.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnn.config import ModelConfig
from gnn.core.layers import (
    GAT,
    GCN,
    GIN,
    SAGE,
    Features,
    GATv2,
    GCNIILayer,
    destinations,
    glorot,
    mean_of_powers,
    personalized_pagerank,
)
from gnn.core.sparse import SparseFeatures, Structure, dropout

ACTIVATIONS = {"relu": F.relu, "elu": F.elu, "selu": F.selu, "tanh": torch.tanh}


def drop_features(x: Features, p: float, training: bool) -> Features:
    """Dropout of dense or sparse features."""
    return x.dropout(p, training) if isinstance(x, SparseFeatures) else dropout(x, p, training)


def split_weights(model: nn.Module, part: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of `part`, and all others of `model`."""
    first = list(part.parameters())
    return first, [p for p in model.parameters() if not any(p is q for q in first)]


class Dense(nn.Module):
    """x W + b for dense or sparse x; the structure is ignored. What a network without a graph is made of."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = glorot(in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Features, structure: Structure | None = None) -> Tensor:
        if structure is not None:
            x = destinations(x, structure)
        return x @ self.weight + self.bias


class GNN(nn.Module):
    """A stack of layers of one kind, with dropout before each, and norm and activation between them.

    Args:
        out_features: outputs K of the last layer.
    forward: x (M, F) and one structure for all layers, or a list of sampled blocks, one a layer, outermost first;
        returns (N, K).
    """

    def __init__(self, config: ModelConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        widths = [in_features, *[config.hidden] * (config.layers - 1), out_features]
        self.layers = nn.ModuleList(
            self.make_layer(a, b, i == config.layers - 1) for i, (a, b) in enumerate(pairwise(widths))
        )
        kinds = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.norms = nn.ModuleList(kinds[config.norm](width) for width in widths[1:-1])
        self.activation = ACTIVATIONS[config.activation]

    def make_layer(self, a: int, b: int, last: bool) -> nn.Module:
        """One layer from width a to b."""
        config = self.config
        if config.layer in ("gat", "gatv2"):
            kind = GAT if config.layer == "gat" else GATv2
            return kind(a, b, config.out_heads if last else config.heads, not last, config.attention_dropout)
        kinds = {"gcn": GCN, "sage": SAGE, "gin": GIN, "mlp": Dense}
        if config.layer not in kinds:
            raise ValueError(f"model.layer={config.layer} is not a stack of layers; build it with build_model")
        return kinds[config.layer](a, b)

    def weight_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the first layer, and all others: the GCN's penalty is on the first layer only (Kipf & Welling
        2017, section 5.2).
        """
        return split_weights(self, self.layers[0])

    def forward(self, x: Features, structure: Structure | list[Structure]) -> Tensor:
        for i in range(len(self.layers)):
            x = self.forward_layer(i, x, structure[i] if isinstance(structure, list) else structure)
        return x

    def forward_layer(self, i: int, x: Features, structure: Structure) -> Tensor:
        """Layer i with what stands before and after it; (M, F) to (N, F'). Layer-wise inference calls this for all
        nodes at a time.
        """
        config = self.config
        p = config.input_dropout if i == 0 and config.input_dropout >= 0 else config.dropout
        x = drop_features(x, p, self.training)
        h = self.layers[i](x, structure)
        if i == len(self.layers) - 1:
            return h
        if config.residual and h.shape[1] == x.shape[1]:
            h = h + destinations(x, structure)
        return self.activation(self.norms[i](h))

    def hidden(self, x: Features, structure: Structure) -> Tensor:
        """What the last layer is given, (N, D): the embeddings that the pictures show."""
        for i in range(len(self.layers) - 1):
            x = self.forward_layer(i, x, structure)
        return x.dense() if isinstance(x, SparseFeatures) else x


class MLP(nn.Module):
    """Two or more dense layers; hidden width D, dropout before each."""

    def __init__(self, config: ModelConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        widths = [in_features, *[config.hidden] * (config.layers - 1), out_features]
        self.layers = nn.ModuleList(Dense(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) if config.norm == "batch" else nn.Identity() for b in widths[1:-1])

    def start(self, x: Features) -> Tensor:
        """The first layer, dropout included: (N, D)."""
        config = self.config
        return self.layers[0](
            drop_features(x, config.dropout if config.input_dropout < 0 else config.input_dropout, self.training)
        )

    def rest(self, h: Tensor) -> Tensor:
        """From the first layer's output to the last one's: (N, K)."""
        for norm, layer in zip(self.norms, list(self.layers)[1:]):
            h = layer(dropout(F.relu(norm(h)), self.config.dropout, self.training))
        return h

    def embed(self, h: Tensor) -> Tensor:
        """From the first layer's output to what the last layer is given."""
        for norm, layer in zip(list(self.norms)[:-1], list(self.layers)[1:-1]):
            h = layer(dropout(F.relu(norm(h)), self.config.dropout, self.training))
        return F.relu(self.norms[-1](h)) if len(self.norms) else h


class APPNP(nn.Module):
    """An MLP for each node, then personalised PageRank of its outputs (Klicpera et al. 2019)."""

    def __init__(self, config: ModelConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = MLP(config, in_features, out_features)

    def weight_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights of the first layer, and all others."""
        return split_weights(self, self.mlp.layers[0])

    def forward(self, x: Features, structure: Structure) -> Tensor:
        h = self.mlp.rest(self.mlp.start(x))  # (N, K)
        return personalized_pagerank(h, structure.gcn(), self.config.hops, self.config.alpha)

    def hidden(self, x: Features, structure: Structure) -> Tensor:
        """Propagated hidden layer (N, D), for pictures."""
        return personalized_pagerank(
            self.mlp.embed(self.mlp.start(x)), structure.gcn(), self.config.hops, self.config.alpha
        )


class GCNII(nn.Module):
    """A deep GCN with initial residual and identity mapping (Chen et al. 2020)."""

    def __init__(self, config: ModelConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        D = config.hidden
        self.first = Dense(in_features, D)
        self.last = Dense(D, out_features)
        self.layers = nn.ModuleList(
            GCNIILayer(D, config.alpha, math.log(config.theta / i + 1)) for i in range(1, config.layers + 1)
        )

    def weight_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The two dense layers, and the propagating ones, which get another penalty in the paper."""
        return [*self.first.parameters(), *self.last.parameters()], list(self.layers.parameters())

    def forward(self, x: Features, structure: Structure) -> Tensor:
        return self.last(dropout(self.hidden(x, structure), self.config.dropout, self.training))

    def hidden(self, x: Features, structure: Structure) -> Tensor:
        """The last propagating layer's output (N, D)."""
        config = self.config
        p = config.dropout if config.input_dropout < 0 else config.input_dropout
        h = h0 = F.relu(self.first(drop_features(x, p, self.training)))
        for layer in self.layers:
            h = F.relu(layer(dropout(h, config.dropout, self.training), h0, structure))
        return h


class GRAND(nn.Module):
    """Random propagation: drop whole nodes, average K powers of the propagation, then an MLP (Feng et al. 2020, section
    3.1).

    The paper propagates the F input features and then applies dropout and the MLP's first matrix. Dropping inputs
    before the propagation instead makes all of it linear up to the first activation, so the matrix comes first and D =
    32 numbers a node are propagated instead of F = 1433: the same propagation at a fortieth of the cost, with dropout's
    noise averaged over a neighbourhood.
    """

    def __init__(self, config: ModelConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = MLP(config, in_features, out_features)

    def weight_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All weights alike."""
        return list(self.parameters()), []

    def forward(self, x: Features, structure: Structure) -> Tensor:
        return self.mlp.rest(self.propagated(x, structure))

    def propagated(self, x: Features, structure: Structure) -> Tensor:
        """The first layer's output after random propagation (N, D). In training, each node is silent with
        probability `drop_node`.
        """
        h = drop_features(
            x, self.config.dropout if self.config.input_dropout < 0 else self.config.input_dropout, self.training
        )
        h = h @ self.mlp.layers[0].weight
        if self.training:
            speaks = dropout(torch.ones(len(h), 1, dtype=h.dtype, device=h.device), self.config.drop_node)
            h = h * speaks
        return mean_of_powers(h, structure.gcn(), self.config.hops) + self.mlp.layers[0].bias

    def hidden(self, x: Features, structure: Structure) -> Tensor:
        """What the last layer is given (N, D)."""
        return self.mlp.embed(self.propagated(x, structure))


def consistency_loss(logits: Tensor, temperature: float) -> Tensor:
    """How far the predictions of S augmentations lie from their sharpened mean (Feng et al. 2020, eqs. 4 and 5).

    Args: logits (S, N, K). The sharpened mean is a target: no gradient flows into it.
    """
    p = logits.softmax(dim=-1)  # (S, N, K)
    with torch.no_grad():
        sharp = p.mean(dim=0).pow(1 / temperature)  # (N, K)
        sharp = sharp / sharp.sum(dim=-1, keepdim=True)
    return (p - sharp).square().sum(dim=-1).mean()


def build_model(config: ModelConfig, in_features: int, out_features: int) -> nn.Module:
    """The network that `config.layer` names."""
    others = {"appnp": APPNP, "gcnii": GCNII, "grand": GRAND}
    return others.get(config.layer, GNN)(config, in_features, out_features)
