"""What surrounds a program: a reader that has enough, a terminal of few letters, Ctrl-C at any time, another's git."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.config import Options, resolve
from common.runtime import _commit
from diffusion.config import Config
from tests.helpers import DIGITS, ROOT, TINY, command, environment, errors, python, status

PROGRAMS = ["diffusion.train", "gnn.train", "ppo.train", "ppo.sweep", "gnn.eval", "common.report", "common.demo"]
CONFIGS = {"diffusion": "ddpm_digits", "gnn": "gcn_karate", "ppo": "ppo_cartpole_tiny", "vae": "vae_digits"}
KARATE = ["--config", str(ROOT / "configs/gcn_karate.yaml"), "train.steps=3", "train.seeds=2"]


@pytest.fixture(scope="module")
def karate(tmp_path_factory) -> Path:
    """A trained run of gnn, whose name and whose table have letters beyond ASCII."""
    run = tmp_path_factory.mktemp("runs") / "kärate"
    assert command("gnn", "train", *KARATE, "device=cpu", f"run_dir={run}") == 0
    return run


def test_a_reader_that_has_enough(karate):
    """`python -m gnn.eval ... | head -1`: quiet, and the files are whole."""
    command = [sys.executable, "-m", "gnn.eval", "--run", str(karate), "eval.figures=false"]
    for read_first in (True, False):
        (karate / "eval.json").unlink(missing_ok=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if read_first:
            process.stdout.readline()
        process.stdout.close()
        text = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) in (0, 1)
        assert not errors(text) and "Exception ignored" not in text and "BrokenPipe" not in text
        assert json.loads((karate / "eval.json").read_text())["metrics"]


@pytest.mark.parametrize(
    "words", [["-m", "gnn.eval", "eval.figures=false", "--run"], ["-m", "diffusion.train", "--help"]]
)
def test_a_terminal_of_few_letters(words, karate):
    done = subprocess.run(
        [sys.executable, *words, *([str(karate)] if words[-1] == "--run" else [])],
        cwd=ROOT,
        env=environment() | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not errors(done.stderr), done.stderr
    assert done.stdout.isascii() and len(done.stdout.splitlines()) > 5


# Ctrl-C arrives while this module is imported, in a place where an exception would be swallowed
SLOW_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
raise SystemExit("went on")
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_importing(program, tmp_path):
    """The first of the slow packages that each program imports is replaced by one that gets the signal."""
    for package in ("torch", "omegaconf", "jinja2", "rich"):
        (tmp_path / f"{package}.py").write_text(SLOW_IMPORT)
    path = {"PYTHONPATH": f"{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-m", program, "--config", str(DIGITS)],
        cwd=ROOT,
        env=environment() | path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted while starting\n")


def test_ctrl_c_after_the_imports_puts_things_in_order():
    """From the main function on it is an exception again, until a run has handlers of its own."""
    code = """
import sys
sys.argv[0] = "-m"
from common.errors import exits_cleanly
import os, signal

@exits_cleanly
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("in order")

main()
"""
    done = python("-c", code)
    assert done.returncode == 130 and done.stdout == "in order\n" and len(errors(done.stderr)) == 1


def test_git_is_asked_without_a_lock(tmp_path, monkeypatch):
    """A refreshed index is written, under a lock that makes somebody's commit fail."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    git("init")
    Path("file").write_text("text")
    git("add", "file")
    git("commit", "-m", "first")
    os.utime("file", (1e9, 1e9))  # the same content at another time: what `git status` would note in the index
    index = Path(".git/index").read_bytes()
    assert len(_commit()) == 40
    assert Path(".git/index").read_bytes() == index


@pytest.mark.parametrize(
    ("project", "setting"),
    [
        *((project, f"device={name}") for project in CONFIGS for name in ("cuda:97", "nonsense")),
        ("diffusion", "precision=fp16"),
    ],
)
def test_a_dry_run_looks_for_the_device(project, setting, capsys):
    import importlib

    if setting == "precision=fp16" and torch.cuda.is_available():
        pytest.skip("a GPU has fp16")
    module = importlib.import_module(f"{project}.train")
    schema = importlib.import_module(f"{project}.config").Config
    resolved = resolve(schema, ROOT / f"configs/{CONFIGS[project]}.yaml", [setting])
    assert status(module.train, resolved, Options("train", dry_run=True)) == 2
    assert capsys.readouterr().err.startswith(f"error: {setting.partition('=')[0]}: ")


# -- memory and compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_names_what_to_lower(error, monkeypatch, capsys, tmp_path):
    import diffusion.train

    def fail(*words):
        raise error

    monkeypatch.setattr(diffusion.train, "load_images", fail)
    config = resolve(Config, DIGITS, [*TINY, f"run_dir={tmp_path / 'run'}"])
    assert status(diffusion.train.train, config, Options("train")) == 1
    (line,) = errors(capsys.readouterr().err)
    assert line.startswith("error: out of memory, try a smaller ")
    assert "train.microbatch" in line and "train.batch_size" in line and "sample.batch_size" in line


def test_other_errors_are_not_about_memory(monkeypatch, capsys):
    import diffusion.train

    def fail(*words):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(diffusion.train, "load_images", fail)
    assert status(diffusion.train.train, resolve(Config, DIGITS, [*TINY]), Options("train")) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: shapes do not match")


def test_compile_without_a_compiler(tmp_path):
    small = ["--config", str(ROOT / "configs/vae_digits.yaml"), "train.steps=1", "device=cpu"]
    words = ["-m", "vae.train", *small, "compile=true", f"run_dir={tmp_path / 'run'}"]
    env = {name: value for name, value in environment().items() if name not in ("CC", "CXX")}
    env |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    (line,) = errors(done.stderr)
    assert done.returncode == 1 and "compile=false" in line and "C++ compiler" in line
