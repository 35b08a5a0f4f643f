"""Tiny runs of the diffusion project, in this process or in one of their own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoints
from common.config import BaseConfig, Options, load, resolve
from common.ema import EMA
from common.logging import read_metrics
from common.run import Run
from diffusion.config import Config

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "configs/ddpm_digits.yaml"
# 64 images in batches of 16: an epoch is four steps, the run three epochs
TINY = [
    "model.channels=8",
    "model.groups=4",
    "model.multipliers=[1]",
    "model.attention=[]",
    "model.dropout=0.3",
    "data.max_images=64",
    "data.flip=true",
    "train.batch_size=16",
    "train.steps=12",
    "train.log_every=1",
    "train.save_every=100",
    "train.sample_every=0",
    "sample.count=4",
    "sample.steps=3",
    "precision=fp32",
    "device=cpu",
]

STEPS = 12
TIMING = ("images_per_second",)


def schema_of(project: str) -> type[BaseConfig]:
    """The config class of a project."""
    return importlib.import_module(f"{project}.config").Config


def tiny(run_dir: Path, *overrides: str) -> Config:
    """The digits config, shrunk to a few milliseconds a step."""
    return resolve(Config, DIGITS, [*TINY, f"run_dir={run_dir}", *overrides])


def train(config: Config, **options: Any) -> int:
    """Run the training program in this process; its exit status."""
    from diffusion.train import train

    return status(train, config, Options("train", **options))


def command(project: str, mode: str, *words: str) -> int:
    """`python -m <project>.<mode> <words>` in this process; its exit status."""

    def call() -> None:
        config, options = load(schema_of(project), project, mode, list(words))
        module = importlib.import_module(f"{project}.{mode}")
        getattr(module, "train" if mode == "train" else "main")(config, options)

    return status(call)


def status(main: Any, *args: Any) -> int:
    """The exit status of a program's main function."""
    try:
        main(*args)
    except SystemExit as stop:
        return stop.code
    return 0


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter from the repository's root."""
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )


def torchrun(module: str, *words: str) -> None:
    """Run a program by torchrun in two processes, to its good end."""
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", module, *words)
    assert done.returncode == 0, done.stderr


SEED = """
import json, os, runpy, sys
import torch._dynamo  # PyTorch, and what its optimizers and DistributedDataParallel load when they are first used
for line in sys.stdin:
    words, out, err, environments = json.loads(line)
    running = []
    for environment in environments:
        running.append(os.fork())
        if running[-1]:
            continue
        for number, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        sys.orig_argv = ["python", "-m", *words]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        sys.exit()  # as the interpreter ends
    print(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in running), flush=True)
"""


@functools.cache
def seed_process() -> subprocess.Popen[str]:
    """A process that has loaded PyTorch, which costs seconds, and from which programs are forked."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", SEED], cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True
    )
    atexit.register(process.communicate)  # the end of its input is its own
    return process


def program(*words: str, environments: Sequence[dict[str, str]] = ({},)) -> subprocess.CompletedProcess[str]:
    """`python -m <words>` in a process of its own, forked from one that has PyTorch already; one for each of the
    environments, side by side.
    """
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = [words, out.name, err.name, [environment() | more for more in environments]]
        if seed_process().poll() is not None:  # somebody has ended it
            seed_process.cache_clear()
        seed = seed_process()
        print(json.dumps(request), file=seed.stdin, flush=True)
        status = int(seed.stdout.readline())
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


def two_processes(module: str, *words: str) -> None:
    """The same as `torchrun` does, in a quarter of the time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(2)
    ]
    done = program(module, *words, environments=ranks)
    assert done.returncode == 0, done.stderr


def start_python(*words: str) -> subprocess.Popen[str]:
    """As `python`, without waiting for the end."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)


def environment() -> dict[str, str]:
    """One thread, and no progress bar."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def checkpoint(run_dir: Path, step: int = STEPS) -> dict:
    return Checkpoints.load(run_dir / f"checkpoints/{step:08d}.pt")


def log(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def same(a: object, b: object) -> bool:
    """Equality to the last bit of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    first, second = checkpoint(a), checkpoint(b)
    for part in ("model", "optimizer", "ema", "measured"):
        assert same(first["parts"][part], second["parts"][part]), part
    assert same(first["rng"], second["rng"])
    assert first["step"] == second["step"] == STEPS
    assert log(a) == log(b)
    assert [line["step"] for line in log(a)] == list(range(1, STEPS + 1))


def stop_in_step(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Send this process a real SIGTERM in the middle of each of these steps."""
    update, waiting = EMA.update, list(steps)

    def update_and_stop(self, model, step):
        update(self, model, step)
        if step in waiting:
            waiting.remove(step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(EMA, "update", update_and_stop)


def stop_in_check(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The same right before the update of each of these steps, for any project."""
    check, waiting = Run.check_gradients, list(steps)

    def check_and_stop(self, *args, **kwargs):
        result = check(self, *args, **kwargs)
        if self.step in waiting:
            waiting.remove(self.step)
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Run, "check_gradients", check_and_stop)


def errors(text: str) -> list[str]:
    """The error lines of a program; there must be no traceback among them."""
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own; skips the test where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder unwritable: for root, who may write anywhere, by a read-only mount over itself."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,ro,bind", str(folder))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*words: str) -> None:
    """Call mount(8); skips the test where it is not allowed, as in a container."""
    mounted = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
