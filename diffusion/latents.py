"""Diffusion on the codes of an autoencoder instead of on pixels (Rombach et al. 2022): codes from one file, a decoder
from another, both written by whoever trained the autoencoder. The formats are in `common.latents` and `common.program`.

Legend: N codes, B batch, Z numbers a code, C channels, H = W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from torch import Tensor, nn

from common.config import ConfigError
from common.errors import ProjectError
from common.images import MemoryImages
from common.images.memory import batch_indices, draw_indices
from common.latents import read_latents
from common.program import Program, load_program
from common.runtime import mix_seed
from diffusion.config import Config, DataConfig
from diffusion.images import to_float, to_uint8

POSTERIOR_STREAM = 2_000_000_011  # keeps the draws of codes apart from the order in which they are seen


class LatentImages(MemoryImages):
    """Codes in the place of images: float32 (N, Z, 1, 1), not scaled.

    Attributes:
        deviations: standard deviations of q(z | x), where codes are drawn from it anew each time; else None.
        scale: 1 / standard deviation of what is trained on.
    """

    def __init__(
        self,
        codes: Tensor,
        labels: Tensor | None,
        class_names: tuple[str, ...],
        deviations: Tensor | None = None,
        scale: float = 0.0,
    ) -> None:
        super().__init__("latents", codes, labels, class_names)
        self.deviations = deviations
        self.scale = scale or self._measure()

    def _measure(self) -> float:
        variance = float(self.images.double().var(correction=0))
        if self.deviations is not None:
            variance += float(self.deviations.double().square().mean())
        if variance == 0:
            raise ProjectError("data.latents: all codes are equal: there is nothing to learn")
        return variance**-0.5

    def draw(self, count: int, seed: int = 0) -> LatentImages:
        """`count` codes drawn by seed, 0 = all; their scale stays that of all."""
        index = draw_indices(len(self), count, seed)
        labels = None if self.labels is None else self.labels[index]
        deviations = None if self.deviations is None else self.deviations[index]
        return LatentImages(self.images[index], labels, self.class_names, deviations, self.scale)

    def batches(
        self, first_step: int, batch_size: int, seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless batches from step `first_step` on: float (B, Z, 1, 1) and int64 (B,) or None. A function of (seed,
        step), draws from q(z | x) included.
        """
        codes = self.images.to(device)
        labels = None if self.labels is None else self.labels.to(device)
        deviations = None if self.deviations is None else self.deviations.to(device)
        step = first_step
        while True:
            index = batch_indices(step, batch_size, len(self), seed).to(device)
            batch = codes[index]
            if deviations is not None:
                rng = torch.Generator(device).manual_seed(mix_seed(seed, POSTERIOR_STREAM, step))
                batch = batch + deviations[index] * torch.randn(batch.shape, generator=rng, device=device)
            yield batch.to(torch.get_default_dtype()), None if labels is None else labels[index]
            step += 1

    def pixel_std(self) -> float:
        """sigma_data: of codes after they were scaled, 1."""
        return 1.0


def load_latents(config: DataConfig) -> LatentImages:
    """The training codes that `data.latents` names."""
    path = Path(config.latents).expanduser()
    latents = read_latents(path)
    deviations = None
    if config.posterior == "sample":
        if latents.log_variances is None:
            raise ConfigError("data.posterior", f"must be mean: {path} has no log_variances to draw with")
        deviations = grid(torch.exp(latents.log_variances / 2))
    return LatentImages(grid(latents.codes), latents.labels, latents.class_names, deviations)


def grid(codes: Tensor) -> Tensor:
    """(N, Z) -> (N, Z, 1, 1): an image of one pixel."""
    return codes[:, :, None, None]


def to_network(batch: Tensor, model: nn.Module) -> Tensor:
    """What the network learns from: bytes as numbers in [-1, 1], codes with unit variance."""
    return to_float(batch) if batch.dtype == torch.uint8 else batch * model.scale


def to_pictures(x: Tensor, model: nn.Module, config: Config) -> Tensor:
    """Samples (B, C, H, W) as images uint8 on the CPU; those of codes (B, Z, 1, 1) are decoded."""
    if config.data.dataset != "latents":
        return to_uint8(x).cpu()
    return decode(x.float().flatten(1) / model.scale.float(), config, x.device)


def decode(codes: Tensor, config: Config, device: torch.device) -> Tensor:
    """Codes (B, Z), not scaled, as images uint8 (B, C, H, W) on the CPU."""
    decoder = load_decoder(config.data.decoder, str(device))
    parts = [decoder(part.to(device)) for part in codes.split(config.sample.batch_size)]
    return torch.cat([(part.clamp(0, 1) * 255).round().byte().cpu() for part in parts])


@functools.lru_cache(maxsize=1)
def load_decoder(path: str, device: str) -> Program:
    """The exported decoder, kept for the next call."""
    return load_program(Path(path).expanduser()).to(torch.device(device))


def check_decoder(config: Config) -> None:
    """`ProjectError` where the decoder does not belong to the codes: another size, or other weights."""
    place = f"data.decoder: {config.data.decoder}"
    decoder = load_decoder(config.data.decoder, "cpu")
    if len(decoder.output_shape) != 3:
        raise ProjectError(f"{place} puts out no images (C, H, W)")
    for name in filter(None, (config.data.latents, config.data.held_out_latents)):
        latents = read_latents(Path(name).expanduser())
        size = latents.codes.shape[1]
        if decoder.input_shape != (size,):
            raise ProjectError(
                f"{place} decodes codes of {decoder.input_shape[0]} numbers, those in {name} have {size}"
            )
        made_by = decoder.facts.get("weights")
        if latents.facts.get("weights", made_by) != made_by:
            raise ProjectError(f"{place} and {name} are of different weights; encode the images again")


def pictured(config: Config) -> Config:
    """The same config, but with the images that the codes are of as its data: what decoded samples are judged by."""
    if config.data.dataset != "latents":
        return config
    about = read_latents(Path(config.data.latents).expanduser()).facts.get("data")
    names = ("dataset", "folder", "held_out", "grey", "image_size")
    known = get_args(get_type_hints(DataConfig)["dataset"])
    if not isinstance(about, dict) or about.get("dataset") not in known or not set(names) <= about.keys():
        raise ProjectError(
            f"{config.data.latents} does not say of which images its codes are, or they are none that diffusion reads: "
            "decoded samples can be drawn but not judged"
        )
    return dataclasses.replace(config, data=DataConfig(**{name: about[name] for name in names}))


def reconstructions(config: Config, count: int, device: torch.device) -> Tensor | None:
    """Decoded codes of held-out images, `count` drawn by seed (all, if there are fewer); None where there are none."""
    if not config.data.held_out_latents:
        return None
    latents = read_latents(Path(config.data.held_out_latents).expanduser())
    return decode(latents.codes[draw_indices(len(latents), count, 0)], config, device)
