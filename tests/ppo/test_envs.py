"""Environments side by side: reset modes, time limits, seeds, books, and what goes wrong in them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit

from ppo.config import EnvConfig
from ppo.environments.registry import as_input, make_one, make_vector
from ppo.environments.vectors import GymVector, LocalVector
from tests.ppo.helpers import Counting, acting, collector_for, config, register, train, vector_of

MODES = list(AutoresetMode)
IDENTITIES = (0, 3, 5)


def transitions(vector, steps):
    """For each environment its valid rows (observation, reward, terminated, truncated, observation that followed or
    ended the episode).

    Actions follow from the observation, so that dead rows do not shift them. Also counts dead rows and those of them
    called valid.
    """
    rows = [[] for _ in range(len(vector))]
    observations = vector.reset()
    for _ in range(steps):
        actions = ((observations.sum(axis=1) * 7) % 3).astype(np.int64)
        step = vector.step(actions)
        for n in range(len(vector)):
            if step.valid[n]:
                after = step.final.get(n, step.observations[n])
                rows[n].append(
                    (
                        tuple(observations[n]),
                        step.rewards[n],
                        bool(step.terminated[n]),
                        bool(step.truncated[n]),
                        tuple(after),
                    )
                )
        observations = step.observations
    return rows


@pytest.mark.parametrize("mode", [None, *MODES])
def test_all_reset_modes_tell_the_same_story(mode):
    """What the vector reports is, row for row, what the toy itself did: no dead row is called valid, none that is
    valid is left out.
    """
    toys = [Counting(i) for i in IDENTITIES]
    rows = transitions(vector_of(mode, toys), 60)
    for toy, seen in zip(toys, rows):
        assert seen == toy.rows
        assert len(toy.played) > 5
        assert {(row[2], row[3]) for row in seen} == {(False, False), (True, False), (False, True), (True, True)}
        assert all(row[4][0] == row[0][0] and row[4][1] == row[0][1] + 1 for row in seen), (
            "an observation of another episode"
        )
    dead = 60 * len(toys) - sum(len(seen) for seen in rows)
    ended = sum(len(toy.played) for toy in toys)
    assert dead == 0 if mode != AutoresetMode.NEXT_STEP else ended - 3 <= dead <= ended


def test_reset_modes_agree_with_each_other():
    stories = [transitions(vector_of(mode, [Counting(i) for i in IDENTITIES]), 60) for mode in [None, *MODES]]
    for story in stories[1:]:
        for a, b in zip(story, stories[0]):
            shortest = min(len(a), len(b))
            assert shortest >= 40
            assert a[:shortest] == b[:shortest]


def test_final_observation_survives_a_simulator_that_reuses_its_array():
    """Resetting overwrites the array that the last step returned; what is kept must be a copy."""
    toys = [Counting(i, reuse=True) for i in IDENTITIES]
    vector = LocalVector(toys, 0)
    vector.reset()
    ends = 0
    for _ in range(30):
        step = vector.step(np.zeros(3, dtype=np.int64))
        for n, final in step.final.items():
            ends += 1
            assert final[1] > 0, "the first observation of the next episode"
            assert step.observations[n][1] == 0
    assert ends > 5


@pytest.mark.parametrize("mode", [None, *MODES])
def test_collector_keeps_the_books(mode, tmp_path):
    """Rollouts through the product's own loop: rows, final observations, returns and lengths are those that the toys
    counted.
    """
    toys = [Counting(i) for i in IDENTITIES]
    made = config(tmp_path, "env.count=3", "train.rollout=16", "train.batch_size=48")
    collector, model = collector_for(made, vector_of(mode, toys))
    stored = [[] for _ in toys]
    episodes = []
    for update in range(4):
        rollout = collector.collect(acting(model), torch.Generator().manual_seed(update))
        episodes += rollout.episodes
        final = dict(zip(rollout.final_at, rollout.final))
        for t, n in np.argwhere(rollout.valid):
            after = final.get((t, n), rollout.observations[t + 1, n])
            stored[n].append(
                (
                    tuple(rollout.observations[t, n]),
                    float(rollout.rewards[t, n]),
                    bool(rollout.terminated[t, n]),
                    bool(rollout.done[t, n]),
                    tuple(after),
                )
            )
    for toy, rows in zip(toys, stored):
        assert rows == [(before, reward, over, over or cut, after) for before, reward, over, cut, after in toy.rows]
    assert sorted(episodes) == sorted(game for toy in toys for game in toy.played)
    assert list(collector.recent) == episodes
    assert collector.num_episodes == len(episodes)
    assert collector.num_steps == sum(len(rows) for rows in stored)
    played = collector.played()
    assert played["return_mean"] == pytest.approx(np.mean([game[0] for toy in toys for game in toy.played]))
    assert played["length_mean"] == pytest.approx(np.mean([game[1] for toy in toys for game in toy.played]))


def test_dead_rows_are_in_no_statistic(tmp_path):
    """Running moments of a vector with dead rows are those of the valid observations and discounted returns alone."""
    toys = [Counting(i) for i in IDENTITIES]
    made = config(
        tmp_path, "env.count=3", "train.batch_size=48", "env.normalize_observations=true", "env.normalize_rewards=true"
    )
    collector, model = collector_for(made, vector_of(AutoresetMode.NEXT_STEP, toys))
    for update in range(3):
        collector.collect(acting(model), torch.Generator().manual_seed(update))
    seen = np.array([row[0] for toy in toys for row in toy.rows], dtype=np.float64)
    moments = collector.observations.moments
    assert moments.count == len(seen)
    np.testing.assert_allclose(moments.mean, seen.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, seen.var(axis=0), rtol=1e-12)
    discounted = []
    for toy in toys:
        running = 0.0
        for _, reward, over, cut, _ in toy.rows:
            discounted.append(running := made.train.gamma * running + reward)
            running *= not (over or cut)
    assert collector.rewards.moments.count == len(discounted)
    np.testing.assert_allclose(collector.rewards.moments.var, np.var(discounted), rtol=1e-12)


@pytest.mark.parametrize("limit", [0, 7])
def test_time_limit_without_wrappers_is_gymnasiums(limit):
    """The limit kept by LocalVector ends episodes in the same step, with the same flags, as gymnasium's TimeLimit."""
    lengths = [-1, 7, 0]  # by itself after 2 to 8 steps; by itself in the very step of the limit; never
    bare = [Counting(i, length) for i, length in enumerate(lengths)]
    name = register(limit=0)
    gym.registry[name].max_episode_steps = 7
    try:
        vector = LocalVector([gym.make(name, disable_env_checker=True) for _ in range(3)], 0, max_episode_steps=limit)
    finally:
        gym.registry.pop(name)
    assert vector.limit == 7
    assert all(isinstance(e, Counting) for e in vector.environments), "no wrappers a step"
    vector.environments = bare
    peers = [TimeLimit(Counting(i, length), 7) for i, length in enumerate(lengths)]
    vector.reset()
    for peer in peers:
        peer.reset()
    for _ in range(40):
        step = vector.step(np.ones(3, dtype=np.int64))
        for n, peer in enumerate(peers):
            observation, _, over, cut, _ = peer.step(1)
            assert (step.terminated[n], step.truncated[n]) == (over, cut)
            np.testing.assert_array_equal(step.final.get(n, step.observations[n]), observation)
            if over or cut:
                peer.reset()


def test_limit_of_the_config_reaches_every_backend():
    for backend in ("native", "local", "processes"):
        vector = make_vector(EnvConfig("CartPole-v1", max_episode_steps=3, backend=backend), 0, 2)
        try:
            vector.reset()
            ends = [vector.step(np.array([t % 2, 1 - t % 2])) for t in range(3)]
            assert [step.truncated.tolist() for step in ends] == [[False] * 2, [False] * 2, [True] * 2], backend
            assert not any(step.terminated.any() for step in ends)
        finally:
            vector.close()


def test_a_wrapped_environment_keeps_its_wrappers():
    """Only gymnasium's own limit and checks are done without; a wrapper that changes what is seen stays, and so does
    its time limit.
    """
    inner = TimeLimit(gym.wrappers.TransformReward(Counting(0, 0), lambda reward: -reward), 4)
    vector = LocalVector([inner], 0)
    assert vector.limit == 0
    assert vector.environments == [inner]
    vector.reset()
    steps = [vector.step(np.array([0])) for _ in range(4)]
    assert all(step.rewards[0] < 0 for step in steps)
    assert [bool(step.truncated[0]) for step in steps] == [False, False, False, True]


def test_seeds_are_distinct_for_environments_episodes_and_processes():
    """Two processes of two environments get the seeds of one process with four, and no seed is given twice."""

    def seeds(first, count, seed=0):
        toys = [Counting(i) for i in range(count)]
        vector = LocalVector(toys, seed, first)
        vector.reset()
        for _ in range(20):
            vector.step(np.zeros(count, dtype=np.int64))
        return [toy.seeds[:3] for toy in toys]

    assert seeds(0, 4) == seeds(0, 2) + seeds(2, 2)
    together = [s for row in seeds(0, 2) + seeds(2, 2) for s in row]
    assert len(set(together)) == len(together)
    assert not set(together) & {s for row in seeds(0, 4, seed=1) for s in row}


@pytest.mark.parametrize("backend", ["local", "native", "processes"])
def test_first_observations_differ_by_environment_and_process(backend):
    firsts = []
    for first in (0, 3):
        vector = make_vector(EnvConfig("CartPole-v1", backend=backend), 5, 3, first=first)
        try:
            firsts.append(vector.reset())
            np.testing.assert_array_equal(firsts[-1], vector.reset() if backend != "local" else firsts[-1])
        finally:
            vector.close()
    rows = np.concatenate(firsts)
    assert len(np.unique(rows, axis=0)) == 6


def test_native_cartpole_is_the_local_one():
    """From the same state the same action leads to the same observation, reward and flags; its dead rows are found."""
    native = make_vector(EnvConfig("CartPole-v1", max_episode_steps=40), 0, 16)
    assert isinstance(native, GymVector)
    assert native.mode == AutoresetMode.NEXT_STEP
    local = make_one(EnvConfig("CartPole-v1"))
    local.reset(seed=0)
    random = np.random.default_rng(0)
    native.reset()
    inner, compared, dead, cut = native.environment.unwrapped, 0, 0, 0
    for _ in range(120):
        before, ended, ages = inner.state.T.copy(), native.before.copy(), inner.steps.copy()
        actions = random.integers(0, 2, 16)
        step = native.step(actions)
        assert (step.valid == ~ended).all()
        for n in range(16):
            if not step.valid[n]:
                dead += 1
                assert step.rewards[n] == 0
                assert not (step.terminated[n] or step.truncated[n])
                continue
            local.unwrapped.state, local.unwrapped.steps_beyond_terminated = tuple(before[n]), None
            observation, reward, over, _, _ = local.unwrapped.step(int(actions[n]))
            np.testing.assert_allclose(step.observations[n], observation, rtol=1e-6, atol=1e-7)
            assert (step.rewards[n], step.terminated[n]) == (reward, over)
            assert step.truncated[n] == (ages[n] + 1 >= 40)
            compared, cut = compared + 1, cut + step.truncated[n]
    assert compared > 1500
    assert dead > 40
    assert cut > 0


def test_discrete_observations_train(tmp_path):
    """FrozenLake: plain integers as observations, also as final ones."""
    assert train(config(tmp_path / "run", "env.id=FrozenLake-v1")) == 0


class Square(Counting):
    """Its observation is a matrix."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2, 2), np.float64)

    def look(self):
        return np.array([[self.episode, self.steps], [self.identity, 1]], dtype=np.float64)


def test_matrices_of_numbers_train(tmp_path):
    """An mlp reads all numbers of an observation in a row."""
    gym.register("Square-v0", entry_point=Square)
    try:
        assert train(config(tmp_path / "run", "env.id=Square-v0", "env.normalize_observations=true")) == 0
    finally:
        gym.registry.pop("Square-v0")


def test_discrete_observations_become_one_hot():
    space = gym.spaces.Discrete(4, start=2)
    np.testing.assert_array_equal(as_input(space, np.array([2, 5])), np.eye(4, dtype=np.float32)[[0, 3]])
