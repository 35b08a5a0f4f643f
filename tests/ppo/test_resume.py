"""Exact resume, environments included: a run that was stopped and one that was not log the same numbers and end with
the same bits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
import torch

from common.checkpoint import Checkpoints
from tests.helpers import ROOT, environment, errors, same, stop_in_check
from tests.ppo.helpers import CARTPOLE, TINY, Counting, config, log, register, train, two_processes, weights

NORMAL = (
    "env.normalize_observations=true",
    "env.normalize_rewards=true",
    "train.evaluate_every=2",
    "train.evaluate_episodes=4",
)
TOY = register(noisy=True)
KINDS = {
    "native": ("env.normalize_rewards=true",),  # the simulator's arrays are saved
    "native, normalised, dead rows": (*NORMAL, "env.max_episode_steps=9", "train.steps=1280"),
    # seeds and actions are saved and played again
    "local": ("env.id=LunarLander-v3", "train.rollout=48", "train.steps=1152", *NORMAL),
    "local, continuous": (
        "env.id=LunarLander-v3",
        "env.continuous=true",
        "env.max_episode_steps=30",
        "train.rollout=48",
        "train.steps=1152",
    ),
    # new episodes at saves
    "processes": (f"env.id={TOY}", "env.backend=processes", "train.steps=704", "train.save_every=3", *NORMAL),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> the folder of an uninterrupted run."""

    @cache
    def folder(kind):
        path = tmp_path_factory.mktemp("whole") / "run"
        assert train(config(path, *KINDS[kind])) == 0
        return path

    return folder


def newest(folder):
    """All that a run would go on from."""
    checkpoints = Checkpoints(folder / "checkpoints", 2, 0)
    state = Checkpoints.load(checkpoints.path(checkpoints.newest_step()))
    return {name: state[name] for name in ("step", "parts", "rng")}


@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("native", (3,)),
        ("native", (4,)),
        ("native", (2, 3)),
        ("native", (1, 6)),
        ("native, normalised, dead rows", (17,)),
        ("local", (2,)),
        ("local", (4, 5)),
        ("local, continuous", (3,)),
        ("processes", (1,)),
        ("processes", (4,)),
        ("processes", (3,)),
        ("processes", (5, 7)),
        ("processes", (6, 7, 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "stopped in " + " and ".join(map(str, value)),
)
def test_resume_is_exact(kind, stops, whole, tmp_path, monkeypatch):
    """Real SIGTERMs in the middle of an update's epochs; in some of these updates a checkpoint is due anyway."""
    folder = tmp_path / "run"
    stop_in_check(monkeypatch, *stops)
    for i, update in enumerate(stops):
        assert train(config(folder, *KINDS[kind]), resume=i > 0) == 143
        assert newest(folder)["step"] == update, "it leaves within one update, with a checkpoint"
    assert train(config(folder, *KINDS[kind]), resume=True) == 0
    expected = whole(kind)
    assert log(folder) == log(expected)
    assert len(log(folder)) == newest(folder)["step"] > max(stops) - 1
    assert same(weights(folder), weights(expected))
    assert same(newest(folder), newest(expected))


def test_these_runs_are_worth_comparing(whole):
    """Episodes end and the best policy is kept in them, so that a resumed run has something to lose."""
    for kind in KINDS:
        lines = log(whole(kind))
        assert float(lines[-1]["episodes"]) > 3, kind
        assert len({line["policy_loss"] for line in lines}) == len(lines), kind
    assert newest(whole("processes"))["parts"]["leader"]["weights"]
    assert newest(whole("native, normalised, dead rows"))["parts"]["leader"]["weights"]


def test_restart_begins_the_books_anew(tmp_path):
    """At a regular save the worker processes' episodes are given up: no return is logged that mixes two of them."""
    name = register(limit=40)
    assert train(config(tmp_path / "run", f"env.id={name}", "env.backend=processes", "train.save_every=2")) == 0
    last = log(tmp_path / "run")[-1]
    assert last["episodes"] == "0.0", "no episode of 40 steps fits between two restarts 32 steps apart"
    assert last["return_mean"] == "nan"


class Forgetful(Counting):
    """The same seed does not lead to the same place."""

    made = 0

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        Forgetful.made += 1
        return observation + Forgetful.made, info


@pytest.mark.parametrize("backend", ["local", "processes"])
def test_environment_that_does_not_repeat_itself_begins_new_episodes(backend, tmp_path, monkeypatch, capsys):
    """It cannot be brought back to where it was; what was learned can, and a note says so. No return is logged that
    mixes two episodes.
    """
    import gymnasium as gym

    gym.register("Forgetful-v0", entry_point=Forgetful)
    words = ("env.id=Forgetful-v0", "train.steps=640", f"env.backend={backend}")
    try:
        stop_in_check(monkeypatch, 3)
        assert train(config(tmp_path / "run", *words)) == 143
        assert train(config(tmp_path / "run", *words), resume=True) == 0
    finally:
        gym.registry.pop("Forgetful-v0")
    said = capsys.readouterr().err
    assert not errors(said)
    assert said.count("note: Forgetful-v0 does not come back to where it was") == 1
    assert [line["step"] for line in log(tmp_path / "run")] == [str(step) for step in range(1, 11)]


@pytest.mark.parametrize("words", [("env.count=8",), ("train.rollout=64",)])
def test_resume_with_other_rollouts_is_refused(words, tmp_path, monkeypatch, capsys):
    """Updates are counted in rollouts: with longer ones nothing would be left to train, and nothing be said. The run
    goes on as it was.
    """
    stop_in_check(monkeypatch, 3)
    assert train(config(tmp_path / "run")) == 143
    capsys.readouterr()
    assert train(config(tmp_path / "run", *words), resume=True) == 1
    (line,) = errors(capsys.readouterr().err)
    assert "env.count=4 and train.rollout=16" in line
    assert newest(tmp_path / "run")["step"] == 3
    assert train(config(tmp_path / "run"), resume=True) == 0


def test_two_processes_resume(tmp_path):
    """Each process gets its own environments back, not those of the first: the second is stopped at an update
    without a regular save.
    """
    two_processes(
        tmp_path,
        f"""
        folder, words = Path({str(tmp_path)!r}), ("env.backend=local", *{NORMAL!r})
        assert train(config(folder / "whole", *words)) == 0
        with pytest.MonkeyPatch.context() as patch:
            stop_in_check(patch, 3 if os.environ["RANK"] == "1" else 99)
            assert train(config(folder / "run", *words)) == (143 if os.environ["RANK"] == "1" else 0)
        if os.environ["RANK"] == "0":  # the one that saves
            assert Checkpoints(folder / "run/checkpoints", 2, 0).newest_step() == 4  # agreed when the next step begins
        assert train(config(folder / "run", *words), resume=True) == 0
    """,
    )
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert same(newest(tmp_path / "run")["parts"], newest(tmp_path / "whole")["parts"])


def test_a_kl_stop_and_a_signal_leave_no_process_waiting(tmp_path):
    """Every update ends after its first step because of the KL; one process alone gets a stop signal. Both leave at the
    same update, and go on together.
    """
    two_processes(
        tmp_path,
        f"""
        folder, words = Path({str(tmp_path)!r}), ("env.backend=local", "train.target_kl=1e-9")
        assert train(config(folder / "whole", *words)) == 0
        with pytest.MonkeyPatch.context() as patch:
            stop_in_check(patch, 3 if os.environ["RANK"] == "1" else 99)
            assert train(config(folder / "run", *words)) == (143 if os.environ["RANK"] == "1" else 0)
        assert train(config(folder / "run", *words), resume=True) == 0
    """,
    )
    lines = log(tmp_path / "whole")
    assert len(lines) == 6 and float(lines[2]["epochs"]) == 1, "the KL stops the update in which the signal arrives"
    assert log(tmp_path / "run") == lines
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_resume_with_another_number_of_processes_is_refused(tmp_path, monkeypatch, capsys):
    from ppo.collect import Collector

    stop_in_check(monkeypatch, 2)
    monkeypatch.setattr(Collector, "gathered", lambda self: [self.state_dict()] * 2)
    assert train(config(tmp_path / "run")) == 143
    assert train(config(tmp_path / "run"), resume=True) == 1
    (line,) = errors(capsys.readouterr().err)
    assert "2 processes" in line


def test_stop_signal_to_the_whole_group_spares_the_workers(tmp_path):
    """As Ctrl-C or a cluster does it: the main process still saves, nothing hangs and no worker is left."""
    command = [
        sys.executable,
        "-m",
        "ppo.train",
        "--config",
        str(CARTPOLE),
        *TINY,
        f"run_dir={tmp_path / 'run'}",
        "env.backend=processes",
        "env.count=2",
        "train.steps=3200000",
        "train.save_every=1000000",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143, stderr
    assert not errors(stderr)
    assert newest(tmp_path / "run")["step"] >= 3
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_checkpoints_hold_the_generators(whole):
    """The canary of all of the above: the collector's state is tensors and plain values, one for each process."""
    (state,) = newest(whole("native"))["parts"]["collector"]
    assert {"vector", "observations", "rewards", "current", "returns", "lengths"} <= state.keys()
    assert state["vector"]["rng"]["state"].isdigit()
    assert isinstance(state["vector"]["state"], torch.Tensor)
