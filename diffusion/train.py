"""Train a diffusion model:

    python -m diffusion.train --config configs/ddpm_cifar.yaml [key=value ...] [--resume] [--dry-run]

Legend: B images a step over all processes, C channels, H = W pixels.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, to_yaml
from diffusion.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "diffusion")

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.checkpoint import export_weights
from common.config import require
from common.ema import EMA
from common.errors import exits_cleanly
from common.images.memory import random_flip, started
from common.rates import learning_rate
from common.run import Run
from common.runtime import check_machine, count_parameters
from diffusion.data import load_images
from diffusion.images import Images
from diffusion.latents import LatentImages, check_decoder, to_network
from diffusion.measured import Measured
from diffusion.mlp import MLP, build_network
from diffusion.model import UNet
from diffusion.objectives import build_objective
from diffusion.sample import generate, grid_labels, save_grid


@exits_cleanly
def train(config: Config, options: Options) -> None:
    """Run one experiment, from its config to its last checkpoint and `model.safetensors`."""
    images = load_images(config.data, config.data_root)
    check_fit(config, images)
    if options.dry_run:
        return describe(config, images)
    run = Run.start(config, options)
    with run:
        measured = Measured(images)
        model = build_network(config.model, config.data.image_size)
        if isinstance(images, LatentImages):
            model.scale.fill_(images.scale)  # a resumed run keeps the one that it began with
        model = model.to(run.device, memory_format=run.memory_format)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=run.device.type != "mps",
        )
        ema = EMA(model, config.train.ema)
        done = run.resume(model=model, optimizer=optimizer, ema=ema, measured=measured)  # 0 when fresh
        objective = build_objective(config.objective, measured.sigma_data)
        net = run.prepare(model)  # the same weights, compiled or spread over processes
        run.flops_per_step = training_flops(config) * config.train.batch_size
        batches = started(images.batches(done + 1, config.train.batch_size, config.seed, run.device))
        run.display.say(
            f"{len(images)} images {images.shape}, {count_parameters(model) / 1e6:.1f}M parameters, "
            f"sigma_data {measured.sigma_data:.4f}"
        )
        if measured.changed:
            run.display.say("note: these are not the images that the run began with; sigma_data stays as it was then")

        for step in run.steps(done, config.train.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.train)
            rng = run.generator(step)  # flips, noise, times and dropped labels are functions of (seed, step)
            pixels, labels = next(batches)  # uint8 (B, C, H, W), int64 (B,)
            x0 = to_network(pixels, model)
            x0 = random_flip(x0, rng) if config.data.flip else x0
            noise = torch.randn(x0.shape, generator=rng, device=run.device)
            u = torch.rand(len(x0), generator=rng, device=run.device)  # decides each image's noise level
            labels = drop_labels(labels, config, rng)
            x0, noise, u, labels = (None if part is None else run.shard(part) for part in (x0, noise, u, labels))

            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=run.device)
            size = config.train.microbatch or len(x0)
            for i in range(0, len(x0), size):
                part = slice(i, i + size)
                x0_part = x0[part].contiguous(memory_format=run.memory_format)
                with run.autocast():
                    losses = objective.loss(
                        net, x0_part, None if labels is None else labels[part], noise[part], u[part]
                    )
                part_loss = losses.sum() / len(x0)
                run.scaler.scale(part_loss).backward()
                loss += part_loss.detach()
            grad_norm = run.check_gradients(optimizer, loss, config.train.grad_clip)  # stops on a non-finite value
            run.scaler.step(optimizer)  # in fp16 left out where a gradient overflowed; else simply optimizer.step()
            run.scaler.update()
            ema.update(model, step)

            run.log(
                step,
                config.train.log_every,
                {"images": config.train.batch_size},
                loss=loss,
                grad_norm=grad_norm,
                lr=optimizer.param_groups[0]["lr"],
            )
            if run.is_main and run.due(step, config.train.sample_every):
                with run.interruptible():
                    labels = grid_labels(config, config.sample.count)
                    drawn = generate(ema.model, objective, config, config.sample.count, labels, config.seed, run)
                    save_grid(drawn, run.folder / f"samples/{step:08d}.png")
            if run.save_due(step, config.train.save_every):
                run.save(step, model=model, optimizer=optimizer, ema=ema, measured=measured)
        if run.is_main:
            export(run, config, model, ema, measured)


def export(run: Run, config: Config, model: UNet | MLP, ema: EMA, measured: Measured) -> None:
    """`model.safetensors`: the weights that sampling and evaluation use, the average or the last ones, with the step
    they are of and how many the run was to have.
    """
    weights = ema.state_dict() if config.sample.weights == "ema" else model.state_dict()
    facts = {
        "project": "diffusion",
        "step": str(run.step),
        "total_steps": str(config.train.steps),
        "weights": config.sample.weights,
        "sigma_data": str(measured.sigma_data),
        "config": to_yaml(config),
    }
    export_weights(run.folder / "model.safetensors", weights, facts)


def drop_labels(labels: torch.Tensor | None, config: Config, rng: torch.Generator) -> torch.Tensor | None:
    """Replace a share of the labels (B,) by "no label", so that one network learns both models guidance needs (Ho &
    Salimans 2022).
    """
    if labels is None or not config.model.num_classes:
        return None
    dropped = torch.rand(len(labels), generator=rng, device=labels.device) < config.objective.label_dropout
    return torch.where(dropped, config.model.num_classes, labels)


def check_fit(config: Config, images: Images) -> None:
    """`ConfigError` where the model does not fit the images."""
    channels = images.shape[0]
    classes = len(images.class_names)
    require(
        channels == config.model.image_channels,
        "model.image_channels",
        f"must be {channels} for data.dataset={config.data.dataset}",
    )
    require(config.model.num_classes in (0, classes), "model.num_classes", f"must be 0 or {classes} for these images")
    if isinstance(images, LatentImages):
        check_decoder(config)


def training_flops(config: Config) -> float:
    """Floating-point operations to train on one image: forward, and twice that for backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_network(config.model, config.data.image_size)
        model(
            torch.empty(1, config.model.image_channels, config.data.image_size, config.data.image_size), torch.empty(1)
        )
    return 3.0 * counter.get_total_flops()


def describe(config: Config, images: Images) -> None:
    """What --dry-run prints: the resolved config, then sizes and shapes."""
    check_machine(config)
    model = build_network(config.model, config.data.image_size)
    print(to_yaml(config), end="")
    print(f"# {count_parameters(model):,} parameters, {training_flops(config) / 1e9:.2f} GFLOP to train on one image")
    epochs = config.train.steps * config.train.batch_size / len(images)
    print(
        f"# {len(images):,} images of shape {images.shape}, {len(images.class_names)} classes; a batch is "
        f"({config.train.batch_size}, {', '.join(map(str, images.shape))}), {epochs:.1f} epochs"
    )


if __name__ == "__main__":
    train(CONFIG, OPTIONS)
