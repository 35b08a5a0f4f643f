"""Write images as codes, for another program to learn from:

    python -m vae.encode --run runs/vae_mnist [--out DIR] [encode.split=test] [encode.folder=/my/pictures]

Into `latents/` of the run go a file of codes for each split (or one, named after the folder) as `common.latents`
describes it, and `decoder.safetensors`, which turns codes back into images without this project: see `common.program`.

The code of an image is the mean of q(z | x). It is not scaled; `scale` in each file is what brings the training codes
to unit variance, as diffusion on latents wants them (Rombach et al. 2022, appendix G).

Legend: B images at once, N images, Z latents, C channels, H = W pixels.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from vae.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "vae", "encode", short={"out": "encode.out"})

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import weights_hash
from common.errors import ProjectError, exits_cleanly
from common.files import place_of, write_json
from common.images import FolderImages, MemoryImages, list_images
from common.program import save_program
from common.images.export import MANIFEST, claimed, npz_writer
from common.run import Run
from vae.data import load_images
from vae.images import expected
from vae.load import load_model
from vae.model import VAE, Autoencoder

DECODER = "decoder.safetensors"
Dataset = MemoryImages | FolderImages


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Encode what `config.encode` names."""
    settings = config.encode
    with Run(config, options) as run:
        model, step = load_model(config, options, run)
        images = find_images(config)
        folder = Path(settings.out).expanduser() if settings.out else run.folder / "latents"
        identity = identify(model, config)
        with claimed(folder, identity, run.display.say) as manifest:
            facts = identity | {"run": run.folder.name, "step": step}
            save_program(
                folder / DECODER, Decoder(model), torch.zeros(2, model.size, dtype=torch.float32), texts(facts)
            )
            if manifest.get("scale") is None and "train" not in images:
                manifest["scale"] = measure_scale(model, config, run)
            for name, data in images.items():  # the training images first: the others' files hold their scale
                facts |= {"split": name, "data": describe_data(config)}
                path = folder / f"{name}.npz"
                manifest["scale"] = write_codes(path, model, data, facts, manifest.get("scale"), config, run)
            write_json(folder / MANIFEST, manifest)
        run.display.say(f"step {step}: {', '.join(images)} and the decoder in {folder}")


def find_images(config: Config) -> dict[str, Dataset]:
    """What is to be encoded, by the names of the files, training images first."""
    settings = config.encode
    if settings.folder:
        folder = place_of(settings.folder, config.data_root)
        listing = list_images(folder, "encode.folder")
        grey = config.model.image_channels == 1
        data = FolderImages(
            "folder", listing, config.data.image_size, config.data.workers, grey=grey, patience=config.data.patience
        )
        return {"folder" if folder.name in ("train", "test", "validation", "") else folder.name: data}
    splits = ("train", "validation", "test") if settings.split == "all" else (settings.split,)
    found = {name: load_images(config.data, config.data_root, name) for name in splits}  # type: ignore[arg-type]
    there = {name: data for name, data in found.items() if data is not None}
    if not there:
        raise ProjectError(f"encode.split: there are no {settings.split} images in data.dataset={config.data.dataset}")
    return there


def identify(model: Autoencoder, config: Config) -> dict[str, Any]:
    """What codes depend on beside the images, in JSON types."""
    return {
        "project": "vae",
        "weights": weights_hash(model.state_dict()),
        "latents": model.size,
        "image_shape": [config.model.image_channels, config.data.image_size, config.data.image_size],
    }


def describe_data(config: Config) -> dict[str, Any]:
    """Where images like these are found again, in the settings that every project with images has."""
    data = dataclasses.asdict(config.data)
    about = {name: data[name] for name in ("dataset", "folder", "held_out", "grey", "image_size")}
    if config.encode.folder:
        grey = config.model.image_channels == 1
        about |= {"dataset": "folder", "folder": config.encode.folder, "held_out": 0.0, "grey": grey}
    return about


class Decoder(nn.Module):
    """From codes to expected images: what is exported. (B, Z) -> (B, C, H, W) in [0, 1]"""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval()

    def forward(self, z: Tensor) -> Tensor:
        return self.model.likelihood.mean(self.model.decode(z))


@torch.no_grad()
def encode(model: Autoencoder, pixels: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """Means of q(z | x), and log variances where it is one normal distribution; on the CPU. uint8 (B, C, H, W) ->
    (B, Z)
    """
    x = expected(pixels, config)
    if not isinstance(model, VAE):  # in a hierarchy the lower layers' distributions depend on what is drawn above
        return model.codes(x).float().cpu(), None
    posterior = model.infer(x)
    return posterior.mean.float().cpu(), posterior.log_variance.float().cpu()


def in_order(data: Dataset, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Every usable image once: uint8 (B, C, H, W) on the device, and its number, int64 (B,)."""
    if isinstance(data, FolderImages):
        yield from data.in_order(batch_size, device)
        return
    for index in torch.arange(len(data)).split(batch_size):
        yield data.images[index].to(device), index


class Spread:
    """Standard deviation of numbers that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self.squares = 0.0

    def add(self, values: Tensor) -> None:
        """Take in more of them, any shape."""
        exact = values.double()
        self.count += values.numel()
        self.sum += float(exact.sum())
        self.squares += float(exact.square().sum())

    @property
    def scale(self) -> float:
        """1 / standard deviation. `ProjectError` where all are equal, or some are not finite."""
        variance = self.squares / max(self.count, 1) - (self.sum / max(self.count, 1)) ** 2
        if not (math.isfinite(variance) and variance > 0):
            raise ProjectError("the codes are all equal or not finite: this model has learned nothing to encode")
        return variance**-0.5


def write_codes(
    path: Path,
    model: Autoencoder,
    data: Dataset,
    facts: dict[str, Any],
    scale: float | None,
    config: Config,
    run: Run,
) -> float | None:
    """Write the codes of a dataset, at no time holding more than a batch of images.

    Args:
        scale: of the training images' codes; measured here where these are they. None: it could not be measured.
    Returns:
        The scale that is in the file.
    """
    spread = Spread()
    numbers = []
    with npz_writer(path) as archive:
        for index, mean, log_variance in codes_of(model, data, config, run, f"encoding {path.stem}"):
            spread.add(mean)
            archive.add("codes", mean.numpy())
            if log_variance is not None:
                archive.add("log_variances", log_variance.numpy())
            numbers.append(index)
        index = torch.cat(numbers)
        if isinstance(data, FolderImages):
            archive.put("names", np.array([file_name(data.files[i], config) for i in index.tolist()]))
        else:
            archive.put("index", index.numpy())
        if data.labels is not None:
            archive.put("labels", data.labels[index].numpy())
            archive.put("class_names", np.array(data.class_names))
        if facts["split"] == "train":
            scale = spread.scale
        if scale is not None:
            archive.put("scale", np.array(scale))
        archive.put("facts", np.array(json.dumps(facts)))
    return scale


def codes_of(
    model: Autoencoder, data: Dataset, config: Config, run: Run, label: str
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Numbers, means and log variances of a dataset's images, batch by batch."""
    size = config.encode.batch_size
    batches = run.display.track(in_order(data, size, run.device), -(-len(data) // size), label)
    for pixels, index in run.track(batches):
        mean, log_variance = encode(model, pixels, config)
        yield index, mean, log_variance


def measure_scale(model: Autoencoder, config: Config, run: Run) -> float | None:
    """1 / standard deviation of the training images' codes; None, with a note, where those images are not here."""
    try:
        data = load_images(config.data, config.data_root)
    except ProjectError as error:
        run.display.say(f"note: no scale, for the training images are not here: {error}")
        return None
    assert data is not None  # something was trained on
    spread = Spread()
    for _, mean, _ in codes_of(model, data, config, run, "measuring the scale"):
        spread.add(mean)
    return spread.scale


def file_name(path: Path, config: Config) -> str:
    """A file's path below the person's folder, with / on every system; its bare name elsewhere."""
    folder = place_of(config.encode.folder or config.data.folder, config.data_root)
    inside = path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside else path.name


def texts(facts: dict[str, Any]) -> dict[str, str]:
    """Facts as the metadata of a safetensors file: text, or JSON of what is none."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
