"""Two processes equal one, and what a run is: its folder, its learning rate, its augmentation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import diffusion.train
from common.config import Options, flatten, resolve
from common.logging import read_metrics
from common.run import Run
from diffusion.config import Config, TrainConfig
from diffusion.train import drop_labels, learning_rate, random_flip
from tests.helpers import (
    DIGITS,
    STEPS,
    TINY,
    assert_same_run,
    checkpoint,
    errors,
    log,
    same,
    tiny,
    torchrun,
    train,
    two_processes,
)

# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [0, 3])
def test_two_processes_equal_one(microbatch, tmp_path):
    words = ["precision=fp64", "model.dropout=0.0", "train.steps=5", "model.multipliers=[1,2]", "model.attention=[4]"]
    tiny_words = ["--config", str(DIGITS), *TINY, *words, f"train.microbatch={microbatch}"]
    start = two_processes if microbatch else torchrun
    start("diffusion.train", *tiny_words, f"run_dir={tmp_path / 'two'}")
    assert json.loads((tmp_path / "two/env.json").read_text())["processes"] == 2
    assert train(tiny(tmp_path / "one", *words)) == 0
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-6, abs=1e-12)
    one, two = (checkpoint(tmp_path / name, 5)["parts"] for name in ("one", "two"))
    for part in ("model", "ema"):
        assert all(value.dtype == torch.float64 for value in one[part].values())
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-6, atol=1e-9, msg=name)
    for mine, other in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(other["exp_avg"], mine["exp_avg"], rtol=1e-6, atol=1e-12)  # the gradients themselves


def test_dropout_masks_are_those_of_step_and_process(tmp_path):
    """What holds with dropout: every run of two processes draws the same masks, the processes different ones."""

    def masks(rank: int) -> list[torch.Tensor]:
        run = Run(tiny(tmp_path / "run"), Options("train"))
        run.rank = rank
        return [torch.nn.functional.dropout(torch.ones(50), 0.3) for _ in run.steps(0, 2)]

    assert same(masks(0), masks(0))
    assert not torch.equal(masks(0)[0], masks(0)[1])
    assert all(not torch.equal(*pair) for pair in zip(masks(0), masks(1)))


def test_microbatches_equal_one_batch(tmp_path):
    logs = []
    for size in (0, 5):
        words = ["precision=fp64", "model.dropout=0.0", "train.steps=3", f"train.microbatch={size}"]
        assert train(tiny(tmp_path / str(size), *words)) == 0
        logs.append(log(tmp_path / str(size)))
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_batch_that_cannot_be_shared_out_is_refused(tmp_path, capfd, monkeypatch):
    """Dropping the odd image would make two processes differ from one."""
    monkeypatch.setattr(Run, "steps", lambda self, done, total: setattr(self, "world", 2) or iter([1]))
    assert train(tiny(tmp_path / "run", "train.batch_size=15")) == 2
    assert "15" in errors(capfd.readouterr().err)[0]


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_run_folder(uninterrupted):
    config = resolve(Config, uninterrupted / "config.yaml", [], str(uninterrupted))
    assert flatten(config) == flatten(tiny(uninterrupted))
    env = json.loads((uninterrupted / "env.json").read_text())
    assert {"command", "commit", "device", "versions", "precision"} <= env.keys()
    assert env["versions"]["torch"] == torch.__version__.split("+")[0] or env["versions"]["torch"] == torch.__version__
    assert set(log(uninterrupted)[0]) == {"step", "loss", "grad_norm", "lr"}
    assert read_metrics(uninterrupted / "metrics.jsonl")[0]["images_per_second"] > 0
    with safe_open(uninterrupted / "model.safetensors", "pt") as file:
        ema = checkpoint(uninterrupted)["parts"]["ema"]
        assert set(file.keys()) == set(ema)
        assert all(torch.equal(file.get_tensor(name), ema[name]) for name in ema)
        assert file.metadata()["step"] == str(STEPS)


def test_steps_cut_a_run_short_and_samples_appear(tmp_path):
    assert train(tiny(tmp_path / "run", "train.steps=2", "train.sample_every=2")) == 0
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2]
    with Image.open(tmp_path / "run/samples/00000002.png") as image:
        assert image.size[0] > 8


def test_finished_run_resumes_to_nothing(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert train(tiny(tmp_path / "run"), resume=True) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_other_seed_other_run(uninterrupted, tmp_path):
    assert train(tiny(tmp_path / "run", "seed=1")) == 0
    assert log(tmp_path / "run")[0]["loss"] != log(uninterrupted)[0]["loss"]


def test_dry_run(tmp_path, capsys):
    assert train(tiny(tmp_path / "run"), dry_run=True) == 0
    text = capsys.readouterr().out
    assert "channels: 8" in text and "parameters" in text and "(16, 1, 8, 8)" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.image_channels=3", "model.image_channels"),
        ("model.num_classes=7", "model.num_classes"),
        ("device=cuda:99", "device"),
        ("device=warp", "device"),
        ("precision=fp16", "precision"),
    ],
)
def test_what_only_the_machine_or_the_data_can_tell(override, key, tmp_path, capfd):
    assert train(tiny(tmp_path / "run", override)) == 2
    (line,) = errors(capfd.readouterr().err)
    assert line.startswith(f"error: {key}")
    assert not (tmp_path / "run").exists()


def test_learning_rate():
    config = TrainConfig(lr=1.0, steps=100, warmup=5000)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])  # the warm-up is cut to a tenth of a short run
    assert rates[10:] == [1.0] * 90
    linear = [learning_rate(step, dataclasses.replace(config, decay="linear")) for step in range(1, 101)]
    assert linear[9:] == pytest.approx([1 - i / 90 for i in range(91)])
    cosine = [learning_rate(step, dataclasses.replace(config, decay="cosine")) for step in range(1, 101)]
    assert cosine[9] == 1.0 and cosine[54] == pytest.approx(0.5) and cosine[99] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(cosine[9:]))
    assert learning_rate(1, dataclasses.replace(config, steps=3)) == 1.0
    long = TrainConfig(lr=2e-4, steps=800_000, warmup=5000)
    assert (
        learning_rate(2500, long) == pytest.approx(1e-4)
        and learning_rate(5000, long) == learning_rate(800_000, long) == 2e-4
    )


def test_short_run_reaches_its_full_learning_rate(tmp_path):
    assert train(tiny(tmp_path / "run", "train.steps=20", "train.warmup=5000", "train.decay=constant")) == 0
    assert [line["lr"] for line in log(tmp_path / "run")] == [5e-4] + [1e-3] * 19


def test_flip_is_half_of_the_images_and_only_mirrors():
    x = torch.randn(4000, 1, 2, 3)
    flipped = random_flip(x, torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored])
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize("flip", [True, False])
def test_flip_only_when_asked(flip, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(diffusion.train, "random_flip", lambda x, rng: calls.append(1) or x)
    assert train(tiny(tmp_path / "run", f"data.flip={flip}", "train.steps=2")) == 0
    assert len(calls) == (2 if flip else 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_label_dropout_share(share, tmp_path):
    config = tiny(tmp_path, f"objective.label_dropout={share}")
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, config, torch.Generator().manual_seed(0))
    null = dropped == 10
    assert float(null.float().mean()) == pytest.approx(share, abs=0.015)
    assert torch.equal(dropped[~null], labels[~null])


def test_unconditional_model_gets_no_labels(tmp_path):
    assert (
        drop_labels(torch.zeros(3, dtype=torch.int64), tiny(tmp_path, "model.num_classes=0"), torch.Generator()) is None
    )
    assert train(tiny(tmp_path / "run", "model.num_classes=0", "train.steps=2", "train.sample_every=1")) == 0
