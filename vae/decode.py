"""Draw the images that codes stand for:

    python -m vae.decode --run runs/vae_mnist --latents runs/vae_mnist/latents/test.npz [--out DIR] [decode.format=npz]

The codes are of `vae.encode`, or of whatever has learned from such (then not scaled any more); `common.latents`
describes the file. PNGs are named as the encoded files were, or by number.

Legend: B images decoded at once, N images, Z latents, C channels, H = W pixels.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load, require
from vae.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "vae", "decode", short={"latents": "decode.latents", "out": "decode.out"})

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from common.checkpoint import weights_hash
from common.errors import ProjectError, exits_cleanly
from common.files import sha256
from common.latents import Latents, read_latents
from common.images.export import claimed, npz_writer, save_png, to_rows
from common.run import Run
from vae.figures import to_bytes
from vae.load import load_model
from vae.model import Autoencoder


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Decode `decode.latents`."""
    settings = config.decode
    require(settings.latents, "decode.latents", "must name a file of codes: --latents FILE.npz")
    with Run(config, options) as run:
        model, step = load_model(config, options, run)
        path = Path(settings.latents).expanduser()
        latents = read_latents(path)
        key = {
            "weights": weights_hash(model.state_dict()),
            "latents": sha256(path),
            "format": settings.format,
        }
        check_fit(path, latents, model, key["weights"])
        folder = Path(settings.out).expanduser() if settings.out else run.folder / "decoded" / path.stem
        with claimed(folder, key, run.display.say):
            if settings.format == "npz":
                write_archive(folder / "images.npz", model, latents, config, run)
            else:
                write_pngs(folder, model, latents, config, run)
        run.display.say(f"step {step}: {len(latents)} images in {folder}")


def check_fit(path: Path, latents: Latents, model: Autoencoder, weights: str) -> None:
    """`ProjectError` for codes that mean nothing to this model."""
    size = latents.codes.shape[1]
    if size != model.size:
        raise ProjectError(f"{path} has codes of {size} numbers, this run's model of {model.size}")
    if latents.facts.get("weights", weights) != weights:
        made = f"{latents.facts.get('run', 'another run')} at step {latents.facts.get('step', '?')}"
        raise ProjectError(f"{path} was made by other weights ({made}): its codes mean something else to this run's")


@torch.no_grad()
def decode(model: Autoencoder, codes: torch.Tensor, run: Run) -> torch.Tensor:
    """Expected images of codes: (B, Z) -> uint8 (B, C, H, W) on the CPU."""
    z = codes.to(run.device, torch.get_default_dtype())
    return to_bytes(model.likelihood.mean(model.decode(z))).cpu()


def write_pngs(folder: Path, model: Autoencoder, latents: Latents, config: Config, run: Run) -> None:
    """One file an image."""
    paths = [folder / name for name in png_names(latents)]
    size = config.decode.batch_size
    starts = range(0, len(latents), size)
    for start in run.track(run.display.track(starts, len(starts), "decoding")):
        images = decode(model, latents.codes[start : start + size], run)
        for image, path in zip(images, paths[start : start + size], strict=True):
            save_png(image, path)


def write_archive(path: Path, model: Autoencoder, latents: Latents, config: Config, run: Run) -> None:
    """All images in one file: `images` uint8 (N, H, W, C), and the names, numbers and labels that came with the
    codes.
    """
    parts = latents.codes.split(config.decode.batch_size)
    with npz_writer(path) as archive:
        for part in run.track(run.display.track(parts, len(parts), "decoding")):
            archive.add("images", to_rows(decode(model, part, run)))
        whole: dict[str, Any] = {
            "names": latents.names,
            "index": latents.index,
            "labels": latents.labels,
            "class_names": latents.class_names,
        }
        for name, values in whole.items():
            if values is not None and len(values):
                archive.put(name, np.asarray(values))


def png_names(latents: Latents) -> list[str]:
    """A file name for each code, no two alike: the encoded file's with the suffix .png, or the number.

    Raises:
        ProjectError: a name leads out of the folder.
    """
    if not latents.names:
        index = range(len(latents)) if latents.index is None else latents.index.tolist()
        return unique([f"{i:08d}.png" for i in index])
    for name in latents.names:
        path = PurePosixPath(name)
        if not path.name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ProjectError(f"decode.latents: {name!r} cannot be the name of an image in the folder")
    return unique([PurePosixPath(name).with_suffix(".png").as_posix() for name in latents.names])


def unique(names: list[str]) -> list[str]:
    """The names, with a number before the suffix of each that has occurred before."""
    taken: set[str] = set()
    result = []
    for name in names:
        candidate = name
        count = 1
        while candidate.lower() in taken:  # some file systems take both cases for one
            count += 1
            candidate = f"{name.removesuffix('.png')}-{count}.png"
        taken.add(candidate.lower())
        result.append(candidate)
    return result


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
