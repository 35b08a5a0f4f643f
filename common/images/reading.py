"""One image file as pixels, whatever its mode: turned as it was held, white where transparent, scaled to 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SMALLEST = 4  # pixels: an image with a shorter side says nothing at any size that we train at
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels; the colours hidden under them do not


def read_image(path: Path, size: int, crop: int = 0, grey: bool = False) -> np.ndarray:
    """Decode, centre-crop to a square, resize: uint8 (3, size, size), or (1, size, size) in grey.

    Args:
        crop: side of the centre square taken before resizing; 0 = the shorter side.
    Raises:
        OSError or ValueError: a file that cannot be used; the message says why.
    """
    return square(open_image(path, grey), size, crop)


def open_image(path: Path, grey: bool = False) -> Image.Image:
    """An image file in RGB, or in grey, turned as it was held. Raises as `read_image`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError("not an image file")
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    with path.open("rb") as file:
        return decode_image(file, grey)


def decode_image(file: BinaryIO, grey: bool = False) -> Image.Image:
    """The same of an open file, such as a member of an archive."""
    with Image.open(file) as image:
        decoded = eight_bits(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
    if min(decoded.size) < SMALLEST:
        raise ValueError(f"only {decoded.size[0]}x{decoded.size[1]} pixels")
    return decoded


def square(image: Image.Image, size: int, crop: int = 0) -> np.ndarray:
    """The centre square of an image, resized: uint8 (C, size, size)."""
    side = min(crop or min(image.size), *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (size, size),
        Image.Resampling.BOX if side >= 2 * size else Image.Resampling.BILINEAR,
        box=(left, top, left + side, top + side),
        reducing_gap=None,
    )
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)


def eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode of eight bits a channel, opaque. `ValueError` for numbers of unknown range.

    Pillow's own `convert` cuts 16 bits off at 255, which makes them white, and floats down to 0 or 1, which makes them
    black.
    """
    if image.mode.startswith("I;16"):
        return grey_from(np.asarray(image, dtype=np.float64), 65535)
    if image.mode == "I":
        pixels = np.asarray(image, dtype=np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"32-bit pixels from {pixels.min():.0f} to {pixels.max():.0f}: more than 16 bits")
        return grey_from(pixels, 65535)
    if image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError("floating-point pixels outside [0, 1] and [0, 255]")
        return grey_from(pixels, 1 if pixels.max() <= 1 else 255)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA"))
    return image


def grey_from(pixels: np.ndarray, white: float) -> Image.Image:
    """Numbers (H, W) from 0 to `white` as an image of eight bits."""
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
