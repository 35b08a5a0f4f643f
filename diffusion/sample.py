"""Draw images from a trained model:

    python -m diffusion.sample --run runs/ddpm_mnist [sample.guidance=2 sample.count=100 ...]
    python -m diffusion.sample --run runs/ddpm_mnist --out DIR --count 10000 [sample.format=npz ...]

Without --out, into the run's `figures/`: a grid, interpolations between noises, and how images come out of the noise,
as a film strip (PNG) and a GIF. With it, as many images as the disk holds; see `export`.

Legend: B batch, C channels, H = W pixels, T frames.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from diffusion.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "diffusion", "sample", short={"out": "sample.out", "count": "sample.count"})

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import runtime
from common.checkpoint import UNFIT, CheckpointError, load_chosen, weights_hash
from common.errors import exits_cleanly
from common.files import atomic_open, sha256, write_csv
from common.images.export import Shards, claimed
from common.provenance import trained_otherwise
from common.run import Run
from diffusion.latents import check_decoder, to_pictures
from diffusion.mlp import MLP, build_network
from diffusion.model import UNet
from diffusion.objectives import DDPM, EDM, Flow, build_objective
from diffusion.samplers import guided, resolve_sampler, sample

Objective = DDPM | EDM | Flow
Network = UNet | MLP
NOISE_STREAM = 1_000_000_007  # keeps the generators of sampling apart from those of training
# settings that weights are of, and those among them that matter in training alone
TRAINED = ("model.", "objective.", "data.dataset", "data.image_size")
UNUSED = ("model.dropout", "objective.weighting", "objective.min_snr_gamma", "objective.label_dropout")


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Draw the pictures of one run."""
    with Run(config, options) as run:
        model, objective, step = load_model(config, options, run)
        if config.sample.out:
            return export(model, objective, config, run)
        folder = run.folder / "figures"
        sampler = resolve_sampler(config.objective.kind, config.sample.sampler)
        name = f"{sampler}{config.sample.steps}_w{config.sample.guidance:g}"
        drawn = generate(
            model, objective, config, config.sample.count, grid_labels(config, config.sample.count), config.seed, run
        )
        save_grid(drawn, folder / f"grid_{name}.png")
        save_grid(interpolate(model, objective, config, run), folder / f"interpolation_{name}.png", columns=10)
        frames = film(model, objective, config, run, count=10)
        chosen = torch.linspace(0, len(frames) - 1, 10).round().long()  # a row each: ten moments
        save_grid(frames[chosen].flatten(0, 1), folder / f"filmstrip_{name}.png", columns=frames.shape[1])
        save_gif(frames, folder / f"denoising_{name}.gif")
        run.display.say(
            f"step {step} of {config.train.steps}: wrote grid, interpolation, filmstrip and denoising_{name} into "
            f"{folder}"
        )


def export(model: Network, objective: Objective, config: Config, run: Run) -> None:
    """`sample.count` images into the folder `sample.out`, as PNGs beside a `labels.csv` or in npz files, a batch after
    the other. The same command goes on where it was stopped, and with a larger count adds to what is there (only a last
    batch that was not full is drawn anew).
    """
    settings = config.sample
    folder = Path(settings.out).expanduser()
    labels = grid_labels(config, settings.count)
    size = settings.batch_size
    with claimed(folder, sample_key(model, config), run.display.say) as manifest:
        shards = Shards(folder, manifest, settings.count, size, settings.format)
        missing = shards.missing()
        for number in run.track(run.display.track(missing, len(missing), "sampling")):
            chunk = None if labels is None else labels[number * size : (number + 1) * size]
            drawn = generate_batch(model, objective, config, number, shards.size(number), chunk, config.seed, run)
            shards.write(number, to_pictures(drawn, model, config), chunk)
        if labels is not None and settings.format == "png":
            write_csv(
                folder / "labels.csv", [{"file": f"{i:08d}.png", "class": c} for i, c in enumerate(labels.tolist())]
            )
    kept = shards.total - len(missing)
    run.display.say(f"{settings.count} images in {folder}; {kept} of {shards.total} batches were there before")


def sample_key(model: Network, config: Config) -> dict[str, Any]:
    """What generated images depend on, in JSON types: none kept of an interrupted evaluation are taken for others."""
    settings = dataclasses.asdict(config.sample)
    return {
        "weights": weights_hash(model.state_dict()),
        "objective": dataclasses.asdict(config.objective),
        "model": dataclasses.asdict(config.model),
        "image_size": config.data.image_size,
        "sample": {name: settings[name] for name in settings if name not in ("count", "out")},
        "precision": config.precision,
        "seed": config.seed,
        "decoder": sha256(Path(config.data.decoder).expanduser()) if config.data.dataset == "latents" else "",
    }


def load_model(config: Config, options: Options, run: Run) -> tuple[Network, Objective, int]:
    """The network of a run's newest whole checkpoint (or of `--checkpoint`), its objective, and the number of
    updates it has seen.
    """
    folder = run.folder / "checkpoints"
    state = load_chosen(folder, options.checkpoint)
    problem = trained_otherwise(state.get("config", ""), config, TRAINED, UNUSED)
    if problem:
        raise CheckpointError(f"the checkpoint in {folder} is of another model than the config's: {problem}")
    if config.data.dataset == "latents":
        check_decoder(config)
    model = build_network(config.model, config.data.image_size)
    try:
        model.load_state_dict(state["parts"]["ema" if config.sample.weights == "ema" else "model"])
        sigma_data = float(state["parts"]["measured"]["sigma_data"])
        step = int(state["step"])
    except UNFIT:
        raise CheckpointError(
            f"the checkpoint in {folder} is of another model than the config's model section"
        ) from None
    model = model.to(run.device, memory_format=run.memory_format).eval().requires_grad_(False)
    return model, build_objective(config.objective, sigma_data), step


def generate(
    model: Network, objective: Objective, config: Config, count: int, labels: Tensor | None, seed: int, run: Run
) -> Tensor:
    """Images uint8 (count, C, H, W) on the CPU, drawn as `config.sample` says; decoded, where the data are latents.

    Batch b depends on (seed, b) and the batch size alone. Raises `Stopped` between two sampling steps after a stop
    signal.

    Args:
        labels: int64 (count,), or None for a model without classes.
    """
    batch_size = config.sample.batch_size
    parts = [
        generate_batch(
            model,
            objective,
            config,
            b,
            min(batch_size, count - b * batch_size),
            None if labels is None else labels[b * batch_size : (b + 1) * batch_size],
            seed,
            run,
        )
        for b in range(math.ceil(count / batch_size))
    ]
    return torch.cat([to_pictures(part, model, config) for part in parts])


@torch.no_grad()
def generate_batch(
    model: Network,
    objective: Objective,
    config: Config,
    index: int,
    count: int,
    labels: Tensor | None,
    seed: int,
    run: Run,
    x_init: Tensor | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Batch number `index` of a sequence of samples: float (count, C, H, W) on the device. See `generate` and
    `samplers.sample`.
    """
    settings = config.sample
    sampler = resolve_sampler(config.objective.kind, settings.sampler)
    rng = torch.Generator(run.device).manual_seed(runtime.indexed_seed(seed, NOISE_STREAM, index))
    labels = None if labels is None else labels.to(run.device)
    denoise = guided(
        objective, lambda x, time, y: _call(model, run, x, time, y), labels, model.null_label, settings.guidance
    )
    shape = (count, config.model.image_channels, config.data.image_size, config.data.image_size)
    return sample(
        denoise,
        objective.grid(settings.steps, settings),
        sampler,
        shape,
        rng,
        device=run.device,
        eta=settings.eta,
        variance=settings.variance,
        clip=settings.clip,
        track=run.track,
        x_init=x_init,
        on_step=on_step,
    )


def _call(model: Network, run: Run, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    with run.autocast():
        return model(x.contiguous(memory_format=run.memory_format), time, labels)


def grid_labels(config: Config, count: int) -> Tensor | None:
    """Labels 0, 1, ..., K - 1, 0, 1, ... int64 (count,), so that a grid with K columns shows one class a column;
    None without classes.
    """
    return torch.arange(count) % config.model.num_classes if config.model.num_classes else None


def interpolate(
    model: Network, objective: Objective, config: Config, run: Run, rows: int = 6, columns: int = 10
) -> Tensor:
    """Images whose starting noises lie on great circles between two noises, one a row, with one label: uint8 (rows *
    columns, C, H, W).

    A straight line would leave the shell of radius sqrt(dimension) on which Gaussian noise lives; a great circle stays
    on it (White 2016).
    """
    shape = (rows, config.model.image_channels, config.data.image_size, config.data.image_size)
    ends = torch.randn(
        2, *shape, generator=torch.Generator().manual_seed(runtime.mix_seed(config.seed, NOISE_STREAM, 2**20))
    )
    angle = torch.linspace(0, math.pi / 2, columns).view(1, columns, 1, 1, 1)
    noise = torch.cos(angle) * ends[0][:, None] + torch.sin(angle) * ends[1][:, None]  # (rows, columns, C, H, W)
    labels = (
        None
        if not config.model.num_classes
        else (torch.arange(rows) % config.model.num_classes).repeat_interleave(columns)
    )
    sampler = "auto" if config.sample.sampler == "ddpm" else config.sample.sampler  # no noise may enter but the first
    smooth = dataclasses.replace(config, sample=dataclasses.replace(config.sample, eta=0.0, sampler=sampler))
    drawn = generate_batch(
        model, objective, smooth, 0, rows * columns, labels, config.seed, run, noise.flatten(0, 1).to(run.device)
    )
    return to_pictures(drawn, model, config)


def film(model: Network, objective: Objective, config: Config, run: Run, count: int) -> Tensor:
    """What the network believes x_0 to be, step by step: uint8 (T, count, C, H, W)."""
    frames: list[Tensor] = []
    drawn = generate_batch(
        model,
        objective,
        config,
        0,
        count,
        grid_labels(config, count),
        config.seed,
        run,
        on_step=lambda i, x, x0: frames.append(to_pictures(x0, model, config)),
    )
    return torch.stack([*frames, to_pictures(drawn, model, config)])


def tile(images: Tensor, columns: int, scale: int = 1) -> Tensor:
    """(N, C, H, W) uint8 -> one (C, rows (H + 2) s + 2 s, columns (W + 2) s + 2 s) sheet with a border of 2 pixels,
    enlarged by `scale`.
    """
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((channels, rows * (height + 2) + 2, columns * (width + 2) + 2), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 2) + 2, (i % columns) * (width + 2) + 2
        sheet[:, top : top + height, left : left + width] = image
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def to_pillow(sheet: Tensor) -> Image.Image:
    """(1 or 3, H, W) uint8 -> a Pillow image."""
    return Image.fromarray((sheet[0] if len(sheet) == 1 else sheet.permute(1, 2, 0)).numpy())  # (C, H, W) -> (H, W, C)


def save_grid(images: Tensor, path: Path, columns: int = 0) -> None:
    """Write images uint8 (N, C, H, W) as one PNG, in ten columns if not told otherwise; small images are enlarged."""
    scale = max(1, 56 // images.shape[-1])
    with atomic_open(path) as file:
        to_pillow(tile(images, columns or 10, scale)).save(file, "PNG", optimize=True)


def save_gif(frames: Tensor, path: Path, seconds: float = 4.0) -> None:
    """Write frames uint8 (T, N, C, H, W) as an endless GIF that rests on the last one."""
    scale = max(1, 56 // frames.shape[-1])
    sheets = [to_pillow(tile(frame, columns=10, scale=scale)).convert("RGB").quantize(64) for frame in frames]
    durations = [max(20, int(1000 * seconds / len(sheets)))] * (len(sheets) - 1) + [1500]
    with atomic_open(path) as file:
        sheets[0].save(file, "GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0, disposal=1)


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
