"""Graph autoencoders: an encoder that gives each node a vector, and a decoder that scores pairs of vectors.

    GAE, VGAE   encode the training graph, decode its own edges (Kipf & Welling 2016, "Variational graph auto-encoders")
    MaskGAE     hide a large part of the edges, encode what is left, decode the hidden ones (Li et al. 2023, "What's
                behind the mask: understanding masked graph modeling for graph autoencoders")

A hidden edge is hidden in both directions: the structure is made of undirected pairs, so that no mirror of it stays
behind.

Legend: N nodes, M undirected training edges, S pairs to score, F features, D numbers of an embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnn.config import LinkConfig, ModelConfig
from gnn.core.layers import Features
from gnn.core.sparse import Structure, dropout
from gnn.model import ACTIVATIONS, build_model

MAX_LOG_SIGMA = 10.0  # exp of more would overflow in the first steps of a bad start


class Output(NamedTuple):
    """What a training step needs of one pass."""

    logits: Tensor  # (S,) of the pairs asked for
    kl: Tensor | None  # vgae: divergence of a node from the prior, the mean over nodes; a scalar
    degree: Tensor | None  # maskgae: (N,) predicted number of hidden edges at each node


class LinkModel(nn.Module):
    """Encoder and decoder. Also the only module that training calls, so that it can be wrapped whole for several
    processes.

    Args:
        in_features: F.
    """

    def __init__(self, config: LinkConfig, model: ModelConfig, in_features: int) -> None:
        super().__init__()
        self.config = config
        self.variational = config.method == "vgae"
        D = config.embedding
        # mean and log sigma come out of one last layer, side by side: two layers on a shared hidden one (Kipf & Welling
        # 2016, section 2)
        self.encoder = build_model(model, in_features, 2 * D if self.variational else D)
        self.norm = nn.BatchNorm1d(D) if config.embedding_norm and not self.variational else None
        self.activation = ACTIVATIONS[model.activation]
        self.decoder = (
            nn.Sequential(nn.Linear(D, config.decoder_hidden), nn.ReLU(), nn.Linear(config.decoder_hidden, 1))
            if config.decoder == "mlp"
            else None
        )
        self.degree = (
            nn.Sequential(nn.Linear(D, config.decoder_hidden), nn.ReLU(), nn.Linear(config.decoder_hidden, 1))
            if config.method == "maskgae" and config.degree_weight > 0
            else None
        )

    def forward(self, x: Features, structure: Structure, pairs: Tensor) -> Output:
        """Encode along `structure`, which must not hold the pairs that are to be guessed; score `pairs` int64 (2,
        S).
        """
        kl = None
        if self.variational:
            mean, log_sigma = self.distribution(x, structure)
            kl = kl_divergence(mean, log_sigma)
            # the reparametrisation trick
            z = mean + torch.randn_like(mean) * log_sigma.exp() if self.training else mean
        else:
            z = self.embed(x, structure)
        z = dropout(z, self.config.embedding_dropout, self.training)
        degree = None if self.degree is None else self.degree(z).squeeze(1)
        return Output(self.score(z, pairs), kl, degree)

    def distribution(self, x: Features, structure: Structure) -> tuple[Tensor, Tensor]:
        """vgae: mean and log of the standard deviation of q(z | x, structure), each (N, D)."""
        mean, log_sigma = self.encoder(x, structure).chunk(2, dim=1)
        return mean, log_sigma.clamp(max=MAX_LOG_SIGMA)

    def embed(self, x: Features, structure: Structure) -> Tensor:
        """Embeddings (N, D) without noise; vgae: the mean."""
        if self.variational:
            return self.distribution(x, structure)[0]
        z = self.encoder(x, structure)
        return z if self.norm is None else self.activation(self.norm(z))

    def score(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Logits (S,) that `pairs` int64 (2, S) are linked, alike for (u, v) and (v, u), from embeddings (N, D)."""
        product = z.index_select(0, pairs[0]) * z.index_select(0, pairs[1])  # (S, D)
        if self.decoder is None:
            return product.sum(dim=1)
        return self.decoder(dropout(product, self.config.decoder_dropout, self.training)).squeeze(1)


def kl_divergence(mean: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) summed over D, the mean over nodes; both (N, D) (Kingma & Welling 2014,
    appendix B).
    """
    return -0.5 * (1 + 2 * log_sigma - mean.square() - (2 * log_sigma).exp()).sum(dim=1).mean()


def reconstruction_loss(logits: Tensor, num_positives: int) -> Tensor:
    """Binary cross-entropy of logits (S,), the first `num_positives` of them links: mean over links plus mean over
    the others.
    """
    positive, negative = logits[:num_positives], logits[num_positives:]
    return F.softplus(-positive).mean() + F.softplus(negative).mean()  # softplus(-x) = -log sigmoid(x)


class TrainingEdges:
    """Training edges as something that parts can be taken out of, a new part each step.

    Args: canonical `pairs` int64 (2, M).
    """

    def __init__(self, pairs: Tensor, num_nodes: int, device: torch.device | str = "cpu") -> None:
        both = torch.cat([pairs, pairs.flip(0)], 1)  # (2, 2M): entry e and entry M + e are the two directions of pair e
        order = torch.argsort(both[0] * num_nodes + both[1])
        self.pairs = pairs.to(device)
        self.num_nodes = num_nodes
        self.rows, self.columns = both[:, order].to(device)  # (2M,) each, in the order of the CSR
        self.pair_of_entry = (order % max(1, pairs.shape[1])).to(device)  # (2M,)
        self.whole = self.without(torch.zeros(pairs.shape[1], dtype=torch.bool, device=device))

    def without(self, hidden: Tensor) -> Structure:
        """The structure that is left when the pairs marked in `hidden` bool (M,) are taken out, in both directions."""
        keep = ~hidden.index_select(0, self.pair_of_entry)  # (2M,)
        indptr = torch.zeros(self.num_nodes + 1, dtype=torch.int64, device=keep.device)
        torch.cumsum(torch.bincount(self.rows[keep], minlength=self.num_nodes), 0, out=indptr[1:])
        return Structure(indptr, self.columns[keep].int(), symmetric=True)

    def mask_edges(self, share: float) -> Tensor:
        """Each pair is hidden with probability `share`, independently: bool (M,) (Li et al. 2023, section 4.1)."""
        return torch.rand(self.pairs.shape[1], device=self.pairs.device) < share

    def mask_paths(self, share: float, length: int) -> Tensor:
        """Pairs on random walks of `length` edges from a share of the nodes: bool (M,). Neighbouring edges are
        hidden together.
        """
        device = self.pairs.device
        indptr = self.whole.pattern.indptr.long()
        node = torch.randperm(self.num_nodes, device=device)[: round(share * self.num_nodes)]
        hidden = torch.zeros(self.pairs.shape[1], dtype=torch.bool, device=device)
        for _ in range(length):
            degree = indptr[node + 1] - indptr[node]
            node, degree = node[degree > 0], degree[degree > 0]  # an isolated node has nowhere to go
            entry = indptr[node] + (torch.rand(len(node), device=device, dtype=torch.float64) * degree).long()
            hidden[self.pair_of_entry[entry]] = True
            node = self.columns[entry]
        return hidden

    def mask_batch(self, count: int) -> Tensor:
        """`count` pairs, or all but one if there are fewer: bool (M,)."""
        number = self.pairs.shape[1]
        hidden = torch.zeros(number, dtype=torch.bool, device=self.pairs.device)
        hidden[torch.randperm(number, device=hidden.device)[: min(count, number - 1)]] = True
        return hidden

    def degrees(self, hidden: Tensor) -> Tensor:
        """How many of the pairs marked in `hidden` bool (M,) each node has: float (N,), what the degree decoder must
        guess.
        """
        return torch.bincount(self.pairs[:, hidden].flatten(), minlength=self.num_nodes).to(torch.get_default_dtype())
