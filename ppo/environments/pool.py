"""Environments of envpool, as a `GymVector`. Legend: N environments, O shape of an observation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from common.runtime import mix_seed
from ppo.environments.vectors import GymVector, Step


class PoolVector(GymVector):
    """Environments of envpool, stepped by its C++ threads.

    Left to itself, envpool resets in the next step, takes no seed once it is made, and says "truncated" alone of an
    episode that terminates in the very step in which its time is up. Here the time limit is kept by this class,
    envpool's own lies one step beyond, and who has ended is reset at once: no row is dead, and both flags mean what
    they say. Its state cannot be read, but equal seeds and actions lead to equal steps, so a checkpoint holds those, as
    for other environments of this kind.

    Args:
        build: seeds, one for each environment -> an envpool of as many.
        first: number of the first environment among those of all processes; environment n begins the same, whoever
            plays it.
        limit: steps of an episode; 0 = none.
        by_lives: an episode ends with a lost life; the game goes on.
    """

    def __init__(
        self,
        build: Callable[[list[int]], Any],
        count: int,
        seed: int,
        first: int = 0,
        limit: int = 0,
        by_lives: bool = False,
    ) -> None:
        self.build = build
        self.limit = limit
        self.by_lives = by_lives
        self.fresh = True
        super().__init__(build([mix_seed(seed, first + n) % 2**31 for n in range(count)]), seed, first)
        self.readable = False
        self.lives = np.zeros(count, dtype=np.int32)

    def reset(self, *numbers: int) -> np.ndarray:
        """The first observations (N, *O); a function of the seed and `numbers`."""
        if numbers or not self.fresh:
            self.environment = self.build(
                [mix_seed(self.seed, self.first + n, *numbers) % 2**31 for n in range(len(self))]
            )
        self.fresh = False
        self.numbers = numbers
        self.actions = []
        observations, infos = self.environment.reset()
        self.lives = infos.get("lives", self.lives)
        return observations

    def step(self, actions: np.ndarray) -> Step:
        """Play one action in each."""
        self.actions.append(np.array(actions))
        observations, rewards, terminated, truncated, infos = self.environment.step(actions)
        if self.limit:
            truncated = truncated | (infos["elapsed_step"] >= self.limit)
        over = terminated | truncated
        final = {}
        lives = infos.get("lives", self.lives)
        if self.by_lives:
            terminated = terminated | (lives < self.lives)
        self.lives = lives
        if over.any():
            numbers = over.nonzero()[0]
            final = {int(n): observations[n].copy() for n in numbers}
            begun, infos = self.environment.reset(numbers.astype(np.int32))
            numbers = infos["env_id"]
            observations = observations.copy()
            observations[numbers] = begun
            if "lives" in infos:
                self.lives = lives.copy()
                self.lives[numbers] = infos["lives"]
        return Step(
            observations,
            np.asarray(rewards, dtype=np.float64),
            terminated,
            truncated,
            np.ones(len(self), dtype=bool),
            final,
            over,
        )
