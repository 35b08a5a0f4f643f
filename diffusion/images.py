"""Images between their two forms: bytes as they are stored, and numbers in [-1, 1] as the network sees them.

Legend: B batch, C channels, H = W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.images import Images, MemoryImages

__all__ = ["Images", "MemoryImages", "to_float", "to_uint8"]


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> default float dtype in [-1, 1]."""
    return images.to(torch.get_default_dtype()) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, C, H, W) in [-1, 1], anything outside clamped -> uint8, rounded to nearest."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte()
