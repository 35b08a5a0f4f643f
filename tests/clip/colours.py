"""A model that knows three colours and nothing else, and pictures for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip.config import Config, DataConfig
from clip.model.images import Preprocess
from clip.model.tokenizer import WordTokenizer

NAMES = ("red", "green", "blue")


class Colours:
    """Stands for `clip.load.Loaded`: an image's embedding is its mean colour, a text's the colours that it names."""

    def __init__(self, weights: str = "aa" * 32) -> None:
        self.weights_hash = weights
        self.preprocess = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.tokenizer = WordTokenizer((*NAMES, "a", "photo", "of", "small"), 8)
        self.config = Config(data=DataConfig(workers=0))
        self.device = torch.device("cpu")
        self.step = 7
        self.embedded = 0  # images so far

    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        self.embedded += len(images)
        if isinstance(images, Tensor):
            pixels = self.preprocess.batch(images)
        else:
            pixels = torch.stack([self.preprocess(image) for image in images]) if images else torch.empty(0, 3, 8, 8)
        return torch.nn.functional.normalize(pixels.float().mean(dim=(2, 3)) + 1e-3, dim=1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [[float(name in text) + 0.01 for name in NAMES] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows).view(-1, 3), dim=1)


def picture(path: Path, colour: tuple[int, ...] | str, size: tuple[int, int] = (12, 9), **options: Any) -> Path:
    """An image file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def chosen(model: Colours) -> Any:
    """What a program gets instead of `load_chosen`."""

    def load(args: argparse.Namespace) -> Colours:
        return model

    return load
