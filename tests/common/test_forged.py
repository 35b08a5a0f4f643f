"""Checkpoints that are whole by their hash, and not what a run writes: one line each, in resuming and evaluating."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError, Checkpoints, _digest, verify
from common.config import BaseConfig, Options
from common.files import read_json
from common.logging import read_metrics
from common.run import Run
from common.runtime import rng_state
from diffusion.sample import load_model
from tests.helpers import tiny

FORGED = [
    [1, 2],
    3,
    {},
    {"parts": 3},
    {"parts": {"model": 3}},
    {"parts": {"model": None, "measured": None}},
    {"parts": {"model": {"weight": "text", "bias": 3}}},
    {"parts": {"model": {"weight": torch.zeros(9, 9), "bias": torch.zeros(2)}}},
    {"parts": {"model": {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, "optimizer": {"state": 3}}},
    {"parts": {"model": {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, "optimizer": [1]}},
]
LINEAR = {"model": {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}}
FORGED_BESIDE = [
    {"parts": LINEAR},
    {"parts": LINEAR, "scaler": {}, "rng": {"python": 3}},
    {"parts": LINEAR, "scaler": {}, "rng": {"python": [3, [1, 2], None], "numpy": [], "torch": 3, "cuda": []}},
    {"parts": LINEAR, "scaler": {}, "rng": rng_state(), "step": "x"},
    {"parts": LINEAR, "scaler": {}, "rng": rng_state(), "step": None},
]


def resumed(folder: Path, state: object, **parts: object) -> int:
    config = BaseConfig(run_dir=str(folder), device="cpu", precision="fp32")
    with Run.start(config, Options("train")):
        pass
    Checkpoints(folder / "checkpoints").save(5, state)
    with Run.start(config, Options("train", resume=True)) as run:
        return run.resume(**parts)


@pytest.mark.parametrize("state", FORGED)
def test_a_forged_part_cannot_be_resumed(state, tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(CheckpointError, match="checkpoints"), pytest.MonkeyPatch.context():
        resumed(tmp_path / "run", state, model=model, optimizer=optimizer)


@pytest.mark.parametrize("state", FORGED_BESIDE)
def test_nor_can_a_run_of_forged_generators(state, tmp_path):
    with pytest.raises(CheckpointError, match="does not fit"):
        resumed(tmp_path / "run", state, model=torch.nn.Linear(2, 1))


@pytest.mark.parametrize("state", FORGED)
def test_nor_can_it_be_evaluated(state, tmp_path):
    config = tiny(tmp_path / "run")
    Checkpoints(tmp_path / "run/checkpoints").save(5, state)
    with pytest.raises(CheckpointError):
        load_model(config, Options("eval", checkpoint="00000005.pt"), Run(config, Options("eval")))


@pytest.mark.parametrize(
    "error", [KeyError("storages"), ValueError("odd"), AssertionError(), IndexError("x"), OSError()]
)
def test_whatever_the_reader_raises(error, tmp_path, monkeypatch):
    path = Checkpoints(tmp_path).save(1, {"a": 1})

    def fail(*words, **flags):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoints.load(path)


@pytest.mark.parametrize("manifest", [{}, {"bytes": 3}, {"bytes": "x", "sha256": 5}])
def test_a_forged_manifest(manifest, tmp_path):
    path = Checkpoints(tmp_path).save(1, {"a": 1})
    path.with_suffix(".json").write_text(json.dumps(manifest | {"manifest_sha256": _digest(manifest)}))
    with pytest.raises(CheckpointError, match="damaged"):
        verify(path)


def test_files_nested_too_deep(tmp_path):
    deep = '{"step": 1, "a": ' * 5000 + "1" + "}" * 5000
    path = Checkpoints(tmp_path).save(1, {"a": 1})
    path.with_suffix(".json").write_text(deep)
    with pytest.raises(CheckpointError, match="damaged"):
        verify(path)
    assert read_json(path.with_suffix(".json")) == {}
    (tmp_path / "metrics.jsonl").write_text(deep + '\n{"step": 2}\n')
    with pytest.warns(UserWarning, match="1 damaged line"):
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2}]
