"""A tiny run of each project; `PROJECTS` are those that have a way of their own of keeping weights."""

from __future__ import annotations

import importlib
from pathlib import Path

from common.config import Options, resolve
from tests.helpers import ROOT, TINY, schema_of, status

PROJECTS = ("gnn", "ppo", "vae")
WEIGHTS = {"gnn": "models/0000.safetensors", "ppo": "last.safetensors", "vae": "checkpoints/00000002.pt"}
CONFIGS = {"gnn": "gcn_karate", "ppo": "ppo_cartpole_tiny", "vae": "", "diffusion": "ddpm_digits"}
SETTINGS = {
    "gnn": ("train.steps=3", "train.seeds=1", "model.hidden=8", "eval.figures=false"),
    "ppo": (
        *("env.count=2", "env.backend=local", "train.rollout=8", "train.steps=16", "train.epochs=1"),
        *("train.batch_size=16", "model.hidden=[8]", "train.backprop=autograd", "eval.episodes=1", "eval.video=false"),
        *("eval.max_steps=20", "train.evaluate_every=0"),
    ),
    "diffusion": tuple(TINY),
    "vae": (
        *("data.dataset=digits", "data.image_size=8", "data.max_images=40", "data.binarize=dynamic"),
        *("model.latents=3", "model.hidden=[16]", "train.steps=2", "train.batch_size=8", "train.sample_every=0"),
        *("train.validate_every=0", "eval.importance_samples=2", "eval.num_images=8", "eval.features=none"),
    ),
}


def trained_run(project: str, folder: Path) -> Path:
    """Train for a moment, in this process; the run's folder."""
    assert train(project, folder / "run") == 0
    return folder / "run"


def train(project: str, run_dir: Path, *overrides: str, **options: bool) -> int:
    """The training program of a project in this process; its exit status."""
    path = ROOT / f"configs/{CONFIGS[project]}.yaml" if CONFIGS[project] else None
    words = [*SETTINGS[project], "device=cpu", "precision=fp32", f"run_dir={run_dir}", *overrides]
    config = resolve(schema_of(project), path, words)
    return status(importlib.import_module(f"{project}.train").train, config, Options("train", **options))
