"""The data of an agent: what it has just played, made into minibatches.

`Rollout` is what is kept of T steps, `gae` judges its actions, `learning_batch` puts together what a minibatch needs,
`epochs` deals out the rows.

Legend: T steps, N environments of this process, O shape of an observation, D shape of an action, M valid rows of all
processes' T x N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.run import Run
from ppo.config import TrainConfig
from ppo.learning.distributions import Distribution
from ppo.model import ActorCritic

# rows a forward pass when a whole rollout is read: more need gigabytes for pixels, and break up the heap for small
# networks
ROWS_AT_ONCE = 512


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
        passes: the policy's parameters (N, P) and values (N,) of each of the T + 1 observations, or nothing.
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
        for kept in (self.final, self.final_at, self.passes, self.episodes):
            kept.clear()


class Batch(NamedTuple):
    """Rows to learn from; row t N + n of a whole rollout belongs to step t of environment n.

    Attributes:
        observations: (B, *O), as the network saw them. actions: (B, *D).
        old_log_prob, old_values: (B,), by the weights that played. advantages, returns: (B,), by `gae`.
    """

    observations: Tensor
    actions: Tensor
    old_log_prob: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> Batch:
        """The rows int64 (B',) of every field."""
        return Batch(*(field.index_select(0, rows) for field in self))


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
    advantages = torch.empty_like(rewards)
    last = torch.zeros_like(rewards[0])
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


def learning_batch(
    rollout: Rollout, model: ActorCritic, distribution: Distribution, settings: TrainConfig, device: torch.device
) -> Batch:
    """Everything that the epochs learn from, T N rows on the device.

    Values and log-probabilities of the whole rollout are computed in one pass, with the weights that played it; or they
    are those of the rollout's own passes, where it has kept them.
    """
    T, N = rollout.rewards.shape
    shape = rollout.observations.shape[2:]
    observations = torch.from_numpy(rollout.observations).to(device, copy=True).view((T + 1) * N, *shape)
    actions = torch.from_numpy(rollout.actions).to(device, copy=True).flatten(0, 1)
    with torch.no_grad():
        passes = rollout.passes or [model(rows) for rows in observations.split(ROWS_AT_ONCE)]
        parameters = torch.cat([p for p, _ in passes])[: T * N]
        values = torch.cat([v for _, v in passes]).view(T + 1, N)
        next_values = values[1:].clone()
        if rollout.final_at:
            final = torch.from_numpy(np.stack(rollout.final)).to(device)
            t, n = torch.tensor(rollout.final_at, device=device).T
            next_values[t, n] = torch.cat([model.evaluate(rows) for rows in final.split(ROWS_AT_ONCE)])
        observations = observations[: T * N]
        log_prob, _ = distribution.log_prob_entropy(parameters, actions)
        terminated = torch.from_numpy(rollout.terminated).to(device)
        done = torch.from_numpy(rollout.done).to(device)
        valid = torch.from_numpy(rollout.valid).to(device)
        ends = terminated if settings.bootstrap_truncated else done
        rewards = torch.from_numpy(rollout.rewards).to(device, values.dtype)
        advantages, returns = gae(
            rewards, values[:-1], next_values, ends, done, valid, settings.gamma, settings.gae_lambda
        )
    return Batch(observations, actions, log_prob, values[:-1].flatten(), advantages.flatten(), returns.flatten())


def valid_rows(rollout: Rollout, run: Run) -> Tensor:
    """Numbers t N' + n of the rows that hold a real step, n counting the N' environments of all processes: int64
    (M,) on the CPU.
    """
    valid = torch.from_numpy(rollout.valid)
    if run.world > 1:
        flags = [torch.empty_like(valid, dtype=torch.uint8, device=run.device) for _ in range(run.world)]
        dist.all_gather(flags, valid.to(run.device, torch.uint8))
        valid = torch.cat(flags, dim=1).bool().cpu()  # (T, N')
    return valid.flatten().nonzero().flatten()


def epochs(rows: Tensor, settings: TrainConfig, order: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(epoch 1, 2, ..., rows of a minibatch)."""
    for epoch in range(1, settings.epochs + 1):
        for minibatch in minibatches(rows, settings.batch_size, order):
            yield epoch, minibatch


def local_rows(minibatch: Tensor, count: int, run: Run) -> Tensor:
    """Which of a minibatch's rows this process played, as rows of its own batch, on its device.

    Args:
        minibatch: int64, numbers t N' + n, n counting the N' environments of all processes.
        count: environments of this process.
    """
    if run.world == 1:
        return minibatch.to(run.device)
    t = minibatch // (count * run.world)
    n = minibatch % (count * run.world) - run.rank * count
    here = (n >= 0) & (n < count)
    return (t * count + n)[here].to(run.device)
