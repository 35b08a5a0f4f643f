"""Three operations of LLaMA that keep less for the backward pass than their plain formulas would.

Written as formulas, RMSNorm keeps its input in float32 and SwiGLU keeps three tensors as wide as the gated layer. Both
can be had again from their inputs at the cost of a few multiplications, and in finetuning it is memory that is scarce.
Attention keeps no scores either way; on a CPU its backward pass here is matrix products, which AMX and AVX-512 are made
for.

Legend: B rows, T tokens, S tokens they may look at, H query heads, G key-value heads, R = H / G, K width of a head, D
width, M width of the gated layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 1024  # tokens up to which the scores of one layer may exist for a moment


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

    dg = dy u silu'(g)  and  du = dy silu(g)
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grad_up


class _Attention(torch.autograd.Function):
    """O = P V,  P = softmax(Q K^T / sqrt(K) + mask)      Vaswani et al. 2017, eq. 1

    dV = P^T dO,  dP = dO V^T,  dZ = P (dP - sum(dO O)),  dQ = dZ K / sqrt(K),  dK = dZ^T Q / sqrt(K)

    (Dao et al. 2022, appendix B.2). Query heads that share a key head stand below one another, as if they were R times
    as many tokens: then the products sum over them by themselves.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        shared = query.shape[1] != key.shape[1]
        result = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=shared)
        ctx.save_for_backward(query, key, value, mask, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mask, result = ctx.saved_tensors
        groups = key.shape[1]
        dtype = query.dtype
        scale = query.shape[-1] ** -0.5

        def stack(x: Tensor) -> Tensor:
            return x.unflatten(1, (groups, -1)).flatten(2, 3)  # (B, H, T, K) -> (B, G, R T, K)

        q = stack(query)
        grad = stack(grads[0])
        scores = (q @ key.transpose(-1, -2)).unflatten(2, (-1, query.shape[2]))  # (B, G, R T, S) -> (B, G, R, T, S)
        scores = (scores.float() if dtype.itemsize < 4 else scores).mul_(scale).add_(mask[:, :, None])
        p = scores.softmax(-1).flatten(2, 3).to(dtype)  # (B, G, R T, S)
        del scores  # as large as all that follows
        grad_value = p.transpose(-1, -2) @ grad  # (B, G, S, K)
        along = (grad * stack(result)).sum(-1, keepdim=True)
        grad_scores = (grad @ value.transpose(-1, -2)).sub_(along).mul_(p).mul_(scale)  # (B, G, R T, S)
        grad_query = grad_scores @ key  # (B, G, R T, K)
        grad_key = grad_scores.transpose(-1, -2) @ q
        grad_query = grad_query.unflatten(2, (-1, query.shape[2])).flatten(1, 2)  # (B, H, T, K)
        return grad_query, grad_key, grad_value, None


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of every query head to its key and value head.

    Args:
        query: (B, H, T, K).
        key, value: (B, G, S, K).
        mask: (B or 1, 1, T, S), added to the scores: 0, or minus infinity; None: every token sees itself and all before
            it, or, where T = 1, everything. (To learn on a CPU in the way above it must be given.)
    Returns:
        (B, H, T, K)
    """
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    here = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if learns and here and mask is not None and query.shape[2] <= LONGEST:
        result: Tensor = _Attention.apply(query, key, value, mask)
        return result
    shared = query.shape[1] != key.shape[1]
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=shared)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each vector divided by its root mean square, times a weight. (..., D), (D,) -> (..., D), in the type of x."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. (..., M), (..., M) -> (..., M)"""
    result: Tensor = _SwiGLU.apply(gate, up)
    return result
