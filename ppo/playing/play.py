"""A trained policy at work: episodes for the record, and one on film.

Legend: N environments side by side, O shape of an observation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from common.checkpoint import UNFIT, CheckpointError, Checkpoints, read_weights
from common.config import ConfigError
from common.errors import ProjectError
from common.provenance import trained_otherwise
from common.runtime import mix_seed
from ppo.config import Config
from ppo.environments.registry import as_input, make_vector, observation_normalizer, observation_shape
from ppo.environments.vectors import Vector, check_finite
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic
from ppo.playing.collect import Collector

BEST_STREAM = 1_000_000_009  # environments that choose the best policy: none of training's, none of ppo.eval's
EVALUATION_COPIES = 16  # environments side by side


class Policy:
    """Weights and the scaling of observations they were trained with, which does not change any more.

    Args:
        weights: `best.safetensors` or `last.safetensors` of a run, or what `policy_weights` returned.
    Attributes:
        facts: what is noted beside the weights in the file.
    Raises:
        ProjectError: the file is missing, damaged, or of another config.
    """

    def __init__(
        self,
        weights: Path | dict[str, Tensor],
        config: Config,
        observation_space: gym.Space,
        action_space: gym.Space,
        device: torch.device,
    ) -> None:
        self.space = observation_space
        self.device = device
        self.distribution = distribution_for(action_space, config.model.squash)
        self.scale = observation_normalizer(observation_space, config.env)
        self.facts: dict[str, str] = {}
        try:
            if isinstance(weights, dict):
                parts = weights
            else:
                parts, self.facts = read_policy(weights)
            problem = trained_otherwise(self.facts.get("config", ""), config, only=("model.",))
            if problem:  # before a network is built that may be far larger than what was trained
                raise CheckpointError(problem)
            shape = observation_shape(observation_space)
            self.model = ActorCritic(config.model, shape, self.distribution, config.precision == "bf16")
            self.model.load_state_dict(
                {name.removeprefix("model."): value for name, value in parts.items() if name.startswith("model.")}
            )
            moments = {
                name.removeprefix("observations."): value
                for name, value in parts.items()
                if name.startswith("observations.")
            }
            self.scale.load_state_dict(moments)
        except (CheckpointError, ConfigError, *UNFIT) as error:
            raise ProjectError(
                f"{weights}: no policy for this config ({(str(error).splitlines() or ['unreadable'])[0][:150]}); "
                "train first, or give another --run"
            ) from None
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """What the environment takes, for observations (N, *O): the most likely actions, or drawn ones where there
        is a generator.
        """
        seen = torch.from_numpy(np.ascontiguousarray(self.scale(as_input(self.space, observations)))).to(self.device)
        parameters = self.model.act(seen)
        if generator is None:
            actions = self.distribution.mode(parameters)
        else:
            actions = self.distribution.sample(
                parameters, self.distribution.noise((len(seen),), generator).to(self.device)
            )
        return self.distribution.to_env(actions.cpu().numpy())


def read_policy(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an exported file or of a checkpoint (`.pt`), and what is noted beside them."""
    if path.suffix == ".pt":
        state = Checkpoints.load(path)
        parts = state["parts"]
        weights = named_weights(parts["model"], parts["collector"][0]["observations"])
        return weights, {"update": str(int(state["step"])), "config": str(state["config"])}
    parts, facts = read_weights(path)
    if not facts.get("update", "").isdecimal():
        raise CheckpointError("it does not say of which update it is, as the files of ppo.train do")
    return parts, facts


def policy_weights(model: ActorCritic, collector: Collector) -> dict[str, Tensor]:
    """What it takes to act: weights under `model.`, and the mean and variance of observations under `observations.`."""
    return named_weights(model.state_dict(), collector.observations.state_dict())


def named_weights(model: dict[str, Any], observations: dict[str, Any]) -> dict[str, Tensor]:
    """Both under the names that a file of weights has."""
    found = {f"model.{name}": value.detach().clone() for name, value in model.items()}
    return found | {f"observations.{name}": torch.as_tensor(value).clone() for name, value in observations.items()}


class Best:
    """The policy with the highest mean return in evaluation episodes of its own.

    Every `train.evaluate_every` updates the policy plays `train.evaluate_episodes` episodes with its most likely
    actions, always from the same starts, which neither training nor `ppo.eval` sees. Training games cannot choose: the
    best mean of so many hundred is a lucky one.

    Attributes:
        score: its mean return, minus infinity before the first evaluation.
        update: after which update it was.
        weights: as `policy_weights`, empty before the first evaluation.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.score = -math.inf
        self.update = 0
        self.weights: dict[str, Tensor] = {}

    def challenge(self, weights: dict[str, Tensor], update: int, device: torch.device) -> float:
        """The mean return of the policy with these weights, which is kept if none so far has had a higher one."""
        settings = self.config.train
        count = min(settings.evaluate_episodes, EVALUATION_COPIES)
        vector = evaluation_vector(self.config, mix_seed(self.config.seed, BEST_STREAM), count)
        try:
            policy = Policy(weights, self.config, vector.observation_space, vector.action_space, device)
            games = play(policy, vector, settings.evaluate_episodes, None, self.config.eval.max_steps)
        finally:
            vector.close()
        mean = statistics.fmean(value for value, _ in games)
        if mean >= self.score:
            self.score = mean
            self.update = update
            self.weights = weights
        return mean

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"score": self.score, "update": self.update, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.score = state["score"]
        self.update = state["update"]
        self.weights = state["weights"]


def evaluation_vector(config: Config, seed: int, count: int) -> Vector:
    """Environments as evaluation wants them: rewards and episodes as they are, observations as in training."""
    backend = "local" if config.env.backend == "native" else config.env.backend
    return make_vector(dataclasses.replace(config.env, backend=backend), seed, count, training=False)


def play(
    policy: Policy,
    vector: Vector,
    episodes: int,
    generator: torch.Generator | None,
    max_steps: int = 100_000,
    track: Any = iter,
) -> list[tuple[float, int]]:
    """(return, length) of `episodes` whole games, rewards as the environment gives them.

    Each environment plays a fixed number of games. Taking the first so many that end would favour short ones. A game
    that has not ended after `max_steps` is counted as it stands, and its environment plays no further one: only
    environments without a time limit get there.
    """
    count = len(vector)
    quota = [episodes // count + (n < episodes % count) for n in range(count)]
    found: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    returns = np.zeros(count)
    lengths = np.zeros(count, dtype=np.int64)
    observations = vector.reset()
    for _ in track(itertools.count()):  # a stop signal ends it
        if all(len(games) >= most for games, most in zip(found, quota)):
            break
        step = vector.step(policy(observations, generator))
        check_finite(step, int(lengths.sum()))
        returns += step.rewards
        lengths += step.valid
        over = step.over if step.over is not None else step.terminated | step.truncated
        for n in over.nonzero()[0]:
            if len(found[n]) < quota[n]:
                found[n].append((float(returns[n]), int(lengths[n])))
            returns[n] = 0.0
            lengths[n] = 0
        for n in (lengths >= max_steps).nonzero()[0]:
            if len(found[n]) < quota[n]:
                found[n].append((float(returns[n]), int(lengths[n])))
            quota[n] = len(found[n])
        observations = step.observations
    return [game for games in found for game in games]


def film_pixels(policy: Policy, vector: Vector, frames: int, scale: int = 3) -> tuple[list[np.ndarray], float]:
    """`film` for a policy that sees images: pictures uint8 (scale H, scale W, 3) of the newest image that it sees, and
    the return so far.

    Args: vector: one environment whose observations are stacks uint8 (1, K, H, W), the newest image last.
    """
    observations = vector.reset()
    pictures = []
    total = 0.0
    for _ in range(frames):
        pictures.append(
            np.repeat(observations[0, -1].repeat(scale, axis=0).repeat(scale, axis=1)[..., None], 3, axis=-1)
        )
        step = vector.step(policy(observations, None))
        observations = step.observations
        total += float(step.rewards[0])
        if step.terminated[0] or step.truncated[0]:
            break
    return pictures, total


def film(policy: Policy, environment: gym.Env, frames: int, seed: int) -> tuple[list[np.ndarray], float]:
    """Pictures uint8 (H, W, 3) of one episode with the most likely actions, at most `frames` of them, and its return
    so far.
    """
    observation, _ = environment.reset(seed=seed)
    pictures = [environment.render()]
    if not isinstance(pictures[0], np.ndarray):
        raise ProjectError(f"render() returned {type(pictures[0]).__name__}, no picture")
    total = 0.0
    for _ in range(frames - 1):
        action = policy(np.asarray(observation)[None], None)[0]
        observation, reward, terminated, truncated, _ = environment.step(action)
        total += float(reward)
        pictures.append(environment.render())
        if terminated or truncated:
            break
    return pictures, total
