"""A trained policy at work: episodes for the record, and one on film.

Legend: N environments side by side, O shape of an observation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from common.config import ConfigError
from common.errors import ProjectError
from ppo.config import Config
from ppo.distributions import distribution_for
from ppo.envs import Vector, check_finite
from ppo.model import ActorCritic
from ppo.normalize import ObservationNormalizer
from ppo.registry import as_input, observation_shape


class Policy:
    """Weights and the scaling of observations they were trained with, which does not change any more.

    Args:
        path: `best.safetensors` or `last.safetensors` of a run.
    Raises:
        ProjectError: the file is missing, damaged, or of another config.
    """

    def __init__(
        self, path: Path, config: Config, observation_space: gym.Space, action_space: gym.Space, device: torch.device
    ) -> None:
        self.space, self.device = observation_space, device
        self.distribution = distribution_for(action_space, config.model.squash)
        shape = observation_shape(observation_space)
        self.model = ActorCritic(config.model, shape, self.distribution, config.precision == "bf16")
        self.scale = ObservationNormalizer(shape, config.env.normalize_observations, config.env.clip_observations)
        try:
            with safe_open(path, "pt") as file:
                self.facts: dict[str, str] = file.metadata()
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.model.load_state_dict(
                {name.removeprefix("model."): value for name, value in parts.items() if name.startswith("model.")}
            )
            moments = {
                name.removeprefix("observations."): value
                for name, value in parts.items()
                if name.startswith("observations.")
            }
            self.scale.load_state_dict(moments)
        except (OSError, SafetensorError, RuntimeError, KeyError, ConfigError) as error:
            raise ProjectError(
                f"{path}: no policy for this config ({(str(error).splitlines() or ['unreadable'])[0][:150]}); "
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


def play(
    policy: Policy, vector: Vector, episodes: int, generator: torch.Generator | None, track: Any = iter
) -> list[tuple[float, int]]:
    """(return, length) of `episodes` whole games, rewards as the environment gives them.

    Each environment plays a fixed number of games. Taking the first so many that end would favour short ones.
    """
    count = len(vector)
    quota = [episodes // count + (n < episodes % count) for n in range(count)]
    found: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    returns, lengths = np.zeros(count), np.zeros(count, dtype=np.int64)
    observations = vector.reset()
    ticks = iter(track(iter(int, 1)))  # endless; a stop signal ends it
    while any(len(games) < most for games, most in zip(found, quota)):
        next(ticks)
        step = vector.step(policy(observations, generator))
        check_finite(step, int(lengths.sum()))
        returns += step.rewards
        lengths += step.valid
        over = step.over if step.over is not None else step.terminated | step.truncated
        for n in over.nonzero()[0]:
            if len(found[n]) < quota[n]:
                found[n].append((float(returns[n]), int(lengths[n])))
            returns[n], lengths[n] = 0.0, 0
        observations = step.observations
    return [game for games in found for game in games]


def film_pixels(policy: Policy, vector: Vector, frames: int, scale: int = 3) -> tuple[list[np.ndarray], float]:
    """`film` for a policy that sees images: pictures uint8 (scale H, scale W, 3) of the newest image that it sees, and
    the return so far.

    Args: vector: one environment whose observations are stacks uint8 (1, K, H, W), the newest image last.
    """
    observations, pictures, total = vector.reset(), [], 0.0
    for _ in range(frames):
        pictures.append(
            np.repeat(observations[0, -1].repeat(scale, axis=0).repeat(scale, axis=1)[..., None], 3, axis=-1)
        )
        step = vector.step(policy(observations, None))
        observations, total = step.observations, total + float(step.rewards[0])
        if step.terminated[0] or step.truncated[0]:
            break
    return pictures, total


def film(policy: Policy, environment: gym.Env, frames: int, seed: int) -> tuple[list[np.ndarray], float]:
    """Pictures uint8 (H, W, 3) of one episode with the most likely actions, at most `frames` of them, and its return
    so far.
    """
    observation, _ = environment.reset(seed=seed)
    pictures, total = [environment.render()], 0.0
    for _ in range(frames - 1):
        action = policy(np.asarray(observation)[None], None)[0]
        observation, reward, terminated, truncated, _ = environment.step(action)
        total += float(reward)
        pictures.append(environment.render())
        if terminated or truncated:
            break
    return pictures, total
