"""Running mean and standard deviation of observations and of discounted returns: part of the policy, so part of the
checkpoint.

They change between rollouts only: all steps of a rollout, and the epochs that learn from it, see one and the same
scaling. Evaluation never changes them.

Legend: T steps, N environments, O shape of an observation.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class RunningMoments:
    """Mean and variance of everything seen, merged batch by batch (Chan, Golub & LeVeque 1979), in float64.

    With several processes, `update` must be called by all of them, and each sees the moments of all.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)
        self.count = 0.0

    def update(self, values: np.ndarray) -> None:
        """Add `values` (M, *shape)."""
        values = np.asarray(values, dtype=np.float64)
        count = float(shared_sum(np.array(float(len(values)))))
        if not count:
            return
        mean = shared_sum(values.sum(axis=0)) / count
        squares = shared_sum(np.square(values - mean).sum(axis=0))
        delta, together = mean - self.mean, self.count + count
        scatter = (self.var * self.count if self.count else 0.0) + squares + delta**2 * (self.count * count / together)
        self.mean = self.mean + delta * (count / together)
        self.var = scatter / together
        self.count = together

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, not below 1e-4."""
        return np.sqrt(np.maximum(self.var, 1e-8))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "mean": torch.from_numpy(np.array(self.mean)),
            "var": torch.from_numpy(np.array(self.var)),
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.mean = state["mean"].numpy().copy()
        self.var = state["var"].numpy().copy()
        self.count = float(state["count"])


def gather_states(state: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """One nested dict of tensors and plain values from each process, in order of rank; all processes must call this."""
    if world == 1:
        return [state]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    file = io.BytesIO()
    torch.save(state, file)
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = int(max(sizes))
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [
        torch.load(io.BytesIO(part[:size].cpu().numpy().tobytes()), weights_only=True)
        for part, size in zip(parts, map(int, sizes))
    ]


def shared_sum(values: np.ndarray) -> np.ndarray:
    """Sum over all processes, of the same shape; all of them must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    shared = torch.from_numpy(np.array(values)).to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared)
    return shared.cpu().numpy()


class ObservationNormalizer:
    """(x - mean) / std, clipped; the identity when switched off."""

    def __init__(self, shape: tuple[int, ...], enabled: bool, clip: float) -> None:
        self.moments = RunningMoments(shape)
        self.enabled = enabled
        self.clip = clip
        self.refresh()

    def refresh(self) -> None:
        """Use what has been learned."""
        self.mean = self.moments.mean.astype(np.float32)
        self.scale = (1 / self.moments.std).astype(np.float32)

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        if not self.enabled:
            return observations
        return np.clip((observations - self.mean) * self.scale, -self.clip, self.clip, dtype=np.float32)

    def learn(self, observations: np.ndarray) -> None:
        """Take in observations (M, *O) as the environment gave them."""
        if self.enabled:
            self.moments.update(observations)
            self.refresh()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.moments.load_state_dict(state)
        self.refresh()


class RewardNormalizer:
    """Rewards over the standard deviation of the discounted return G_t = gamma G_{t-1} + r_t, which starts anew with
    each episode.

    The mean is not subtracted: that would change which behaviour is best, scaling does not.
    """

    def __init__(self, count: int, gamma: float, enabled: bool, clip: float) -> None:
        self.moments = RunningMoments()
        self.enabled = enabled
        self.gamma = gamma
        self.clip = clip
        self.returns = np.zeros(count)  # (N,) G of the running episodes

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Scale rewards (T, N)."""
        if not self.enabled:
            return rewards
        return np.clip(rewards / self.moments.std, -self.clip, self.clip).astype(np.float32)

    def learn(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray) -> None:
        """Take in the rewards (T, N) of a rollout; dead rows are passed over."""
        if not self.enabled:
            return
        seen = np.empty(rewards.shape)
        for t in range(len(rewards)):
            self.returns = np.where(valid[t], self.gamma * self.returns + rewards[t], self.returns)
            seen[t] = self.returns
            self.returns = np.where(done[t], 0.0, self.returns)
        self.moments.update(seen[valid])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**self.moments.state_dict(), "returns": torch.from_numpy(self.returns.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.moments.load_state_dict(state)
        self.returns = state["returns"].numpy().copy()
