"""What is kept of a rollout, and generalised advantage estimation.

Legend: T steps, N environments, O shape of an observation, D shape of an action.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Rollout:
    """T steps of N environments, in arrays that are made once and filled anew.

    Attributes:
        observations: (T + 1, N, *O), as the network sees them; the last row is what comes after the rollout.
        actions: (T, N, *D). rewards: float32 (T, N), as the learner sees them.
        terminated: bool (T, N), the task ended, nothing follows. done: bool (T, N), the episode ended, by termination
            or for lack of time.
        valid: bool (T, N), false for a dead row: a step in which the environment was reset and ignored the action.
        final: observations (K, *O) in which the episodes of the rows `final_at` (K, 2), pairs (t, n), ended, where row
            t + 1 holds another episode's first one.
        passes: pixels only: the policy's parameters (N, P) and values (N,) of each of the T + 1 observations, so that
            the network need not see them twice.
        episodes: (return, length) of each episode that ended, rewards as the environment gave them.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    done: np.ndarray
    valid: np.ndarray

    def __post_init__(self) -> None:
        self.final: list[np.ndarray] = []
        self.final_at: list[tuple[int, int]] = []
        self.passes: list[tuple[Tensor, Tensor]] = []
        self.episodes: list[tuple[float, int]] = []

    @classmethod
    def empty(
        cls,
        steps: int,
        count: int,
        observation: tuple[int, ...],
        action: tuple[int, ...],
        observation_type: type,
        action_type: type,
    ) -> Rollout:
        """Room for T = steps and N = count."""
        flags = [np.zeros((steps, count), dtype=bool) for _ in range(3)]
        return cls(
            np.zeros((steps + 1, count, *observation), dtype=observation_type),
            np.zeros((steps, count, *action), dtype=action_type),
            np.zeros((steps, count), dtype=np.float32),
            *flags,
        )

    def clear(self) -> None:
        """Forget what is kept in lists; the arrays are overwritten."""
        self.final, self.final_at, self.passes, self.episodes = [], [], [], []


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    valid: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), with the two kinds of ends kept apart.

        delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
        A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}

    An episode that ran out of time is cut (done) but not over (terminated): the value of where it stopped counts. If
    both flags are set, it is over. A dead row has no advantage and passes none on.

    Args:
        rewards, values, next_values: (T, N); next_values is V of the observation that the step led to, the final one at
            an episode's end.
        terminated, done, valid: bool (T, N).
    Returns:
        advantages and returns A + V, both (T, N), zero in dead rows.
    """
    # filled with zeros, not multiplied by them: whatever the row holds, NaN and infinity included, ends here
    dead = ~valid
    delta = (rewards + gamma * next_values.masked_fill(terminated, 0) - values).masked_fill(dead, 0)
    carry = gamma * gae_lambda * (valid & ~done).to(rewards.dtype)
    advantages, last = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in range(len(rewards) - 1, -1, -1):
        last = torch.addcmul(delta[t], carry[t], last)
        advantages[t] = last
    return advantages, (advantages + values).masked_fill(dead, 0)


def minibatches(rows: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """The rows int64 (M,) in random order, cut into M / batch_size parts, rounded, at least one, whose sizes differ by
    one at most.

    Rounded, for a few dead rows must not make one part less of a rollout.
    """
    order = rows[torch.randperm(len(rows), generator=generator)]
    return list(torch.tensor_split(order, max(1, round(len(rows) / batch_size))))
