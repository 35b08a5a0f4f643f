"""What a variational autoencoder is trained to maximise, in nats an image: sums over pixels and latents, means over the
batch. With beta = 1 the evidence lower bound (ELBO) is a bound of log p(x), and may be compared between papers.

Legend: B images, K draws of z for each, Z latents, N images of the training set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae.config import ObjectiveConfig
from vae.likelihoods import at_least_fp32
from vae.model import Draw, Gaussian


def importance_bound(log_weight: Tensor) -> Tensor:
    """log of the mean weight: the bound of Burda et al. 2016, eq. 8; K = 1 is an ELBO. (B, K) -> (B,)"""
    return torch.logsumexp(log_weight, 1) - math.log(log_weight.shape[1])


def free(kl: Tensor, bits: float) -> Tensor:
    """KL divergence of which the first `bits` nats of each variable cost nothing (Kingma et al. 2016, eq. 15).

    The minimum applies to the mean over the batch, so that images may share the allowance. (B, K, Z) -> ()
    """
    return kl.mean((0, 1)).clamp(min=bits).sum()


# -- the total correlation ---------------------------------------------------------------------------------------------


class Decomposition(NamedTuple):
    """KL(q(z|x) || p(z)), mean over images = mutual + total_correlation + dimension_wise (Chen et al. 2018, eq. 2)."""

    mutual: Tensor  # I(x; z): what the code says about the image
    total_correlation: Tensor  # KL(q(z) || product of q(z_j)): how much the latents say about each other
    dimension_wise: Tensor  # sum of KL(q(z_j) || p(z_j)): how far each latent is from its prior


def decompose(posterior: Gaussian, z: Tensor, log_weight: Tensor) -> Decomposition:
    """Estimate the three parts from one batch.

    Args:
        posterior: of the batch's images, (B, Z).
        z: one draw for each image, (B, Z).
        log_weight: how much image j of the batch counts in q(z_i), see `stratified_weights`. (B, B)
    """
    log_q_given_x = posterior.log_prob(z)  # (B,)
    # log q(z_i | x_j), latent by latent
    scaled = (z[:, None] - posterior.mean[None]) ** 2 * torch.exp(-posterior.log_variance)[None]
    pairs = -0.5 * (scaled + posterior.log_variance[None] + math.log(2 * math.pi))  # (B, B, Z)
    log_q = torch.logsumexp(log_weight + pairs.sum(2), 1)  # log q(z_i), (B,)
    log_product = torch.logsumexp(log_weight[:, :, None] + pairs, 1).sum(1)  # log of the product of q(z_ij), (B,)
    log_p = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
    return Decomposition((log_q_given_x - log_q).mean(), (log_q - log_product).mean(), (log_product - log_p).mean())


def stratified_weights(batch: int, data: int) -> Tensor:
    """log weights of minibatch-stratified sampling (Chen et al. 2018, appendix C.2). (B, B)

    q(z_i) is a mean over all N training images, of which the batch holds B = M + 1: the image that z_i was drawn from,
    and M others. The first counts 1/N as it is known to be in the sum; M - 1 of the others count 1/M each, and the last
    (N - M) / (N M), which makes the estimate of q(z_i) unbiased and the weights sum to one.
    """
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others, dtype=torch.float64)
    rows = torch.arange(batch)
    weights[rows, rows] = 1 / data
    weights[rows, (rows + 1) % batch] = (data - others) / (data * others)
    return weights.log()


def published_weights(batch: int, data: int) -> Tensor:
    """The same as the authors' program fills them, which other programs copied. (B, B)

    It walks the flattened matrix in strides of M + 1 = B, which is down the first column; the diagonal would be a
    stride of B + 1. So 1/N falls on the first image of the batch for every row, and the image that z_i was drawn from
    counts 1/M. Kept for comparison.
    """
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others, dtype=torch.float64)
    last = (data - others) / (data * others)
    weights[:, 0] = 1 / data
    weights[:, 1] = last
    weights[others - 1, 0] = last
    return weights.log()


def weighted_weights(batch: int, data: int) -> Tensor:
    """log weights of minibatch-weighted sampling: 1/(N B) each (Chen et al. 2018, appendix C.1). They do not sum to
    one, so q(z) comes out too small by a constant, which no gradient sees. (B, B)
    """
    return torch.full((batch, batch), -math.log(data * batch), dtype=torch.float64)


ESTIMATORS = {"stratified": stratified_weights, "published": published_weights, "weighted": weighted_weights}


class Critic(nn.Module):
    """FactorVAE's discriminator: did a code come from q(z), or from the product of its latents' distributions?"""

    def __init__(self, config: ObjectiveConfig, latents: int) -> None:
        super().__init__()
        widths = (latents, *[config.critic_width] * config.critic_layers)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, z: Tensor) -> Tensor:
        """log of the odds that z is a draw from q(z): its density there over that of the product. (B, Z) -> (B,)"""
        return at_least_fp32(self.layers(z)[:, 0])


def permute_latents(z: Tensor, rng: torch.Generator) -> Tensor:
    """Shuffle each latent over the batch by itself: draws from the product of the latents' distributions (Kim & Mnih
    2018, algorithm 1). (B, Z)
    """
    order = torch.rand(z.shape, generator=rng, device=z.device).argsort(0)
    return z.gather(0, order)


def critic_loss(critic: nn.Module, z: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    """Cross-entropy of telling codes z from permuted codes of other images, both (B, Z) and detached."""
    return 0.5 * (F.softplus(-critic(z)) + F.softplus(critic(permute_latents(other, rng)))).mean()


# -- the objectives ----------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """What a step minimises, and what it logs: all means over the batch, in nats an image."""

    loss: Tensor
    shown: dict[str, Tensor]


def objective(
    config: ObjectiveConfig,
    step: int,
    data: int,
    draw: Draw,
    critic: nn.Module | None = None,
    split_kl: Callable[[Gaussian, Tensor, Tensor], Decomposition] = decompose,
) -> Losses:
    """The loss of one batch.

    Args:
        step: 1, 2, ...; decides the warm-up and the capacity.
        data: N, for the estimate of q(z).
        critic: only for objective.kind=factor.
        split_kl: `decompose`, or the same compiled.
    """
    log_likelihood = draw.log_likelihood.mean()
    kl = draw.kl.sum(2).mean()
    weight = config.beta * min(1.0, step / config.warmup) if config.warmup else config.beta
    if config.kind == "elbo":
        return Losses(weight * free(draw.kl, config.free_bits) - log_likelihood, {})
    if config.kind == "iwae":
        bound = importance_bound(draw.log_weights).mean()
        return Losses(-bound, {"bound": bound.detach()})
    if config.kind == "capacity":  # Burgess et al. 2018, eq. 8
        aim = config.capacity * min(1.0, step / config.capacity_steps)
        return Losses(config.capacity_gamma * (kl - aim).abs() - log_likelihood, {})
    z = draw.latents[:, 0]
    assert draw.posterior is not None
    if config.kind == "tcvae":  # Chen et al. 2018, eq. 4 with alpha = gamma = 1
        log_weight = ESTIMATORS[config.estimator](len(z), data).to(z.device, z.dtype)
        parts = split_kl(draw.posterior, z, log_weight)
        loss = parts.mutual + weight * parts.total_correlation + parts.dimension_wise - log_likelihood
        return Losses(loss, {name: value.detach() for name, value in parts._asdict().items()})
    assert critic is not None  # Kim & Mnih 2018, eq. 2: gamma there is weight here, beside the KL of weight 1
    total_correlation = critic(z).mean()
    return Losses(kl + weight * total_correlation - log_likelihood, {"total_correlation": total_correlation.detach()})
