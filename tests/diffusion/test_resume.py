"""A resumed run equals one that was never interrupted, to the last bit; and a start where something is already."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from PIL import Image

from common.checkpoint import Checkpoints
from common.files import TEMPORARY
from tests.helpers import STEPS, assert_same_run, checkpoint, errors, log, stop_in_step, tiny, train

# -- exact resume ------------------------------------------------------------------------------------------------------


RNG = random.Random(2026)
STOPS = [(RNG.choice([5, 6, 7]),), (8,), tuple(sorted(RNG.sample(range(1, STEPS), 2)))]


@pytest.mark.parametrize("stops", STOPS, ids=["mid-epoch", "epoch boundary", "twice"])
def test_exact_resume(stops, uninterrupted, tmp_path, monkeypatch):
    config = tiny(tmp_path / "run")
    assert config.model.dropout > 0
    stop_in_step(monkeypatch, *stops)
    assert train(config) == 143
    for stop, following in zip(stops, [*stops[1:], None], strict=True):
        assert Checkpoints(tmp_path / "run/checkpoints").newest_step() == stop
        assert train(config, resume=True) == (143 if following else 0)
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Forty images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 10, 12, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / f"{'ab'[i % 2]}/{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_exact_resume_from_files(workers, image_folder, tmp_path, monkeypatch):
    """Decoded by workers: the epoch ends in the middle of step 3 (40 images in batches of 16)."""
    config = tiny(
        tmp_path / "whole",
        "data.dataset=folder",
        f"data.folder={image_folder}",
        f"data.workers={workers}",
        "data.max_images=0",
        "model.image_channels=3",
        "model.num_classes=2",
    )
    assert train(config) == 0
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    stop_in_step(monkeypatch, 3, 5)
    assert train(config) == 143
    assert train(config, resume=True) == 143
    assert train(config, resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resume_after_a_crash_drops_later_lines(uninterrupted, tmp_path, monkeypatch):
    """A crash leaves metrics of steps after the last checkpoint, and half a line; they are computed again, not
    logged twice.
    """
    config = tiny(tmp_path / "run")
    stop_in_step(monkeypatch, 6)
    assert train(config) == 143
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert train(config, resume=True) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_resume_falls_back_from_a_broken_checkpoint(uninterrupted, tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", "train.save_every=4")
    stop_in_step(monkeypatch, 10)
    assert train(config) == 143
    newest = tmp_path / "run/checkpoints/00000010.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="00000010.pt is damaged") as caught:
        assert train(config, resume=True) == 0
    assert len(caught) == 1
    assert_same_run(uninterrupted, tmp_path / "run")


def test_no_whole_checkpoint_left(uninterrupted, tmp_path, capfd, monkeypatch):
    config = tiny(tmp_path / "run")
    stop_in_step(monkeypatch, 2)
    assert train(config) == 143
    (tmp_path / "run/checkpoints/00000002.json").write_text("{}")
    with pytest.warns(UserWarning, match="00000002"):
        assert train(config, resume=True) == 1
    assert "no whole checkpoint" in errors(capfd.readouterr().err)[0]


def test_stale_temporaries_are_removed(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", "train.steps=2")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / f"run/checkpoints/{TEMPORARY}123-00000001.pt").write_bytes(b"half")
    assert train(config) == 0
    assert not list((tmp_path / "run/checkpoints").glob(f"{TEMPORARY}*"))


# -- starting where something is already -------------------------------------------------------------------------------


def test_fresh_start_refuses_an_existing_run(stopped, capfd):
    before = (stopped / "metrics.jsonl").read_bytes()
    assert train(tiny(stopped)) == 1
    (line,) = errors(capfd.readouterr().err)
    assert "step 3" in line and "--resume" in line and "--overwrite" in line
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_overwrite(stopped, uninterrupted):
    (stopped / "left_over.txt").write_text("of the earlier run")
    assert train(tiny(stopped), overwrite=True) == 0
    assert not (stopped / "left_over.txt").exists()
    assert_same_run(uninterrupted, stopped)


@pytest.mark.parametrize("content", [["thesis.txt"], ["config.yaml", "thesis.txt"]])
def test_overwrite_refuses_what_is_not_a_run(tmp_path, capfd, content):
    for name in content:
        (tmp_path / name).write_text("seed: 1")
    assert train(tiny(tmp_path), overwrite=True) == 1
    assert "not a run folder" in errors(capfd.readouterr().err)[0]
    assert all((tmp_path / name).exists() for name in content)


def test_changed_model_refuses_and_shows_the_difference(stopped, capfd):
    files = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert train(tiny(stopped, "model.channels=16", "model.dropout=0.1"), resume=True) == 1
    text = capfd.readouterr().err
    assert len(errors(text)) == 1
    for line in ("- model.channels: 8", "+ model.channels: 16", "- model.dropout: 0.3", "+ model.dropout: 0.1"):
        assert line in text.splitlines()
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == files, "nothing may be touched"


def test_changed_optimisation_is_allowed_with_a_note(stopped, capfd):
    changed = ["train.lr=5e-4", "train.weight_decay=0.25", "train.betas=[0.8,0.95]"]
    assert train(tiny(stopped, *changed), resume=True) == 0
    text = capfd.readouterr().err
    assert "note: train.lr was 0.001, is now 0.0005" in text
    assert "note: train.weight_decay was 0.0, is now 0.25" in text
    (group,) = checkpoint(stopped)["parts"]["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.25 and tuple(group["betas"]) == (0.8, 0.95)
    assert log(stopped)[3]["lr"] < 5e-4 < log(stopped)[2]["lr"]


def test_damaged_config_of_the_run_is_one_line(stopped, capfd):
    (stopped / "config.yaml").write_text("train: [\n")
    assert train(tiny(stopped), resume=True) == 1
    assert "config.yaml" in errors(capfd.readouterr().err)[0]
