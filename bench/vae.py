"""Our variational autoencoder against pythae's: one training step, same network, weights, batch and optimizer.:

    python -m bench.vae

First the two must agree in float32, on loss and on the gradient of every parameter, with the same noise; otherwise
nothing is timed. Then each round times blocks of steps in one process, one thread, by CPU time: ours, ours without
compilation, ours without it and in float32, the peer with the fused AdamW that ours has, the peer with AdamW as it
comes, and ours again. Each side draws its own noise. Ours computes as our program does: compiled if the config says so,
in bf16 where the CPU multiplies in it, with its check of loss and gradients at every step. The peer knows mixed
precision on GPUs alone, and not for this loss, and does not compile.

`ratio` is the throughput of ours over the peer's with the fused optimizer, `ratio_eager` and `ratio_fp32` of ours
without compilation, and in float32, over the same, `ratio_default` of ours over the peer as it comes: all of a training
step. `program_ratio` is another thing: of whole training programs, not compiled, `vae.train` and pythae's BaseTrainer,
from the images in memory to the last file. Ours again over ours is the A/A control, whose spread says which differences
are noise. The last line of stdout is one JSON object: the ratios, ours and peer (images per CPU-second), circumstances.

Legend: B images, Z latents, H = W pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import vae.train
from bench.rounds import circumstances, interleave, ours_of, quartiles, ratio, report
from common.config import Options, resolve
from common.images import MemoryImages
from common.run import Run
from common.runtime import use_threads
from vae.config import Config
from vae.load import build_model
from vae.model import VAE
from vae.objectives import objective

TOLERANCE = 1e-5  # float32, relative to the largest entry
DATA = 60_000  # images in the training set; no objective here asks
SETTINGS = ["device=cpu", "objective.warmup=0"]  # the peer has no warm-up of the KL divergence
# a program of which only training is left: neither pictures nor validation, which the peer would do in its own way
PROGRAM = [
    "compile=false",
    "data.validation=0",
    "data.binarize=static",
    "train.sample_every=0",
    "train.validate_every=0",
]


def make_peer(config: Config, ours: VAE) -> nn.Module:
    """pythae's VAE with a network like ours and the same weights: two heads in the place of our fused one, and
    probabilities where ours stays with logits. SystemExit without pythae.
    """
    try:
        from pythae.models import VAE as PeerVAE
        from pythae.models import VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError:
        raise SystemExit("bench.vae compares with pythae: pip install pythae") from None
    features, latents = ours.posterior.in_features, ours.size
    fresh = build_model(config)
    assert isinstance(fresh, VAE)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = fresh.encoder
            self.embedding = nn.Linear(features, latents)
            self.log_var = nn.Linear(features, latents)

        def forward(self, x: Tensor) -> Any:
            hidden = self.layers(2 * x - 1)
            return ModelOutput(embedding=self.embedding(hidden), log_covariance=self.log_var(hidden))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = fresh.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.layers(z)))

    size = config.data.image_size
    settings = VAEConfig(
        input_dim=(config.model.image_channels, size, size), latent_dim=latents, reconstruction_loss="bce"
    )
    peer = PeerVAE(settings, Encoder(), Decoder())
    peer.load_state_dict(in_peer_names(ours, lambda parameter: parameter.detach()))
    return peer


def in_peer_names(ours: VAE, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """`value` of each of our parameters (its data, its gradient) under the peer's names, our fused head in two."""
    named: dict[str, Tensor] = {}
    for part in ("encoder", "decoder"):
        for name, parameter in getattr(ours, part).named_parameters():
            named[f"{part}.layers.{name}"] = value(parameter)
    for name, parameter in ours.posterior.named_parameters():
        mean, log_variance = value(parameter).chunk(2)
        named[f"encoder.embedding.{name}"] = mean
        named[f"encoder.log_var.{name}"] = log_variance
    return named


def build_pair(config: Config, seed: int = 0) -> tuple[VAE, nn.Module]:
    """Ours and the peer with equal random weights."""
    torch.manual_seed(seed)
    ours = build_model(config)
    assert isinstance(ours, VAE)
    with torch.no_grad():  # no bias is left at zero, where a wrong one would not show
        for parameter in ours.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return ours, make_peer(config, ours)


def make_batch(config: Config, count: int) -> Tensor:
    """Random black and white images, (B, C, H, W)."""
    size = config.data.image_size
    rng = torch.Generator().manual_seed(1)
    return (torch.rand(count, config.model.image_channels, size, size, generator=rng) < 0.2).float()


def largest_difference(config: Config, ours: VAE, peer: Any, x: Tensor) -> dict[str, float]:
    """Of the losses, and of the gradients of any parameter relative to the largest entry of the peer's, in float32."""
    noise = ours.noise(len(x), 1, torch.Generator().manual_seed(2))  # (B, 1, Z)
    ours.zero_grad(set_to_none=True)
    peer.zero_grad(set_to_none=True)
    mine = objective(config.objective, 1, DATA, ours(x, noise)).loss
    mine.backward()

    def given(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return mean + std * noise[:, 0], noise[:, 0]

    with mock.patch.object(peer, "_sample_gauss", given):
        theirs = peer({"data": x}).loss
    theirs.backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    worst = 0.0
    for name, gradient in in_peer_names(ours, gradient_of).items():
        worst = max(worst, float((gradient - gradients[name]).abs().max() / gradients[name].abs().max()))
    return {"loss": float((mine - theirs).detach().abs() / theirs.detach().abs()), "gradient": worst}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# -- a training step ---------------------------------------------------------------------------------------------------


class Ours:
    """Our model with its optimizer, and the step of `vae.train` without its log and its files."""

    def __init__(self, config: Config, model: VAE) -> None:
        self.config = config
        self.model = model.train()
        self.run = Run(config, Options("eval"))
        self.net = self.run.prepare(model)  # compiled, if the config says so
        self.done = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=True,
        )

    def step(self, x: Tensor) -> None:
        self.done += 1
        noise = self.model.noise(len(x), 1, self.run.generator(self.done))
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.autocast():
            draw = self.net(x, noise)
        losses = objective(self.config.objective, self.done, DATA, draw)
        losses.loss.backward()
        self.run.check_gradients(self.optimizer, losses.loss, self.config.train.grad_clip)
        self.optimizer.step()


class Peer:
    """pythae's model with AdamW, and the step of its BaseTrainer."""

    def __init__(self, config: Config, model: Any, fused: bool) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), **optimizer_settings(config), fused=fused or None)

    def step(self, x: Tensor) -> None:
        loss = self.model({"data": x}).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def optimizer_settings(config: Config) -> dict[str, Any]:
    """AdamW's settings of our config."""
    train = config.train
    return {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}


def make_sides(config: Config) -> dict[str, Ours | Peer]:
    """What a round times, each with a model of its own that starts from the same weights."""
    eager = replace(config, compile=False)
    fp32 = replace(eager, precision="fp32")
    return {
        "ours": Ours(config, build_pair(config)[0]),
        "ours_eager": Ours(eager, build_pair(config)[0]),
        "ours_fp32": Ours(fp32, build_pair(config)[0]),
        "peer": Peer(config, build_pair(config)[1], fused=True),
        "peer_default": Peer(config, build_pair(config)[1], fused=False),
    }


def summarise(times: dict[str, list[float]], images: int) -> dict[str, Any]:
    """Medians of the per-round ratios, with quartiles, and of the rates; `images` were seen in each block."""
    ours = ours_of(times)
    result: dict[str, Any] = ratio("ratio", times["peer"], ours)
    result |= ratio("ratio_eager", times["peer"], times["ours_eager"])
    result |= ratio("ratio_fp32", times["peer"], times["ours_fp32"])
    result |= ratio("ratio_default", times["peer_default"], ours)
    result |= ratio("aa_ratio", times["again"], times["ours"])
    others = ("ours_eager", "ours_fp32", "peer", "peer_default")
    for name, values in (("ours", ours), *((name, times[name]) for name in others)):
        result[name] = round(images / statistics.median(values), 1)
    return result | {"unit": "images per CPU-second"}


# -- whole programs ----------------------------------------------------------------------------------------------------


def program_ours(config: Config, images: MemoryImages) -> float:
    """CPU-seconds of `vae.train` on images in memory, from its config to its last file."""

    def load_images(data: Any, root: str, split: str = "train") -> MemoryImages | None:
        return images if split == "train" else None

    shutil.rmtree(config.run_dir, ignore_errors=True)
    start = time.process_time()
    with mock.patch.object(vae.train, "load_images", load_images), contextlib.redirect_stderr(io.StringIO()):
        vae.train.train(config, Options("train"))
    return time.process_time() - start


def program_peer(config: Config, images: MemoryImages) -> float:
    """The same of pythae's BaseTrainer, with the same number of images in batches of the same size."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    shutil.rmtree(config.run_dir, ignore_errors=True)
    peer = build_pair(config)[1]
    data = BaseDataset(images.images.float() / 255, torch.zeros(len(images)))
    settings = optimizer_settings(config)
    start = time.process_time()
    training = BaseTrainerConfig(
        output_dir=config.run_dir,
        per_device_train_batch_size=config.train.batch_size,
        num_epochs=config.train.steps * config.train.batch_size // len(images),
        optimizer_cls="AdamW",
        optimizer_params={name: settings[name] for name in ("betas", "weight_decay")},
        learning_rate=settings["lr"],
        no_cuda=True,
    )
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        BaseTrainer(peer, data, training_config=training).train()
    return time.process_time() - start


def compare_programs(config: Config, rounds: int) -> dict[str, Any]:
    """Whole programs, in turns, of two epochs."""
    images = MemoryImages(
        "random", (255 * make_batch(config, config.train.steps * config.train.batch_size // 2)).byte(), None
    )
    times = [(program_ours(config, images), program_peer(config, images)) for _ in range(rounds)]
    ratios = [peer / own for own, peer in times]
    seen = 2 * len(images)
    return {
        "program_ratio": round(statistics.median(ratios), 4),
        "program_ratio_iqr": quartiles(ratios),
        "program_ours": round(seen / statistics.median(own for own, _ in times), 1),
        "program_peer": round(seen / statistics.median(peer for _, peer in times), 1),
        "program_images": seen,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.vae", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/vae_mnist.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50, help="of each block (default: %(default)s)")
    parser.add_argument("--program-rounds", type=int, default=3, help="of whole programs; 0 = leave them out")
    parser.add_argument("--program-batches", type=int, default=200, help="an epoch of a whole program")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "program_batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"run_dir={folder}/run", *args.overrides]
        config = resolve(Config, args.config, settings)
        x = make_batch(config, config.train.batch_size)
        differences = largest_difference(config, *build_pair(config), x)
        print(f"largest relative difference in float32: {differences}")
        if max(differences.values()) > TOLERANCE:
            raise SystemExit(f"ours and the peer differ by more than {TOLERANCE}: nothing was timed")
        logging.disable(logging.WARNING)  # the peer's account of its training
        sides = make_sides(config)
        steps: dict[str, Callable[[], None]] = {name: partial(side.step, x) for name, side in sides.items()}
        result = summarise(interleave(steps, args.rounds, args.steps), args.steps * len(x))
        if args.program_rounds:
            program = [*PROGRAM, f"train.steps={2 * args.program_batches}"]
            result |= compare_programs(resolve(Config, args.config, [*settings, *program]), args.program_rounds)
    result = {
        "bench": f"VAE, {config.data.image_size} pixels, hidden {list(config.model.hidden)}, batch {len(x)}",
        **result,
        "precision": str(sides["ours"].run.machine.amp_dtype or torch.float32).removeprefix("torch."),
        "peer_precision": "float32",
        "rounds": args.rounds,
        "steps": args.steps,
        "threads": 1,
        "difference": differences,
        **circumstances(load, "torch", "pythae"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
