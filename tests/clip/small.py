"""A model of a few thousand parameters, and batches for it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from clip.config import HeadConfig, ImageConfig, ModelConfig, TextConfig
from clip.model import CLIP

IMAGE = ImageConfig(image_size=16, width=16, heads=2, patch=4, layers=2, mlp_ratio=2)
RESNET = ImageConfig(kind="resnet", image_size=32, width=4, heads=4, stages=(1, 1, 1, 1))
TEXT = TextConfig(vocab_size=20, context=8, width=16, heads=2, layers=2, mlp_ratio=2)
CONFIG = ModelConfig(embed_dim=8, image=IMAGE, text=TEXT)


def with_dropout() -> ModelConfig:
    """All kinds of dropout at once."""
    return dataclasses.replace(
        CONFIG,
        image=dataclasses.replace(IMAGE, dropout=0.2, patch_dropout=0.5),
        text=dataclasses.replace(TEXT, dropout=0.2),
        image_head=HeadConfig(kind="mlp", hidden=16, dropout=0.3),
    )


def build(config: ModelConfig = CONFIG, **changes: Any) -> CLIP:
    """In float64, with the same weights every time."""
    torch.manual_seed(0)
    return CLIP(dataclasses.replace(config, **changes)).double()


def batch(images: int = 8, captions: int = 1, side: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, ids, and the image that each belongs to: (N, 3, S, S), (N captions, 8), (N,), (N captions,)."""
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, side, side, generator=rng, dtype=torch.float64)
    ids = torch.randint(1, 18, (images * captions, 8), generator=rng)
    for row, length in zip(ids, itertools.cycle((3, 8, 5, 2, 6))):
        row[length - 1] = 19
        row[length:] = 0
    numbers = torch.arange(images)
    return pixels, ids, numbers, numbers.repeat_interleave(captions)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter, by name."""
    return {name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()}
