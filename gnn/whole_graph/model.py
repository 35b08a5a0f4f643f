"""Networks that give a whole graph its class: message passing, a readout over the nodes, and a linear map of every
layer's readout.

Pure: no files, no command line, no device.

Legend: M nodes of a batch, B graphs, F features in, D width, L layers, K classes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from common.config import require
from gnn.config import GraphConfig, ModelConfig
from gnn.core.layers import GCN, GIN, SAGE
from gnn.core.sparse import dropout
from gnn.model import ACTIVATIONS, Dense
from gnn.whole_graph.data import Batch


def pool(h: Tensor, owner: Tensor, sizes: Tensor, kind: str) -> Tensor:
    """The sum, mean or largest of the rows of h (M, D) that belong to each graph: (B, D).

    Args: owner: int64 (M,), the graph of each row. sizes: int64 (B,), rows of each graph, none of them zero.
    """
    if kind == "max":
        out = h.new_zeros(len(sizes), h.shape[1])
        return out.scatter_reduce(0, owner[:, None].expand_as(h), h, "amax", include_self=False)
    total = h.new_zeros(len(sizes), h.shape[1]).index_add(0, owner, h)
    return total / sizes[:, None] if kind == "mean" else total


class GraphNet(nn.Module):
    """Logits (B, K) of a batch: W CONCAT(READOUT(h_l)), h_0 the features and h_l the nodes after layer l (Xu et al.
    2019, eq. 4.2).

    With `jumping` off, only the last layer is read. A layer is followed by the norm and the activation; dropout is of
    the readouts. model.layer=mlp ignores the edges: what node features alone can tell.
    """

    def __init__(self, config: ModelConfig, graph: GraphConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        kinds = {"gin": GIN, "gcn": GCN, "sage": SAGE, "mlp": Dense}
        require(config.layer in kinds, "model.layer", f"must be one of {', '.join(kinds)} when task=graph")
        self.config = config
        self.graph = graph
        widths = [in_features, *[config.hidden] * config.layers]
        inner = {"norm": config.norm == "batch"} if config.layer == "gin" else {}  # of the MLP inside a GIN layer
        self.layers = nn.ModuleList(kinds[config.layer](a, b, **inner) for a, b in pairwise(widths))
        norms = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.norms = nn.ModuleList(norms[config.norm](width) for width in widths[1:])
        read = sum(widths) if graph.jumping else widths[-1]
        self.scale = nn.BatchNorm1d(read) if graph.readout_norm else nn.Identity()
        self.head = nn.Linear(read, out_features)
        for layer in self.layers:
            if isinstance(layer, GIN):
                layer.eps.requires_grad_(graph.learn_eps)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(dropout(self.hidden(batch), self.config.dropout, self.training))

    def hidden(self, batch: Batch) -> Tensor:
        """The readouts, which embed the graphs: the input's and every layer's side by side (B, F + L D), or the last
        layer's (B, D).
        """
        h = batch.x
        states = [batch.x]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            out = norm(layer(h, batch.structure))
            h = ACTIVATIONS[self.config.activation](out + h if self.config.residual and out.shape == h.shape else out)
            states.append(h)
        nodes = torch.cat(states, dim=1) if self.graph.jumping else h  # (M, F + L D) or (M, D)
        return self.scale(pool(nodes, batch.owner, batch.sizes, self.graph.readout))
