"""Tiny graph runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from common.config import Options, resolve
from gnn.config import Config
from tests.helpers import ROOT, status

DATA = Path(os.environ.get("DATA_ROOT", ROOT / "data"))
KARATE = ROOT / "configs/gcn_karate.yaml"


def config(run_dir: Path, *overrides: str, base: Path = KARATE) -> Config:
    """The karate config, or another, on the CPU in this folder."""
    return resolve(Config, base, [f"run_dir={run_dir}", "device=cpu", *overrides])


def train(config: Config, **options: bool) -> int:
    """Run the training program in this process; its exit status."""
    from gnn.train import train

    return status(train, config, Options("train", **options))


def evaluate(config: Config) -> int:
    """Run the evaluation program in this process; its exit status."""
    from gnn.eval import main

    return status(main, config, Options("eval"))


def needs(path: str) -> pytest.MarkDecorator:
    """Skip a test, with the reason, where a dataset is not laid out."""
    return pytest.mark.skipif(not (DATA / path).exists(), reason=f"{DATA / path} is not there")


def ring(n: int = 12) -> torch.Tensor:
    """Edges (2, n) of a cycle."""
    return torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
