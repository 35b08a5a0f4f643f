"""What a person should know of a run: which of its settings do nothing, and that it is not learning."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from ppo.config import Config
from ppo.envs import GymVector, Vector
from ppo.model import ActorCritic

PATIENCE = 10  # updates that are looked at, after as many that are not
EXPLAINED = 0.05  # explained variance: the critic knows nothing
FAR_ABOVE = 20.0  # times the largest norm that a gradient may have


class Advice:
    """Says once a run which setting to try, where the critic explains nothing of the returns and gradients are cut to
    a twentieth or less of what they are: returns of hundreds do that, or observations of thousands.

    Args:
        say: what is told.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.explained: deque[float] = deque(maxlen=PATIENCE)
        self.norms: deque[float] = deque(maxlen=PATIENCE)
        self.updates = 0
        self.said = False

    def look(self, explained: float, grad_norm: float) -> None:
        """Take in what an update measured."""
        if self.said:
            return
        self.updates += 1
        self.explained.append(float(explained))
        self.norms.append(float(grad_norm))
        clip = self.config.train.max_grad_norm
        if self.updates < 2 * PATIENCE or not clip:
            return
        known = [value for value in self.explained if not math.isnan(value)] or [0.0]
        explains = statistics.fmean(known)
        norm = statistics.median(self.norms)
        if explains < EXPLAINED and norm > FAR_ABOVE * clip:
            self.said = True
            self.say(
                f"hint: not learning so far: the critic explains {explains:.0%} of the returns' variance, and "
                f"gradients of norm {norm:.3g} are cut to {clip:g}. Try {self.remedy()}"
            )

    def remedy(self) -> str:
        """The first setting that may help."""
        if not self.config.env.normalize_rewards:
            return "env.normalize_rewards=true: rewards are large"
        if not self.config.env.normalize_observations and self.config.model.kind == "mlp":
            return "env.normalize_observations=true: observations are large"
        return f"a smaller train.lr than {self.config.train.lr:g}, or a longer train.rollout"


def idle_settings(config: Config, model: ActorCritic, vector: Vector, world: int) -> list[str]:
    """A line for each changed setting that does nothing here, or not what is promised elsewhere."""
    env = config.env
    settings = config.model
    train = config.train
    discrete = model.policy.log_std is None
    convolutions = settings.kind == "cnn"
    usual = Config()
    idle = {
        "model.squash": discrete and settings.squash,
        "model.log_std": discrete and settings.log_std != usual.model.log_std,
        "model.shared": convolutions and settings.shared,
        "model.hidden": convolutions and settings.hidden != usual.model.hidden,
        "model.activation": convolutions and settings.activation != usual.model.activation,
        "env.clip_observations": not env.normalize_observations
        and env.clip_observations != usual.env.clip_observations,
        "env.clip_rewards": not env.normalize_rewards and env.clip_rewards != usual.env.clip_rewards,
        "train.evaluate_episodes": not train.evaluate_every
        and train.evaluate_episodes != usual.train.evaluate_episodes,
    }
    reasons = {
        "model.squash": "actions are discrete",
        "model.log_std": "actions are discrete",
        "env.clip_observations": "env.normalize_observations is off",
        "env.clip_rewards": "env.normalize_rewards is off",
        "train.evaluate_episodes": "train.evaluate_every is 0",
    }
    notes = [
        f"note: {name} does nothing here: {reasons.get(name, 'model.kind=cnn has its own')}"
        for name, nothing in idle.items()
        if nothing
    ]
    if model.pictures and not convolutions:
        notes.append("note: observations are pictures: model.kind=cnn is made for them")
    one_generator = isinstance(vector, GymVector) and vector.readable
    if one_generator and world > 1:
        notes.append(
            f"note: {env.id} draws the starts of all its copies from one generator, so that {world} processes do not "
            "do what one would; with env.backend=local they do"
        )
    return notes
