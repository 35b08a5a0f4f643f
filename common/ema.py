"""An exponential moving average of a model's weights: what is sampled from and evaluated (Ho et al. 2020, appendix
B).
"""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Averaged copy of a model.

    After update n the average is  d_n * average + (1 - d_n) * weights  with  d_n = min(decay, (1 + n) / (10 + n)),
    so that a short run is not dominated by its initial weights. Buffers are copied, not averaged.

    Args:
        model: what to average; it must be on its device already.
        decay: the limit of d_n; 0 turns averaging off, the copy then equals the model.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step` (1, 2, ...)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step)) if self.decay else 1.0
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
