"""Environments that answer in another way than they say, or cannot do what is asked of them: one line, or a note, and
results first.
"""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

from common.config import ConfigError
from common.errors import ProjectError
from ppo.advice import idle_settings
from ppo.config import EnvConfig, ModelConfig
from ppo.distributions import distribution_for
from ppo.model import ActorCritic
from ppo.registry import as_input, make_vector, observation_shape
from tests.helpers import errors
from tests.ppo.helpers import collector_for, config, evaluate, train


class Answering(gym.Env):
    """An episode of five steps, which answers as told."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)
    shown = np.zeros(2, dtype=np.float32)
    reward = 1.0
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as gymnasium has it)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.shown, {}

    def step(self, action):
        self.steps += 1
        return self.shown, self.reward, self.steps == 5, False, {}


class Bare(Answering):
    def __init__(self):
        """As gymnasium's checker allows it: no render_mode."""


class OldReset(Answering):
    def reset(self, *, seed=None, options=None):
        return super().reset()[0]


class OldStep(Answering):
    def step(self, action):
        return self.shown, 1.0, False, {}


class NoSeed(Answering):
    def reset(self):
        return super().reset()


class Longer(Answering):
    shown = np.zeros(3, dtype=np.float32)


class Words(Answering):
    shown = "left"


class ArrayReward(Answering):
    reward = np.ones(1)


class TwoRewards(Answering):
    reward = np.ones(2)


class NoReward(Answering):
    reward = None


class BelowStart(Answering):
    observation_space = gym.spaces.Discrete(4, start=3)
    shown = 2


class Unrendered(Answering):
    def render(self):
        raise KeyError("no display here")


class NoPicture(Answering):
    def render(self):
        return "a line of text"


class Endless(Answering):
    def step(self, action):
        return self.shown, 1.0, False, False, {}


WRONG = {
    OldReset: "reset() returned an array of shape (2,); gymnasium's returns (observation, info)",
    OldStep: "returned 4 values",
    NoSeed: "gymnasium's is reset(self, *, seed=None, options=None)",
    Longer: "reset() showed an array of shape (3,); its observation space is of shape (2,)",
    Words: "reset() showed str left",
    ArrayReward: "it is one number: float(reward)",
    TwoRewards: "an array of shape (2,) as the reward",
    NoReward: "NoneType None as the reward",
    BelowStart: "showed 2; its observation space is 3 to 6",
}


@pytest.fixture
def known():
    """Make these classes known to gymnasium."""
    everyone = [*WRONG, Bare, Answering, Unrendered, NoPicture, Endless]
    for each in everyone:
        gym.register(f"{each.__name__}-v0", entry_point=each)
    yield
    for each in everyone:
        gym.registry.pop(f"{each.__name__}-v0")


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_an_answer_that_gymnasium_does_not_know_is_one_line(kind, known, tmp_path, capsys):
    assert train(config(tmp_path / "run", f"env.id={kind.__name__}-v0")) == 1
    (line,) = errors(capsys.readouterr().err)
    assert WRONG[kind] in line


@pytest.mark.parametrize("kind", [Longer, ArrayReward])
def test_the_same_in_worker_processes(kind, known):
    vector = None
    with pytest.raises(ProjectError, match=r"showed an array|one number"):
        vector = make_vector(EnvConfig(f"{kind.__name__}-v0", backend="processes"), 0, 2)
        vector.reset()
        vector.step(np.zeros(2, dtype=np.int64))
    if vector:
        vector.environment.close(terminate=True)


def test_an_environment_that_knows_no_render_mode_is_trained_and_evaluated(known, tmp_path, capsys):
    made = config(tmp_path / "run", "env.id=Bare-v0", "eval.video=true")
    assert train(made) == 0
    assert evaluate(made) == 0
    assert "note: no film: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Unrendered, NoPicture, Answering])
def test_results_do_not_depend_on_a_film(kind, known, tmp_path, capsys):
    """Whatever rendering does, eval.json is there and the program ends well, with a note."""
    made = config(tmp_path / "run", f"env.id={kind.__name__}-v0", "eval.video=true")
    assert train(made) == 0
    assert evaluate(made) == 0
    said = capsys.readouterr()
    assert said.err.count("note: no film: ") == 1
    assert not errors(said.err)
    result = json.loads(said.out.splitlines()[-1])
    assert json.loads((tmp_path / "run/eval.json").read_text()) == result
    assert result["metrics"]["return_mean"] == 5


def test_results_do_not_depend_on_a_learning_curve(known, tmp_path, capsys, monkeypatch):
    import ppo.pictures

    def fail(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(ppo.pictures, "draw_curve", fail)
    made = config(tmp_path / "run", "env.id=Answering-v0")
    assert train(made) == 0
    assert evaluate(made) == 0
    assert "note: no learning curve: ModuleNotFoundError" in capsys.readouterr().err


def test_an_environment_without_a_time_limit_is_evaluated(known, tmp_path, capsys):
    made = config(tmp_path / "run", "env.id=Endless-v0", "eval.max_steps=30")
    assert train(made) == 0
    assert evaluate(made) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["metrics"]["return_mean"] == 30
    assert "eval.max_steps=30" in said.err


def test_a_checkpoint_is_evaluated_or_refused(known, tmp_path, capsys):
    """`--checkpoint` names what is measured: the weights and the scaling of observations that lie in it."""
    from common.config import Options
    from ppo.eval import main
    from tests.helpers import status

    words = ("env.normalize_observations=true", "train.lr=0.01", "keep_last=9", "train.save_every=2")
    made = config(tmp_path / "run", *words)
    assert train(made) == 0
    found = {}
    for name in ("", "00000002.pt", "00000006.pt", str(tmp_path / "run/checkpoints/00000006.pt")):
        assert status(main, made, Options("eval", checkpoint=name)) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = found.pop("")
    assert [result["checkpoint_step"] for result in found.values()] == [2, 6, 6]
    for name in ("00000006.pt", str(tmp_path / "run/checkpoints/00000006.pt")):
        assert found[name]["metrics"]["return_mean_stochastic"] == last["metrics"]["return_mean_stochastic"]
    assert found["00000002.pt"]["metrics"] != last["metrics"]
    before = (tmp_path / "run/eval.json").read_bytes()
    for name in ("nonsense", "00000003.pt", "other.safetensors"):
        assert status(main, made, Options("eval", checkpoint=name)) == 1
        (line,) = errors(capsys.readouterr().err)
        assert name in line
    assert (tmp_path / "run/eval.json").read_bytes() == before


@pytest.mark.parametrize(
    "word",
    [
        "env.frame_stack=2",
        "env.frame_skip=2",
        "env.sticky_actions=0.25",
        "env.noop_max=0",
        "env.episodic_life=false",
        "env.sign_rewards=false",
        "env.image_size=64",
    ],
)
def test_settings_of_atari_are_refused_elsewhere(word, tmp_path):
    with pytest.raises(ConfigError, match="does nothing here: CartPole-v1 is no Atari game"):
        config(tmp_path, word)
    config(tmp_path, word, "env.id=ALE/Pong-v5")
    config(tmp_path, word, "env.id=ale_py:ALE/Pong-v5")


def test_continuous_is_refused_where_it_changes_nothing(known, tmp_path, capsys):
    """An environment that swallows any argument."""

    class Swallowing(Answering):
        def __init__(self, **_):
            """Whatever it is."""

    gym.register("Swallowing-v0", entry_point=Swallowing)
    try:
        assert train(config(tmp_path / "run", "env.id=Swallowing-v0", "env.continuous=true")) == 2
    finally:
        gym.registry.pop("Swallowing-v0")
    (line,) = errors(capsys.readouterr().err)
    assert "env.continuous: does nothing here" in line


@pytest.mark.parametrize(
    ("words", "world", "said"),
    [
        ((), 1, []),
        (("model.squash=true",), 1, ["model.squash does nothing here: actions are discrete"]),
        (("model.log_std=1",), 1, ["model.log_std does nothing here: actions are discrete"]),
        (("env.id=Pendulum-v1", "model.log_std=1"), 1, []),
        (("env.clip_rewards=5",), 1, ["env.clip_rewards does nothing here: env.normalize_rewards is off"]),
        (("env.clip_rewards=5", "env.normalize_rewards=true"), 1, []),
        (("env.clip_observations=5",), 1, ["env.normalize_observations is off"]),
        (("train.evaluate_episodes=5",), 1, ["train.evaluate_every is 0"]),
        ((), 2, ["2 processes do not do what one would; with env.backend=local they do"]),
        (("env.backend=local",), 2, []),
    ],
)
def test_settings_that_do_nothing_are_said(words, world, said, tmp_path):
    made = config(tmp_path, *words)
    vector = make_vector(made.env, 0, 2)
    collector, model = collector_for(made, vector)
    vector.reset()
    notes = idle_settings(made, model, collector.vector, world)
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes))


@pytest.mark.parametrize(("high", "dtype"), [(255, "uint8"), (1, "float32"), (255, "float32")])
def test_pictures_reach_an_mlp_between_nought_and_one(high, dtype):
    space = gym.spaces.Box(0, high, (40, 48, 3), np.dtype(dtype))
    levels = np.random.default_rng(0).integers(256, size=(2, 40, 48, 3))
    given = (levels * high / 255).astype(dtype)
    model = ActorCritic(ModelConfig(), observation_shape(space), distribution_for(gym.spaces.Discrete(2)))
    read = model.read(torch.from_numpy(as_input(space, given)))
    expected = torch.from_numpy(levels.transpose(0, 3, 1, 2) / 255).flatten(1).float()
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)


def test_small_pictures_are_numbers_like_any():
    space = gym.spaces.Box(0, 1, (7, 7, 3), np.float32)
    given = np.random.default_rng(0).random((2, 7, 7, 3), dtype=np.float32)
    model = ActorCritic(ModelConfig(), observation_shape(space), distribution_for(gym.spaces.Discrete(2)))
    torch.testing.assert_close(model.read(torch.from_numpy(as_input(space, given))), torch.from_numpy(given).flatten(1))


@pytest.mark.parametrize("name", ["Acrobot-v1", "ALE/Pong-v5"])
def test_environments_begin_alike_whoever_plays_them(name):
    """Four in one process, or two in each of two: seeded by their global number, through episodes' ends."""
    if name.startswith("ALE/"):
        pytest.importorskip("ale_py")
    atari = name.startswith("ALE/")
    made = EnvConfig(name, backend="auto" if atari else "processes", max_episode_steps=20 if atari else 4, threads=1)
    together = make_vector(made, 7, 4)
    apart = [make_vector(made, 7, 2, first=first) for first in (0, 2)]
    different = 0
    try:
        for numbers in [(5,)] if atari else [(), (5,)]:
            whole = together.reset(*numbers)
            np.testing.assert_array_equal(whole, np.concatenate([vector.reset(*numbers) for vector in apart]))
            for _ in range(25 if atari else 10):
                actions = np.array([1, 1, 1, 1])  # only their seeds tell them apart
                whole = together.step(actions).observations
                halves = [vector.step(part).observations for vector, part in zip(apart, np.split(actions, 2))]
                np.testing.assert_array_equal(whole, np.concatenate(halves))
                different = max(different, len(np.unique(whole.reshape(4, -1), axis=0)))
    finally:
        for vector in (together, *apart):
            vector.close()
    assert different > 1
    assert isinstance(together.environment, AsyncVectorEnv) or atari
