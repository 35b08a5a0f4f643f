"""Environments side by side, under gymnasium 1.x: one meaning of a step, whatever resets what, and a state that can be
saved.

Gymnasium's vector environments reset a finished copy in one of three ways (`AutoresetMode`). NEXT_STEP: the step after
the last one ignores its action and returns the first observation of a new episode with reward 0: a dead row, nothing
was learned from it. SAME_STEP: the last step already returns the new episode's first observation, and the old one's
last hides in `infos["final_obs"]`. DISABLED: nothing happens until somebody resets. Code that takes one for another
trains on dead rows, or bootstraps from the wrong observation. Here a `Step` says which rows are valid and where an
episode's final observation is; the rest of the project knows no modes.

Legend: N environments, O shape of an observation.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from common.errors import ProjectError
from common.runtime import indexed_seed, mix_seed
from ppo.checks import first_reset, first_step


@dataclass
class Step:
    """What came of one action in each environment.

    Attributes:
        observations: (N, *O), what the next action answers to.
        rewards: float64 (N,). terminated, truncated, valid: bool (N,). A row that is not valid was a reset and ignored
            its action.
        final: n -> observation (*O) in which the episode of environment n ended, where `observations` holds the next
            one's first.
        over: bool (N,), the game is over; None = wherever an episode ended. In Atari an episode may end with a life,
            the game goes on.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    final: dict[int, np.ndarray] = field(default_factory=dict)
    over: np.ndarray | None = None


class LocalVector:
    """Environments in this process, stepped one after another: for cheap ones nothing is faster.

    Each episode starts with `reset(seed=...)`, a seed that depends on (seed, environment, episode) alone. So an
    episode's state is its seed and the actions since, which is what a checkpoint holds: resuming plays them again,
    exactly, without help from the simulator.

    Args:
        first: number of the first environment among those of all processes.
    """

    def __init__(self, environments: list[gym.Env], seed: int, first: int = 0, max_episode_steps: int = 0) -> None:
        self.wrapped = environments
        # the time limit is kept here: no wrappers a step
        self.environments = [e.unwrapped if bare(e) else e for e in environments]
        limit = max_episode_steps or (environments[0].spec.max_episode_steps if environments[0].spec else None) or 0
        self.limit = limit if bare(environments[0]) else 0
        self.seed = seed
        self.first = first
        self.observation_space = environments[0].observation_space
        self.action_space = environments[0].action_space
        self.episode = [0] * len(environments)
        self.looked = False  # whether each has played a step, and its answer was looked at
        self.actions: list[list[Any]] = [[] for _ in environments]

    def __len__(self) -> int:
        return len(self.environments)

    def reset(self) -> np.ndarray:
        """The first observations (N, *O)."""
        return np.stack([self._begin(n) for n in range(len(self))])

    def _begin(self, n: int) -> np.ndarray:
        self.actions[n] = []
        seed = indexed_seed(self.seed, self.first + n, self.episode[n]) % 2**31
        return first_reset(self.environments[n], seed, self.observation_space)

    def step(self, actions: np.ndarray) -> Step:
        """Play one action in each."""
        count = len(self)
        limit = self.limit
        observations = [None] * count
        final = {}
        rewards = np.empty(count)
        terminated = np.zeros(count, dtype=bool)
        truncated = np.zeros(count, dtype=bool)
        discrete = actions.ndim == 1
        chosen = actions.tolist() if discrete else actions
        for n, environment in enumerate(self.environments):
            action = chosen[n]
            history = self.actions[n]
            history.append(action if discrete else action.copy())
            step = environment.step(action) if self.looked else first_step(environment, action, self.observation_space)
            observation, rewards[n], over, cut, _ = step
            cut = cut or (limit > 0 and len(history) >= limit)
            if over or cut:
                # a copy: resetting may overwrite it
                terminated[n] = over
                truncated[n] = cut
                final[n] = np.array(observation)
                self.episode[n] += 1
                observation = self._begin(n)
            observations[n] = observation
        self.looked = True
        return Step(np.stack(observations), rewards, terminated, truncated, np.ones(count, dtype=bool), final)

    def state_dict(self) -> dict[str, Any]:
        """Episode numbers and the actions since each began."""
        return {
            "episode": list(self.episode),
            "actions": [torch.from_numpy(np.array(history)) for history in self.actions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Play the saved actions again; returns the observations (N, *O) they lead to."""
        self.episode = [int(number) for number in state["episode"]]
        observations = []
        for n, saved in enumerate(state["actions"]):
            observation = self._begin(n)
            history = list(saved.numpy()) if saved.ndim > 1 else saved.tolist()
            for action in history:
                observation, _, over, cut, _ = self.environments[n].step(action)
                if over or cut:
                    break  # it did not end there before: the collector will see that it is elsewhere
            self.actions[n] = history
            observations.append(observation)
        return np.stack(observations)

    def close(self) -> None:
        """Free what the simulators hold."""
        for environment in self.wrapped:
            environment.close()


def bare(environment: gym.Env) -> bool:
    """Whether only gymnasium's own time limit and order checks are around the simulator, so that both can be done
    without.
    """
    names = []
    while environment is not environment.unwrapped:
        names.append(type(environment).__name__)
        environment = environment.env
    return set(names) <= {"TimeLimit", "OrderEnforcing", "PassiveEnvChecker"}


class GymVector:
    """Any vector environment of gymnasium, in any of its three reset modes.

    Where the simulator's state can be read (`state`, `steps`, `prev_done` and a generator, as in gymnasium's own numpy
    environments) a checkpoint holds it. Where it cannot, it holds the numbers of the last `reset` and the actions
    since, to be played again. So that these do not grow for ever, the training program resets to (seed, update) at
    every regular save.

    Attributes:
        readable: whether the state can be read.
    """

    NUMPY_STATE = ("state", "steps", "prev_done")

    def __init__(self, environment: gym.vector.VectorEnv, seed: int, first: int = 0) -> None:
        self.environment = environment
        self.seed = seed
        self.first = first
        self.mode = AutoresetMode(environment.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.observation_space = environment.single_observation_space
        self.action_space = environment.single_action_space
        # set where an episode ends with a life and the game goes on
        self.frame_limit = getattr(environment, "frame_limit", 0)
        self.before = np.zeros(len(self), dtype=bool)  # NEXT_STEP: whose episode ended in the last step
        self.readable = True
        self.numbers = ()
        self.actions: list[np.ndarray] = []
        self.end_workers = weakref.finalize(self, end, getattr(environment, "processes", []))

    def __len__(self) -> int:
        return self.environment.num_envs

    def reset(self, *numbers: int) -> np.ndarray:
        """The first observations (N, *O); a function of the seed and `numbers`."""
        self.before[:] = False
        self.numbers = numbers
        self.actions = []
        try:
            observations, _ = self.environment.reset(seed=self.seeds(*numbers))
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        inner = self.environment.unwrapped
        self.readable = all(isinstance(getattr(inner, name, None), np.ndarray) for name in self.NUMPY_STATE)
        return observations

    def seeds(self, *numbers: int) -> list[int] | np.ndarray | int:
        """What `reset` takes: a seed for each environment by its number among those of all processes, so that it begins
        alike whoever plays it. Gymnasium's numpy environments have one generator for all, and take one seed.
        """
        each = [mix_seed(self.seed, self.first + n, *numbers) % 2**31 for n in range(len(self))]
        inner = self.environment.unwrapped
        if isinstance(inner, SyncVectorEnv | AsyncVectorEnv):
            return each
        return np.array(each) if hasattr(inner, "ale") else each[0]

    def _lost(self, error: Exception) -> ProjectError:
        """A worker process has died: end the others, for none of them would notice."""
        self.end_workers()
        self.environment.closed = True  # it would wait for answers when it is deleted
        return ProjectError(
            f"an environment's worker process is gone ({type(error).__name__}: {error}); the last checkpoint stands, "
            "--resume continues from it"
        )

    def step(self, actions: np.ndarray) -> Step:
        """Play one action in each."""
        if not self.readable:
            self.actions.append(np.array(actions))
        try:
            observations, rewards, terminated, truncated, infos = self.environment.step(actions)
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        done = terminated | truncated
        valid = np.ones(len(self), dtype=bool)
        final = {}
        over = done
        # the vector resets where the game is over; a life lost in the last frame is not called truncated
        if self.frame_limit:
            over = done & (truncated | (infos["lives"] == 0) | (infos["episode_frame_number"] >= self.frame_limit))
        if self.mode == AutoresetMode.NEXT_STEP:
            # the final observation is the one returned, the dead row's own
            valid = ~self.before
            self.before = over
        elif done.any() and self.mode == AutoresetMode.SAME_STEP:
            final = {int(n): np.asarray(infos["final_obs"][n]) for n in done.nonzero()[0]}
        elif done.any():
            final = {int(n): observations[n].copy() for n in done.nonzero()[0]}
            observations = self.environment.reset(options={"reset_mask": done})[0]
        return Step(observations, np.asarray(rewards, dtype=np.float64), terminated, truncated, valid, final, over)

    def state_dict(self) -> dict[str, Any]:
        """The simulator's arrays and generator; where they cannot be read, what has been done since the last
        `reset`.
        """
        inner = self.environment.unwrapped
        if not self.readable:
            return {"numbers": list(self.numbers), "actions": torch.from_numpy(np.array(self.actions))}
        arrays = {name: torch.from_numpy(np.array(getattr(inner, name))) for name in self.NUMPY_STATE}
        return {**arrays, "before": torch.from_numpy(self.before.copy()), "rng": pack_generator(inner.np_random)}

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Continue from `state_dict`; returns the observations (N, *O) of that moment."""
        if "actions" in state:
            observations = self.reset(*state["numbers"])
            for actions in state["actions"].numpy():
                observations = self.step(actions).observations
            return observations
        self.reset()
        inner = self.environment.unwrapped
        for name in self.NUMPY_STATE:
            setattr(inner, name, state[name].numpy().copy())
        self.before = state["before"].numpy().copy()
        unpack_generator(inner.np_random, state["rng"])
        return inner.state.T.astype(np.float32)

    def close(self) -> None:
        """End workers and simulators."""
        self.environment.close()
        self.end_workers()


def end(processes: list[BaseProcess]) -> None:
    """Kill worker processes that are still there: they leave SIGTERM to the main process."""
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def pack_generator(generator: np.random.Generator) -> dict[str, Any]:
    """The state of a PCG64 generator in types that a checkpoint can hold; its integers have 128 bits."""
    state = generator.bit_generator.state
    return {
        "state": str(state["state"]["state"]),
        "inc": str(state["state"]["inc"]),
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }


def unpack_generator(generator: np.random.Generator, saved: dict[str, Any]) -> None:
    """Set a PCG64 generator to a packed state."""
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": int(saved["state"]), "inc": int(saved["inc"])},
        "has_uint32": saved["has_uint32"],
        "uinteger": saved["uinteger"],
    }


Vector = LocalVector | GymVector


def check_finite(step: Step, numbers: int) -> None:
    """`ProjectError` if an environment returned NaN or infinity; the policy would carry it into every weight."""
    seen = (
        [step.rewards]
        if step.observations.dtype.kind != "f"
        else [step.rewards, step.observations, *step.final.values()]
    )
    if not all(np.isfinite(values).all() for values in seen):
        rows = ~np.isfinite(step.rewards)
        if len(seen) > 1:
            rows |= ~np.isfinite(step.observations.reshape(len(rows), -1)).all(axis=1)
            rows[[n for n, observation in step.final.items() if not np.isfinite(observation).all()]] = True
        raise ProjectError(
            f"environment {int(rows.nonzero()[0][0])} returned NaN or infinity after {numbers} steps; nothing was "
            "learned "
            "from it, and the last checkpoint stands"
        )
