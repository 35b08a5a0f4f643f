"""Environments that people bring: by module and name, with arguments and wrappers, as the README shows; and a hint for
runs that do not learn.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from common.config import ConfigError, resolve
from common.errors import ProjectError
from common.logging import read_metrics
from ppo.config import Config, EnvConfig
from ppo.environments.custom import spec_of
from ppo.environments.registry import make_one, make_vector, one_hot
from ppo.learning.advice import PATIENCE, Advice
from tests.helpers import ROOT, environment, errors
from tests.ppo.helpers import acting, collector_for, config, evaluate, log, train

DEFAULT = ROOT / "configs/ppo_default.yaml"
SMALL = ("env.count=2", "train.rollout=16", "train.batch_size=16", "train.steps=96", "train.epochs=2", "device=cpu")

OWN = """
import gymnasium as gym
import numpy as np

class Pair(gym.Env):
    observation_space = gym.spaces.Dict({"a": gym.spaces.Discrete(3), "b": gym.spaces.Box(-1, 1, (2,), np.float32)})
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length=5):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps >= self.length, False, {}

class Plain(Pair):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

def flat(environment):
    return gym.wrappers.FlattenObservation(environment)

gym.register("own/Plain-v0", entry_point=Plain, max_episode_steps=4)
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with somebody's module in it, as the current one."""
    (tmp_path / "own_env.py").write_text(OWN)
    (tmp_path / "broken_env.py").write_text("import nothing_of_this_name")
    (tmp_path / "failing_env.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("own_env", "broken_env", "failing_env"):
        sys.modules.pop(name, None)
    gym.registry.pop("own/Plain-v0", None)


@pytest.mark.parametrize("file", ["ppo/README.md", "CONTRIBUTING.md"])
def test_the_examples_are_environments_by_gymnasiums_own_check(file):
    """`Walk`, as the README and the recipe show it."""
    text = (ROOT / file).read_text()
    start = text.rindex("\n", 0, text.index("class Walk(gym.Env)"))
    end = text.index("False, {}\n", start) + len("False, {}\n")
    names = {"gym": gym, "np": np}
    exec(textwrap.dedent(text[start:end]), names)
    check_env(names["Walk"](), skip_render_check=True)


def test_the_example_of_the_readme(tmp_path):
    """The file and the two commands that the README shows, in a folder of their own."""
    text = (ROOT / "ppo/README.md").read_text()
    section = text[text.index("## Your own environment") :]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.S)
    assert source.count("\n") <= 20
    name = re.search(r"`(\w+\.py)`", section)[1]
    (tmp_path / name).write_text(source)
    commands = re.findall(r"^    python (-m ppo.*)$", section, re.M)
    assert len(commands) == 2
    for command in commands:
        words = command.split("#")[0].replace("configs/", f"{ROOT}/configs/").split()
        if "ppo.train" in words:
            words += SMALL
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT)])},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/eval.json"))


@pytest.mark.parametrize("backend", ["auto", "processes"])
@pytest.mark.parametrize(
    "words",
    [
        ("env.id=own_env:own/Plain-v0",),
        ("env.id=own_env:Plain",),
        ("env.id=own_env:Plain", "env.kwargs.length=7"),
        ("env.id=own_env:Pair", "env.wrappers=[own_env.flat]"),
        ("env.id=own_env:Pair", "env.wrappers=[gymnasium.wrappers.FlattenObservation]"),
    ],
)
def test_environments_by_module(words, backend, here):
    """Trained and evaluated; the arguments and the time limit of the registration count."""
    made = resolve(Config, DEFAULT, [*SMALL, *words, f"env.backend={backend}", "run_dir=run", "eval.episodes=2"])
    assert train(made) == 0
    length = 4 if "own/" in words[0] else 7 if "env.kwargs.length=7" in words else 5
    assert read_metrics(here / "run/metrics.jsonl")[-1]["length_mean"] == length
    assert evaluate(made) == 0


def test_arguments_reach_the_environment():
    slippery = make_one(EnvConfig("FrozenLake-v1", kwargs={"is_slippery": False, "map_name": "8x8"}))
    assert slippery.observation_space.n == 64
    assert max(len(found) for found in slippery.unwrapped.P[0].values()) == 1


def test_arguments_survive_the_config_file(tmp_path):
    """As the evaluation reads them back; a number stays a number."""
    words = ("env.id=FrozenLake-v1", "env.kwargs.is_slippery=false", "env.kwargs.map_name=8x8")
    made = config(tmp_path / "run", *words)
    assert made.env.kwargs == {"is_slippery": False, "map_name": "8x8"}
    assert train(made) == 0
    assert resolve(Config, tmp_path / "run/config.yaml").env.kwargs == made.env.kwargs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("env.id=own_env:Plane",), "did you mean Plain"),
        (("env.id=own_env:number",), "no class 'number'"),
        (("env.id=no_such_module:Thing",), "env.id: there is no module 'no_such_module'"),
        (("env.id=broken_env:Thing",), "broken_env cannot be imported: No module named 'nothing_of_this_name'"),
        (("env.id=failing_env:Thing",), "failing_env cannot be imported: ZeroDivisionError"),
        (("env.id=own_env:Pair",), "env.wrappers=[gymnasium.wrappers.FlattenObservation]"),
        (("env.id=own_env:Pair", "env.wrappers=[own_env.flatt]"), "env.wrappers: 'own_env.flatt' is no wrapper"),
        (("env.id=own_env:Pair", "env.wrappers=[flat]"), "env.wrappers: 'flat' is no wrapper"),
        (("env.id=own_env:Plain", "env.kwargs.lenght=3"), "lenght"),
        (("env.wrappers=[own_env.flat]", "env.backend=native"), "env.wrappers: env.backend=native does not know it"),
        (("env.kwargs.length=3", "env.backend=native"), "env.kwargs: env.backend=native does not know it"),
        (("env.continuous=true", "env.backend=native"), "env.continuous: env.backend=native does not know it"),
    ],
)
def test_what_cannot_be_found_is_one_line(words, said, here, capsys):
    assert train(config(here / "run", *words)) in (1, 2)
    (line,) = errors(capsys.readouterr().err)
    assert said in line


def test_a_function_is_an_environment_too(here):
    (here / "own_env.py").write_text(OWN + "def make(length=2):\n    return Plain(length)\n")
    assert make_vector(EnvConfig("own_env:make", kwargs={"length": 3}), 0, 2).environments[0].length == 3


def test_specs_are_gymnasiums_own():
    assert spec_of("CartPole-v1").max_episode_steps == 500
    assert spec_of("gymnasium:CartPole-v1") is spec_of("CartPole-v1")
    with pytest.raises(ProjectError, match="did you mean CartPole"):
        spec_of("CartPoole-v1")
    with pytest.raises(ConfigError, match="no module"):
        spec_of("nowhere.at.all:CartPole-v1")


def test_the_default_config_takes_discrete_and_continuous_actions(tmp_path):
    for name in ("Pendulum-v1", "MountainCarContinuous-v0", "Acrobot-v1", "Taxi-v4"):
        made = resolve(Config, DEFAULT, [*SMALL, f"env.id={name}", f"run_dir={tmp_path / name}"])
        assert made.env.normalize_observations
        assert made.env.normalize_rewards
        assert train(made) == 0
        assert len(log(tmp_path / name)) == 3


def test_one_hot_observations_are_not_scaled(tmp_path):
    """Dividing by the deviation would turn the rare one of 500 entries into 22: Taxi is not learned that way."""
    made = resolve(Config, DEFAULT, [*SMALL, "env.id=Taxi-v4", f"run_dir={tmp_path}"])
    collector, model = collector_for(made, make_vector(made.env, 0, 2))
    for _ in range(2):
        seen = collector.collect(acting(model), torch.Generator().manual_seed(0)).observations
    assert set(np.unique(seen)) == {0.0, 1.0}
    assert (seen.sum(axis=-1) == 1).all()


@pytest.mark.parametrize("start", [0, 7, -3])
def test_one_hot(start):
    numbers = np.random.default_rng(0).integers(start, start + 50, size=100)
    np.testing.assert_array_equal(one_hot(numbers, 50, start), np.eye(50, dtype=np.float32)[numbers - start])
    for wrong in (start - 1, start + 50):
        with pytest.raises(ProjectError, match=f"showed {wrong}; its observation space is {start} to {start + 49}"):
            one_hot(np.array([start, wrong]), 50, start)


def test_one_hot_of_a_large_space_does_not_build_a_square(monkeypatch):
    monkeypatch.setattr(np, "eye", None)
    assert one_hot(np.array([5, 999_999]), 1_000_000).sum() == 2


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ((), "env.normalize_rewards=true"),
        (("env.normalize_rewards=true",), "env.normalize_observations=true"),
        (("env.normalize_rewards=true", "env.normalize_observations=true"), "train.lr"),
    ],
)
def test_a_run_that_does_not_learn_says_so_once(words, remedy, tmp_path):
    said = []
    advice = Advice(config(tmp_path, *words), said.append)
    for _ in range(5 * PATIENCE):
        advice.look(0.001, 80.0)
    (hint,) = said
    assert hint.startswith("hint: not learning")
    assert remedy in hint


@pytest.mark.parametrize(("explained", "norm"), [(0.6, 80.0), (0.001, 2.0), (np.nan, 2.0)])
def test_no_hint_where_something_is_learned_or_nothing_is_cut(explained, norm, tmp_path):
    advice = Advice(config(tmp_path), pytest.fail)
    for _ in range(5 * PATIENCE):
        advice.look(explained, norm)


def test_the_hint_in_a_run(tmp_path, capsys):
    """Pendulum's rewards as they are: the case that people meet."""
    words = ("env.id=Pendulum-v1", "train.steps=3200", "train.rollout=32", "env.count=4", "train.batch_size=64")
    assert train(config(tmp_path / "run", *words)) == 0
    said = capsys.readouterr().err
    assert said.count("hint: ") == 1
    assert "env.normalize_rewards=true" in said
    assert train(config(tmp_path / "scaled", *words, "env.normalize_rewards=true")) == 0
    assert "hint: " not in capsys.readouterr().err
