"""Tables of many runs: a cell is a config with some settings and a seed, trained and evaluated in a folder of its own.
What is finished is kept as long as its config stays the same, and what was stopped goes on.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from common.config import BaseConfig, resolve
from common.files import read_json
from common.provenance import config_hash


def train_and_evaluate(
    project: str, kind: type[BaseConfig], config: str, overrides: list[str], folder: Path, threads: int
) -> tuple[dict, dict]:
    """Train and evaluate.

    Args:
        project: its name: `vae`.
        kind: its class of configs.
        config: a file.
        overrides: `key=value`, of what is trained and of how it is evaluated.
        folder: the run's.
        threads: of each program.

    Returns:
        The content of eval.json, and what a record says of how it came about.
    """
    overrides = [f"run_dir={folder}", *overrides]
    digest = config_hash(resolve(kind, Path(config), overrides))
    begun = is_begun(kind, folder, digest)
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    train = ["-m", f"{project}.train", "--config", config, *overrides]
    train_seconds = command([*train, *(["--resume"] if begun else [])], threads)
    command(["-m", f"{project}.eval", "--run", str(folder)], threads)
    result = read_json(folder / "eval.json")
    environment = read_json(folder / "env.json")
    origin = {
        # None for a run in several parts, of which only the last was timed
        "train_cpu_seconds": None if begun else round(train_seconds, 1),
        "eval_seconds": result["seconds"],
        "threads": threads,
        "precision": result["precision"],
        # without the folder, which is the machine's own
        "command": f"python {' '.join(word for word in train if not word.startswith('run_dir='))}",
        "config_sha256": digest,
        **{key: environment[key] for key in ("commit", "device_name") if key in environment},
    }
    return result, origin


def is_begun(kind: type[BaseConfig], folder: Path, digest: str) -> bool:
    """Whether the folder holds a run of the same config that can be gone on with."""
    path = folder / "config.yaml"
    return path.exists() and config_hash(resolve(kind, path)) == digest


def command(arguments: list[str], threads: int | None = None) -> float:
    """Run a program of ours, with as many threads as the environment says if none are given; its CPU-seconds.
    SystemExit with the end of what it said if it failed.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # wait() would not tell this child's time from another's
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed:\n{said[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def name_of(row: str) -> str:
    """The name of a row's files: `rsLoRA, rank 32` -> `rslora_rank_32`."""
    kept = "".join(letter if letter.isalnum() else " " for letter in row.lower())
    return "_".join(kept.split())


def spread(values: list[float], digits: int) -> str:
    """`0.213 ± 0.020`: mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
