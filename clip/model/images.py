"""From pictures to what an image tower reads, the same in training, evaluation and search.

    picture, any mode and size --square--> uint8 (3, S, S) --normalise--> float (3, S, S), about zero

Legend: B images, S pixels of a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from common.images.reading import eight_bits, square

Colour = tuple[float, float, float]
RATIO = (3 / 4, 4 / 3)  # of a random crop's sides, as is usual since Szegedy et al. 2015


@dataclass(frozen=True)
class Preprocess:
    """How a tower wants its images.

    size: S. mean, std: of each colour in [0, 1], with which pixels are normalised.
    """

    size: int
    mean: Colour
    std: Colour

    def __call__(self, image: Image.Image) -> Tensor:
        """The centre square of any picture, resized: uint8 (3, S, S)."""
        return torch.tensor(square(eight_bits(ImageOps.exif_transpose(image)).convert("RGB"), self.size))

    def batch(self, images: Tensor) -> Tensor:
        """The same of pictures in one tensor: uint8 (B, 3, H, W) -> uint8 (B, 3, S, S)."""
        height, width = images.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, :, top : top + side, left : left + side]
        if side == self.size:
            return images
        pixels = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        return pixels.round().clamp(0, 255).byte()

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> (v / 255 - mean) / std, in PyTorch's default type, on the device of the pixels."""
        kind = torch.get_default_dtype()
        mean = torch.tensor(self.mean, dtype=kind, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=kind, device=pixels.device).view(3, 1, 1)
        return (pixels.to(kind) / 255 - mean) / std


def random_crop(image: Image.Image, size: int, smallest: float, rng: np.random.Generator) -> np.ndarray:
    """A random part of a picture, resized: uint8 (3, size, size). Its area is `smallest` to 1 of the picture's, its
    sides as 3:4 to 4:3; the centre square where ten draws do not fit.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1)
        ratio = np.exp(rng.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            box = (left, top, left + w, top + h)
            part = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=None)
            return np.asarray(part).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    return square(image, size)
