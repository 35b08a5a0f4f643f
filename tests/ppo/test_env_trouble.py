"""What goes wrong in environments: NaN, unknown names, missing packages, spaces that cannot be read, workers that
die.
"""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from common.checkpoint import Checkpoints
from common.errors import ProjectError
from ppo.config import EnvConfig, ModelConfig
from ppo.environments.registry import as_input, make_vector, observation_shape
from ppo.environments.vectors import LocalVector, check_finite
from ppo.learning.distributions import distribution_for
from ppo.model import ActorCritic
from tests.helpers import errors, same, stop_in_check
from tests.ppo.helpers import Counting, acting, collector_for, config, log, register, train, vector_of, weights

MODES = list(AutoresetMode)


@pytest.mark.parametrize("make", [LocalVector, "processes"])
def test_nan_names_the_environment(make, tmp_path, capsys):
    """The third episode of every environment goes wrong: nothing is learned from it, the last checkpoint stands."""
    name = register(limit=5, trouble="nan")
    backend = "local" if make is LocalVector else make
    assert (
        train(
            config(
                tmp_path / "run",
                f"env.id={name}",
                f"env.backend={backend}",
                "train.rollout=8",
                "env.count=2",
                "train.batch_size=8",
                "train.save_every=1",
                "train.steps=96",
            )
        )
        == 1
    )
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


@pytest.mark.parametrize(
    ("name", "near"),
    [("CartPole-v9", "CartPole-v1"), ("LunarLandr-v3", "LunarLander-v3"), ("ALE/Pnog-v5", "ALE/Pong-v5")],
)
def test_unknown_environment_names_the_nearest(name, near):
    with pytest.raises(ProjectError, match="did you mean") as error:
        make_vector(EnvConfig(name), 0, 1)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package", "hint"),
    [
        ("LunarLander-v3", "Box2D", 'pip install "gymnasium[box2d]"'),
        ("HalfCheetah-v5", "mujoco", 'pip install "gymnasium[mujoco]"'),
        ("ALE/Pong-v5", "ale_py", "pip install ale-py"),
    ],
)
def test_missing_package_says_how_to_install_it(name, package, hint, monkeypatch):
    """A package whose import fails, as on a machine without it."""
    for module in [
        m
        for m in sys.modules
        if m.split(".")[0] == package or m.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))
    ]:
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


class Showing(gym.Env):
    """Shows numbers of a space; they follow from the step. An episode has five."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, low=0, high=255, shape=(), dtype="float32", **_):
        self.observation_space, self.steps = gym.spaces.Box(low, high, shape, np.dtype(dtype)), 0

    def look(self):
        space = self.observation_space
        shown = np.random.default_rng(self.steps).uniform(
            0, min(float(space.high.max()), 255) + (space.dtype.kind != "f"), space.shape
        )
        return np.array(shown).astype(space.dtype)[()]  # of shape (): a number, no array

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.look(), {}

    def step(self, action):
        self.steps += 1
        return self.look(), float(action), False, self.steps == 5, {}


@pytest.fixture
def showing():
    """Make `Showing` with these arguments known to gymnasium; its id."""
    gym.register("Showing-v0", entry_point=Showing)

    def known(**arguments):
        gym.registry["Showing-v0"].kwargs = arguments
        return "Showing-v0"

    yield known
    gym.registry.pop("Showing-v0")


IMAGES = ("model.kind=cnn", "env.count=2", "train.rollout=8", "train.steps=48", "train.batch_size=8", "train.epochs=1")


@pytest.mark.parametrize("backend", ["local", "processes"])
@pytest.mark.parametrize(
    ("shape", "dtype", "high"),
    [
        ((), "float32", 9),
        ((), "float64", 9),
        ((), "int64", 9),
        ((3,), "bool", 1),
        ((3,), "int8", 9),
        ((2, 3), "float16", 9),
        ((3,), "uint16", 9),
        ((7, 7, 3), "uint8", 9),
    ],
)
def test_boxes_of_any_numbers_are_learned_from(shape, dtype, high, backend, showing, tmp_path):
    """A single number is a vector of one; all types become float32, but for small pictures, which stay bytes until
    they are used.
    """
    made = config(
        tmp_path / "run",
        f"env.id={showing(shape=shape, dtype=dtype, high=high)}",
        f"env.backend={backend}",
        "train.steps=128",
        "env.count=2",
        "train.batch_size=8",
    )
    vector = make_vector(made.env, 0, 2)
    collector, model = collector_for(made, vector)
    space, expected = vector.observation_space, Showing(shape=shape, dtype=dtype, high=high).reset(seed=0)[0]
    stored = collector.collect(acting(model), torch.Generator().manual_seed(0)).observations
    vector.close()
    assert stored[0].shape == (2, *observation_shape(space)) == (2, *(shape or (1,)))
    assert stored.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    np.testing.assert_array_equal(stored[0, 0], np.reshape(expected, shape or (1,)).astype(np.float32))
    assert train(made) == 0
    assert len(log(tmp_path / "run")) > 1


def test_small_boxes_of_bytes_are_normalised_like_any_numbers(showing, tmp_path):
    made = config(
        tmp_path / "run",
        f"env.id={showing(shape=(7, 7, 3), dtype='uint8', high=200)}",
        "env.normalize_observations=true",
    )
    collector, model = collector_for(made, make_vector(made.env, 0, 4))
    first, second = (
        collector.collect(acting(model), torch.Generator().manual_seed(0)).observations.copy() for _ in range(2)
    )
    assert first.dtype == second.dtype == np.float32
    assert first.mean() > 9 and first.max() == collector.observations.clip, (
        "before anything is known, bytes are far from zero"
    )
    assert abs(second.mean()) < 0.2 and second.std() == pytest.approx(1, abs=0.2)
    assert train(made) == 0


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((40, 48, 3), (3, 40, 48)),
        ((40, 36, 1), (1, 40, 36)),
        ((36, 40, 4), (4, 36, 40)),
        ((3, 40, 48), (3, 40, 48)),
        ((40, 48, 2), (40, 48, 2)),
        ((40, 4, 3), (40, 4, 3)),
    ],
)
def test_channels_come_first(shape, shown, showing):
    """Pixel by pixel; what no picture of 1, 3 or 4 channels can be is left alone."""
    vector = make_vector(EnvConfig(showing(shape=shape, dtype="uint8")), 0, 2)
    seen, space = vector.reset(), vector.observation_space
    assert observation_shape(space) == shown
    expected = seen if shown == shape else np.stack([seen[..., c] for c in range(shape[2])], axis=1)
    np.testing.assert_array_equal(as_input(space, seen), expected)
    assert as_input(space, seen).dtype == np.uint8


def test_pictures_with_channels_last_are_learned_from_and_resumed(showing, tmp_path, monkeypatch):
    words = (*IMAGES, f"env.id={showing(shape=(40, 48, 3), dtype='uint8')}")
    assert train(config(tmp_path / "whole", *words)) == 0
    with monkeypatch.context() as patch:
        stop_in_check(patch, 1)
        assert train(config(tmp_path / "run", *words)) == 143
    assert train(config(tmp_path / "run", *words), resume=True) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert weights(tmp_path / "run")["last"]["model.actor_trunk.body.0.weight"].shape == (32, 3, 8, 8)


@pytest.mark.parametrize(
    ("dtype", "high"), [("float32", 1), ("float64", 255), ("uint8", 1), ("uint8", 200), ("int32", 255), ("bool", 1)]
)
def test_the_network_sees_the_same_picture_whatever_its_numbers_are(dtype, high):
    """A picture in bytes, and the same one with another brightest value or type: not divided by 255 twice."""
    levels = np.random.default_rng(0).integers(256 if high != 1 or dtype == "float32" else 2, size=(2, 40, 48, 3))
    levels = levels * (255 if high == 1 and dtype != "float32" else 1)
    plain = gym.spaces.Box(0, 255, (40, 48, 3), np.uint8)
    space = gym.spaces.Box(0, high, (40, 48, 3), np.dtype(dtype))
    torch.manual_seed(0)
    model = ActorCritic(ModelConfig(kind="cnn"), observation_shape(space), distribution_for(gym.spaces.Discrete(3)))
    given = (levels / 255 if high == 1 else levels).astype(dtype)
    with torch.no_grad():
        (a, _), (b, _) = (
            model(torch.from_numpy(as_input(s, x))) for s, x in ((plain, levels.astype(np.uint8)), (space, given))
        )
    assert a.std() > 1e-4
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": -np.inf, "high": np.inf, "shape": (40, 48, 3)}, ("[0, 1] or [0, 255]", "TransformObservation")),
        ({"low": -1, "high": 1, "shape": (3, 40, 48)}, ("[0, 1] or [0, 255]",)),
        ({"high": 2, "shape": (3, 40, 48)}, ("[0, 1] or [0, 255]",)),
        ({"high": 1000, "shape": (3, 40, 48), "dtype": "uint16"}, ("[0, 1] or [0, 255]",)),
        ({"shape": (3, 0)}, ("a Box of numbers",)),
    ],
)
def test_pictures_of_unknown_brightness_and_empty_boxes_are_refused(arguments, words, showing, tmp_path, capsys):
    assert train(config(tmp_path / "run", f"env.id={showing(**arguments)}", "env.backend=local")) == 1
    (line,) = errors(capsys.readouterr().err)
    assert "observation space Box(" in line
    assert all(word in line for word in words)
    assert len(line) < 400


@pytest.mark.parametrize("shape", [(84, 84), (40, 48, 2), (4, 40, 48, 3), (5,)])
def test_a_picture_that_the_convolutional_network_cannot_read_is_one_line(shape, showing, tmp_path, capsys):
    assert train(config(tmp_path / "run", *IMAGES, f"env.id={showing(shape=shape, dtype='uint8')}")) == 2
    (line,) = errors(capsys.readouterr().err)
    assert "cnn reads images (C, H, W)" in line
    assert str(shape) in line


def test_a_worker_that_dies_is_one_line(tmp_path, capfd):
    """An environment that ends its process: no hang, no traceback, no worker left behind, and the last checkpoint
    can be loaded.
    """
    name = register(limit=5, trouble="die")
    made = []
    build = AsyncVectorEnv.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        build(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncVectorEnv, "__init__", remember)
        assert (
            train(
                config(
                    tmp_path / "run",
                    f"env.id={name}",
                    "env.backend=processes",
                    "train.rollout=8",
                    "env.count=3",
                    "train.batch_size=8",
                    "train.save_every=1",
                    "train.steps=96",
                )
            )
            == 1
        )
    (line,) = errors(capfd.readouterr().err)
    assert "worker process is gone" in line
    assert "--resume" in line
    folder = tmp_path / "run/checkpoints"
    assert Checkpoints(folder, 2, 0).newest_step() == 1
    assert Checkpoints.load(folder / "00000001.pt")["step"] == 1
    assert all(not process.is_alive() for process in made[0].processes)
