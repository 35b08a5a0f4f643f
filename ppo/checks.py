"""Whether an environment answers as gymnasium's API says: looked at in every reset and in the first step, for nothing
that goes wrong later is as hard to understand.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from common.errors import ProjectError


def first_reset(environment: gym.Env, seed: int, space: gym.Space) -> Any:
    """The observation of `reset`. `ProjectError` for an answer that gymnasium's API does not know."""
    try:
        answer = environment.reset(seed=seed)
    except TypeError as error:
        raise ProjectError(
            f"reset() failed ({error}); gymnasium's is reset(self, *, seed=None, options=None)"
        ) from error
    pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)
    if not pair:
        raise ProjectError(f"reset() returned {described(answer)}; gymnasium's returns (observation, info)")
    check_observation(answer[0], space, "reset()")
    return answer[0]


def first_step(environment: gym.Env, action: Any, space: gym.Space) -> tuple[Any, float, bool, bool, dict]:
    """What `step` answers. `ProjectError` for an answer that gymnasium's API does not know."""
    try:
        answer = environment.step(action)
    except (TypeError, ValueError) as error:
        raise ProjectError(f"the first step() failed: {type(error).__name__}: {error}") from error
    if not (isinstance(answer, tuple) and len(answer) == 5):
        raise ProjectError(
            f"step() returned {described(answer)}; gymnasium's returns five: "
            "(observation, reward, terminated, truncated, info)"
        )
    observation, reward, terminated, truncated, _ = answer
    check_observation(observation, space, "step()")
    if np.ndim(reward) or np.asarray(reward).dtype.kind not in "fuib":
        raise ProjectError(f"step() returned {described(reward)} as the reward; it is one number: float(reward)")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if np.ndim(flag) or np.asarray(flag).dtype.kind not in "buif":
            raise ProjectError(f"step() returned {described(flag)} as {name!r}; it is true or false")
    return answer


def check_observation(observation: Any, space: gym.Space, where: str) -> None:
    """`ProjectError` where the shape is another than the observation space says, or there are no numbers in it."""
    if not isinstance(space, gym.spaces.Box | gym.spaces.Discrete):
        return  # refused by its own message
    seen = np.asarray(observation, dtype=object) if isinstance(observation, dict | tuple) else np.asarray(observation)
    if seen.dtype.kind not in "fuib" or seen.shape != space.shape:
        raise ProjectError(f"{where} showed {described(observation)}; its observation space is of shape {space.shape}")


def described(value: Any) -> str:
    """A few words about any value."""
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{type(value).__name__} {str(value)[:40]}"


class FirstLook(gym.Wrapper):
    """The same in a worker process, around one environment."""

    def __init__(self, environment: gym.Env) -> None:
        super().__init__(environment)
        self.looked = False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """The environment's own; the first one is looked at."""
        if seed is None:
            return self.env.reset(options=options)
        return first_reset(self.env, seed, self.observation_space), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """The environment's own; the first one is looked at."""
        if self.looked:
            return self.env.step(action)
        self.looked = True
        return first_step(self.env, action, self.observation_space)
