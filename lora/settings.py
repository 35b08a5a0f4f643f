"""What an adapter is: the settings that, with its tensors, say everything about it.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.config import require

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterConfig:
    """Which layers are adapted, and how: W x becomes W x + s B A x with B A of low rank (Hu et al. 2021)."""

    rank: int = 8  # r: rows of A and columns of B
    alpha: float = 16.0  # the update is scaled by s = alpha / r, so that a learning rate fits other ranks, too
    # all-linear: every linear layer but the head; else names, or the last parts of names (q_proj, mlp.up_proj), or
    # patterns with * and ? over whole names (model.layers.0.*)
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dropout: float = 0.0  # of the adapter's input only; the frozen path sees its input whole
    rslora: bool = False  # s = alpha / sqrt(r): large ranks learn as fast as small ones (Kalajdzievski 2023)
    dora: bool = False  # learn the length of each row of the weight apart from its direction (Liu et al. 2024)
    # default: A random, B zero; pissa: the r largest singular directions of W, which leave the frozen weight (Meng et
    # al. 2024)
    init: Literal["default", "pissa"] = "default"
    # pissa: subspace iterations of a randomised SVD, 4 to 16 in the paper; 0 = the exact one, slow for wide layers
    pissa_iterations: int = 0
    lora_plus: float = 1.0  # learning rate of B over that of A; about 16 in LoRA+ (Hayou et al. 2024)
    head: tuple[str, ...] = ()  # modules trained and saved in full beside the adapters, such as a new classifier

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapter.rank", "must be at least 1")
        require(0 < self.alpha < math.inf, "adapter.alpha", "must be positive and finite")
        require(len(self.targets) > 0, "adapter.targets", f"must name layers, or be [{ALL_LINEAR}]")
        require(all(self.targets), "adapter.targets", "must not hold an empty name")
        require(0 <= self.dropout < 1, "adapter.dropout", "must be in [0, 1)")
        require(self.pissa_iterations >= 0, "adapter.pissa_iterations", "must not be negative")
        useful = self.init == "pissa" or self.pissa_iterations == 0
        require(useful, "adapter.pissa_iterations", "does nothing without init=pissa")
        require(0 < self.lora_plus < math.inf, "adapter.lora_plus", "must be positive and finite")

    @property
    def scaling(self) -> float:
        """s: what B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
