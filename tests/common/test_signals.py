"""A wish to stop, however it arrives and whoever has gone away meanwhile, ends in a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from common.checkpoint import Checkpoints
from common.files import read_json
from tests.helpers import DIGITS, ROOT, TINY, environment

WORDS = ["--config", str(DIGITS), *TINY, "train.steps=100000", "train.log_every=20", "train.save_every=100000"]


@pytest.fixture
def start():
    """`begin`, whose processes do not outlive the test."""
    begun = []

    def remember(run, **pipes) -> subprocess.Popen:
        return begin(run, begun, **pipes)

    yield remember
    for process in begun:
        process.kill()


def begin(run, begun: list, **pipes) -> subprocess.Popen:
    """A training that goes on until it is stopped, as a group of its own, and has done some steps."""
    command = [sys.executable, "-m", "diffusion.train", *WORDS, f"run_dir={run}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **pipes)
    begun.append(process)
    deadline = time.monotonic() + 60
    while "total_steps" not in read_json(run / "env.json"):  # written where the loop begins
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    return process


def saved(run) -> int:
    """The step of the newest whole checkpoint, 0 without any."""
    return Checkpoints(run / "checkpoints").newest_step() or 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_each_signal_saves(name, start, tmp_path):
    process = start(tmp_path / "run", stderr=subprocess.DEVNULL)
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 128 + getattr(signal, name)
    assert saved(tmp_path / "run") > 0


def test_the_same_wish_from_two_sides_is_one_wish(start, tmp_path):
    """A group and a parent: two signals within a fraction of a second."""
    process = start(tmp_path / "run", stderr=subprocess.DEVNULL)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert saved(tmp_path / "run") > 0


@pytest.mark.parametrize("stream", ["stderr", "stdout and stderr"])
def test_a_reader_that_goes_away_costs_no_checkpoint(stream, start, tmp_path):
    """As `2>&1 | tee log` does, which dies of the same Ctrl-C, and before us."""
    reader, writer = os.pipe()
    pipes = {"stderr": writer} if stream == "stderr" else {"stderr": writer, "stdout": writer}
    process = start(tmp_path / "run", **pipes)
    os.close(writer)
    os.close(reader)
    time.sleep(0.5)  # lines are written to nobody meanwhile
    assert process.poll() is None, "it goes on"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert saved(tmp_path / "run") > 0
