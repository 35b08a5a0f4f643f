"""The clipped objective (Schulman et al. 2017). Pure functions of tensors.

With `train.backprop=manual`, as the configs for small networks on a CPU have it, `backprop.py` computes the gradient of
this objective by hand. It is compared with this file on the first minibatch of each run and refused if they differ:
after a change here, train with `train.backprop=autograd`, or change `backprop.py` as well.

Legend: B samples of this process's part of a minibatch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo.config import TrainConfig


class Terms(NamedTuple):
    """One number for each sample, (B,): what the losses are means of, and what is watched."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    kl: Tensor
    clipped: Tensor


def ppo_terms(
    log_prob: Tensor,
    entropy: Tensor,
    values: Tensor,
    old_log_prob: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    clip: float,
    clip_value: float,
) -> Terms:
    """Losses of each sample; all arguments are (B,) but the two clips.

    ratio = pi(a | s) / pi_old(a | s)
    policy = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)                                   (eq. 7)
    value = 1/2 (V - R)^2, or with clip_value > 0 the larger of that and the same for V within clip_value of the old
    one
    kl = (ratio - 1) - log ratio, an estimate of KL(old || new) that is never negative           (Schulman 2020)
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    value = 0.5 * (values - returns).square()
    if clip_value > 0:
        near = old_values + (values - old_values).clamp(-clip_value, clip_value)
        value = torch.maximum(value, 0.5 * (near - returns).square())
    with torch.no_grad():
        kl = log_ratio.expm1() - log_ratio
        clipped = ((ratio - 1).abs() > clip).to(ratio.dtype)
    return Terms(policy, value, entropy, kl, clipped)


def total_loss(terms: Terms, config: TrainConfig) -> Tensor:
    """Each sample's share of what is minimised, (B,)."""
    return terms.policy + config.value_weight * terms.value - config.entropy_weight * terms.entropy


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): 1 for a critic that knows, 0 for one that names the mean, negative for one that
    misleads.
    """
    variance = returns.var()
    return torch.where(variance > 0, 1 - (returns - values).var() / variance.clamp(min=1e-12), torch.nan)
