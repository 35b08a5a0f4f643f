"""Two operations of LLaMA that keep less for the backward pass than their plain formulas would.

Written as formulas, RMSNorm keeps its input in float32 and SwiGLU keeps four tensors as wide as the gated layer. Both
can be had again from their inputs at the cost of a few multiplications, and in finetuning it is memory that is scarce.

Legend: D width, M width of the gated layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = w x / rms(x),   rms(x)^2 = mean(x^2) + eps      Zhang & Sennrich 2019, eq. 4

    With n = x / rms(x):  dx = (w dy - n mean(w dy n)) / rms(x)  and  dw = sum(dy n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # 1 / rms(x), (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale  # n, (..., D)
        grad = grads[0].to(scale.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        weighted = grad * weight.to(scale.dtype)  # w dy
        along = (weighted * normed).mean(-1, keepdim=True)
        return ((weighted - normed * along) * scale).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """y = silu(g) u,   silu(g) = g sigmoid(g)      Shazeer 2020, eq. 6

    silu'(g) = s + g s (1 - s) with s = sigmoid(g).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        sigmoid = torch.sigmoid(gate)
        slope = sigmoid + silu * (1 - sigmoid)
        return grads[0] * up * slope, grads[0] * silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each vector divided by its root mean square, times a weight. (..., D), (D,) -> (..., D), in the type of x."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (..., M), (..., M) -> (..., M)"""
    result: Tensor = _SwiGLU.apply(gate, up)
    return result
