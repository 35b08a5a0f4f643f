"""Pictures of what a variational autoencoder does.

Legend: N images, C channels, H = W pixels, Z latents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import atomic_open
from common.run import Run
from vae.config import Config
from vae.images import to_bytes
from vae.model import Autoencoder


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """A sheet of images, row by row, with a gap of 2 pixels. uint8 (N, C, H, W) -> PNG"""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + 2) - 2, columns * (width + 2) - 2), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top = i // columns * (height + 2)
        left = i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    pixels = sheet.permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)
    if channels == 1:
        pixels = pixels[:, :, 0]
    with atomic_open(path) as file:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")


@torch.no_grad()
def reconstruct(model: Autoencoder, x: Tensor) -> Tensor:
    """The expected image at the mean of q(z | x). (B, C, H, W) in [0, 1]"""
    return model.likelihood.mean(model.decode(model.codes(x)))


@torch.no_grad()
def save_progress(model: Autoencoder, x: Tensor, config: Config, run: Run) -> None:
    """In training: a sheet of images beside their reconstructions, and one of draws from the prior."""
    shown = x[:32]
    pairs = torch.stack([shown, reconstruct(model, shown)], 1).flatten(0, 1)
    save_grid(to_bytes(pairs), run.folder / f"samples/reconstructions_{run.step:08d}.png", 16)
    noise = model.noise(64, 1, run.generator(0, run.step))[:, 0]
    drawn = model.likelihood.mean(model.decode(model.prior(noise)))
    save_grid(to_bytes(drawn), run.folder / f"samples/prior_{run.step:08d}.png", 16)
