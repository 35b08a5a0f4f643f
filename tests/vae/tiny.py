"""A tiny run of the vae project on images that need no download."""

from __future__ import annotations

import importlib
from pathlib import Path

from common.config import Options, load, resolve
from tests.helpers import status
from vae.config import Config

TINY = [
    "data.dataset=digits",
    "data.image_size=8",
    "data.max_images=40",
    "data.binarize=dynamic",
    "model.latents=3",
    "model.hidden=[16]",
    "train.steps=2",
    "train.batch_size=8",
    "train.sample_every=0",
    "train.validate_every=0",
    "precision=fp32",
    "device=cpu",
]
MODELS = {
    "mlp": [],
    "ladder": ["model.kind=ladder", "model.ladder=[1,2]", "model.width=8"],
    "conv": [
        "model.kind=conv",
        "model.channels=4",
        "model.width=8",
        "data.binarize=none",
        "likelihood.kind=gaussian",
        "likelihood.sigma_from=decoder",
    ],
}


def train(run_dir: Path, *overrides: str) -> int:
    """Two steps in this process; the exit status."""
    config = resolve(Config, None, [*TINY, f"run_dir={run_dir}", *overrides])
    return status(importlib.import_module("vae.train").train, config, Options("train"))


def call(program: str, run_dir: Path, *words: str) -> int:
    """A program of the project, as from the command line; the exit status."""
    module = importlib.import_module(f"vae.{program}")
    short = {
        "sample": {"out": "sample.out", "count": "sample.count"},
        "encode": {"out": "encode.out"},
        "decode": {"latents": "decode.latents", "out": "decode.out"},
    }[program]
    config, options = load(Config, "vae", program, ["--run", str(run_dir), *words], short)
    return status(module.main, config, options)
