"""Distributions over actions: how one is drawn, how likely it was, how spread they are.

Each is a handful of functions of the network's output, with the noise handed in, so that a rollout's randomness is
drawn at once, from a generator that depends on (seed, update) only. Tests hold them against torch.distributions and
stable-baselines3.

Legend: B batch, A actions of a discrete space, D dimensions of an action, P numbers that the network puts out.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ProjectError

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Categorical:
    """One of A actions, from logits (B, A). Actions are int64 (B,)."""

    def __init__(self, space: gym.spaces.Discrete) -> None:
        self.num_parameters = int(space.n)
        self.start = int(space.start)
        self.noise_shape = (self.num_parameters,)
        self.action_shape = ()
        self.discrete = True

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gumbel noise (*shape, A): the largest of logit plus noise is a draw from the softmax (Gumbel 1954)."""
        uniform = torch.rand(*shape, *self.noise_shape, generator=generator, device=generator.device)
        return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))

    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Actions (B,)."""
        return (parameters + noise).argmax(dim=-1)

    def mode(self, parameters: Tensor) -> Tensor:
        """The most likely actions (B,)."""
        return parameters.argmax(dim=-1)

    def log_prob_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of actions (B,) and entropy of each distribution, both (B,), in nats."""
        log_p = F.log_softmax(parameters, dim=-1)  # (B, A)
        return log_p.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(dim=-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """What the environment takes."""
        return actions + self.start if self.start else actions


class MultiCategorical:
    """Several independent choices at a time, from all their logits side by side (B, sum A_i). Actions are int64 (B,
    D).
    """

    def __init__(self, space: gym.spaces.MultiDiscrete | gym.spaces.MultiBinary) -> None:
        sizes = (
            [2] * int(np.prod(space.shape))
            if isinstance(space, gym.spaces.MultiBinary)
            else [int(n) for n in space.nvec.flatten()]
        )
        self.sizes = sizes
        self.start = np.asarray(getattr(space, "start", 0)).flatten()
        self.num_parameters = sum(sizes)
        self.action_shape = (len(sizes),)
        self.discrete = True
        self.noise_shape = (self.num_parameters,)
        self.shape = space.shape
        self.parts = [Categorical(gym.spaces.Discrete(n)) for n in sizes]

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gumbel noise (*shape, sum A_i)."""
        return torch.cat([part.noise(shape, generator) for part in self.parts], dim=-1)

    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, D)."""
        return self.mode(parameters + noise)

    def mode(self, parameters: Tensor) -> Tensor:
        """The most likely actions (B, D)."""
        return torch.stack([part.argmax(dim=-1) for part in parameters.split(self.sizes, dim=-1)], dim=-1)

    def log_prob_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the choices, both (B,)."""
        pairs = [
            part.log_prob_entropy(logits, actions[..., i])
            for i, (part, logits) in enumerate(zip(self.parts, parameters.split(self.sizes, dim=-1)))
        ]
        return sum(p for p, _ in pairs), sum(e for _, e in pairs)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """What the environment takes."""
        return (actions + self.start).reshape(-1, *self.shape)


class Gaussian:
    """Independent normals, from means and log standard deviations side by side (B, 2 D). Actions are floats (B, D), not
    bounded.

    The environment gets them clipped to its bounds; what is scored is the action as it was drawn, for the density of
    the clipped one would be another function, and its gradient wrong at the bounds.
    """

    def __init__(self, space: gym.spaces.Box) -> None:
        self.low = space.low.flatten()
        self.high = space.high.flatten()
        D = len(self.low)
        self.num_parameters = 2 * D
        self.noise_shape = (D,)
        self.action_shape = (D,)
        self.discrete = False
        self.shape = space.shape
        self.dtype = space.dtype

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal (*shape, D)."""
        return torch.randn(*shape, *self.noise_shape, generator=generator, device=generator.device)

    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, D): mean + std * noise."""
        mean, log_std = parameters.chunk(2, dim=-1)
        return mean + log_std.exp() * noise

    def mode(self, parameters: Tensor) -> Tensor:
        """The means (B, D)."""
        return parameters.chunk(2, dim=-1)[0]

    def log_prob_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of actions (B, D) and differential entropy, both (B,), in nats."""
        mean, log_std = parameters.chunk(2, dim=-1)
        z = (actions - mean) * torch.exp(-log_std)
        return (-0.5 * z.square() - log_std - LOG_SQRT_2PI).sum(dim=-1), (log_std + 0.5 + LOG_SQRT_2PI).sum(dim=-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Clipped to the bounds."""
        return np.clip(actions, self.low, self.high).reshape(-1, *self.shape).astype(self.dtype)


class SquashedGaussian(Gaussian):
    """tanh of a Gaussian, stretched to the bounds (Haarnoja et al. 2018, appendix C). Stored actions are those before
    the tanh.

    The density is that of tanh(u) in (-1, 1): log N(u) - sum log(1 - tanh(u)^2), the last term as 2 (log 2 - u -
    softplus(-2 u)), which does not lose its digits for large u. The entropy has no closed form; its estimate from the
    action at hand is -log p.
    """

    def __init__(self, space: gym.spaces.Box) -> None:
        super().__init__(space)
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ProjectError("model.squash=true needs an action space with finite bounds")

    def log_prob_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of tanh(actions) and minus the same as an estimate of the entropy, both (B,), in nats."""
        log_p = super().log_prob_entropy(parameters, actions)[0]
        log_p = log_p - (2 * (math.log(2) - actions - F.softplus(-2 * actions))).sum(dim=-1)
        return log_p, -log_p

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """tanh, then from (-1, 1) to the bounds; clipped, for rounding may lead past them."""
        return super().to_env(self.low + (np.tanh(actions) + 1) / 2 * (self.high - self.low))


Distribution = Categorical | MultiCategorical | Gaussian


def distribution_for(space: gym.Space, squash: bool = False) -> Distribution:
    """The distribution over a gymnasium action space. `ProjectError` for a space that has none here."""
    if isinstance(space, gym.spaces.Discrete):
        return Categorical(space)
    if isinstance(space, gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        return MultiCategorical(space)
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return SquashedGaussian(space) if squash else Gaussian(space)
    raise ProjectError(
        f"action space {space} is not supported: Discrete, MultiDiscrete, MultiBinary and floating-point Box are"
    )


class PolicyHead(nn.Module):
    """From features (B, F) to the parameters of a distribution (B, P); a Gaussian's log standard deviations do not
    depend on the state.
    """

    def __init__(self, features: int, distribution: Any, log_std: float) -> None:
        super().__init__()
        gaussian = isinstance(distribution, Gaussian)
        self.linear = nn.Linear(features, distribution.num_parameters // 2 if gaussian else distribution.num_parameters)
        self.log_std = nn.Parameter(torch.full(distribution.action_shape, float(log_std))) if gaussian else None

    def forward(self, features: Tensor) -> Tensor:
        out = self.linear(features)
        return out if self.log_std is None else torch.cat([out, self.log_std.expand_as(out)], dim=-1)
