"""Environments whose value function is known: the critic finds it, whether episodes end or run out of time, in every
reset mode.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from ppo.config import Config
from ppo.data import learning_batch
from ppo.environments.registry import make_vector, observation_shape
from ppo.environments.vectors import GymVector
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic
from ppo.playing.collect import Collector
from ppo.playing.play import Policy
from tests.ppo.helpers import acting, config, train

GAMMA = 0.9
# hidden=[]: the networks are tables, one number for each state
SETTINGS = (
    "train.rollout=28",
    "env.count=4",
    "train.steps=2240",
    "train.epochs=10",
    "train.batch_size=112",
    "train.lr=0.3",
    f"train.gamma={GAMMA}",
    "train.gae_lambda=0.95",
    "train.max_grad_norm=0",
    "train.log_every=50",
    "train.save_every=1000",
    "model.hidden=[]",
)
MODES = {"next": AutoresetMode.NEXT_STEP, "same": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}


class Ring(gym.Env):
    """From state s to s + 1, after the last one to the first; each step pays what its state pays. Actions do nothing.

    Args:
        pays: reward of a step from each state. ends: terminates after so many steps, 0 = never. chance: of terminating
            in any step.
    """

    action_space = gym.spaces.Discrete(2)

    def __init__(
        self, pays: tuple[float, ...], ends: int = 0, chance: float = 0.0, render_mode: str | None = None
    ) -> None:
        self.pays, self.ends, self.chance, self.render_mode = pays, ends, chance, render_mode
        self.observation_space = gym.spaces.Discrete(len(pays))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return 0, {}

    def step(self, action):
        reward = self.pays[self.time % len(self.pays)]
        self.time += 1
        over = self.time == self.ends or self.np_random.random() < self.chance
        return self.time % len(self.pays), reward, over, False, {}


# name: (arguments, time limit). A chain has one state more than steps: where it ends
TOYS = {
    "stream": ({"pays": (1.0,)}, 7),  # out of time after 7 of steps without end
    "ring": ({"pays": (0.0, 1.0, 5.0, -2.0)}, 6),  # the last state differs from the first, and the values of the two
    "chain": ({"pays": (1.0,) * 7, "ends": 6}, None),
    "both": ({"pays": (1.0,) * 7, "ends": 6}, 6),  # the task ends with the very step that reaches the limit
    "chance": ({"pays": (1.0,), "chance": 0.1}, 5),  # some episodes end, some run out of time
}
for toy, (arguments, limit) in TOYS.items():
    if f"ValueToy{toy.title()}-v0" not in gym.registry:
        gym.register(f"ValueToy{toy.title()}-v0", entry_point=Ring, kwargs=arguments, max_episode_steps=limit)


def name_of(toy: str) -> str:
    return f"ValueToy{toy.title()}-v0"


def true_values(toy: str) -> np.ndarray:
    """V = r + gamma V' of each state that is ever left, solved as linear equations; time limits are no part of the
    task.
    """
    arguments, _ = TOYS[toy]
    pays, ends = arguments["pays"], arguments.get("ends", 0)
    S = len(pays)
    follows = np.roll(np.eye(S), 1, axis=1) * (1 - arguments.get("chance", 0.0))
    if ends:
        follows[ends - 1] = 0.0
    return np.linalg.solve(np.eye(S) - GAMMA * follows, np.array(pays))[: ends or S]


def learned_values(settings: Config) -> np.ndarray:
    """What the exported critic says of each state."""
    vector = make_vector(settings.env, 0, 1)
    policy = Policy(
        Path(settings.run_dir) / "last.safetensors",
        settings,
        vector.observation_space,
        vector.action_space,
        torch.device("cpu"),
    )
    with torch.no_grad():
        return policy.model.evaluate(torch.eye(int(vector.observation_space.n))).numpy()


def test_the_known_values():
    """By the sums that they stand for."""
    assert true_values("stream") == pytest.approx([10.0])
    for toy in ("chain", "both"):
        assert true_values(toy) == pytest.approx([(1 - GAMMA**k) / (1 - GAMMA) for k in (6, 5, 4, 3, 2, 1)])
    pays = TOYS["ring"][0]["pays"]
    assert true_values("ring") == pytest.approx(
        [sum(GAMMA**i * pays[(s + i) % 4] for i in range(400)) for s in range(4)]
    )
    assert true_values("chance") == pytest.approx([sum((GAMMA * 0.9) ** i for i in range(400))])


def run(toy: str, folder: Path, *overrides: str) -> tuple[np.ndarray, np.ndarray]:
    """Train; the values found and the true ones."""
    settings = config(folder, *SETTINGS, f"env.id={name_of(toy)}", *overrides)
    assert train(settings) == 0
    expected = true_values(toy)
    return learned_values(settings)[: len(expected)], expected


@pytest.mark.parametrize("toy", ["stream", "ring", "chain", "both"])
def test_the_critic_finds_the_right_values(toy, tmp_path):
    found, expected = run(toy, tmp_path / "run")
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_ends_and_time_limits_mixed(tmp_path):
    """By chance some episodes terminate; the estimate is as noisy as the last rollouts are."""
    found, expected = run(
        "chance", tmp_path / "run", "env.count=32", "train.steps=26880", "train.batch_size=896", "train.epochs=8"
    )
    np.testing.assert_allclose(found, expected, atol=0.3)


@pytest.mark.parametrize(
    ("toy", "overrides"),
    [
        ("ring", ("model.hidden=[32]", "train.lr=0.03", "train.steps=4480")),
        ("both", ("train.clip_value=1.0",)),
        ("both", ("train.gae_lambda=0", "train.steps=4480")),
        ("ring", ("train.gae_lambda=1", "train.rollout=30", "train.batch_size=60")),
    ],
    ids=["hidden layer", "value clipping", "lambda 0", "lambda 1"],
)
def test_other_settings_find_them_too(toy, overrides, tmp_path):
    found, expected = run(toy, tmp_path / "run", *overrides)
    np.testing.assert_allclose(found, expected, atol=0.15)


@pytest.mark.parametrize(("toy", "mode"), [("ring", "next"), ("ring", "same"), ("ring", "disabled"), ("chain", "next")])
def test_every_reset_mode_finds_them(toy, mode, tmp_path, monkeypatch):
    """The same training program on gymnasium's vector environments."""
    monkeypatch.setattr(
        "ppo.train.make_vector", lambda env, seed, count, first=0: vector_of(toy, mode, count, seed, first)
    )
    found, expected = run(toy, tmp_path / "run")
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_worker_processes_find_them(tmp_path):
    found, expected = run("ring", tmp_path / "run", "env.backend=processes")
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_without_bootstrapping_time_limits_are_mistaken_for_ends(tmp_path):
    """The canary: these tests can tell. One state, episodes cut after 7 steps: the mean of what is left, not 10."""
    found, expected = run("stream", tmp_path / "run", "train.bootstrap_truncated=false", "train.gae_lambda=1")
    wrong = np.mean([(1 - GAMMA**k) / (1 - GAMMA) for k in range(1, 8)])
    assert wrong < 4
    np.testing.assert_allclose(found, [wrong], atol=0.1)
    found, expected = run("ring", tmp_path / "ring", "train.bootstrap_truncated=false")
    assert np.abs(found - expected).max() > 1


def test_bootstrapping_does_not_touch_real_ends(tmp_path):
    found, expected = run("both", tmp_path / "run", "train.bootstrap_truncated=false")
    np.testing.assert_allclose(found, expected, atol=0.01)


def vector_of(toy: str, mode: str, count: int, seed: int = 0, first: int = 0) -> GymVector:
    environments = gym.make_vec(
        name_of(toy), count, vectorization_mode="sync", vector_kwargs={"autoreset_mode": MODES[mode]}
    )
    return GymVector(environments, seed, first)


@pytest.mark.parametrize("mode", ["local", *MODES])
@pytest.mark.parametrize("toy", ["stream", "ring", "chain", "both"])
def test_a_perfect_critic_leaves_no_advantage(toy, mode, tmp_path):
    """Nothing is random here but the actions, so that every row's advantage is zero and its return the true value;
    no training involved.
    """
    settings = config(tmp_path / "run", *SETTINGS, f"env.id={name_of(toy)}", "train.rollout=23", "train.batch_size=4")
    vector = make_vector(settings.env, 0, 4) if mode == "local" else vector_of(toy, mode, 4)
    distribution, expected = distribution_for(vector.action_space), true_values(toy)
    model = ActorCritic(settings.model, observation_shape(vector.observation_space), distribution)
    with torch.no_grad():
        model.value.bias.fill_(3.0)
        model.value.weight[0] = 100.0  # in states that no step starts from
        model.value.weight[0, : len(expected)] = torch.from_numpy(expected).float() - 3
    collector = Collector(settings, vector, distribution)
    for update, gae_lambda in enumerate((0.0, 0.7, 1.0)):
        rollout = collector.collect(acting(model), torch.Generator().manual_seed(update))
        observations, _, _, values, advantages, returns = learning_batch(
            rollout, model, distribution, replace(settings.train, gae_lambda=gae_lambda), torch.device("cpu")
        )
        valid = torch.from_numpy(rollout.valid).flatten()
        state = observations.argmax(dim=1)[valid]
        assert rollout.done.any() and valid.any() and (mode == "next") == bool((~valid).any())
        truth = torch.from_numpy(expected).float()[state]
        torch.testing.assert_close(values[valid], truth)
        torch.testing.assert_close(advantages[valid], torch.zeros(len(state)), atol=2e-4, rtol=0)
        torch.testing.assert_close(returns[valid], truth, atol=2e-4, rtol=0)
        assert (advantages[~valid] == 0).all()
    vector.close()


@pytest.mark.parametrize("mode", ["local", *MODES])
def test_the_value_of_the_final_observation_counts_and_not_the_next_episodes_first(mode, tmp_path):
    """A critic that knows only the state in which the ring's episodes are cut: its value reaches their last rows,
    and no others.
    """
    settings = config(
        tmp_path / "run",
        *SETTINGS,
        f"env.id={name_of('ring')}",
        "train.gae_lambda=0",
        "train.rollout=24",
        "train.batch_size=96",
    )
    vector = make_vector(settings.env, 0, 4) if mode == "local" else vector_of("ring", mode, 4)
    distribution = distribution_for(vector.action_space)
    model = ActorCritic(settings.model, (4,), distribution)
    with torch.no_grad():
        model.value.bias.zero_()
        model.value.weight[0] = torch.tensor([1000.0, 0.0, 50.0, 0.0])  # after 6 steps: state 2; an episode starts in 0
    collector = Collector(settings, vector, distribution)
    rollout = collector.collect(acting(model), torch.Generator().manual_seed(0))
    batch = learning_batch(rollout, model, distribution, settings.train, torch.device("cpu"))
    returns = batch.returns.view(24, 4)
    ends = torch.from_numpy(rollout.done & rollout.valid)
    assert ends.any()
    pays = TOYS["ring"][0]["pays"]
    # the sixth step leaves state 1
    torch.testing.assert_close(returns[ends], torch.full_like(returns[ends], pays[1] + GAMMA * 50.0))
    vector.close()
