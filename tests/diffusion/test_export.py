"""Many images into a folder: as an evaluation would draw them, going on after a stop, never beside those of others."""

from __future__ import annotations

import csv
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion.sample
from common.config import Options, load
from common.run import Run
from diffusion.config import Config
from tests.helpers import errors, status, tiny, train

QUICK = ["sample.batch_size=8", "sample.steps=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("export") / "run"
    assert train(tiny(run_dir, "train.steps=1")) == 0
    return run_dir


def draw(run_dir, *words: str) -> int:
    short = {"out": "sample.out", "count": "sample.count"}
    config, _ = load(Config, "diffusion", "sample", ["--run", str(run_dir), *QUICK, *words], short=short)
    return status(diffusion.sample.main, config, Options("sample"))


def images(folder) -> np.ndarray:
    """(N, H, W), in the order of the names"""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture
def calls(monkeypatch):
    """Numbers of the batches that are drawn; a SIGTERM comes before number `stop`."""
    made: list[int] = []
    original = diffusion.sample.generate_batch

    def counted(model, objective, config, index, *rest, **named):
        made.append(index)
        if index == counted.stop:
            signal.raise_signal(signal.SIGTERM)
        return original(model, objective, config, index, *rest, **named)

    counted.stop = None
    monkeypatch.setattr(diffusion.sample, "generate_batch", counted)
    return made, counted


def test_pngs_npz_and_what_is_evaluated_are_the_same_images(trained, tmp_path):
    assert draw(trained, "--out", str(tmp_path / "png"), "--count", "20") == 0
    assert draw(trained, "--out", str(tmp_path / "npz"), "--count", "20", "sample.format=npz") == 0
    shards = [np.load(path) for path in sorted((tmp_path / "npz").glob("*.npz"))]
    assert [len(shard["images"]) for shard in shards] == [8, 8, 4]
    stacked = np.concatenate([shard["images"] for shard in shards])[..., 0]
    np.testing.assert_array_equal(images(tmp_path / "png"), stacked)
    config = tiny(trained, *QUICK)
    with Run(config, Options("sample")) as run:
        model, objective, _ = diffusion.sample.load_model(config, Options("sample"), run)
        labels = torch.arange(20) % 10
        direct = diffusion.sample.generate(model, objective, config, 20, labels, config.seed, run)
    np.testing.assert_array_equal(stacked, direct[:, 0].numpy())
    rows = list(csv.DictReader((tmp_path / "png/labels.csv").open()))
    assert [row["file"] for row in rows] == sorted(path.name for path in (tmp_path / "png").glob("*.png"))
    assert [int(row["class"]) for row in rows] == labels.tolist()
    assert np.concatenate([shard["labels"] for shard in shards]).tolist() == labels.tolist()


def test_a_stopped_export_goes_on_and_a_larger_one_adds(trained, tmp_path, calls, capsys):
    made, drawing = calls
    words = ["--out", str(tmp_path / "cut")]
    drawing.stop = 1
    assert draw(trained, *words, "--count", "24") == 143
    drawing.stop = None
    assert list(json.loads((tmp_path / "cut/manifest.json").read_text())["shards"]) == ["0"]
    made.clear()
    assert draw(trained, *words, "--count", "24") == 0
    assert made == [1, 2] and "1 of 3 batches were there before" in capsys.readouterr().err
    before = images(tmp_path / "cut")
    made.clear()
    assert draw(trained, *words, "--count", "32") == 0
    assert made == [3]
    after = images(tmp_path / "cut")
    assert len(after) == 32
    np.testing.assert_array_equal(after[:24], before)
    assert len((tmp_path / "cut/labels.csv").read_text().splitlines()) == 33


def test_other_settings_and_other_folders_are_refused(trained, tmp_path, capsys):
    assert draw(trained, "--out", str(tmp_path / "a"), "--count", "2") == 0
    assert draw(trained, "--out", str(tmp_path / "a"), "--count", "2", "sample.guidance=2") == 1
    assert "other weights or settings" in errors(capsys.readouterr().err)[-1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.png").write_bytes(b"")
    assert draw(trained, "--out", str(tmp_path / "mine"), "--count", "2") == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["holiday.png"]
