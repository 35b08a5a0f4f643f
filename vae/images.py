"""From bytes to the numbers that a likelihood is a distribution of.

Legend: B images, C channels, H = W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae.config import Config
from vae.data.binarize import binarize, dequantize


def prepare(pixels: Tensor, config: Config, rng: torch.Generator) -> Tensor:
    """Images as the model reads them, in [0, 1]. uint8 (B, C, H, W) -> float

    Black and white where they are binarised; with uniform noise inside each grey level for a density; else v / 255.
    """
    if config.data.binarize == "dynamic":
        return binarize(pixels, rng)
    if config.likelihood.kind == "gaussian":
        return dequantize(pixels, rng)
    return pixels.to(torch.get_default_dtype()) / 255  # static ones and dsprites are 0 or 255


def expected(pixels: Tensor, config: Config) -> Tensor:
    """What `prepare` gives on average: an image that is encoded without chance, so that its code is its own. uint8
    (B, C, H, W) -> float
    """
    values = pixels.to(torch.get_default_dtype())
    return (values + 0.5) / 256 if config.likelihood.kind == "gaussian" else values / 255
