"""Settings that cannot work are refused before training; what a run measured or made is never taken for another's."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from common.config import ConfigError, Options
from common.judges.classifier import ResNet20
from diffusion import eval as evaluation
from diffusion.eval import main as evaluate
from diffusion.model import UNet
from diffusion.sample import sample_key
from tests.helpers import checkpoint, same, status, tiny, train

QUICK_EVAL = ["eval.num_samples=4", "eval.manifold_samples=20", "eval.neighbours=0", "sample.steps=2"]


@pytest.mark.parametrize(
    ("words", "key", "text"),
    [
        (
            ["model.attention=[4,5]"],
            "model.attention",
            r"\[5\] is no resolution of this network, whose levels have \[4\]",
        ),
        (["sample.guidance=2", "model.num_classes=0"], "sample.guidance", "without classes"),
        (["sample.guidance=nan"], "sample.guidance", "finite"),
        (["eval.guidance_table=[1,inf]"], "eval.guidance_table", "finite"),
    ],
)
def test_refused(words, key, text, tmp_path):
    with pytest.raises(ConfigError, match=text) as caught:
        tiny(tmp_path / "run", *words)
    assert caught.value.key == key


def test_measured_spread_is_restored(tmp_path, capsys):
    """A resumed EDM keeps the sigma_data that its network was trained for, whatever the images are now, and says so."""
    words = ["objective.kind=edm", "sample.sampler=heun", "train.steps=4", "train.save_every=2"]
    assert train(tiny(tmp_path / "run", *words)) == 0
    before = checkpoint(tmp_path / "run", 4)["parts"]["measured"]
    config = tiny(tmp_path / "run", *words, "train.steps=6", "data.max_images=20")
    capsys.readouterr()
    assert train(config, resume=True) == 0
    assert "these are not the images that the run began with" in capsys.readouterr().err
    after = checkpoint(tmp_path / "run", 6)["parts"]["measured"]
    assert after["sigma_data"] == before["sigma_data"]
    assert after["fingerprint"] != before["fingerprint"]


def test_same_images_are_not_remarked_on(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", "train.steps=2")) == 0
    assert train(tiny(tmp_path / "run", "train.steps=4"), resume=True) == 0
    assert "not the images" not in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_exported_weights_are_those_that_evaluation_uses(weights, tmp_path):
    assert train(tiny(tmp_path / "run", f"sample.weights={weights}")) == 0
    parts = checkpoint(tmp_path / "run")["parts"]
    with safe_open(tmp_path / "run/model.safetensors", framework="pt") as file:
        assert file.metadata()["weights"] == weights
        exported = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert same(exported, dict(parts["ema" if weights == "ema" else "model"]))
    assert not same(dict(parts["ema"]), dict(parts["model"]))


def test_accuracy_only_on_the_same_classes(tmp_path, monkeypatch):
    """Ten digits are not CIFAR's ten classes, however equal the numbers are."""
    config = tiny(tmp_path / "run", "train.steps=2", *QUICK_EVAL, "eval.features=resnet20", f"data_root={tmp_path}")
    assert train(config) == 0
    network = ResNet20().eval().requires_grad_(False)
    network.name = "fd_resnet20"
    monkeypatch.setattr(evaluation, "build_extractor", lambda *args, **kwargs: network)
    assert status(evaluate, config, Options("eval")) == 0
    metrics = json.loads((tmp_path / "run/eval.json").read_text())["metrics"]
    assert "fd_resnet20" in metrics and "conditional_accuracy" not in metrics
    network.class_names = tuple("0123456789")
    assert status(evaluate, config, Options("eval")) == 0
    assert "conditional_accuracy" in json.loads((tmp_path / "run/eval.json").read_text())["metrics"]


def test_few_samples_have_no_manifold(tmp_path, capsys, monkeypatch):
    config = tiny(tmp_path / "run", "train.steps=2", *QUICK_EVAL, f"data_root={tmp_path}")
    assert train(config) == 0
    monkeypatch.setattr(evaluation, "build_extractor", lambda *args, **kwargs: ResNet20().eval().requires_grad_(False))
    assert status(evaluate, config, Options("eval")) == 0
    assert "4 images a side are too few" in capsys.readouterr().err
    assert "precision" not in json.loads((tmp_path / "run/eval.json").read_text())["metrics"]


def test_evaluation_in_double_precision(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", "train.steps=2", *QUICK_EVAL, f"data_root={tmp_path}", "precision=fp64")
    monkeypatch.setattr(evaluation, "build_extractor", lambda *args, **kwargs: ResNet20().eval().requires_grad_(False))
    try:
        assert train(config) == 0
        assert status(evaluate, config, Options("eval")) == 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_kept_samples_belong_to_weights_and_settings(tmp_path):
    config = tiny(tmp_path / "run")
    torch.manual_seed(0)
    model = UNet(config.model, config.data.image_size)
    key = sample_key(model, config)
    assert key == sample_key(model, config)
    changed = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance=2.0))
    assert key != sample_key(model, changed)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert key != sample_key(model, config)
