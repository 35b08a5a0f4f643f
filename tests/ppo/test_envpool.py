"""env.backend=envpool: its steps are envpool's, its dead rows are gone, its flags mean what they say, and runs
resume exactly.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch

from common.errors import ProjectError
from common.runtime import mix_seed
from ppo.config import EnvConfig
from ppo.environments.pool import PoolVector
from ppo.environments.registry import make_vector, pool_task, register_atari
from tests.helpers import errors, same, stop_in_check
from tests.ppo.helpers import acting, collector_for, config, evaluate, log, train, weights

installed = pytest.mark.skipif(find_spec("envpool") is None, reason="needs pip install envpool")
POOL = "env.backend=envpool"
BREAKOUT = (
    "env.id=ALE/Breakout-v5",
    "model.kind=cnn",
    "env.count=2",
    "train.rollout=8",
    "train.steps=32",
    "train.batch_size=8",
    "train.epochs=1",
)


def pool(name, count=1, seed=0, first=0, training=True, **settings):
    """Our vector of an environment of envpool."""
    return make_vector(EnvConfig(name, backend="envpool", **settings), seed, count, first, training)


def draw(space, random, steps, count):
    """Actions (T, N, *D) of any space."""
    if isinstance(space, gym.spaces.Discrete):
        return random.integers(space.n, size=(steps, count))
    return random.uniform(space.low, space.high, (steps, count, *space.shape)).astype(np.float32)


def alone(task, seeds, actions, limit, **options):
    """Envpool as it comes, which resets in the next step: for each environment, rows (reward, done, observation it
    led to, lives).
    """
    import envpool

    made = envpool.make(task, env_type="gymnasium", num_envs=len(seeds), seed=seeds, max_episode_steps=limit, **options)
    made.reset()
    rows, dead, taken = [[] for _ in seeds], [False] * len(seeds), [0] * len(seeds)
    while min(taken) < len(actions) - 1:
        chosen = np.stack([actions[min(t, len(actions) - 1), n] for n, t in enumerate(taken)])
        observations, rewards, terminated, truncated, infos = made.step(chosen)
        for n in range(len(seeds)):
            done = bool(terminated[n] or truncated[n])
            if not dead[n]:
                rows[n].append(
                    (float(rewards[n]), done, observations[n].copy(), int(infos.get("lives", np.zeros(99))[n]))
                )
                taken[n] += 1
            dead[n] = done
    return rows


@installed
@pytest.mark.filterwarnings("ignore:.*precision lowered")
@pytest.mark.parametrize(
    ("name", "task", "settings", "limit"),
    [
        ("CartPole-v1", "CartPole-v1", {}, 25),
        ("LunarLander-v3", "LunarLander-v3", {}, 90),
        ("LunarLander-v3", "LunarLanderContinuous-v3", {"continuous": True}, 90),
        ("ALE/Breakout-v5", "Breakout-v5", {"noop_max": 2}, 150),
        ("ALE/Breakout-v5", "Breakout-v5", {"sticky_actions": 0.25}, 200),
    ],
)
def test_steps_are_those_of_envpool_alone(name, task, settings, limit):
    """Equal seeds and actions, with and without dead rows: rewards, observations, final ones too, and ends are the
    same to the bit.
    """
    atari, steps = name.startswith("ALE/"), 500
    ours = pool(name, 3, seed=5, max_episode_steps=limit, **settings)
    actions = draw(ours.action_space, np.random.default_rng(1), steps, 3)
    options = (
        {"noop_max": settings.get("noop_max", 30), "repeat_action_probability": settings.get("sticky_actions", 0.0)}
        if atari
        else {}
    )
    theirs = alone(task, [mix_seed(5, n) % 2**31 for n in range(3)], actions, limit, **options)
    ours.reset()
    lives, age, kinds = np.full(3, 5), np.zeros(3, dtype=int), {"terminated": 0, "truncated": 0, "lives": 0}
    for t in range(steps - 1):
        step = ours.step(actions[t])
        assert step.valid.all()
        age += 1
        for n in range(3):
            reward, done, after, left = theirs[n][t]
            assert step.rewards[n] == reward
            assert step.over[n] == done == (n in step.final)
            np.testing.assert_array_equal(step.final[n] if done else step.observations[n], after)
            assert step.truncated[n] == (age[n] == limit)
            assert step.terminated[n] or step.truncated[n] or not done
            if atari:
                assert step.terminated[n] == (left < lives[n])
                kinds["lives"] += int(step.terminated[n] and not done)
            kinds["terminated"] += int(done and not step.truncated[n])
            kinds["truncated"] += int(done and step.truncated[n])
            age[n] = 0 if done else age[n]
            lives[n] = 5 if done else left
    assert min(kinds["terminated"], kinds["truncated"]) > 0, "both were to be met"
    assert kinds["lives"] > 5 or not atari


@installed
def test_cartpole_is_gymnasiums_and_both_flags_are_right():
    """Each step again in gymnasium's simulator: where the pole falls in the step in which time is up, both flags are
    set.
    """
    random, limit = np.random.default_rng(0), 10
    vector, peer = pool("CartPole-v1", 6, max_episode_steps=limit), gym.make("CartPole-v1").unwrapped
    peer.reset()
    seen, age, kinds = vector.reset(), np.zeros(6, dtype=int), set()
    assert len({row.tobytes() for row in seen}) == 6
    for _ in range(300):
        actions = (random.random(6) < 0.95).astype(np.int64)
        step = vector.step(actions)
        age += 1
        for n in range(6):
            peer.state, peer.steps_beyond_terminated = seen[n].astype(np.float64), None
            expected, reward, over, _, _ = peer.step(int(actions[n]))
            after = step.final.get(n, step.observations[n])
            np.testing.assert_allclose(after, expected, atol=1e-5)
            assert (step.rewards[n], step.terminated[n], step.truncated[n]) == (reward, over, age[n] == limit)
            if step.terminated[n] or step.truncated[n]:
                kinds.add((bool(step.terminated[n]), bool(step.truncated[n])))
                assert np.abs(step.observations[n]).max() <= 0.05, "the next episode's first"
                age[n] = 0
        seen = step.observations
    assert len(kinds) == 3, "each kind of end was to be met"


@installed
def test_environments_begin_by_seed_and_number_whoever_plays_them():
    whole, parts = pool("CartPole-v1", 4, seed=3), [pool("CartPole-v1", 2, seed=3, first=first) for first in (0, 2)]
    starts = whole.reset()
    assert len({row.tobytes() for row in starts}) == 4
    np.testing.assert_array_equal(starts, np.concatenate([part.reset() for part in parts]))
    assert not np.isin(pool("CartPole-v1", 4, seed=4).reset(), starts).any()
    again = whole.reset(7)
    assert not np.isin(again, starts).any()
    np.testing.assert_array_equal(whole.reset(7), again)
    np.testing.assert_array_equal(whole.reset(), starts)


@installed
def test_no_dead_row_is_stored_and_truncated_episodes_lead_to_their_own_end(tmp_path):
    """Each stored row again in gymnasium's simulator, and what is bootstrapped from where an episode ended."""
    made = config(tmp_path, POOL, "env.max_episode_steps=10", "train.rollout=64", "train.batch_size=64")
    collector, model = collector_for(made, make_vector(made.env, 0, 4))
    rollout, peer = (
        collector.collect(acting(model), torch.Generator().manual_seed(0)),
        gym.make("CartPole-v1").unwrapped,
    )
    peer.reset()
    final = dict(zip(rollout.final_at, rollout.final))
    assert rollout.valid.all()
    assert {(int(t), int(n)) for t, n in np.argwhere(rollout.done)} == final.keys()
    assert (rollout.done & ~rollout.terminated).sum() > 3
    for t in range(64):
        for n in range(4):
            peer.state, peer.steps_beyond_terminated = rollout.observations[t, n].astype(np.float64), None
            expected = peer.step(int(rollout.actions[t, n]))[0]
            np.testing.assert_allclose(final.get((t, n), rollout.observations[t + 1, n]), expected, atol=1e-5)
    assert collector.num_steps == 256
    assert (rollout.rewards == 1).all(), "a reset pays nothing"


@installed
def test_returns_logged_are_of_whole_games_in_points(tmp_path):
    """Breakout: the learner sees lives and signs; the books hold what envpool itself pays in a game, and how long it
    was.
    """
    made = config(tmp_path, *BREAKOUT, POOL, "env.noop_max=1", "train.rollout=300", "train.batch_size=64")
    collector, _ = collector_for(made, make_vector(made.env, 0, 2))
    actions = draw(collector.vector.action_space, np.random.default_rng(3), 601, 2)
    for t in range(600):
        collector.play(t % 300, actions[t])
        assert set(np.unique(collector.raw_rewards[t % 300])) <= {0.0, 1.0}
    expected = [[], []]
    for n, rows in enumerate(
        alone("Breakout-v5", [mix_seed(0, n) % 2**31 for n in range(2)], actions, 27_000, noop_max=1)
    ):
        points, length = 0.0, 0
        for reward, done, _, _ in rows[:600]:
            points, length = points + reward, length + 1
            if done:
                expected[n].append((points, length))
                points, length = 0.0, 0
    assert sorted(collector.rollout.episodes) == sorted(expected[0] + expected[1])
    assert len(collector.rollout.episodes) >= 3
    assert max(points for points, _ in collector.rollout.episodes) > 1
    assert collector.num_steps == 1200


class Script(gym.vector.VectorEnv):
    """In envpool's place: two games whose lives are written down, a row a step; resets answer in another order than
    asked.
    """

    num_envs, single_observation_space, single_action_space = 2, gym.spaces.Box(0, 99, (1,)), gym.spaces.Discrete(2)

    def __init__(self, lives, over=()):
        self.lives, self.over, self.age = np.array(lives), over, 0

    def reset(self, numbers=None):
        if numbers is None:
            return np.zeros((2, 1)), {"lives": np.array([3, 3])}
        numbers = numbers[::-1]
        return 50.0 + numbers[:, None], {"env_id": numbers, "lives": np.full(len(numbers), 3)}

    def step(self, actions):
        self.age += 1
        over, no = np.full(2, self.age in self.over), np.zeros(2, dtype=bool)
        return (
            np.full((2, 1), self.age),
            np.zeros(2),
            over,
            no,
            {"lives": self.lives[self.age - 1], "elapsed_step": np.zeros(2)},
        )


def test_lives():
    """A life more ends nothing, one less does, in a game's first step, too; rows come back to the environments that
    they belong to.
    """
    vector = PoolVector(lambda seeds: Script([[3, 4], [2, 4], [0, 0], [2, 3], [2, 4]], over=(3,)), 2, 0, by_lives=True)
    vector.reset()
    steps = [vector.step(np.zeros(2, dtype=np.int64)) for _ in range(5)]
    assert [step.terminated.tolist() for step in steps] == [
        [False, False],
        [True, False],
        [True, True],
        [True, False],
        [False, False],
    ]
    assert [bool(step.over.any()) for step in steps] == [False, False, True, False, False]
    assert steps[2].observations.tolist() == [[50.0], [51.0]]
    assert {n: after.tolist() for n, after in steps[2].final.items()} == {0: [3.0], 1: [3.0]}


@installed
def test_evaluation_plays_whole_games():
    """No life ends an episode there."""
    vector, random = pool("ALE/Breakout-v5", 2, training=False), np.random.default_rng(0)
    vector.reset()
    steps = [vector.step(random.integers(4, size=2)) for _ in range(400)]
    assert all((step.terminated == step.over).all() for step in steps)
    assert 2 <= sum(int(step.over.sum()) for step in steps) <= 6


@installed
@pytest.mark.parametrize(
    ("words", "stops"),
    [
        (("env.max_episode_steps=30", "env.normalize_observations=true", "env.normalize_rewards=true"), (3,)),
        (("env.max_episode_steps=30",), (4, 5)),
        (("env.id=LunarLander-v3", "env.continuous=true"), (2,)),
        (BREAKOUT, (1,)),
    ],
    ids=["cartpole", "cartpole, at a save", "lunarlander", "breakout"],
)
def test_resume_is_exact(words, stops, tmp_path, monkeypatch):
    """Seeds and actions are played again."""
    assert train(config(tmp_path / "whole", POOL, *words)) == 0
    with monkeypatch.context() as patch:
        stop_in_check(patch, *stops)
        for i in range(len(stops)):
            assert train(config(tmp_path / "run", POOL, *words), resume=i > 0) == 143
    assert train(config(tmp_path / "run", POOL, *words), resume=True) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert len(log(tmp_path / "run")) > max(stops)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@installed
@pytest.mark.parametrize("words", [(), BREAKOUT], ids=["cartpole", "breakout"])
def test_trains_two_updates_and_is_evaluated(words, tmp_path, capsys, recwarn):
    made = config(
        tmp_path / "run",
        *words,
        POOL,
        *(() if words else ("train.steps=128",)),
        "eval.episodes=2",
        "env.max_episode_steps=40",
    )
    assert train(made) == 0
    assert len(log(tmp_path / "run")) == 2
    assert evaluate(made) == 0
    captured = capsys.readouterr()
    assert np.isfinite(json.loads(captured.out.splitlines()[-1])["metrics"]["return_mean"])
    assert not errors(captured.err)
    assert not [warning for warning in recwarn if "precision" in str(warning.message)]


def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert train(config(tmp_path / "run", POOL)) == 1
    (line,) = errors(capsys.readouterr().err)
    assert "pip install envpool" in line


@installed
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("CartPole-v9", {}, ("no 'CartPole-v9'", "CartPole-v1")),
        ("LunarLandr-v3", {}, ("LunarLander-v3",)),
        ("CartPole-v1", {"continuous": True}, ("CartPoleContinuous-v1", "env.backend=auto")),
        ("Pong-v5", {}, ("ALE/Pong-v5",)),
        ("ALE/Pnog-v5", {}, ("did you mean", "ALE/Pong-v5")),
        ("ALE/Pong-v5", {"noop_max": 0}, ("env.noop_max",)),
        ("Go9x9-v1", {}, ("one player",)),
        ("CoinrunEasy-v0", {}, ("CoinrunEasy-v0",)),
    ],
)
def test_what_envpool_has_not_got_is_one_line(name, settings, words):
    with pytest.raises(ProjectError) as error:
        pool(name, **settings)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_another_version_is_never_played():
    """As with an envpool that has LunarLander-v2 alone."""
    with pytest.raises(ProjectError, match="no 'LunarLander-v3'; its nearest: LunarLander-v2") as error:
        pool_task(EnvConfig("LunarLander-v3", backend="envpool"), ["LunarLander-v2", "CartPole-v1"])
    assert "env.backend=auto" in str(error.value)


@installed
def test_the_games_have_their_names():
    import envpool

    register_atari()
    tasks = envpool.list_all_envs()
    games = [name for name in gym.registry if name.startswith("ALE/")]
    assert len({pool_task(EnvConfig(name), tasks) for name in games}) == len(games) > 100
    assert pool_task(EnvConfig("ALE/TicTacToe3D-v5"), tasks) == "TicTacToe3d-v5"
    assert pool_task(EnvConfig("ALE/MsPacman-v5"), tasks) == "MsPacman-v5"
