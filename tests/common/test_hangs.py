"""Where something runs out or somebody is killed, a program with helpers ends: one line, at once, nobody stays."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import Checkpoints
from common.errors import ProjectError
from common.files import read_json
from common.images import folder
from common.images.folder import FolderImages
from common.images.listing import list_images
from tests.helpers import DIGITS, ROOT, TINY, environment, errors

AT_ONCE = 60  # seconds, imports included, on a machine that does other things as well


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 60 images."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def on_pictures(folder: Path, run: Path, workers: int) -> list[str]:
    """A training on images that worker processes decode, 100 KB a batch."""
    settings = ["data.dataset=folder", f"data.folder={folder}", "data.image_size=32", "data.max_images=0"]
    settings += ["model.image_channels=3", "model.num_classes=0", "train.batch_size=32", f"data.workers={workers}"]
    return ["-m", "diffusion.train", "--config", str(DIGITS), *TINY, *settings, f"run_dir={run}"]


def end_of(words: list[str], handles: int = 0) -> tuple[int, str]:
    """Exit status and messages of a command with so many file handles; it and its helpers are gone in time."""

    def limit() -> None:
        if handles:
            resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))

    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,  # noqa: PLW1509 (one thread)
    )
    try:
        _, text = process.communicate(timeout=AT_ONCE)  # the pipe ends with the last process that holds it
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


def test_a_small_shared_memory_is_enough(pictures, tmp_path):
    """Containers have 64 MB of it; here it holds no batch. It used to hang."""
    command = [sys.executable, *on_pictures(pictures, tmp_path / "run", 2)]
    isolated = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=90k tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a /dev/shm of one's own needs root")
    status, text = end_of([*isolated, *command])
    assert status == 0, text


def test_too_few_file_handles_for_workers(pictures, tmp_path):
    status, text = end_of([sys.executable, *on_pictures(pictures, tmp_path / "run", 16)], handles=64)
    (line,) = errors(text)
    assert status == 1 and "Too many open files" in line and "data.workers" in line
    assert "Exception ignored" not in text


def test_too_few_file_handles_in_a_worker(pictures, monkeypatch, capfd):
    """No image is bad because the machine has no handle left."""

    def fail(path, *rest):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr("common.images.folder.read_image", fail)
    images = FolderImages("mine", list_images(pictures, "data.folder"), size=16, workers=1)
    with pytest.raises(ProjectError, match=r"has died.* data\.workers.*Too many open files"):
        next(images.batches(1, 8, 0, torch.device("cpu")))
    said = capfd.readouterr().err  # gRPC, where other tests of this process have used it, speaks of skipping, too
    assert not any(f"skipping {path}" in said for path in images.files)


def test_too_few_file_handles_for_environments(tmp_path):
    config = ["--config", str(ROOT / "configs/ppo_cartpole_tiny.yaml"), "device=cpu", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "ppo.train", *config, "env.backend=processes", "env.count=32"]
    status, text = end_of(command, handles=64)
    (line,) = errors(text)
    assert status == 1 and "Too many open files" in line and "env.count" in line


def test_a_file_system_that_never_answers(pictures, monkeypatch):
    """As a network file system whose server is gone: the reader blocks, and there is no error to be had."""
    monkeypatch.setattr("common.images.folder.read_image", lambda *words: time.sleep(1000))
    images = FolderImages("mine", list_images(pictures, "data.folder"), size=16, workers=2, patience=3)
    begun = time.monotonic()
    with pytest.raises(ProjectError, match=r"for 3 seconds: .*does not answer; data\.patience"):
        next(images.batches(1, 8, 0, torch.device("cpu")))
    assert time.monotonic() - begun < AT_ONCE
    for process in multiprocessing.active_children():
        process.join(AT_ONCE)
    assert not multiprocessing.active_children()


def test_who_cannot_be_killed_is_left_behind(monkeypatch, capsys):
    """In the middle of a read from such a file system a process does not even die of kill -9."""

    asked = []

    class Waiting:
        def kill(self):
            asked.append("kill")

        def join(self, seconds):
            asked.append("join")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(folder.multiprocessing, "active_children", lambda: [Waiting()])
    monkeypatch.setattr(folder.os, "_exit", leave)
    with pytest.raises(SystemExit) as stop:
        folder.leave_who_cannot_be_killed()
    assert stop.value.code == 1 and asked == ["kill", "join"]


# -- somebody is killed ------------------------------------------------------------------------------------------------


def wait_until(condition, seconds: float = AT_ONCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_workers_of_a_killed_torchrun_save_and_leave(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        "-m",
        "diffusion.train",
        "--config",
        str(DIGITS),
        *TINY,
        "train.steps=100000",
        "train.save_every=100000",
    ]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(
            [*command, f"run_dir={tmp_path / 'run'}"], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    workers = []
    try:
        wait_until(lambda: "total_steps" in read_json(tmp_path / "run/env.json") or agent.poll() is not None)
        workers = children(agent.pid)
        assert len(workers) == 2, (tmp_path / "log").read_text()
        agent.kill()
        agent.wait()
        wait_until(lambda: all(map(gone, workers)))
        assert Checkpoints(tmp_path / "run/checkpoints").newest_step()
    finally:
        for pid in [agent.pid, *workers]:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_a_stage_of_a_killed_demo_leaves(tmp_path):
    stage = "import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(300)"
    code = f"import sys\nfrom common.demo import Runner\nRunner().run([sys.executable, '-c', {stage!r}])"
    demo = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    assert demo.stderr.readline() == b"begun\n"
    (pid,) = children(demo.pid)
    demo.kill()
    demo.wait()
    demo.stderr.close()
    try:
        wait_until(lambda: gone(pid), 10)
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
