"""What goes wrong in environments: NaN, unknown names, missing packages, spaces that cannot be read, workers that die."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from common.checkpoint import Checkpoints
from common.errors import ProjectError
from ppo.config import EnvConfig
from ppo.envs import LocalVector, check_finite
from ppo.registry import make_vector
from tests.helpers import errors
from tests.ppo.helpers import Counting, config, register, train, vector_of

MODES = list(AutoresetMode)


@pytest.mark.parametrize("make", [LocalVector, "processes"])
def test_nan_names_the_environment(make, tmp_path, capsys):
    """The third episode of every environment goes wrong: nothing is learned from it, the last checkpoint stands."""
    name = register(limit=5, trouble="nan")
    backend = "local" if make is LocalVector else make
    assert train(config(tmp_path / "run", f"env.id={name}", f"env.backend={backend}", "train.rollout=8", "env.count=2",
                        "train.batch_size=8", "train.save_every=1", "train.steps=96")) == 1
    (line,) = errors(capsys.readouterr().err)
    assert "environment 0 returned NaN" in line
    assert Checkpoints(tmp_path / "run/checkpoints", 2, 0).newest_step() == 1


def test_nan_of_the_second_environment_is_its_own():
    vector = LocalVector([Counting(0, 5), Counting(1, 5, "nan")], 0)
    vector.reset()
    with pytest.raises(ProjectError, match="environment 1 returned NaN"):
        for number in range(20):
            check_finite(vector.step(np.zeros(2, dtype=np.int64)), number)


def test_nan_in_a_final_observation_is_seen():
    """The observation that an episode ends with is bootstrapped from: NaN there is as bad as anywhere."""
    class Bursting(Counting):
        def step(self, action):
            observation, reward, over, cut, info = super().step(action)
            return observation * np.nan if over or cut else observation, reward, over, cut, info

    for mode in (None, *MODES):
        vector = vector_of(mode, [Counting(0), Bursting(1)])
        vector.reset()
        with pytest.raises(ProjectError, match="environment 1 returned NaN"):
            for number in range(20):
                check_finite(vector.step(np.zeros(2, dtype=np.int64)), number)


@pytest.mark.parametrize(("name", "near"), [("CartPole-v9", "CartPole-v1"), ("LunarLandr-v3", "LunarLander-v3"),
                                            ("ALE/Pnog-v5", "ALE/Pong-v5")])
def test_unknown_environment_names_the_nearest(name, near):
    with pytest.raises(ProjectError, match="did you mean") as error:
        make_vector(EnvConfig(name), 0, 1)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "package", "hint"), [
    ("LunarLander-v3", "Box2D", 'pip install "gymnasium[box2d]"'), ("HalfCheetah-v5", "mujoco", 'pip install "gymnasium[mujoco]"'),
    ("ALE/Pong-v5", "ale_py", "pip install ale-py")])
def test_missing_package_says_how_to_install_it(name, package, hint, monkeypatch):
    """A package whose import fails, as on a machine without it."""
    for module in [m for m in sys.modules if m.split(".")[0] == package or m.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ProjectError) as error:
        make_vector(EnvConfig(name, backend="auto" if name.startswith("ALE/") else "local"), 0, 1)
    assert hint in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_argument_that_the_environment_does_not_know_is_one_line():
    with pytest.raises(ProjectError, match="CartPole-v1 cannot be made") as error:
        make_vector(EnvConfig("CartPole-v1", continuous=True, backend="local"), 0, 1)
    assert "\n" not in str(error.value)


class Odd(Counting):
    """What it shows is no array of numbers."""

    observation_space = gym.spaces.Dict({"a": gym.spaces.Discrete(2)})

    def reset(self, **_):
        return {"a": 0}, {}


def test_unsupported_observation_space_is_refused(tmp_path, capsys):
    gym.register("Odd-v0", entry_point=Odd)
    try:
        assert train(config(tmp_path / "run", "env.id=Odd-v0")) == 1
    finally:
        gym.registry.pop("Odd-v0")
    (line,) = errors(capsys.readouterr().err)
    assert "observation space Dict" in line


def test_a_worker_that_dies_is_one_line(tmp_path, capfd):
    """An environment that ends its process: no hang, no traceback, no worker left behind, and the last checkpoint can be loaded."""
    name = register(limit=5, trouble="die")
    made = []
    build = AsyncVectorEnv.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        build(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncVectorEnv, "__init__", remember)
        assert train(config(tmp_path / "run", f"env.id={name}", "env.backend=processes", "train.rollout=8", "env.count=3",
                            "train.batch_size=8", "train.save_every=1", "train.steps=96")) == 1
    (line,) = errors(capfd.readouterr().err)
    assert "worker process is gone" in line
    assert "--resume" in line
    folder = tmp_path / "run/checkpoints"
    assert Checkpoints(folder, 2, 0).newest_step() == 1
    assert Checkpoints.load(folder / "00000001.pt")["step"] == 1
    assert all(not process.is_alive() for process in made[0].processes)
