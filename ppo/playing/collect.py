"""Play: N environments, T steps each, with the policy as it is; and keep the books.

Legend: T steps, N environments of this process, O shape of an observation, P numbers that describe a distribution.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.errors import ProjectError
from ppo.config import Config
from ppo.data import Rollout
from ppo.environments.normalize import RewardNormalizer, gather_states, shared_sum
from ppo.environments.registry import as_input, observation_normalizer, observation_shape
from ppo.environments.vectors import GymVector, LocalVector, Vector, check_finite
from ppo.learning.distributions import Distribution

Act = Callable[[np.ndarray], torch.Tensor]
Look = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]
RECENT = 100  # episodes whose mean return is logged


class Collector:
    """Fills rollouts. Everything that outlives one is in `state_dict`.

    Args:
        rank, world: this process among those that share `env.count`.
    Attributes:
        recent: (return, length) of the last 100 episodes, rewards as the environment gave them, whole games only.
        num_episodes, num_steps: since the start; dead rows are not steps.
        notes: what a person should know of a resumed run; usually nothing.
    """

    def __init__(
        self, config: Config, vector: Vector, distribution: Distribution, rank: int = 0, world: int = 1
    ) -> None:
        self.config = config
        self.vector = vector
        self.distribution = distribution
        self.rank = rank
        self.world = world
        self.space = vector.observation_space
        shape = observation_shape(self.space)
        count = len(vector)
        train = config.train
        env = config.env
        self.observations = observation_normalizer(self.space, env)
        self.rewards = RewardNormalizer(count, train.gamma, env.normalize_rewards, env.clip_rewards)
        stays = len(shape) == 3 and self.space.dtype == np.uint8 and not self.observations.enabled
        kind = np.uint8 if stays else np.float32
        action = np.int64 if distribution.discrete else np.float32
        self.rollout = Rollout.empty(train.rollout, count, shape, distribution.action_shape, kind, action)
        self.raw = np.zeros((train.rollout, count, *shape), dtype=np.float32) if self.observations.enabled else None
        self.raw_rewards = np.zeros((train.rollout, count))
        self.signs = config.env.sign_rewards and config.env.atari
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self.num_episodes = self.num_steps = 0
        self.notes: list[str] = []
        self.current = as_input(self.space, vector.reset())  # (N, *O)
        # of the running games
        self.returns = np.zeros(count)
        self.lengths = np.zeros(count, dtype=np.int64)

    @torch.inference_mode()
    def collect(self, act: Act, generator: torch.Generator, look: Look | None = None) -> Rollout:
        """T steps of each environment with actions drawn from the policy.

        Args:
            act: from observations (N, *O) to the distribution's parameters (N, P).
            look: the same, and values (N,), where a shared trunk gives them for nothing; used in place of `act`, and
                what it says is kept, so that the network need not see the rollout twice.

        The noise of all environments of all processes is drawn at once, and each process takes its part, so that what
        environment n does does not depend on how they are spread.
        """
        rollout = self.rollout
        distribution = self.distribution
        count = len(self.vector)
        rollout.clear()
        steps = len(rollout.rewards)
        noise = distribution.noise((steps, count * self.world), generator)[
            :, self.rank * count : (self.rank + 1) * count
        ]
        for t in range(steps):
            seen = self.observations(self.current)
            rollout.observations[t] = seen
            if self.raw is not None:
                self.raw[t] = self.current
            if look is None:
                parameters = act(seen)
            else:
                rollout.passes.append(look(seen))
                parameters = rollout.passes[-1][0]
            actions = distribution.sample(parameters, noise[t]).cpu().numpy()
            rollout.actions[t] = actions
            self.play(t, distribution.to_env(actions))
        rollout.observations[steps] = self.observations(self.current)
        if look is not None:
            rollout.passes.append(look(rollout.observations[steps]))
        self.learn()
        return rollout

    def play(self, t: int, actions: np.ndarray) -> None:
        """One step of all environments, into row t."""
        rollout = self.rollout
        step = self.vector.step(actions)
        check_finite(step, self.num_steps)
        done = step.terminated | step.truncated
        rollout.terminated[t] = step.terminated
        rollout.done[t] = done
        rollout.valid[t] = step.valid
        self.raw_rewards[t] = np.sign(step.rewards) if self.signs else step.rewards
        for n, observation in step.final.items():
            rollout.final_at.append((t, n))
            rollout.final.append(self.observations(as_input(self.space, observation[None]))[0])
        self.returns += step.rewards
        self.lengths += step.valid
        self.num_steps += int(step.valid.sum())
        for n in (done if step.over is None else step.over).nonzero()[0]:
            rollout.episodes.append((float(self.returns[n]), int(self.lengths[n])))
            self.returns[n], self.lengths[n] = 0.0, 0
        self.current = as_input(self.space, step.observations)

    def learn(self) -> None:
        """Scale the rollout's rewards as is known so far; then take in what it brought."""
        rollout = self.rollout
        rollout.rewards[:] = self.rewards(self.raw_rewards)
        self.rewards.learn(self.raw_rewards, rollout.done, rollout.valid)
        if self.raw is not None:
            self.observations.learn(self.raw[rollout.valid])
        self.recent.extend(rollout.episodes)
        self.num_episodes += len(rollout.episodes)

    def played(self) -> dict[str, float]:
        """Mean return and length of the last 100 episodes of each process (NaN before the first), episodes and steps
        of all processes.
        """
        pairs = np.array(self.recent, dtype=np.float64).reshape(-1, 2)
        sums = shared_sum(
            np.array([len(pairs), *pairs.sum(axis=0), self.num_episodes, self.num_steps], dtype=np.float64)
        )
        # plain numbers: a checkpoint holds no numpy scalars
        count, returned, length, num_episodes, num_steps = sums.tolist()
        count = count or math.nan
        return {
            "return_mean": returned / count,
            "length_mean": length / count,
            "episodes": num_episodes,
            "env_steps": num_steps,
        }

    def restart(self, update: int) -> None:
        """New episodes from (seed, update) where the simulators' state can only be played again, so that this stays
        short.

        The training program calls it before every regular save, and not where a stop signal brought one, so that a run
        that was stopped and one that was not do the same.
        """
        if isinstance(self.vector, GymVector) and not self.vector.readable:
            self.begin(self.vector.reset(update))

    def begin(self, observations: np.ndarray) -> None:
        """Open the books of new episodes anew, which begin with these observations (N, *O) of the environments."""
        self.current = as_input(self.space, observations)
        self.returns[:] = 0.0
        self.lengths[:] = 0
        self.rewards.returns[:] = 0.0

    def gathered(self) -> list[dict[str, Any]]:
        """`state_dict` of each process, for a checkpoint; all of them must call this."""
        return gather_states(self.state_dict(), self.world)

    def state_dict(self) -> dict[str, Any]:
        """All that this process would need to go on."""
        return {
            "vector": self.vector.state_dict(),
            "observations": self.observations.state_dict(),
            "rewards": self.rewards.state_dict(),
            "recent": [list(pair) for pair in self.recent],
            "num_episodes": self.num_episodes,
            "num_steps": self.num_steps,
            "rollout": self.config.train.rollout,
            "current": torch.from_numpy(np.array(self.current)),
            "returns": torch.from_numpy(self.returns.copy()),
            "lengths": torch.from_numpy(self.lengths.copy()),
        }

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """From a checkpoint, as `gathered`. `ProjectError` for another number of processes, environments or steps of a
        rollout.

        Environments that do not repeat themselves begin new episodes, and `notes` says so.
        """
        if len(states) != self.world:
            raise ProjectError(f"the run was stopped with {len(states)} processes and cannot go on with {self.world}")
        state = states[self.rank]
        before = (len(state["returns"]) * self.world, state.get("rollout", self.config.train.rollout))
        now = (len(self.vector) * self.world, self.config.train.rollout)
        if before != now:
            raise ProjectError(
                f"the run was stopped with env.count={before[0]} and train.rollout={before[1]} and cannot go on with "
                f"{now[0]} and {now[1]}: its updates are counted in rollouts of that size"
            )
        self.observations.load_state_dict(state["observations"])
        self.rewards.load_state_dict(state["rewards"])
        self.recent = deque(((float(a), int(b)) for a, b in state["recent"]), maxlen=RECENT)
        self.num_episodes = int(state["num_episodes"])
        self.num_steps = int(state["num_steps"])
        self.returns = state["returns"].numpy().copy()
        self.lengths = state["lengths"].numpy().copy()
        self.current = as_input(self.space, self.vector.load_state_dict(state["vector"]))
        if np.array_equal(self.current, state["current"].numpy()):
            return
        self.notes.append(
            f"note: {self.config.env.id} does not come back to where it was (the same seed and actions led elsewhere): "
            "its episodes begin anew"
        )
        numbers = () if isinstance(self.vector, LocalVector) else (self.num_steps,)
        self.begin(self.vector.reset(*numbers))
