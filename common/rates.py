"""The learning rate of each step: a linear warm-up, then constant, or down to zero along a line or half a cosine."""

from __future__ import annotations

import math
from typing import Literal, Protocol


class RateConfig(Protocol):
    """The settings that decide it, as they stand in a config's train section."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay(self) -> Literal["constant", "linear", "cosine"]: ...


def learning_rate(step: int, config: RateConfig) -> float:
    """The rate of step 1, 2, ...; the warm-up takes at most a tenth of the run, so that a short one still reaches its
    full rate.
    """
    warmup = min(config.warmup, config.steps // 10)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)  # 1 at the last step
    if config.decay == "linear":
        return config.lr * (1 - progress)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
