"""Atari: frames, rewards and lives are those of gymnasium's own wrappers; a lost life ends an episode and not the
game.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py.roms import get_rom_path
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from PIL import Image

from common.config import resolve
from ppo.config import EnvConfig
from ppo.environments.registry import make_atari, make_vector, register_atari, rom_name
from ppo.environments.vectors import GymVector
from tests.helpers import ROOT, same, stop_in_check
from tests.ppo.helpers import TINY, collector_for, config, evaluate, log, train, weights

PONG = (
    "env.id=ALE/Pong-v5",
    "model.kind=cnn",
    "env.count=2",
    "train.rollout=8",
    "train.steps=32",
    "train.batch_size=8",
    "train.epochs=1",
)
FIRE = 1


def atari(game, count=1, training=True, **settings):
    """Our vector of a game without random starts."""
    return make_vector(EnvConfig(f"ALE/{game}-v5", **{"noop_max": 0, **settings}), 0, count, training=training)


def peer(game, skip=4, **settings):
    """The same by gymnasium's wrappers; for the raw environment see `.unwrapped`."""
    pytest.importorskip("cv2", reason="gymnasium's AtariPreprocessing needs opencv-python")
    register_atari()
    inner = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    return FrameStackObservation(
        AtariPreprocessing(inner, noop_max=0, frame_skip=skip, **settings), 4, padding_type="zero"
    )


def begin(env):
    """Reset, and press the button for one frame, as ale-py's vector does where a game has one."""
    env.reset(seed=0)
    env.unwrapped.step(FIRE)


@pytest.mark.parametrize("game", ["Pong", "Breakout"])
def test_frames_rewards_and_lives_are_those_of_gymnasiums_wrappers(game):
    """300 random actions, to the last bit: both average the pixels of areas in the same arithmetic, so no tolerance is
    needed.

    The first three steps of a game compare fewer frames of the stack: the peer's begins one frame earlier, before the
    button.
    """
    ours, theirs, random = atari(game, training=False), peer(game), np.random.default_rng(0)
    ours.reset()
    begin(theirs)
    age, games, points = 0, 0, 0.0
    for _ in range(300):
        action = int(random.integers(ours.action_space.n))
        step, (frames, reward, over, cut, _) = ours.step(np.array([action])), theirs.step(action)
        age += 1
        np.testing.assert_array_equal(step.observations[0, -age:], frames[-age:])
        assert (step.rewards[0], step.terminated[0], step.truncated[0]) == (reward, over, cut)
        assert step.valid[0]
        points += abs(reward)
        if over:
            dead = ours.step(np.array([0]))
            assert not dead.valid[0]
            assert dead.rewards[0] == 0
            begin(theirs)
            age, games = 0, games + 1
    assert points > 0
    assert games > 0 or game == "Pong"


def test_lost_life_ends_the_learners_episode_and_not_the_game():
    """Beside the peer with whole games: rewards and frames go on through a lost life, where only the flag differs;
    no row is dead.
    """
    ours, theirs, random = atari("Breakout"), peer("Breakout"), np.random.default_rng(1)
    ours.reset()
    begin(theirs)
    lives, ends, games, age = 5, 0, 0, 0
    for _ in range(700):
        action = int(random.integers(4))
        step, (frames, reward, over, _, info) = ours.step(np.array([action])), theirs.step(action)
        age += 1
        np.testing.assert_array_equal(step.observations[0, -age:], frames[-age:])
        assert step.rewards[0] == reward
        assert step.valid[0]
        assert step.terminated[0] == (info["lives"] < lives)
        assert step.over[0] == over
        ends, lives = ends + int(step.terminated[0]), info["lives"]
        if over:
            assert not ours.step(np.array([0])).valid[0]
            begin(theirs)
            games, lives, age = games + 1, 5, 0
    assert games >= 2
    assert ends >= 5 * games


def test_returns_logged_are_of_whole_games(tmp_path):
    """The learner sees five episodes a game and signs of rewards; the books count games and points."""
    made = config(
        tmp_path, "env.id=ALE/Breakout-v5", "model.kind=cnn", "env.count=2", "env.noop_max=0", "train.rollout=256"
    )
    vector = atari("Breakout", 2)
    collector, _ = collector_for(made, vector)
    step, paid = vector.step, []
    vector.step = lambda actions: (paid.append(came := step(actions)), came)[1]
    random = np.random.default_rng(3)
    points, frames, expected, valid, deaths = np.zeros(2), np.zeros(2, dtype=int), [], 0, 0
    for t in range(256 * 2):
        row = t % 256
        collector.play(row, random.integers(4, size=2))
        rollout = collector.rollout
        assert (collector.raw_rewards[row] == np.sign(paid[-1].rewards)).all()
        points += paid[-1].rewards
        frames += rollout.valid[row]
        valid, deaths = valid + int(rollout.valid[row].sum()), deaths + int(rollout.done[row].sum())
        for n in range(2):
            if rollout.done[row, n] and vector.before[n]:  # the vector will begin a new game
                expected.append((points[n], frames[n]))
                points[n], frames[n] = 0.0, 0
    assert collector.rollout.episodes == expected
    assert len(expected) >= 2
    assert deaths >= 5 * len(expected)
    assert any(value > 4 for value, _ in expected), "bricks of the upper rows, which pay more than one"
    assert 1024 - len(expected) <= collector.num_steps == valid <= 1024 - len(expected) + 2
    assert all(length > 100 for _, length in expected), "a life lasts about 25 steps, a game at least five lives"


def test_time_limit_in_the_step_of_a_lost_life_ends_the_game():
    """ale-py resets then without calling it truncated; the row after it must not pass for a valid one."""
    ours = atari("Breakout", 8, max_episode_steps=24)  # who misses the first ball loses a life in step 24
    ours.reset()
    random, both = np.random.default_rng(0), 0
    for _ in range(80):
        before = ours.before.copy()
        step = ours.step(random.integers(4, size=8))
        # the stack is empty but for its last frame after a reset
        numbers = np.array([row.sum() for row in step.observations[:, :3]])
        np.testing.assert_array_equal(numbers == 0, before)
        np.testing.assert_array_equal(step.valid, ~before)
        both += int((step.over & step.terminated & ~step.truncated).sum())
    assert both > 0, "the case was never met"


def test_rewards_are_signs_for_the_learner_and_points_in_the_books(tmp_path):
    collector, _ = collector_for(config(tmp_path, *PONG), atari("Pong", 2))

    class Paying(GymVector):
        """Seven points for one, one for the other, none when dead."""

        def step(self, actions):
            step = super().step(actions)
            step.rewards = np.array([7.0, -3.0]) * step.valid
            return step

    collector.vector = Paying(make_atari(EnvConfig("ALE/Pong-v5"), 2, True), 0)
    collector.vector.reset()
    collector.play(0, np.zeros(2, dtype=np.int64))
    assert collector.raw_rewards[0].tolist() == [1.0, -1.0]
    assert collector.returns.tolist() == [7.0, -3.0]


def test_every_rom_of_the_package_is_found_by_its_gymnasium_name():
    """Each registered game has a ROM file that is there, and each ROM file a game."""
    register_atari()
    games = [name for name in gym.registry if name.startswith("ALE/")]
    assert len(games) > 100
    assert all(get_rom_path(rom_name(name)) is not None for name in games)
    roms = {path.stem for path in Path(ale_py.__file__).parent.glob("roms/*.bin")}
    assert roms - {rom_name(name) for name in games} <= {"combat", "joust", "maze_craze", "warlords"}, (
        "games for two players only"
    )
    assert rom_name("ALE/SpaceInvaders-v5") == "space_invaders"
    assert rom_name("ALE/TicTacToe3D-v5") == "tic_tac_toe_3d"
    for name in ("ALE/TicTacToe3D-v5", "ALE/MsPacman-v5"):
        vector = make_vector(EnvConfig(name), 0, 1)
        assert vector.reset().shape == (1, 4, 84, 84)
        vector.close()


def test_starts_differ_by_environment_and_process_and_repeat():
    """Up to 30 random idle steps, from the seed."""

    def starts(first):
        vector = make_vector(EnvConfig("ALE/Pong-v5"), 3, 4, first=first)
        vector.reset()
        found = vector.environment.step(np.zeros(4, dtype=np.int64))[4]["episode_frame_number"].tolist()
        vector.close()
        return found

    here, there = starts(0), starts(4)
    assert starts(0) == here != there
    assert len({*here, *there}) >= 4
    assert max(here + there) <= 1 + 30 + 4


def test_pong_trains_resumes_and_is_evaluated(tmp_path, monkeypatch, capsys):
    """Two updates with the convolutional network; stopped after the first, the second is the same; then a film of
    what it sees.
    """
    assert train(config(tmp_path / "whole", *PONG)) == 0
    with monkeypatch.context() as patch:
        stop_in_check(patch, 1)
        assert train(config(tmp_path / "run", *PONG)) == 143
    assert train(config(tmp_path / "run", *PONG), resume=True) == 0
    assert len(log(tmp_path / "run")) == 2
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert weights(tmp_path / "run")["last"]["model.actor_trunk.body.0.weight"].shape == (32, 4, 8, 8)
    short = ("env.max_episode_steps=40", "eval.episodes=2", "eval.video=true", "eval.video_frames=20")
    assert evaluate(config(tmp_path / "run", *PONG, *short)) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["return_mean"])
    with Image.open(tmp_path / "run/figures/episode.gif") as film:
        assert film.n_frames > 5
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert frames[0].shape == (252, 252, 3)
    assert sum((a != b).any() for a, b in pairwise(frames)) > 3


@pytest.mark.parametrize("name", ["ppo_pong", "ppo_breakout"])
def test_atari_configs_use_the_network_for_pixels(name):
    from ppo.config import Config

    made = resolve(Config, ROOT / f"configs/{name}.yaml", [word for word in TINY if word.startswith("device")])
    assert made.model.kind == "cnn"
    assert torch.Size([made.env.frame_stack]) == (4,)
