"""Generalised advantage estimation against a peer and against its definition; minibatches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from ppo.data import Rollout, gae, minibatches

T, N = 23, 6
GAMMAS = [(0.99, 0.95), (0.9, 0.5), (0.98, 0.0), (0.98, 1.0), (1.0, 1.0), (0.0, 0.7)]
NAMES = ("rewards", "values", "next_values", "terminated", "done", "valid")


def definition(rewards, values, next_values, terminated, done, valid, gamma, gae_lambda):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, up to the end of the episode or of the data (Schulman et al.
    2016, eq. 16).
    """
    rewards, values, next_values = (array.double().numpy() for array in (rewards, values, next_values))
    terminated, done, valid = (flags.numpy() for flags in (terminated, done, valid))
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for n in range(rewards.shape[1]):
        for t in range(rewards.shape[0]):
            if not valid[t, n]:
                continue
            for l in range(rewards.shape[0] - t):
                at = (t + l, n)
                if not valid[at]:
                    break
                follows = 0.0 if terminated[at] else gamma * next_values[at]
                advantages[t, n] += (gamma * gae_lambda) ** l * (rewards[at] + follows - values[at])
                if done[at]:
                    break
            returns[t, n] = advantages[t, n] + values[t, n]
    return torch.from_numpy(advantages), torch.from_numpy(returns)


def rollout(
    seed: int, terminations: float = 0.1, truncations: float = 0.1, dead: bool = False
) -> dict[str, torch.Tensor]:
    """Random numbers float64 (T, N) and flags; with `dead`, the row after each end is a dead one, as under next-step
    autoreset.
    """
    g = torch.Generator().manual_seed(seed)
    rewards, values, next_values = (torch.randn(T, N, generator=g, dtype=torch.float64) for _ in range(3))
    terminated, truncated = torch.rand(T, N, generator=g) < terminations, torch.rand(T, N, generator=g) < truncations
    done, valid = terminated | truncated, torch.ones(T, N, dtype=torch.bool)
    if dead:
        for t in range(1, T):
            valid[t] = ~(done[t - 1] & valid[t - 1])
            done[t] &= valid[t]
            terminated[t] &= valid[t]
        valid[0, 0] = done[0, 0] = terminated[0, 0] = False  # an episode ended with the last row of the rollout before
    return dict(zip(NAMES, (rewards, values, next_values, terminated, done, valid)))


def close(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("gamma", "gae_lambda"), GAMMAS)
def test_equals_the_buffer_of_stable_baselines3(gamma, gae_lambda):
    """No episode runs out of time here; that buffer knows one kind of end only. Its arrays are float32."""
    data = rollout(1, truncations=0.0)
    data["next_values"] = torch.cat([data["values"][1:], data["next_values"][-1:]])
    data["terminated"][-1, 0] = data["done"][-1, 0] = True
    data = {name: value.float() if value.is_floating_point() else value for name, value in data.items()}
    buffer = RolloutBuffer(
        T, spaces.Box(-1, 1, (3,)), spaces.Discrete(2), device="cpu", gae_lambda=gae_lambda, gamma=gamma, n_envs=N
    )
    done = data["done"].numpy()
    starts = np.concatenate([np.ones((1, N)), done[:-1]])
    for t in range(T):
        buffer.add(
            np.zeros((N, 3)), np.zeros(N), data["rewards"][t].numpy(), starts[t], data["values"][t], torch.zeros(N)
        )
    buffer.compute_returns_and_advantage(data["next_values"][-1], done[-1])
    assert done[:-1].any() and done[-1].any() and not done[-1].all()
    close(
        gae(**data, gamma=gamma, gae_lambda=gae_lambda),
        (torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)),
        2e-5,
    )


@pytest.mark.parametrize("dead", [False, True], ids=["all rows live", "dead rows"])
@pytest.mark.parametrize(("gamma", "gae_lambda"), GAMMAS)
def test_equals_the_definition(gamma, gae_lambda, dead):
    for seed in range(5):
        data = rollout(seed, dead=dead)
        assert (data["done"] & ~data["terminated"]).any() and data["terminated"].any()
        assert (~data["valid"]).any() == dead
        close(gae(**data, gamma=gamma, gae_lambda=gae_lambda), definition(**data, gamma=gamma, gae_lambda=gae_lambda))


@pytest.mark.parametrize("time", [True, False])
def test_equals_the_one_of_torchrl(time):
    """Its (done, terminated) version, where that package is installed."""
    pytest.importorskip("torchrl", reason="torchrl is not installed")
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    data = rollout(3, truncations=0.1 if time else 0.0)
    turned = {name: value.T.unsqueeze(-1) for name, value in data.items()}  # (N, T, 1)
    theirs = generalized_advantage_estimate(
        0.97, 0.9, turned["values"], turned["next_values"], turned["rewards"], turned["done"], turned["terminated"]
    )
    # theirs has float32 inside
    close(gae(**data, gamma=0.97, gae_lambda=0.9), [value.squeeze(-1).T for value in theirs], 2e-5)


def one(reward: float, value: float, following: float, terminated: bool, done: bool) -> float:
    """Advantage of the first of two steps, the second worth 100, with gamma .5 and lambda 1."""
    column = [
        torch.tensor([[a], [b]])
        for a, b in ((reward, 100.0), (value, 0.0), (following, 0.0), (terminated, True), (done, True))
    ]
    return float(gae(*column, torch.ones(2, 1, dtype=torch.bool), 0.5, 1.0)[0][0, 0])


def test_ends_by_hand():
    """r = 1, V = 2, V' = 4, gamma = .5."""
    assert one(1, 2, 4, terminated=False, done=False) == 1 + 0.5 * 4 - 2 + 0.5 * 100
    assert one(1, 2, 4, terminated=False, done=True) == 1 + 0.5 * 4 - 2, (
        "out of time: the value of where it stopped, and no more"
    )
    assert one(1, 2, 4, terminated=True, done=True) == 1 - 2, "over: nothing follows"


def test_termination_wins_where_both_flags_are_set():
    data = rollout(5, terminations=0.3, truncations=0.3)
    truncated = torch.rand(T, N, generator=torch.Generator().manual_seed(1)) < 0.5
    plain = gae(**{**data, "done": data["terminated"]}, gamma=0.9, gae_lambda=0.8)
    both = gae(**{**data, "done": data["terminated"] | (truncated & data["terminated"])}, gamma=0.9, gae_lambda=0.8)
    close(both, plain, 0)
    wild = {**data, "next_values": torch.where(data["terminated"], 1e30, data["next_values"])}
    close(gae(**wild, gamma=0.9, gae_lambda=0.8), gae(**data, gamma=0.9, gae_lambda=0.8), 0)


@pytest.mark.parametrize("garbage", [1e30, -3e38, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_dead_row_holds_does_not_matter(garbage, dtype):
    data = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in rollout(7, dead=True).items()
    }
    dead = ~data["valid"]
    before = gae(**data, gamma=0.99, gae_lambda=0.95)
    for name in ("rewards", "values", "next_values"):
        data[name] = torch.where(dead, garbage, data[name])
    for flags in (("terminated",), ("done",), ("terminated", "done")):
        after = gae(**{**data, **{name: data[name] | dead for name in flags}}, gamma=0.99, gae_lambda=0.95)
        close(after, before, 0)
    assert (before[0][dead] == 0).all() and (before[1][dead] == 0).all()
    assert (before[0][~dead] != 0).all()


def test_dead_rows_anywhere_separate_what_is_around_them():
    """A row that follows a dead one is the start of an episode: taken alone, it has the same advantages."""
    data = rollout(2, terminations=0.0, truncations=0.0)
    for t in (4, 5, 11):
        data["valid"][t] = False
        data["done"][t - 1] = True
    found = gae(**data, gamma=0.99, gae_lambda=0.9)
    for a, b in ((0, 4), (6, 11), (12, T)):
        alone = gae(**{name: value[a:b] for name, value in data.items()}, gamma=0.99, gae_lambda=0.9)
        close([value[a:b] for value in found], alone)


def test_lambda_zero_is_the_temporal_difference():
    data = rollout(4)
    expected = data["rewards"] + 0.9 * data["next_values"] * (~data["terminated"]) - data["values"]
    close(gae(**data, gamma=0.9, gae_lambda=0.0), (expected, expected + data["values"]))


def test_lambda_one_is_the_discounted_sum_of_rewards():
    """With consistent values, A + V is the plain sum of discounted rewards to the end, plus the value of where it
    was cut.
    """
    data = rollout(4)
    inside = ~data["done"][:-1]
    data["next_values"][:-1] = torch.where(inside, data["values"][1:], data["next_values"][:-1])
    expected = torch.empty(T, N, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            total, factor, s = 0.0, 1.0, t
            while True:
                total += factor * float(data["rewards"][s, n])
                factor *= 0.9
                if data["done"][s, n] or s == T - 1:
                    break
                s += 1
            expected[t, n] = total + (0.0 if data["terminated"][s, n] else factor * float(data["next_values"][s, n]))
    close((gae(**data, gamma=0.9, gae_lambda=1.0)[1],), (expected,))


def test_shapes_and_inputs():
    data = {name: value.float() if value.is_floating_point() else value for name, value in rollout(0).items()}
    copies = {name: value.clone() for name, value in data.items()}
    advantages, returns = gae(**data, gamma=0.9, gae_lambda=0.9)
    assert advantages.shape == returns.shape == (T, N) and advantages.dtype == returns.dtype == torch.float32
    assert all(torch.equal(data[name], copies[name]) for name in data), "the arguments are left as they were"
    first = gae(**{name: value[:1, :1] for name, value in data.items()}, gamma=0.9, gae_lambda=0.9)[0]
    assert first.shape == (1, 1)


PARTS = [
    (256, 64, 4),
    (250, 64, 4),
    (64, 64, 1),
    (63, 64, 1),
    (90, 64, 1),
    (100, 64, 2),
    (127, 64, 2),
    (1, 64, 1),
    (7, 1, 7),
    (1000, 3, 333),
]


@pytest.mark.parametrize(("count", "size", "number"), PARTS)
def test_minibatches(count, size, number):
    rows = torch.arange(count) * 3 + 1
    parts = minibatches(rows, size, torch.Generator().manual_seed(0))
    sizes = [len(part) for part in parts]
    assert sorted(torch.cat(parts).tolist()) == rows.tolist(), "every row once"
    assert len(parts) == number
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 / 3 * min(count, size)
    again = minibatches(rows, size, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    if count > 10:
        other = minibatches(rows, size, torch.Generator().manual_seed(1))
        assert torch.cat(parts).tolist() != rows.tolist() and not torch.equal(torch.cat(parts), torch.cat(other))


def test_minibatches_of_one_generator_differ_from_epoch_to_epoch():
    g = torch.Generator().manual_seed(0)
    first, second = (torch.cat(minibatches(torch.arange(100), 10, g)) for _ in range(2))
    assert not torch.equal(first, second)


def test_every_row_is_as_likely_in_every_place():
    """Mean place of each row over many orders, against the uniform law's."""
    places = torch.stack(
        [torch.cat(minibatches(torch.arange(20), 5, torch.Generator().manual_seed(s))).argsort() for s in range(2000)]
    )
    error = (places.double().mean(dim=0) - 9.5).abs()
    assert error.max() < 5 * np.sqrt((20**2 - 1) / 12 / 2000)


def test_empty_rollout():
    store = Rollout.empty(5, 3, (4,), (2,), np.float32, np.float32)
    assert store.observations.shape == (6, 3, 4) and store.actions.shape == (5, 3, 2)
    assert store.rewards.shape == store.terminated.shape == store.done.shape == store.valid.shape == (5, 3)
    assert store.terminated is not store.done and store.done is not store.valid
    assert (store.rewards.dtype, store.valid.dtype) == (np.float32, bool)
    store.final_at.append((0, 0))
    store.clear()
    assert store.final_at == store.final == store.episodes == []
