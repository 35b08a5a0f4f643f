"""Train a variational autoencoder:

    python -m vae.train --config configs/vae_mnist.yaml [key=value ...] [--resume] [--dry-run]

Legend: B images a step over all processes, K draws of z for each, Z latents, C channels, H = W pixels.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from vae.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "vae")

from typing import Any

import torch
from torch import Tensor

from common.checkpoint import export_weights
from common.config import require
from common.ema import EMA
from common.errors import exits_cleanly
from common.images import Images
from common.images.memory import random_flip
from common.rates import learning_rate
from common.run import Run
from common.runtime import check_machine, count_parameters
from vae.data import load_images
from vae.figures import save_progress
from vae.images import prepare
from vae.load import build_model
from vae.metrics.likelihood import Bounds, active_units, estimate_bounds
from vae.model import Autoencoder, Draw
from vae.objectives import Critic, Losses, critic_loss, decompose, objective

VALIDATION_SAMPLES = 10  # draws of z for the bound of validation images


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint and `model.safetensors`."""
    images = load_images(config.data, config.data_root)
    assert images is not None  # something to train on, or an error
    check_fit(config, images)
    if options.dry_run:
        return describe(config, images)
    run = Run.start(config, options)
    with run:
        choosing = load_images(config.data, config.data_root, "validation")
        model = build_model(config).to(run.device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=run.device.type != "mps",
        )
        ema = EMA(model, config.train.ema)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
        critic = None
        if config.objective.kind == "factor":
            critic = Critic(config.objective, config.model.latents).to(run.device)
            critic_optimizer = torch.optim.Adam(critic.parameters(), config.objective.critic_lr, betas=(0.5, 0.9))
            parts |= {"critic": critic, "critic_optimizer": critic_optimizer}
        done = run.resume(**parts)  # 0 when fresh
        net = run.prepare(model)  # the same weights, compiled or spread over processes
        split_kl = torch.compile(decompose) if config.compile else decompose
        batches = images.batches(done + 1, config.train.batch_size, config.seed, run.device)
        run.display.say(f"{len(images)} images {images.shape}, {count_parameters(model) / 1e6:.2f}M parameters")

        for step in run.steps(done, config.train.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.train)
            rng = run.generator(step)  # flips, binarisation and noise are functions of (seed, step)
            pixels, _ = next(batches)  # uint8 (B, C, H, W)
            x = prepare(pixels, config, rng)
            x = random_flip(x, rng) if config.data.flip else x
            noise = model.noise(len(x), config.objective.samples, rng)  # (B, K, Z)
            x = run.shard(x)
            noise = run.shard(noise)

            optimizer.zero_grad(set_to_none=True)
            with run.autocast():
                draw = net(x, noise)
            losses = objective(config.objective, step, len(images), draw, critic, split_kl)
            run.scaler.scale(losses.loss).backward()
            grad_norm = run.check_gradients(optimizer, losses.loss, config.train.grad_clip)
            run.scaler.step(optimizer)  # in fp16 left out where a gradient overflowed; else simply optimizer.step()
            run.scaler.update()
            ema.update(model, step)
            if critic is not None:
                z, other = draw.latents[:, 0].detach().chunk(2)  # codes of half the batch, told from the other half's
                loss = critic_loss(critic, z, other, rng)
                critic_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                critic_optimizer.step()
                losses.shown["critic_loss"] = loss.detach()

            shown = shown_terms(losses, draw) | {"grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}
            if choosing is not None and run.due(step, config.train.validate_every):
                shown |= validate(ema.model, choosing, config, run)
            run.log(step, config.train.log_every, {"images": config.train.batch_size}, **shown)
            if run.is_main and run.due(step, config.train.sample_every):
                save_progress(ema.model, x, run)
            if run.save_due(step, config.train.save_every):
                run.save(step, **parts)
        if run.is_main:
            export(run, config, ema)


def shown_terms(losses: Losses, draw: Draw) -> dict[str, Tensor]:
    """What a log line says of a batch: nats an image, and how many latents are in use."""
    return {
        "loss": losses.loss.detach(),
        "elbo": draw.elbo.detach().mean(),
        "log_likelihood": draw.log_likelihood.detach().mean(),
        "kl": draw.kl.detach().sum(2).mean(),
        "active_units": active_units(draw),
        **losses.shown,
    }


def validate(model: Autoencoder, images: Images, config: Config, run: Run) -> dict[str, float]:
    """The ELBO and a tighter bound of the validation images: what choices are made on."""
    bounds: Bounds = estimate_bounds(model, images, config, run, VALIDATION_SAMPLES)
    return {"val_elbo": bounds.elbo, f"val_bound_{VALIDATION_SAMPLES}": bounds.log_likelihood}


def export(run: Run, config: Config, ema: EMA[Autoencoder]) -> None:
    """`model.safetensors`: the weights that sampling and evaluation use."""
    facts = {
        "project": "vae",
        "step": str(run.step),
        "total_steps": str(config.train.steps),
        "config": to_yaml(config),
    }
    export_weights(run.folder / "model.safetensors", ema.state_dict(), facts)


def check_fit(config: Config, images: Images) -> None:
    """`ConfigError` where the model does not fit the images."""
    channels, size, _ = images.shape
    require(
        channels == config.model.image_channels,
        "model.image_channels",
        f"must be {channels} for data.dataset={config.data.dataset}",
    )
    require(size == config.data.image_size, "data.image_size", f"must be {size} for these images")
    require(
        config.objective.kind != "tcvae" or config.train.batch_size <= len(images),
        "train.batch_size",
        f"must be at most the number of images, {len(images)}: q(z) is estimated from different ones",
    )


def describe(config: Config, images: Images) -> None:
    """What --dry-run prints: the resolved config, then sizes and shapes."""
    check_machine(config)
    model = build_model(config)
    print(to_yaml(config), end="")
    print(f"# {count_parameters(model):,} parameters, a code of {model.size} numbers")
    epochs = config.train.steps * config.train.batch_size / len(images)
    print(
        f"# {len(images):,} images of shape {images.shape}; a batch is ({config.train.batch_size}, "
        f"{', '.join(map(str, images.shape))}), {epochs:.1f} epochs"
    )


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
