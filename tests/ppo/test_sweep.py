"""Sweeps: what they write, what they refuse, and how they stop."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar

import pytest

import ppo.sweep
from common.checkpoint import Checkpoints
from common.errors import ProjectError
from ppo.jobs import Job, lock_folder, run_jobs
from tests.helpers import ROOT, command, environment, errors, python, status
from tests.ppo.helpers import CARTPOLE, TINY

ENDLESS = ("train.steps=3200000", "train.save_every=1000000")


def words(folder: Path, *more: str) -> list[str]:
    """The command line of a sweep of tiny runs."""
    return ["-m", "ppo.sweep", "--config", str(CARTPOLE), "--folder", str(folder), "--jobs", "2", *TINY, *more]


def sweep(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The sweep in this process, which has PyTorch already; its runs are processes as ever."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words(folder, *more)[1:])
        patch.chdir(ROOT)
        code = status(ppo.sweep.main)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def start(folder: Path, *more: str) -> subprocess.Popen:
    """A sweep in a group of its own, whose two runs have logged something."""
    sweep = subprocess.Popen(
        [sys.executable, *words(folder, "--seeds", "2", *ENDLESS, *more)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    logs = [folder / f"{seed:03d}/metrics.jsonl" for seed in range(2)]
    while not all(log.exists() and log.read_text().count("\n") > 2 for log in logs):
        assert sweep.poll() is None, sweep.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return sweep


def newest(folder: Path, seed: int) -> int | None:
    """The step of the newest checkpoint of a seed."""
    return Checkpoints(folder / f"{seed:03d}/checkpoints", 2, 0).newest_step()


def wait_until_free(folder: Path) -> None:
    """Until nobody holds the folder's lock."""
    deadline = time.monotonic() + 60
    while True:
        try:
            os.close(lock_folder(folder))
            return
        except ProjectError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a finished sweep of two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("swept") / "seeds"
    done = python(*words(folder, "--seeds", "2"))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_what_a_sweep_writes(swept):
    folder, said = swept
    result = json.loads((folder / "sweep.json").read_text())
    assert result == said
    assert result["seeds"] == [0, 1]
    with (folder / "seeds.csv").open() as file:
        rows = list(csv.DictReader(file))
    each = [json.loads((folder / f"{seed:03d}/eval.json").read_text())["metrics"] for seed in range(2)]
    assert [float(row["return_mean"]) for row in rows] == [metrics["return_mean"] for metrics in each]
    assert result["metrics"]["return_mean"] == pytest.approx(sum(m["return_mean"] for m in each) / 2)
    assert result["metrics"]["return_mean_min"] == min(m["return_mean"] for m in each)
    assert (folder / "learning_curve.png").exists()


def test_a_finished_seed_is_not_repeated_and_a_new_one_is_added(swept):
    folder, _ = swept
    before = (folder / "000/eval.json").stat().st_mtime_ns
    done = sweep(folder, "--seeds", "3")
    assert done.returncode == 0, done.stderr
    assert (folder / "000/eval.json").stat().st_mtime_ns == before
    assert json.loads(done.stdout.splitlines()[-1])["seeds"] == [0, 1, 2]


def test_runs_of_other_settings_are_refused(swept):
    """They would be reported under the new command; nothing is touched."""
    folder, _ = swept
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    done = sweep(folder, "--seeds", "2", "train.lr=0.004")
    assert done.returncode == 1
    (line,) = errors(done.stderr)
    assert "000 was trained with train.lr=0.002, not 0.004" in line
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_another_evaluation_is_made_anew_without_training(swept):
    folder, _ = swept
    metrics = (folder / "000/metrics.jsonl").read_text()
    done = sweep(folder, "--seeds", "1", "eval.episodes=6")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "000/eval.json").read_text())["n"] == {"episodes": 6}
    assert (folder / "000/metrics.jsonl").read_text() == metrics


def test_results_of_other_weights_are_made_anew(swept):
    """An eval.json beside weights that it does not speak of."""
    folder, _ = swept
    path = folder / "001/eval.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"weights_sha256": "0" * 64, "metrics": {"return_mean": 999.0}}))
    done = sweep(folder, "--seeds", "2", "--first", "1", "eval.episodes=4")
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["metrics"] == told["metrics"]


def test_an_evaluation_by_hand_with_other_settings_is_made_anew(swept):
    """`ppo.eval eval.episodes=2` leaves the config of the run as it is, and its eval.json is not the sweep's."""
    folder, _ = swept
    again = ("--seeds", "1", "--first", "1", "eval.episodes=4")
    assert sweep(folder, *again).returncode == 0
    expected = json.loads((folder / "001/eval.json").read_text())
    assert command("ppo", "eval", "--run", str(folder / "001"), "eval.episodes=2") == 0
    assert json.loads((folder / "001/eval.json").read_text())["n"] == {"episodes": 2}
    assert sweep(folder, *again).returncode == 0
    assert json.loads((folder / "001/eval.json").read_text())["metrics"] == expected["metrics"]


@pytest.mark.parametrize("word", ["seed=3", "run_dir=here"])
def test_overrides_that_a_sweep_sets_itself_are_refused(word, tmp_path):
    done = sweep(tmp_path / "seeds", word)
    assert done.returncode == 2
    assert "--first" in done.stderr
    assert not (tmp_path / "seeds").exists()


@pytest.mark.parametrize("whole_group", [False, True], ids=["sweep alone", "its group, as Ctrl-C"])
def test_a_stop_signal_is_passed_on_once_and_every_run_saves(whole_group, tmp_path):
    folder = tmp_path / "seeds"
    process = start(folder)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if whole_group else 143), said
    assert "the same command goes on" in said
    for seed in range(2):
        assert newest(folder, seed), (folder / f"{seed:03d}/train.log").read_text()
        assert (folder / f"{seed:03d}/train.log").read_text().count("finishing this step") == 1
    wait_until_free(folder)


def test_a_signal_is_passed_on_once_however_long_saving_takes():
    """The second would mean: leave at once. A process that saves for some seconds gets one."""

    class Saving:
        returncode = 143
        signals: ClassVar[list[int]] = []
        polls = 0

        def poll(self):
            self.polls += 1
            if self.polls == 2:
                signal.raise_signal(signal.SIGTERM)
            return 143 if self.polls > 20 else None

        def send_signal(self, number):
            self.signals.append(number)

    class Waiting(Job):
        def start_next(self, lock):
            self.process = Saving()
            return True

    assert run_jobs([Waiting(0, Path("nowhere"), [])], 1, -1) == signal.SIGTERM
    assert Saving.signals == [signal.SIGTERM]


def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch):
    """Passed on as well: nobody is left."""
    folder = tmp_path / "seeds"
    process = start(folder)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.communicate(timeout=60)
    assert process.returncode == 143
    wait_until_free(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_killed_sweep_leaves_no_run_behind(tmp_path):
    """Its runs save and leave; until then the folder is theirs, and the same command is refused."""
    folder = tmp_path / "seeds"
    process = start(folder)
    with pytest.raises(ProjectError, match="in use by another sweep"):
        lock_folder(folder)
    process.kill()
    process.communicate()
    wait_until_free(folder)
    assert all(newest(folder, seed) for seed in range(2))


def test_the_lock_is_held_by_runs_that_outlive_the_sweep(tmp_path):
    """Wherever the parent's death is not told: a process with the lock keeps it."""
    lock = lock_folder(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    os.close(lock)
    with pytest.raises(ProjectError, match="in use"):
        lock_folder(tmp_path)
    child.communicate(b"\n")
    os.close(lock_folder(tmp_path))


def test_a_run_that_fails_is_named_and_the_others_save(tmp_path):
    folder = tmp_path / "seeds"
    (folder / "001").mkdir(parents=True)
    (folder / "001/checkpoints").write_text("in the way")
    done = sweep(folder, "--seeds", "2", *ENDLESS)
    assert done.returncode == 1
    (line,) = errors(done.stderr)
    assert "seed 1 failed with exit status 1" in line
    wait_until_free(folder)
