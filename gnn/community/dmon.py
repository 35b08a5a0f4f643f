"""Deep modularity networks: communities of a graph with node features by gradient descent on modularity (Tsitsulin et
al. 2023).

Pure: no files, no command line, no device.

Legend: N nodes, F features, D width, k communities, m undirected edges, d (N,) degrees.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnn.config import CommunityConfig, ModelConfig
from gnn.core.layers import Features
from gnn.core.sparse import Structure, dropout
from gnn.model import ACTIVATIONS, Dense, build_model


class DMoN(nn.Module):
    """A graph encoder, and a dense layer that assigns each node softly to communities.

    The encoder is the network that `model` names (the paper's is one GCN layer). With `community.skip`, x W_skip is
    added to its output before the activation, so that a node keeps something of its own (the paper leaves self-loops
    out instead; here layers keep theirs).
    """

    def __init__(self, config: ModelConfig, community: CommunityConfig, in_features: int, num_communities: int) -> None:
        super().__init__()
        self.community = community
        self.activation = ACTIVATIONS[config.activation]
        self.encoder = build_model(config, in_features, config.hidden)
        self.skip = Dense(in_features, config.hidden) if community.skip else None
        self.norm = nn.BatchNorm1d(config.hidden) if config.norm == "batch" else nn.Identity()
        self.assign = Dense(config.hidden, num_communities)

    def hidden(self, x: Features, structure: Structure) -> Tensor:
        """Embeddings (N, D) of features x (N, F)."""
        h = self.encoder(x, structure)
        if self.skip is not None:
            h = h + self.skip(x)
        return self.activation(self.norm(h))

    def forward(self, x: Features, structure: Structure) -> Tensor:
        """Assignments C (N, k), rows on the simplex. In training, dropout acts on the logits, before the softmax."""
        logits = self.assign(self.hidden(x, structure))  # (N, k)
        return F.softmax(dropout(logits, self.community.dropout, self.training), dim=1)


def soft_modularity(assignment: Tensor, structure: Structure) -> Tensor:
    """tr(C^T B C) / 2m with B = A - d d^T / 2m, never formed: sum(C * A C) / 2m - |C^T d|^2 / (2m)^2. A scalar; 0
    without edges.

    C (N, k) are soft assignments; at one-hot rows this is Newman's modularity. Time and memory are O((N + E) k).
    """
    degrees = structure.degree.to(assignment.dtype)
    total = degrees.sum().clamp(min=1)  # 2m
    inside = (assignment * (structure.sum() @ assignment)).sum()
    return inside / total - (degrees @ assignment / total).square().sum()


def collapse_penalty(assignment: Tensor) -> Tensor:
    """sqrt(k) / N |sum_i C_i| - 1: 0 for communities of equal (soft) size, sqrt(k) - 1 when all nodes share one."""
    num_nodes, k = assignment.shape
    return math.sqrt(k) / num_nodes * assignment.sum(dim=0).norm() - 1


def dmon_loss(assignment: Tensor, structure: Structure, collapse: float) -> Tensor:
    """What training minimises: minus soft modularity, plus `collapse` times the penalty."""
    return collapse * collapse_penalty(assignment) - soft_modularity(assignment, structure)


def harden(assignment: Tensor) -> Tensor:
    """The community of each node, int64 (N,): the largest entry of each row of C (N, k)."""
    return torch.argmax(assignment, dim=1)
