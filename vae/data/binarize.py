"""Grey pixels as what a likelihood is defined on: bits for the Bernoulli, a continuous value for a density.

A Bernoulli likelihood of grey pixels is none: the values between 0 and 1 have no probability under it, and the number
that binary cross-entropy gives for them can be compared with nothing. Three ways to bits are in use on MNIST, and
log-likelihoods of one cannot be compared with those of another:

- dynamic: each pixel is 1 with a probability of its grey value, drawn anew each time an image is seen (Salakhutdinov &
  Murray 2008). The tables of Burda et al. 2016 and most since are of this kind, on test images drawn the same way.
- static: one such draw, made once and kept. The published file is Larochelle & Murray's (2011); models trained on it
  overfit sooner, and its test scores are some nats worse. Ours is another draw of the same kind, and not that file.
- a threshold at 1/2: no published table that we compare with uses it, so it is not here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.runtime import mix_seed

STATIC_STREAM = 7_100_011  # of the one draw: the same whatever the seed of a run
STATIC_CHUNK = 4096  # images drawn at once; part of what defines the draw
LEVELS = 256  # of an 8-bit pixel


def binarize(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel 1 with a probability of its grey value over 255, else 0: one draw of the dynamic binarisation.

    Args:
        images: uint8, any shape.
        generator: on the device of the images; it is advanced by one number a pixel.
    Returns:
        Float of the same shape, 0 or 1. Black pixels are always 0 and white ones always 1.
    """
    noise = torch.rand(images.shape, generator=generator, device=images.device)  # in [0, 1)
    return (noise < images / 255).to(noise.dtype)


def binarize_static(images: Tensor, number: int) -> Tensor:
    """The static binarisation: the same bits in every run, for training and for evaluation.

    Args:
        images: uint8 (N, C, H, W), the whole of a file, for an image's bits depend on its place in it.
        number: of the file, so that training and test images have different noise.
    Returns:
        uint8 (N, C, H, W), 0 or 255.
    """
    generator = torch.Generator().manual_seed(mix_seed(STATIC_STREAM, number))
    return torch.cat([binarize(part, generator).mul(255).byte() for part in torch.split(images, STATIC_CHUNK)])


def dequantize(images: Tensor, generator: torch.Generator) -> Tensor:
    """(x + u) / 256 with u uniform on [0, 1): integers x as a continuous variable on [0, 1) (Theis et al. 2016, 3.1).

    A density p of the result bounds a probability P of the integers, per image of D values:

        E_u[log p((x + u) / 256)] - D log 256  <=  log P(x)

    The constant is that of the change of variables y = (x + u) / 256; `bits_per_dimension` includes it. Bits per
    dimension without it are too low by 8. Without the noise a density can put all its mass on 256 points and grow
    without bound.

    Args:
        images: uint8, any shape.
        generator: on the device of the images.
    Returns:
        Float of the same shape, never 1: 32 bits would round one bright pixel in 130,000 up to the next value.
    """
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (images + noise.clamp(max=1 - 2**-16)) / LEVELS  # 2^-16: what float32 still tells apart at 255


def bits_per_dimension(log_density: Tensor, dimensions: int) -> Tensor:
    """Bits per dimension of 8-bit images from the log density of dequantised ones on [0, 1).

    -(log p - D log 256) / (D log 2) = 8 - log p / (D log 2): a uniform density, log p = 0, needs 8 bits.

    Args:
        log_density: nats an image, any shape.
        dimensions: D, values an image, all channels counted.
    """
    return math.log2(LEVELS) - log_density / (dimensions * math.log(2))
