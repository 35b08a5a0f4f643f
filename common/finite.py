"""Whether loss and gradients are finite, asked before every step of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoints
from common.errors import ProjectError

CLIP_EPSILON = 1e-6  # what clip_grads_with_norm_ adds to the norm that it divides by


class NonFinite(ProjectError):
    """The loss or a gradient became infinite or NaN; nothing was updated with it and nothing saved."""


class FiniteCheck:
    """Clips gradients and remembers, on the device, the first step at which something was not finite.

    Args:
        scaler: of fp16; it skips steps that overflow by itself.
        checkpoints: of the run, so that a message can name the last good one.
    """

    def __init__(self, device: torch.device, scaler: torch.amp.GradScaler, checkpoints: Checkpoints) -> None:
        self.device = device
        self.scaler = scaler
        self.checkpoints = checkpoints
        self._bad = torch.zeros((), device=device)  # first non-finite step, kept on the device

    def gradients(self, step: int, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> Tensor:
        """See `Run.check_gradients`."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        limit = clip or math.inf
        # numbers at hand: asking them costs less than keeping books
        if self.device.type == "cpu" and not self.scaler.is_enabled():
            if not (math.isfinite(norm) and math.isfinite(loss.detach())):
                self._bad.fill_(float(step))
                self.check(loss, norm)
            if norm + CLIP_EPSILON > limit:  # else every gradient would be multiplied by 1
                nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            return norm
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        bad = ~torch.isfinite(loss.detach())
        # under fp16 an overflow is the scaler's business: it skips the step and halves its factor
        if not self.scaler.is_enabled():
            bad |= ~torch.isfinite(norm)
        self._bad = torch.where((self._bad == 0) & bad, float(step), self._bad)
        if self.device.type == "cuda" and optimizer.defaults.get("fused"):
            # what a scaler would tell it: skip this step
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = (self._bad > 0).float()  # type: ignore[attr-defined]
        else:
            self.check(loss, norm)
        return norm

    def check_weights(self, step: int, parts: Iterable[object]) -> None:
        """`NonFinite` if the last update made a weight of one of these infinite or NaN, as too high a rate does."""
        for part in parts:
            if not isinstance(part, nn.Module):
                continue
            for name, weight in part.named_parameters():
                if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                    raise NonFinite(f"{name} is not finite after step {step}; nothing was saved; {self._last_good()}")

    def _last_good(self) -> str:
        last = self.checkpoints.newest_step()
        if last is None:
            return "no checkpoint yet"
        return f"last good checkpoint: {self.checkpoints.path(last)} (step {last})"

    def check(self, loss: Tensor | None = None, norm: Tensor | None = None) -> None:
        """Raise `NonFinite` if a loss or a gradient was not finite; reads the device."""
        bad = int(self._bad)
        if bad:
            values = (
                f" (loss {float(loss.detach()):.4g}, gradient norm {float(norm):.4g})"
                if loss is not None and norm is not None
                else ""
            )
            raise NonFinite(
                f"loss or gradient is not finite at step {bad}{values}; nothing was updated; {self._last_good()}"
            )
