"""Draw images from a trained model's prior, as many as the disk holds:

    python -m vae.sample --run runs/vae_mnist [--out DIR] [--count 100000] [sample.format=npz ...]

They are written in shards of `sample.shard` images, with a `manifest.json` that says what they were made by. The same
command goes on where it was stopped; shards of other weights or settings are never taken for its own.

Image i is a function of (seed, i): another number of images or an interruption changes nothing, and another batch size
at most the rounding of a grey value.

Legend: B images decoded at once, Z latents, P numbers a pixel from the decoder, C channels, H = W pixels.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from vae.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "vae", "sample", short={"out": "sample.out", "count": "sample.count"})

import dataclasses
import itertools
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import weights_hash
from common.errors import exits_cleanly
from common.images.export import Shards, claimed
from common.run import Run
from common.runtime import mix_seed
from vae.figures import to_bytes
from vae.load import load_model
from vae.model import Autoencoder

SAMPLE_STREAM = 6_000_011  # keeps the random numbers of sampling apart from those of training and evaluation


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Draw `sample.count` images."""
    settings = config.sample
    with Run(config, options) as run:
        model, step = load_model(config, options, run)
        folder = Path(settings.out).expanduser() if settings.out else run.folder / "generated"
        with claimed(folder, sample_key(model, config), run.display.say) as manifest:
            shards = Shards(folder, manifest, settings.count, settings.shard, settings.format)
            missing = shards.missing()
            blocks = [(number, start) for number in missing for start in starts(shards, number, settings.batch_size)]
            track = run.track(run.display.track(blocks, len(blocks), "sampling"))
            for number, group in itertools.groupby(track, key=itemgetter(0)):
                shards.write(number, torch.cat([draw(model, config, start, run) for _, start in group]))
        kept = shards.total - len(missing)
        run.display.say(
            f"step {step}: {settings.count} images in {folder}, {kept} of {shards.total} shards were there before"
        )


def starts(shards: Shards, number: int, batch_size: int) -> range:
    """Numbers of the images with which the batches of a shard begin."""
    first = number * shards.shard
    return range(first, first + shards.size(number), batch_size)


@torch.no_grad()
def draw(model: Autoencoder, config: Config, start: int, run: Run) -> Tensor:
    """Images number `start` and on, as many as `sample.batch_size`: uint8 (B, C, H, W) on the CPU.

    In single precision and always in full batches: matrix products round differently when they have other sizes.
    """
    rngs = [
        torch.Generator().manual_seed(mix_seed(config.seed, SAMPLE_STREAM, i))
        for i in range(start, start + config.sample.batch_size)
    ]
    noise = torch.cat([model.noise(1, 1, rng)[:, 0] for rng in rngs])  # (B, Z), on the CPU for any device
    output = model.decode(model.prior(noise.to(run.device), config.sample.temperature))  # (B, P, H, W)
    if config.sample.pixels == "mean":
        return to_bytes(model.likelihood.mean(output)).cpu()
    likelihood = model.likelihood.cpu()  # a few numbers, if any
    drawn = [likelihood.draw(row[None], rng) for row, rng in zip(output.cpu(), rngs, strict=True)]
    return to_bytes(torch.cat(drawn))


def sample_key(model: Autoencoder, config: Config) -> dict[str, Any]:
    """What the images depend on, and in which files they are, in JSON types."""
    settings = dataclasses.asdict(config.sample)
    return {
        "weights": weights_hash(model.state_dict()),
        "model": dataclasses.asdict(config.model),
        "likelihood": dataclasses.asdict(config.likelihood),
        "image_size": config.data.image_size,
        "double_precision": config.precision == "fp64",
        "seed": config.seed,
        "sample": {name: settings[name] for name in settings if name not in ("count", "out")},
    }


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
