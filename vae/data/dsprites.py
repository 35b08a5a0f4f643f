"""dSprites (Matthey et al. 2017), drawn here instead of downloaded: white sprites on black, every combination of six
known factors once, 737,280 images.

Legend: N images, S pixels a side, P pixels a side of the patch that a sprite fills, F = 6 factors.

The factors, their order and their values are the published ones: the last factor changes fastest. The outlines are our
own (the published ones were never described), so pixels differ from the published file, and so may scores.

- Orientation is linspace(0, 2 pi, 40) with both ends, as in the published file: orientations 0 and 39 show one image.
  A quarter turn is 9.75 steps and half a turn 19.5, so that the symmetries of square and ellipse repeat no other
  outline. A turn by a quarter of a step (2.3 degrees) more may still fall on the same pixels: of 240 squares at one
  place, 216 differ at 64 pixels and 220 at 32, of 240 ellipses or hearts 234 (the most there can be).
- A position is one pixel at 64 x 64, half a pixel at 32 x 32. The centres lie on [16.5, 47.5] of 64, so that no sprite
  is ever cut off. At 32 x 32, one square in 25, nearly upright, does not change with a step to the side.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from common.images import MemoryImages
from common.images.memory import draw_indices
from common.runtime import mix_seed

FACTOR_NAMES = ("color", "shape", "scale", "orientation", "position_x", "position_y")
FACTOR_SIZES = (1, 3, 6, 40, 32, 32)
CATEGORICAL = (1,)  # the columns of factors whose values have no order: the shape
NUM_IMAGES = math.prod(FACTOR_SIZES)
SHAPE_NAMES = ("square", "ellipse", "heart")
SCALES = np.linspace(0.5, 1, 6)
ORIENTATIONS = np.linspace(0, 2 * np.pi, 40)  # radians, clockwise
IMAGE_SIZES = (32, 64)

# In 64ths of the image, at scale 1. No sprite reaches further than 16.5 from its centre. The lengths are chosen so that
# no pixel's centre lies on an outline, where rounding would decide.
HALF_SIDE = 11.4
HALF_AXES = (15.6, 7.8)
HEART_UNIT = 12.0
HEART_CENTROID = 0.2935  # height of the curve's centre of area, in its own units
FIRST_CENTRE = 16.5  # of position 0; each position adds 1

ORDER_STREAM = 7_100_003  # of the order from which the splits are taken
CHUNK = 8192  # images drawn at once: bounds the memory


def factors_of(indices: Tensor) -> Tensor:
    """Factors of images by number, in the published order.

    Args:
        indices: int64 (N,), from 0 to 737,279.
    Returns:
        int64 (N, 6): for each factor the number of its value.
    Raises:
        ValueError: a number outside the grid.
    """
    _require_range(indices, NUM_IMAGES, "image numbers")
    return torch.stack(torch.unravel_index(indices, FACTOR_SIZES), dim=1)  # (N, F)


def index_of(factors: Tensor) -> Tensor:
    """Numbers of images by their factors, int64 (N, 6) -> int64 (N,): the inverse of `factors_of`."""
    for name, size, column in zip(FACTOR_NAMES, FACTOR_SIZES, factors.T, strict=True):
        _require_range(column, size, name)
    strides = [math.prod(FACTOR_SIZES[i + 1 :]) for i in range(len(FACTOR_SIZES))]
    return factors.long() @ torch.tensor(strides)


def render(indices: Tensor, size: int = 64) -> Tensor:
    """Draw images by number: uint8 (N, 1, S, S), 0 or 255, without anti-aliasing.

    A pixel is on if its centre is inside the sprite. Each sprite is drawn once in each scale and orientation and then
    copied to its place; that is exact, because a position is a whole number of pixels, or at 32 x 32 half a pixel
    more, and the sprite is drawn for both.

    Args:
        indices: int64 (N,).
        size: 64 or 32.
    Raises:
        ValueError: another size, or a number outside the grid.
    """
    if size not in IMAGE_SIZES:
        raise ValueError(f"dSprites are drawn at 32 or 64 pixels, not {size}")
    factors = factors_of(indices).numpy()
    images = torch.zeros(len(factors), 1, size, size, dtype=torch.uint8)
    for start in range(0, len(factors), CHUNK):
        _paste(images[start : start + CHUNK, 0].numpy(), factors[start : start + CHUNK])
    return images


def _paste(canvas: np.ndarray, factors: np.ndarray) -> None:
    """Copy each image's sprite to its place, in `canvas`, uint8 (N, S, S)."""
    size = canvas.shape[-1]
    pixel = 64 // size  # positions a pixel
    sprites = draw_sprites(size)
    _, shape, scale, orientation, x, y = factors.T
    patches = sprites[shape, scale, orientation, y % pixel, x % pixel]  # (N, P, P)
    # every P x P window of every canvas, by its upper left corner: (N, S - P + 1, S - P + 1, P, P), a view
    windows = np.lib.stride_tricks.sliding_window_view(canvas, patches.shape[1:], axis=(1, 2), writeable=True)
    windows[np.arange(len(canvas)), y // pixel, x // pixel] = patches


@functools.lru_cache(maxsize=len(IMAGE_SIZES))
def draw_sprites(size: int) -> np.ndarray:
    """Every sprite in the patch around its centre: uint8 (3, 6, 40, phases, phases, P, P), P = S / 2 + 1.

    The phases are the parts of a pixel by which a centre can lie further down and further right: 1 at 64 x 64, 2 at
    32 x 32.
    """
    pixel = 64 // size
    patch = size // 2 + 1
    # from the sprite's centre to the centres of the patch's pixels, in 64ths of the image: (phases, P)
    steps = pixel * (np.arange(patch) + 0.5) - FIRST_CENTRE - np.arange(pixel)[:, None]
    down = steps[:, None, :, None]  # (phases, 1, P, 1)
    right = steps[None, :, None, :]  # (1, phases, 1, P)
    sprites = np.zeros((3, 6, 40, pixel, pixel, patch, patch), np.uint8)
    for orientation, angle in enumerate(ORIENTATIONS):
        # turned back by the angle; rows grow downwards, so this angle goes clockwise
        across = right * np.cos(angle) + down * np.sin(angle)  # (phases, phases, P, P)
        along = down * np.cos(angle) - right * np.sin(angle)
        for scale, factor in enumerate(SCALES):
            for shape, inside in enumerate((in_square, in_ellipse, in_heart)):
                sprites[shape, scale, orientation] = 255 * inside(across / factor, along / factor)
    sprites.flags.writeable = False
    return sprites


def in_square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the square; x to the right and y downwards from its centre, in 64ths of the image."""
    return np.maximum(np.abs(x), np.abs(y)) <= HALF_SIDE


def in_ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the ellipse, twice as wide as high."""
    return (x / HALF_AXES[0]) ** 2 + (y / HALF_AXES[1]) ** 2 <= 1


def in_heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the heart (x^2 + y^2 - 1)^3 = x^2 y^3, its tip down, turned about its centre of area."""
    u = x / HEART_UNIT
    v = HEART_CENTROID - y / HEART_UNIT  # upwards
    return (u**2 + v**2 - 1) ** 3 <= u**2 * v**3


class Dsprites(MemoryImages):
    """Some of the images in memory, with their factors; the labels are the shapes.

    Attributes:
        indices: int64 (N,), the images' numbers in the whole grid.
        factors: int64 (N, 6), see `factors_of`; both stay on the CPU.
    """

    def __init__(self, indices: Tensor, size: int = 64) -> None:
        self.indices = indices
        self.factors = factors_of(indices)
        super().__init__("dsprites", render(indices, size), self.factors[:, 1].contiguous(), SHAPE_NAMES)

    def draw(self, count: int, seed: int = 0) -> Dsprites:
        """`count` images drawn by seed, 0 = all, with their factors."""
        return Dsprites(self.indices[draw_indices(len(self), count, seed)], self.shape[1])


def split_indices(split: str, max_images: int, num_validation: int, seed: int = 0, num_test: int = 10_000) -> Tensor:
    """Image numbers of a split: int64 (N,), in random order; no two splits share one.

    Test and validation images are the first of one random order of the grid, training images the last. Test images
    depend on nothing but the seed, and training images on the number of validation images only where they are all.

    Args:
        split: train, validation or test.
        max_images: training images; 0 = all that are in no other split.
        num_validation, num_test: images of these splits.
    """
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(mix_seed(seed, ORDER_STREAM)))
    apart = num_test + num_validation
    if split == "test":
        return order[:num_test]
    if split == "validation":
        return order[num_test:apart]
    rest = order[apart:].flip(0)
    return rest[:max_images] if max_images else rest


def _require_range(numbers: Tensor, size: int, what: str) -> None:
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
        raise ValueError(f"{what} from {int(numbers.min())} to {int(numbers.max())}, but there are 0 to {size - 1}")
