"""Train and evaluate as a person would: resume, two processes, what appears in the run folder, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import vae.eval
import vae.train
from common.checkpoint import Checkpoints
from common.config import ConfigError, Options, load, resolve
from common.logging import read_metrics
from tests.helpers import ROOT, command, errors, program, same, status, stop_in_step, two_processes
from vae.config import Config
from vae.load import build_model

DIGITS = ROOT / "configs/vae_digits.yaml"
# 64 images in batches of 16: an epoch is four steps
TINY = [
    "model.hidden=[16]",
    "data.max_images=64",
    "data.validation=32",
    "train.batch_size=16",
    "train.steps=8",
    "train.log_every=1",
    "train.save_every=100",
    "train.sample_every=0",
    "train.validate_every=4",
    "precision=fp32",
    "device=cpu",
]
QUICK = ["eval.importance_samples=20", "eval.num_samples=50", "eval.features=none", "eval.num_images=60"]
TIMING = "images_per_second"
KINDS = {
    "elbo": ["objective.warmup=5", "objective.free_bits=0.1", "train.ema=0.9"],
    "iwae": ["objective.kind=iwae", "objective.samples=5"],
    "tcvae": ["objective.kind=tcvae", "objective.beta=4"],
    "factor": ["objective.kind=factor", "objective.beta=4", "objective.critic_width=8", "objective.critic_layers=1"],
    "capacity": ["objective.kind=capacity", "objective.capacity=5", "objective.capacity_steps=6"],
    "ladder": ["model.kind=ladder", "model.ladder=[2,3]", "model.width=16", "train.grad_clip=100"],
    "grey": ["data.binarize=none", "likelihood.kind=gaussian", "model.kind=conv", "model.channels=4", "model.width=8"],
    "mixture": ["data.binarize=none", "likelihood.kind=logistic_mixture", "likelihood.mixtures=2"],
}


def tiny(run_dir, *overrides: str) -> Config:
    return resolve(Config, DIGITS, [*TINY, f"run_dir={run_dir}", *overrides])


def train(config: Config, **options) -> int:
    return status(vae.train.train, config, Options("train", **options))


def evaluate(run_dir, *overrides: str) -> dict:
    config, _ = load(Config, "vae", "eval", ["--run", str(run_dir), *QUICK, *overrides])
    assert status(vae.eval.main, config, Options("eval")) == 0
    return json.loads((run_dir / "eval.json").read_text())


def lines(run_dir) -> list[dict]:
    return [{k: v for k, v in line.items() if k != TIMING} for line in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_resumes_exactly_and_is_evaluated(kind, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and at its end: every tensor and every line equal to a run that was not."""
    assert train(tiny(tmp_path / "whole", *KINDS[kind])) == 0
    config = tiny(tmp_path / "run", *KINDS[kind])
    stop_in_step(monkeypatch, 3, 4)
    assert train(config) == 143
    assert train(config, resume=True) == 143
    assert train(config, resume=True) == 0
    first = Checkpoints.load(tmp_path / "whole/checkpoints/00000008.pt")
    second = Checkpoints.load(tmp_path / "run/checkpoints/00000008.pt")
    assert same(first["parts"], second["parts"])
    assert same(first["rng"], second["rng"])
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert all("active_units" in line for line in lines(tmp_path / "run"))
    metrics = evaluate(tmp_path / "run")["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["log_likelihood"] >= metrics["elbo"]
    assert ("bits_per_dim" in metrics) == (kind in ("grey", "mixture"))


def test_training_leaves_everything(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--config", str(DIGITS), *TINY, "train.steps=2", "train.sample_every=2", f"run_dir={run}"]
    assert command("vae", "train", *words) == 0
    assert "step 2/2" in capsys.readouterr().err
    for name in ("config.yaml", "env.json", "metrics.jsonl", "model.safetensors", "checkpoints/00000002.pt"):
        assert (run / name).stat().st_size > 0
    assert (run / "samples/prior_00000002.png").is_file()
    result = program("vae.eval", "--run", str(run), *QUICK)
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert last == json.loads((run / "eval.json").read_text())
    for name in ("reconstructions", "samples", "interpolations", "traversals", "map", "kl", "plane"):
        assert Image.open(run / f"figures/{name}.png").size > (0, 0)
    rows = (run / "likelihoods.csv").read_text().splitlines()
    assert len(rows) == 1 + 60
    values = [float(row.split(",")[2]) for row in rows[1:]]
    assert np.mean(values) == pytest.approx(last["metrics"]["log_likelihood"], abs=1e-3)


def test_dry_run(tmp_path):
    result = program("vae.train", "--config", str(DIGITS), *TINY, "--dry-run", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert "parameters, a code of 2 numbers" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["elbo", "ladder"])
def test_two_processes_are_as_one(kind, tmp_path):
    """Summed over a batch that two processes share: the same weights up to the order of additions."""
    words = [str(DIGITS), *TINY, *KINDS[kind], "train.steps=3", "train.validate_every=0", "precision=fp64"]
    two_processes("vae.train", "--config", *words, f"run_dir={tmp_path / 'two'}")
    assert train(resolve(Config, DIGITS, [*words[1:], f"run_dir={tmp_path / 'one'}"])) == 0
    first = Checkpoints.load(tmp_path / "one/checkpoints/00000003.pt")["parts"]["model"]
    second = Checkpoints.load(tmp_path / "two/checkpoints/00000003.pt")["parts"]["model"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-9, rtol=1e-7)


def test_overfits_one_batch(tmp_path):
    """Sixteen fixed black and white images: the reconstruction term goes to zero, nats follow."""
    config = tiny(
        tmp_path / "run", "data.max_images=16", "data.binarize=static", "model.hidden=[128]", "model.latents=16",
        "train.steps=300", "train.validate_every=0", "train.lr=3e-3", "objective.beta=0.01",
    )  # fmt: skip
    assert train(config) == 0
    last = lines(tmp_path / "run")[-1]
    assert last["log_likelihood"] > -8
    assert lines(tmp_path / "run")[0]["log_likelihood"] < -150


def test_evaluation_repeats_itself_in_any_memory(tmp_path):
    """The bound of an image does not depend on how many decodings fit into memory at once."""
    assert train(tiny(tmp_path / "run")) == 0
    whole = evaluate(tmp_path / "run", "eval.importance_samples=1")["metrics"]["elbo"]
    # as many images at a time, so the same noise; the passes over K differ
    assert evaluate(tmp_path / "run", "eval.importance_samples=1")["metrics"]["elbo"] == whole
    many = evaluate(tmp_path / "run", "eval.importance_samples=64", "eval.chunk=640")["metrics"]
    few = evaluate(tmp_path / "run", "eval.importance_samples=64", "eval.chunk=100")["metrics"]
    assert many["log_likelihood"] == pytest.approx(few["log_likelihood"], abs=1.0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.binarize=none"], "likelihood.kind: bernoulli"),
        (["objective.kind=tcvae", "model.kind=ladder"], "objective.kind: tcvae needs one layer"),
        (["objective.kind=iwae", "objective.beta=2"], "objective.kind: iwae is a bound of its own"),
        (["objective.kind=tcvae", "train.batch_size=1"], "train.batch_size"),
        (["eval.disentanglement=true"], "eval.disentanglement: needs data.dataset=dsprites"),
        (["objective.beta=nan"], "objective.beta"),
        (["eval.split=validation", "data.validation=0"], "eval.split"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        tiny(tmp_path / "run", *overrides)


def test_images_that_do_not_fit_are_refused(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", "model.image_channels=3")) == 2
    assert "model.image_channels: must be 1" in errors(capsys.readouterr().err)[0]
    config = tiny(tmp_path / "run", "objective.kind=tcvae", "train.batch_size=128")
    assert train(config) == 2
    assert "train.batch_size: must be at most the number of images, 64" in errors(capsys.readouterr().err)[0]
    assert not (tmp_path / "run").exists()


def test_a_folder_of_odd_images(tmp_path):
    """Odd sizes, 16 bits, alpha, grey and colour together; no class folders; a share held out."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        height, width = rng.integers(9, 40, 2)
        if i % 3 == 0:
            image = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
        elif i % 3 == 1:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        else:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{i:02d}.png")
    words = [
        "data.dataset=folder", f"data.folder={folder}", "data.image_size=13", "model.image_channels=3",
        "data.workers=0", "data.max_images=0", "data.validation=4", "data.held_out=0.3", "data.binarize=none",
        "data.flip=true", "likelihood.kind=gaussian", "train.batch_size=1",
    ]  # fmt: skip
    assert train(tiny(tmp_path / "run", *words)) == 0
    metrics = evaluate(tmp_path / "run")["metrics"]
    assert math.isfinite(metrics["bits_per_dim"])


def test_dsprites_from_end_to_end(tmp_path):
    words = [
        "data.dataset=dsprites", "data.binarize=none", "data.image_size=32", "data.max_images=200", "model.latents=4",
        "objective.kind=tcvae", "objective.beta=6",
    ]  # fmt: skip
    assert train(tiny(tmp_path / "run", *words)) == 0
    metrics = evaluate(tmp_path / "run", "eval.disentanglement=true", "eval.num_images=300")["metrics"]
    assert {"mig", "dci", "sap", "factor_vae_score"} <= set(metrics)


def test_a_damaged_or_foreign_checkpoint_ends_as_one_line(tmp_path, capsys):
    assert train(tiny(tmp_path / "run")) == 0
    config, _ = load(Config, "vae", "eval", ["--run", str(tmp_path / "run"), *QUICK, "model.hidden=[17]"])
    assert status(vae.eval.main, config, Options("eval")) == 1
    assert "is of another model than the config's model section" in errors(capsys.readouterr().err)[0]


def test_every_config_builds():
    for path in sorted(ROOT.glob("configs/*vae*.yaml")):
        config = resolve(Config, path, [])
        assert build_model(config).size >= 1
