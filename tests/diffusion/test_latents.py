"""Diffusion on codes: what is learned from is the file's codes with unit variance, what comes out is decoded and judged
as images, and files that do not fit are refused before training.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion.eval
import diffusion.sample
import diffusion.train
from common.checkpoint import read_weights
from common.config import ConfigError, Options, resolve
from common.images.memory import draw_indices
from common.latents import read_latents
from common.program import load_program
from common.run import Run
from diffusion.config import Config, ModelConfig
from diffusion.latents import LatentImages, check_decoder, decode, load_latents, pictured, to_network, to_pictures
from diffusion.mlp import MLP, build_network
from diffusion.objectives import EDM
from diffusion.samplers import guided, sample
from tests.helpers import checkpoint, errors, same, status, stop_in_step
from tests.vae import tiny as vae_tiny

SMALL = ModelConfig(network="mlp", image_channels=3, channels=32, blocks=2, num_classes=10, dropout=0.0)
WORDS = [
    "data.dataset=latents",
    "data.image_size=1",
    "data.flip=false",
    "model.network=mlp",
    "model.image_channels=3",
    "model.channels=32",
    "model.blocks=2",
    "model.dropout=0.2",
    "model.num_classes=10",
    "objective.kind=edm",
    "train.steps=2",
    "train.batch_size=8",
    "train.log_every=1",
    "train.sample_every=2",
    "sample.steps=2",
    "sample.count=4",
    "sample.batch_size=16",
    "eval.num_samples=24",
    "eval.manifold_samples=20",
    "eval.neighbours=2",
    "eval.features=classifier",
    "precision=fp32",
    "device=cpu",
]


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """What vae.encode leaves of a run of two steps."""
    run_dir = tmp_path_factory.mktemp("codes") / "run"
    assert vae_tiny.train(run_dir, "data.max_images=100") == 0
    assert vae_tiny.call("encode", run_dir) == 0
    return run_dir / "latents"


def config_of(codes, run_dir, *words: str) -> Config:
    files = [f"data.{key}={codes / name}" for key, name in FILES.items()]
    return resolve(Config, None, [*WORDS, *files, f"run_dir={run_dir}", f"data_root={run_dir.parent / 'data'}", *words])


FILES = {"latents": "train.npz", "held_out_latents": "test.npz", "decoder": "decoder.safetensors"}


def train(config: Config, **options) -> int:
    return status(diffusion.train.train, config, Options("train", **options))


@pytest.fixture(scope="module")
def trained(codes, tmp_path_factory):
    config = config_of(codes, tmp_path_factory.mktemp("ldm") / "run")
    assert train(config) == 0
    return config


# -- the network -------------------------------------------------------------------------------------------------------


def randomise(net: MLP) -> MLP:
    """The layers that begin at zero get weights."""
    for layer in (net.modulation, net.last):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return net


def test_the_network_starts_at_zero_and_with_identities():
    net = MLP(SMALL, 1)
    x = torch.randn(4, 3, 1, 1)
    time = torch.rand(4) * 1000
    assert torch.equal(net(x, time), torch.zeros_like(x))
    h = torch.randn(4, 32)
    assert torch.equal(net.blocks[0](h, torch.zeros(4, 96)), h)


def test_the_network_hears_time_and_class_and_every_number():
    net = randomise(MLP(SMALL, 1)).eval()
    x = torch.randn(2, 3, 1, 1, requires_grad=True)
    time = torch.tensor([10.0, 10.0])
    out = net(x, time, torch.tensor([0, 0]))
    assert out.shape == x.shape
    assert not torch.equal(net(x, time + 1, torch.tensor([0, 0])), out)
    assert not torch.equal(net(x, time, torch.tensor([1, 0]))[0], out[0])
    assert torch.equal(net(x, time), net(x, time, torch.tensor([10, 10]))), "no label is a class of its own"
    (slope,) = torch.autograd.grad(out[0].sum(), x)
    assert (slope[0] != 0).all() and (slope[1] == 0).all(), "examples do not hear each other"


def test_every_weight_learns():
    net = randomise(MLP(SMALL, 1))
    net(torch.randn(8, 3, 1, 1), torch.rand(8), torch.arange(8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_wrong_shapes_and_labels():
    with pytest.raises(ValueError, match="was built for"):
        MLP(SMALL, 1)(torch.zeros(1, 4, 1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="unconditional"):
        MLP(dataclasses.replace(SMALL, num_classes=0), 1)(
            torch.zeros(1, 3, 1, 1), torch.zeros(1), torch.zeros(1).long()
        )


def test_two_clusters_are_learned():
    """A distribution whose samples can be counted: two points, one a class, in five dimensions."""
    torch.manual_seed(0)
    net = MLP(dataclasses.replace(SMALL, image_channels=5, channels=64, num_classes=2), 1)
    objective = EDM(sigma_data=1.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    centres = torch.stack([torch.ones(5), -torch.ones(5)])[:, :, None, None]
    for _ in range(200):
        labels = torch.randint(2, (64,))
        loss = objective.loss(net, centres[labels], labels, torch.randn(64, 5, 1, 1), torch.rand(64)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(40) % 2
    config = resolve(Config, None, ["objective.kind=edm", "sample.sampler=heun"])
    net.eval()
    with torch.no_grad():
        denoise = guided(objective, net, labels, net.null_label, 1.0)
        rng = torch.Generator().manual_seed(0)
        drawn = sample(denoise, objective.grid(8, config.sample), "heun", (40, 5, 1, 1), rng, device="cpu")
    assert (drawn - centres[labels]).abs().mean() < 0.1


# -- the data ----------------------------------------------------------------------------------------------------------


def test_codes_are_scaled_to_unit_variance(codes):
    latents = read_latents(codes / "train.npz")
    images = load_latents(config_of(codes, codes).data)
    assert images.shape == (3, 1, 1) and len(images) == 100 and images.class_names == latents.class_names
    assert images.scale == pytest.approx(latents.scale, rel=1e-6)
    net = MLP(SMALL, 1)
    net.scale.fill_(images.scale)
    x0 = to_network(images.images, net)
    assert float(x0.std(correction=0)) == pytest.approx(1, rel=1e-5)
    assert images.draw(10).scale == images.scale
    batch, labels = next(images.batches(1, 8, 0, torch.device("cpu")))
    assert batch.shape == (8, 3, 1, 1) and labels.shape == (8,)
    for code, label in zip(batch, labels, strict=True):
        row = (latents.codes == code.flatten()).all(1).nonzero()[0]
        assert latents.labels[row] == label


def test_draws_from_the_posterior(codes):
    """A function of (seed, step). What the scale is of is their variance: that of the means plus the mean variance of
    q(z | x).
    """
    latents = read_latents(codes / "train.npz")
    images = load_latents(config_of(codes, codes, "data.posterior=sample").data)
    first = list(zip(range(3), images.batches(1, 64, 0, torch.device("cpu")), strict=False))
    later = next(images.batches(3, 64, 0, torch.device("cpu")))
    assert torch.equal(first[2][1][0], later[0])
    assert not torch.equal(first[2][1][0], next(images.batches(3, 64, 1, torch.device("cpu")))[0])
    many = torch.cat([batch for _, (batch, _) in zip(range(200), images.batches(1, 100, 0, torch.device("cpu")))])
    variance = float(latents.codes.var(correction=0) + latents.log_variances.exp().mean())
    assert images.scale == pytest.approx(variance**-0.5, rel=1e-4)
    assert float(many.std()) * images.scale == pytest.approx(1, rel=0.02)


def test_no_posterior_without_variances(codes, tmp_path):
    np.savez(tmp_path / "own.npz", codes=np.random.default_rng(0).normal(size=(9, 3)))
    config = config_of(codes, tmp_path / "run", f"data.latents={tmp_path / 'own.npz'}", "data.posterior=sample")
    with pytest.raises(ConfigError, match="no log_variances"):
        load_latents(config.data)
    with pytest.raises(Exception, match="all codes are equal"):
        LatentImages(torch.ones(4, 3, 1, 1), None, ())


def test_samples_are_decoded_with_the_scale_taken_back(codes, tmp_path):
    """x = scale * code comes out as decoder(code)."""
    config = config_of(codes, tmp_path / "run")
    latents = read_latents(codes / "test.npz")
    net = MLP(SMALL, 1)
    net.scale.fill_(3.0)
    x = 3 * latents.codes[:5, :, None, None]
    right = (load_program(codes / "decoder.safetensors")(latents.codes[:5]) * 255).round().byte()
    assert torch.equal(to_pictures(x, net, config), right)
    assert decode(latents.codes[:20], config, torch.device("cpu")).shape == (20, 1, 8, 8)


def test_judged_as_the_images_that_they_stand_for(codes, tmp_path):
    config = config_of(codes, tmp_path / "run")
    assert pictured(config).data.dataset == "digits" and pictured(config).data.image_size == 8
    assert pictured(config).sample == config.sample
    np.savez(tmp_path / "own.npz", codes=np.ones((2, 3)))
    own = config_of(codes, tmp_path / "run", f"data.latents={tmp_path / 'own.npz'}")
    with pytest.raises(Exception, match="can be drawn but not judged"):
        pictured(own)


# -- the programs ------------------------------------------------------------------------------------------------------


def test_training(trained):
    folder = Path(trained.run_dir)
    with Image.open(folder / "samples/00000002.png") as image:
        image.verify()
    weights, facts = read_weights(folder / "model.safetensors")
    assert float(weights["scale"]) == pytest.approx(read_latents(Path(trained.data.latents)).scale, rel=1e-5)
    assert float(facts["sigma_data"]) == 1.0


def test_evaluation(trained, tmp_path, capsys):
    folder = Path(trained.run_dir)
    capsys.readouterr()
    assert status(diffusion.eval.main, trained, Options("eval")) == 0
    result = json.loads((folder / "eval.json").read_text())
    metrics = result["metrics"]
    assert {"fd_digits", "fd_floor", "fd_reconstruction_floor", "conditional_accuracy"} <= metrics.keys()
    assert metrics["fd_floor"] < metrics["fd_reconstruction_floor"], "two steps of a VAE cannot copy its images"
    with Run(trained, Options("eval")) as run:
        judge = diffusion.eval.build_judge(
            pictured(trained),
            "classifier",
            diffusion.eval.load_images(pictured(trained).data, trained.data_root),
            diffusion.eval.load_images(pictured(trained).data, trained.data_root, "test"),
            run,
        )
        codes = read_latents(Path(trained.data.held_out_latents)).codes
        decoded = load_program(Path(trained.data.decoder))(codes[draw_indices(len(codes), 24, 0)])
        distance = judge.distance((decoded * 255).round().byte(), run)
    assert metrics["fd_reconstruction_floor"] == pytest.approx(distance, rel=1e-6)


def test_sampling(trained):
    assert status(diffusion.sample.main, trained, Options("sample")) == 0
    names = {path.name.split("_")[0] for path in (Path(trained.run_dir) / "figures").glob("*_*")}
    assert {"grid", "interpolation", "filmstrip", "denoising"} <= names


def test_a_resumed_run_ends_equal(codes, tmp_path, monkeypatch):
    words = ["train.steps=5", "train.sample_every=0", "data.posterior=sample"]
    assert train(config_of(codes, tmp_path / "whole", *words)) == 0
    with monkeypatch.context() as context:
        stop_in_step(context, 3)
        assert train(config_of(codes, tmp_path / "cut", *words)) == 143
    assert train(config_of(codes, tmp_path / "cut", *words), resume=True) == 0
    for part in ("model", "ema", "optimizer", "measured"):
        assert same(checkpoint(tmp_path / "whole", 5)["parts"][part], checkpoint(tmp_path / "cut", 5)["parts"][part])


def test_the_scale_of_a_run_stays(codes, tmp_path, capsys):
    """Other codes later do not change what the network was trained for, and it is said."""
    assert train(config_of(codes, tmp_path / "run", "train.sample_every=0")) == 0
    before = checkpoint(tmp_path / "run", 2)["parts"]["model"]["scale"]
    shutil.copytree(codes, tmp_path / "codes")
    with np.load(codes / "train.npz", allow_pickle=False) as file:
        arrays = dict(file)
    np.savez(tmp_path / "codes/train.npz", **(arrays | {"codes": 2 * arrays["codes"]}))
    capsys.readouterr()
    config = config_of(tmp_path / "codes", tmp_path / "run", "train.steps=3", "train.sample_every=0")
    assert train(config, resume=True) == 0
    assert "these are not the images that the run began with" in capsys.readouterr().err
    assert torch.equal(checkpoint(tmp_path / "run", 3)["parts"]["model"]["scale"], before)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.latents="], "data.latents"),
        (["data.decoder="], "data.decoder"),
        (["data.image_size=8"], "data.image_size"),
        (["data.flip=true"], "data.flip"),
        (["model.network=unet"], "model.network"),
        (["objective.kind=ddpm"], "sample.clip"),
        (["data.dataset=digits", "data.image_size=8"], "data.latents"),
    ],
)
def test_settings_that_do_not_go_together(codes, tmp_path, words, key):
    with pytest.raises(ConfigError) as caught:
        config_of(codes, tmp_path / "run", *words)
    assert caught.value.key == key


def test_ddpm_on_codes(codes, tmp_path):
    words = ["objective.kind=ddpm", "objective.prediction=v", "sample.clip=false", "objective.timesteps=20"]
    assert train(config_of(codes, tmp_path / "run", *words)) == 0


def test_files_that_do_not_fit(codes, tmp_path, capsys):
    """One line each, before training, and nothing is written."""
    for name, words in {"larger": ["model.latents=4"], "other": ["seed=9"]}.items():
        assert vae_tiny.train(tmp_path / name, *words) == 0
        assert vae_tiny.call("encode", tmp_path / name, "encode.split=test") == 0
    np.savez(tmp_path / "nan.npz", codes=np.full((5, 3), np.nan))
    np.savez(tmp_path / "none.npz", other=np.zeros((5, 3)))
    (tmp_path / "text.safetensors").write_text("no weights")
    cases = {
        f"data.decoder={tmp_path / 'larger/latents/decoder.safetensors'}": "decodes codes of 4 numbers",
        f"data.decoder={tmp_path / 'other/latents/decoder.safetensors'}": "are of different weights",
        f"data.held_out_latents={tmp_path / 'other/latents/test.npz'}": "are of different weights",
        f"data.decoder={tmp_path / 'absent'}": "cannot be read",
        f"data.decoder={tmp_path / 'text.safetensors'}": "cannot be read",
        f"data.latents={tmp_path / 'absent.npz'}": "no such file",
        f"data.latents={tmp_path / 'nan.npz'}": "15 of 15 numbers in codes are not finite",
        f"data.latents={tmp_path / 'none.npz'}": "no array `codes`",
        "model.image_channels=5": "model.image_channels: must be 3",
        "model.num_classes=4": "model.num_classes: must be 0 or 10",
    }
    capsys.readouterr()
    for word, says in cases.items():
        assert train(config_of(codes, tmp_path / "run", word)) in (1, 2), word
        (line,) = errors(capsys.readouterr().err)
        assert says in line, (word, line)
    assert not (tmp_path / "run").exists()


def test_check_passes_what_fits(codes, tmp_path):
    check_decoder(config_of(codes, tmp_path / "run"))
    assert isinstance(build_network(SMALL, 1), MLP)
