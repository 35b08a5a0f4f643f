"""Every setting of the ppo project, with its default and its unit. YAML files override these, `key=value` overrides
both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import BaseConfig, require

ATARI_ONLY = (
    "image_size",
    "frame_stack",
    "frame_skip",
    "noop_max",
    "sticky_actions",
    "episodic_life",
    "sign_rewards",
)


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, how many copies, and what is done to its observations and rewards."""

    # a gymnasium id, ALE/<Game>-v5, or one's own: module:Id-v0 (the module registers it) or module:Class
    id: str = "CartPole-v1"
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the environment: env.kwargs.map_name=8x8
    wrappers: tuple[str, ...] = ()  # by dotted name, the first one innermost: [gymnasium.wrappers.FlattenObservation]
    count: int = 8  # copies side by side, over all processes together
    # auto: atari for ALE, native where there is one, else local; envpool: its own C++ versions of these environments,
    # in threads
    backend: Literal["auto", "local", "native", "processes", "atari", "envpool"] = "auto"
    continuous: bool = False  # passed to environments that know it, such as LunarLander-v3
    max_episode_steps: int = 0  # 0 = what the environment was registered with
    normalize_observations: bool = False  # by running mean and standard deviation
    normalize_rewards: bool = False  # by the running standard deviation of the discounted return
    clip_observations: float = 10.0  # after normalisation
    clip_rewards: float = 10.0  # after normalisation
    # Atari (Mnih et al. 2015; Machado et al. 2018)
    image_size: int = 84  # pixels a side
    threads: int = 0  # CPU threads of the emulators; 0 = as many as there are cores. The games do not depend on it
    frame_stack: int = 4  # frames that the network sees at once
    frame_skip: int = 4  # Atari: frames that each action is repeated for
    noop_max: int = 30  # random "no operation" steps at the start of an episode
    sticky_actions: float = 0.0  # probability that the last action is repeated
    episodic_life: bool = True  # in training, a lost life ends the episode for the learner
    sign_rewards: bool = True  # in training, rewards are -1, 0 or 1

    def __post_init__(self) -> None:
        require(self.id, "env.id", "must name an environment")
        for name in ("count", "frame_stack", "frame_skip"):
            require(getattr(self, name) >= 1, f"env.{name}", "must be at least 1")
        for name in ("max_episode_steps", "noop_max", "threads"):
            require(getattr(self, name) >= 0, f"env.{name}", "must not be negative")
        for name in ("clip_observations", "clip_rewards"):
            require(getattr(self, name) > 0, f"env.{name}", "must be positive")
        require(self.image_size >= 36, "env.image_size", "must be at least 36: less does not survive the convolutions")
        require(0 <= self.sticky_actions < 1, "env.sticky_actions", "must be in [0, 1)")
        for item in dataclasses.fields(self):
            idle = item.name in ATARI_ONLY and not self.atari and getattr(self, item.name) != item.default
            require(not idle, f"env.{item.name}", f"does nothing here: {self.id} is no Atari game (ALE/<Game>-v5)")

    @property
    def atari(self) -> bool:
        """Whether it is a game of the Arcade Learning Environment."""
        return self.id.rpartition(":")[2].startswith("ALE/")


@dataclass(frozen=True)
class ModelConfig:
    """The actor and the critic."""

    kind: Literal["mlp", "cnn"] = "mlp"  # cnn: the network of Mnih et al. 2015, for pixels
    hidden: tuple[int, ...] = (64, 64)  # mlp: widths
    activation: Literal["tanh", "relu"] = "tanh"  # mlp: between the layers
    shared: bool = False  # one trunk for actor and critic; cnn always shares
    orthogonal: bool = True  # orthogonal initial weights, gains sqrt(2), 0.01 for the policy, 1 for the value
    squash: bool = False  # continuous actions: tanh of a Gaussian instead of a Gaussian whose samples are clipped
    log_std: float = 0.0  # continuous actions: initial log standard deviation, one a dimension, learned

    def __post_init__(self) -> None:
        require(all(width >= 1 for width in self.hidden), "model.hidden", "must be positive widths")


@dataclass(frozen=True)
class TrainConfig:
    """The algorithm (Schulman et al. 2017)."""

    steps: int = 100_000  # environment steps, over all copies; rounded up to whole updates
    rollout: int = 32  # steps of each copy between two updates
    epochs: int = 20  # passes over the rollout
    batch_size: int = 256  # of a minibatch, over all processes
    gamma: float = 0.98  # discount of later rewards
    gae_lambda: float = 0.8  # of generalised advantage estimation: 0 trusts the critic, 1 the rewards
    lr: float = 1e-3  # learning rate of Adam
    lr_decay: Literal["constant", "linear"] = "linear"  # linear: down to zero at the last update
    clip: float = 0.2  # of the probability ratio
    clip_decay: Literal["constant", "linear"] = "linear"  # linear: down to zero at the last update
    clip_value: float = 0.0  # how far the value may move from the old one before its loss stops pulling; 0 = no limit
    value_weight: float = 0.5  # of the value loss, beside the policy's
    entropy_weight: float = 0.0  # of the entropy bonus
    normalize_advantage: bool = True  # in each minibatch: zero mean, unit variance
    max_grad_norm: float = 0.5  # 0 = no limit
    # stop all remaining epochs of an update when the approximate KL exceeds 1.5 times this; 0 = never
    target_kl: float = 0.0
    adam_eps: float = 1e-5  # epsilon of Adam
    bootstrap_truncated: bool = True  # add the value of the final observation where an episode ran out of time
    log_every: int = 1  # updates
    save_every: int = 20  # updates
    # updates between evaluations that choose best.safetensors, beside last.safetensors; 0 = never, and no best
    evaluate_every: int = 0
    evaluate_episodes: int = 32  # episodes an evaluation, most likely actions
    # autograd: PyTorch differentiates ppo/objective.py; manual: ppo/backprop.py has the chain rule written out in
    # NumPy, four times as fast for small MLPs on a CPU, and is compared with autograd once a run
    backprop: Literal["autograd", "manual"] = "autograd"
    threads: int = 1  # CPU threads: these networks are too small for more; 0 = all

    def __post_init__(self) -> None:
        for name in ("steps", "rollout", "epochs", "batch_size", "log_every", "save_every", "evaluate_episodes"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"train.{name}", "must be in [0, 1]")
        names = ("clip_value", "value_weight", "entropy_weight", "max_grad_norm", "target_kl", "threads")
        for name in (*names, "evaluate_every"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(self.clip > 0, "train.clip", "must be positive")
        require(self.adam_eps > 0, "train.adam_eps", "must be positive")


@dataclass(frozen=True)
class EvalConfig:
    """What `ppo.eval` measures."""

    episodes: int = 100  # of each kind: deterministic and stochastic
    count: int = 0  # copies side by side; 0 = min(episodes, 16)
    max_steps: int = 100_000  # of an episode; without a time limit of its own an environment might never end one
    solved: float = 0.0  # return that counts as solved; 0 = the environment's own threshold
    video: bool = True  # also film one episode as a GIF
    video_frames: int = 400  # at most so many

    def __post_init__(self) -> None:
        for name in ("episodes", "video_frames", "max_steps"):
            require(getattr(self, name) >= 1, f"eval.{name}", "must be at least 1")
        require(self.count >= 0, "eval.count", "must not be negative")


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    # bf16: the convolutional network computes in it, losses do not; small networks gain nothing from 16 bits
    precision: Literal["fp32", "fp64", "bf16"] = "fp32"  # type: ignore[assignment]
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(self.precision != "bf16" or self.model.kind == "cnn", "precision", "bf16 is for model.kind=cnn")
        size = self.env.count * self.train.rollout
        require(
            self.train.batch_size <= size, "train.batch_size", f"must be at most env.count * train.rollout = {size}"
        )
