"""Actor and critic. Pure: no files, no command line, no device.

Legend: B batch, O numbers of an observation, P numbers that describe a distribution over actions, C channels, H x W
    pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import require
from ppo.config import ModelConfig
from ppo.learning.distributions import Distribution, PolicyHead

SMALLEST_IMAGE = 36  # pixels a side: less than that and nothing is left after the convolutions
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def mlp(sizes: list[int], activation: str) -> nn.Sequential:
    """Linear layers of these widths, each followed by the activation."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class NatureCNN(nn.Module):
    """Pixels uint8 (B, C, 84, 84) to 512 features: the network of Mnih et al. 2015, for the sizes of any image of at
    least 36 pixels.

    Args:
        bf16: compute in bfloat16; weights and the features returned keep the weights' type.
    """

    def __init__(self, channels: int, height: int, width: int, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.body(torch.zeros(1, channels, height, width)).shape[1]
        self.last = nn.Linear(flat, 512)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.last.weight.dtype
        # bytes become numbers here and not before; bfloat16 holds 0 to 255 exactly. Channels last: convolutions are
        # faster so, in fp32 and much more in bf16
        seen = torch.bfloat16 if self.bf16 else kept
        pixels = x.to(seen, copy=True, memory_format=torch.channels_last).div_(255)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features = F.relu(self.last(self.body(pixels)))
        return features.to(kept)


class ActorCritic(nn.Module):
    """A policy and a value function, with separate trunks unless `shared` (pixels always share theirs).

    Args:
        observation_shape: (O,) or (C, H, W).
        bf16: the convolutional trunk computes in bfloat16; both heads, and all that follows, never do.
    """

    def __init__(
        self,
        config: ModelConfig,
        observation_shape: tuple[int, ...],
        distribution: Distribution,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.kind = config.kind
        self.pictures = len(observation_shape) == 3 and min(observation_shape[1:]) >= SMALLEST_IMAGE
        if config.kind == "cnn":
            require(
                self.pictures,
                "model.kind",
                f"cnn reads images (C, H, W) of at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, not shape "
                f"{observation_shape}",
            )
            self.actor_trunk: nn.Module = NatureCNN(*observation_shape, bf16=bf16)
            features, shared = 512, True
        else:
            sizes = [math.prod(observation_shape), *config.hidden]
            self.actor_trunk = mlp(sizes, config.activation)
            features = sizes[-1]
            shared = config.shared
        self.critic_trunk = None if shared else mlp([math.prod(observation_shape), *config.hidden], config.activation)
        self.policy = PolicyHead(features, distribution, config.log_std)
        self.value = nn.Linear(features, 1)
        if config.orthogonal:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Orthogonal weights and zero biases; a policy head of gain 0.01 starts close to uniform (Andrychowicz et
        al. 2021).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                gain = {id(self.policy.linear): 0.01, id(self.value): 1.0}.get(id(module), math.sqrt(2))
                nn.init.orthogonal_(module.weight, gain)
                nn.init.zeros_(module.bias)

    def read(self, observations: Tensor) -> Tensor:
        """What the trunks take: pixels as they are, for an mlp all numbers in a row in the weights' dtype, and those of
        pictures in [0, 1].
        """
        if self.kind == "cnn":
            return observations
        x = observations.to(self.value.weight.dtype).flatten(1)
        return x / 255 if self.pictures else x

    def act(self, observations: Tensor) -> Tensor:
        """Parameters of the policy's distribution (B, P): all that a step of a rollout needs."""
        return self.policy(self.actor_trunk(self.read(observations)))

    def evaluate(self, observations: Tensor) -> Tensor:
        """Values (B,)."""
        trunk = self.actor_trunk if self.critic_trunk is None else self.critic_trunk
        return self.value(trunk(self.read(observations))).squeeze(-1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the policy (B, P) and values (B,)."""
        x = self.read(observations)
        features = self.actor_trunk(x)
        critic = features if self.critic_trunk is None else self.critic_trunk(x)
        return self.policy(features), self.value(critic).squeeze(-1)
