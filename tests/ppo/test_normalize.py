"""Running statistics against numpy, discounted returns against a plain loop, and that evaluation leaves them alone."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.logging import read_metrics
from ppo.environments.normalize import ObservationNormalizer, RewardNormalizer, RunningMoments
from ppo.environments.registry import make_one, make_vector
from ppo.environments.vectors import LocalVector
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic
from ppo.playing.collect import Collector
from ppo.playing.play import Policy, film, play
from tests.helpers import same
from tests.ppo.helpers import acting, config, evaluate, train

SIZES = (1, 7, 0, 100, 2, 1, 33, 500, 0, 3)


def batches(shape: tuple[int, ...], mean: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    """Of very different sizes; each drifts, so that no batch looks like another."""
    rng = np.random.default_rng(seed)
    return [mean + rng.normal(size=(size, *shape)) * (1 + i) + i for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_numpys(shape, offset):
    moments, seen = RunningMoments(shape), []
    assert (moments.mean == 0).all() and (moments.var == 1).all() and moments.std.shape == shape
    for batch in batches(shape, offset):
        moments.update(batch)
        seen.append(batch)
        everything = np.concatenate(seen)
        assert moments.count == len(everything)
        np.testing.assert_allclose(moments.mean, everything.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.var, everything.var(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.std, everything.std(axis=0), rtol=1e-9)


def test_unit_variance_around_a_million_survives_many_batches():
    """The sum of squares would have lost it: 1e12 times the number of rows leaves no digits for 1."""
    rng, moments = np.random.default_rng(0), RunningMoments((2,))
    data = (1e6 + rng.normal(size=(50_000, 2))).astype(np.float64)
    for part in np.array_split(data, 500):
        moments.update(part)
    np.testing.assert_allclose(moments.var, data.var(axis=0), rtol=1e-8)
    np.testing.assert_allclose(moments.var, 1, atol=0.03)


def test_float32_input_is_summed_in_float64():
    data = (1e6 + np.random.default_rng(0).integers(0, 8, size=(10_000, 1))).astype(np.float32)
    moments = RunningMoments((1,))
    moments.update(data)
    np.testing.assert_allclose(moments.var, data.astype(np.float64).var(axis=0), rtol=1e-9)


def test_order_does_not_matter():
    parts = [batch for batch in batches((2,)) if len(batch)][:4]
    found = []
    for order in itertools.permutations(parts):
        moments = RunningMoments((2,))
        for batch in order:
            moments.update(batch)
        found.append(np.concatenate([moments.mean, moments.var]))
    np.testing.assert_allclose(found, np.broadcast_to(found[0], (24, 4)), rtol=1e-12)


def test_an_empty_batch_and_a_constant_one():
    moments = RunningMoments((2,))
    moments.update(np.zeros((0, 2)))
    assert moments.count == 0 and (moments.var == 1).all() and np.isfinite(moments.std).all()
    moments.update(np.full((1, 2), 3.0))
    assert (moments.mean == 3).all() and (moments.var == 0).all()
    assert (moments.std == 1e-4).all(), "never zero: it is divided by"
    before = moments.state_dict()
    moments.update(np.zeros((0, 2)))
    assert same(moments.state_dict(), before)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_moments_come_back_from_a_state(shape):
    first, second = RunningMoments(shape), RunningMoments(shape)
    parts = batches(shape)
    for batch in parts[:5]:
        first.update(batch)
    state = first.state_dict()
    second.load_state_dict(state)
    for batch in parts[5:]:
        first.update(batch)
        second.update(batch)
    assert same(first.state_dict(), second.state_dict()), "to the last bit"
    assert not same(first.state_dict(), state), "a state is a copy, not a view"
    fresh = RunningMoments(shape)
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)


def test_observations():
    normalizer, data = (
        ObservationNormalizer((3,), enabled=True, clip=2.0),
        batches((3,), mean=50.0)[7].astype(np.float32),
    )
    np.testing.assert_array_equal(normalizer(data[:5] * 0 + 1.5), 1.5)  # nothing learned yet: mean 0, variance 1
    normalizer.learn(data)
    found = normalizer(data)
    assert found.dtype == np.float32 and np.abs(found).max() == 2.0
    np.testing.assert_allclose(found, np.clip((data - data.mean(axis=0)) / data.std(axis=0), -2, 2), atol=1e-4)
    again = ObservationNormalizer((3,), enabled=True, clip=2.0)
    again.load_state_dict(normalizer.state_dict())
    np.testing.assert_array_equal(again(data), found)
    before = normalizer.state_dict()
    normalizer(data * 9)
    assert same(normalizer.state_dict(), before), "to use it teaches it nothing"


def test_observations_switched_off():
    normalizer, data = ObservationNormalizer((3,), enabled=False, clip=2.0), batches((3,), mean=50.0)[3]
    normalizer.learn(data)
    assert normalizer.moments.count == 0
    assert normalizer(data) is data


def games(T: int, N: int, seed: int, dead: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards (T, N) and flags; with `dead`, a dead row after each end, which holds a huge reward."""
    rng = np.random.default_rng(seed)
    rewards, done, valid = rng.normal(size=(T, N)) * 3 + 1, rng.random((T, N)) < 0.15, np.ones((T, N), dtype=bool)
    if dead:
        for t in range(1, T):
            valid[t] = ~(done[t - 1] & valid[t - 1])
            done[t] &= valid[t]
        rewards[~valid] = 1e9
    return rewards, done, valid


@pytest.mark.parametrize("dead", [False, True], ids=["all rows live", "dead rows"])
def test_discounted_returns_are_those_of_a_plain_loop(dead):
    """G starts anew with an episode, goes on from one rollout to the next, and passes over dead rows."""
    gamma, T, N = 0.9, 40, 5
    rewards, done, valid = games(T, N, 0, dead)
    assert (~valid).any() == dead and done.any()
    normalizer, seen = RewardNormalizer(N, gamma, enabled=True, clip=10.0), []
    for n in range(N):
        running = 0.0
        for t in range(T):
            if valid[t, n]:
                running = gamma * running + rewards[t, n]
                seen.append(running)
                running = 0.0 if done[t, n] else running
    for part in np.array_split(np.arange(T), 3):
        normalizer.learn(rewards[part], done[part], valid[part])
    assert normalizer.moments.count == len(seen) == valid.sum()
    np.testing.assert_allclose(normalizer.moments.mean, np.mean(seen), rtol=1e-10)
    np.testing.assert_allclose(normalizer.moments.var, np.var(seen), rtol=1e-10)
    np.testing.assert_allclose(normalizer(rewards), np.clip(rewards / np.std(seen), -10, 10), rtol=1e-5)


def test_rewards_keep_their_sign_and_their_order():
    """The mean is not taken off."""
    normalizer = RewardNormalizer(1, 0.99, enabled=True, clip=10.0)
    ones = np.ones((100, 1))
    normalizer.learn(ones, np.zeros((100, 1), dtype=bool), ones.astype(bool))
    found = normalizer(np.array([[-1.0], [0.0], [1.0], [2.0]]))
    assert found[1] == 0 and found[0] == -found[2] and found[3] == pytest.approx(2 * found[2]) and found[2] > 0
    assert found.dtype == np.float32


def test_rewards_switched_off_or_clipped():
    rewards, done, valid = games(10, 2, 0, False)
    off = RewardNormalizer(2, 0.9, enabled=False, clip=0.5)
    off.learn(rewards, done, valid)
    assert off(rewards) is rewards and off.moments.count == 0
    on = RewardNormalizer(2, 0.9, enabled=True, clip=0.5)
    assert np.abs(on(rewards)).max() == 0.5


def test_rewards_come_back_from_a_state():
    first, second = (RewardNormalizer(3, 0.9, enabled=True, clip=10.0) for _ in range(2))
    first.learn(*games(20, 3, 0, True))
    state = first.state_dict()
    second.load_state_dict(state)
    assert np.abs(second.returns).max() > 0, "an episode is under way"
    for normalizer in (first, second):
        normalizer.learn(*games(20, 3, 1, False))
    assert same(first.state_dict(), second.state_dict()) and not same(first.state_dict(), state)


def test_a_rollout_sees_one_scaling_and_teaches_the_next(tmp_path):
    """What the network saw is what the statistics of before the rollout make of it; they change at its end, by its
    raw numbers.
    """
    settings = config(
        tmp_path / "run", "env.normalize_observations=true", "env.normalize_rewards=true", "env.backend=local"
    )
    vector = make_vector(settings.env, 0, 4)
    distribution = distribution_for(vector.action_space)
    collector = Collector(settings, vector, distribution)
    model = ActorCritic(settings.model, (4,), distribution)
    for update in range(3):
        before, first = collector.observations.state_dict(), collector.current.copy()
        rollout = collector.collect(acting(model), torch.Generator().manual_seed(update))
        frozen = ObservationNormalizer((4,), enabled=True, clip=10.0)
        frozen.load_state_dict(before)
        np.testing.assert_array_equal(rollout.observations[0], frozen(first))
        np.testing.assert_array_equal(rollout.observations[-1], frozen(collector.current))
        np.testing.assert_array_equal(rollout.observations[:-1], frozen(collector.raw))
        assert not same(collector.observations.state_dict(), before)
        assert collector.observations.moments.count == collector.rewards.moments.count == (update + 1) * 64


def test_evaluation_never_changes_statistics(tmp_path):
    folder = tmp_path / "run"
    settings = config(folder, "env.normalize_observations=true", "env.normalize_rewards=true", "train.steps=128")
    assert train(settings) == 0
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.pt"))}
    vector = make_vector(settings.env, 5, 3)
    policy = Policy(
        folder / "last.safetensors", settings, vector.observation_space, vector.action_space, torch.device("cpu")
    )
    state, weights = (
        policy.scale.state_dict(),
        {name: value.clone() for name, value in policy.model.state_dict().items()},
    )
    saved = load_file(folder / "last.safetensors")
    assert saved["observations.count"] == state["count"] == read_metrics(folder / "metrics.jsonl")[-1]["env_steps"]
    assert torch.equal(saved["observations.var"], state["var"])
    assert not torch.equal(state["var"], torch.ones(4)), "something was learned"

    games = play(policy, vector, 6, torch.Generator().manual_seed(0))
    assert len(games) == 6 and sum(length for _, length in games) > 30
    far = np.full((2, 4), 1e3, dtype=np.float32)
    assert policy(far, None).shape == (2,)
    film(policy, make_one(settings.env, "rgb_array"), 5, 0)
    assert same(policy.scale.state_dict(), state) and same(dict(policy.model.state_dict()), weights)
    assert not any(p.grad is not None for p in policy.model.parameters())

    assert evaluate(settings) == 0
    assert {path: path.read_bytes() for path in files} == files


def test_the_policy_sees_what_training_saw(tmp_path):
    """The exported scaling is in use: other statistics, other actions."""
    folder = tmp_path / "run"
    settings = config(folder, "env.normalize_observations=true", "train.steps=128")
    assert train(settings) == 0
    space, actions = gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Discrete(2)
    policy = Policy(folder / "last.safetensors", settings, space, actions, torch.device("cpu"))
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    saved = load_file(folder / "last.safetensors")
    scaled = ((x - saved["observations.mean"].numpy()) / saved["observations.var"].sqrt().numpy()).clip(-10, 10)
    with torch.no_grad():
        expected = policy.model.act(torch.from_numpy(scaled.astype(np.float32))).argmax(dim=1).numpy()
        raw = policy.model.act(torch.from_numpy(x)).argmax(dim=1).numpy()
    np.testing.assert_array_equal(policy(x, None), expected)
    assert (expected != raw).any()


class Picture(gym.Env):
    """Floating-point numbers in three dimensions: not pixels."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2, 3, 4), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, (2, 3, 4)).astype(np.float32), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, (2, 3, 4)).astype(np.float32), 0.0, False, False, {}


def test_floats_in_three_dimensions_are_not_stored_as_bytes(tmp_path):
    settings = config(tmp_path / "run")
    vector = LocalVector([Picture() for _ in range(4)], seed=0)
    distribution = distribution_for(vector.action_space)
    collector = Collector(settings, vector, distribution)
    first = collector.current.copy()
    model = ActorCritic(settings.model, (2, 3, 4), distribution)
    rollout = collector.collect(acting(model), torch.Generator().manual_seed(0))
    assert rollout.observations.dtype == np.float32
    np.testing.assert_array_equal(rollout.observations[0], first)
