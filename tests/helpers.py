"""Tiny runs of the diffusion project, in this process or in one of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import Options, resolve
from diffusion.config import Config

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "configs/ddpm_digits.yaml"
TINY = ["model.channels=8", "model.groups=4", "model.multipliers=[1]", "model.attention=[]", "model.dropout=0.3", "data.max_images=64",
        "data.flip=true", "train.batch_size=16", "train.steps=12", "train.log_every=1", "train.save_every=100", "train.sample_every=0",
        "sample.count=4", "sample.steps=3", "precision=fp32", "device=cpu"]  # 64 images in batches of 16: an epoch is four steps


def tiny(run_dir: Path, *overrides: str) -> Config:
    """The digits config, shrunk to a few milliseconds a step."""
    return resolve(Config, DIGITS, [*TINY, f"run_dir={run_dir}", *overrides])


def train(config: Config, **options: Any) -> int:
    """Run the training program in this process; its exit status."""
    from diffusion.train import train

    return status(train, config, Options("train", **options))


def status(main: Any, *args: Any) -> int:
    """The exit status of a program's main function."""
    try:
        main(*args)
    except SystemExit as stop:
        return stop.code
    return 0


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the interpreter from the repository's root."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False, **options)


def start_python(*words: str) -> subprocess.Popen[str]:
    """As `python`, without waiting for the end."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def environment() -> dict[str, str]:
    """One thread, and no progress bar."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own; skips the test where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
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
    for words in (["--bind", str(folder), str(folder)], ["-o", "remount,ro,bind", str(folder)]):
        mounted = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if mounted.returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
            pytest.skip(f"cannot mount a folder read-only here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
