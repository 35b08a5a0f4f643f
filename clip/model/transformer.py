"""The Transformer block that both towers are made of: normalise, attend, add; normalise, think, add.

Shapes:  B batch   T tokens   C width   K attention heads   D = C / K width of a head

Vaswani et al. 2017   Attention is all you need                                  arXiv:1706.03762
Hendrycks & Gimpel    Gaussian error linear units                                arXiv:1606.08415
Radford et al. 2021   Learning transferable visual models (CLIP)                 arXiv:2103.00020
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GELU(nn.Module):
    """x * P(Z <= x) for a standard normal Z, exactly or by one of two approximations (Hendrycks & Gimpel, section 2).

    gelu:        the exact function.
    quick_gelu:  x * sigmoid(1.702 x). OpenAI trained CLIP with it; its weights are worse off with the exact function.
    gelu_tanh:   by tanh, as SigLIP was trained; closer than the sigmoid.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al., eq. 1): q (B, K, Q, D), k and v (B, K, T, D) -> (B, K, Q, D).

    causal: query i sees the keys 0..i; then Q = T.

    PyTorch's fused kernel never holds the (Q, T) table of weights and is the faster one nearly everywhere. The
    exception is bf16 on a CPU: there its backward pass took 40 percent of a whole training step, five times what the
    formula written out takes (PyTorch 2.14, AMX; `bench.clip` times the step).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with torch.autocast("cpu", enabled=False):  # it would keep the weights in float32: twice the memory to no avail
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, K, Q, T)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # (T, T): keys behind the query
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Every token looks at every other, or with `causal` at those before it and itself (Vaswani et al., eq. 1):
    (B, T, C) -> (B, T, C).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # query, key and value in one matrix product
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # (B, T, 3, K, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, K, T, D) each
        mixed = attend(q, k, v, causal)  # (B, K, T, D)
        return self.out(mixed.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Sequential):
    """Two linear maps around an activation, token by token: (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__(nn.Linear(width, hidden), GELU(activation), nn.Linear(hidden, width))


class Block(nn.Module):
    """One layer: attention, then an MLP, each around a skip connection and after a LayerNorm: (B, T, C) -> (B, T, C).

    The norm stands before each branch, not after the sum as in Vaswani et al.: the sum then reaches from the first
    layer to the last untouched, which lets deep stacks train (Radford et al. 2021, section 2.4).
    """

    def __init__(self, width: int, heads: int, hidden: int, activation: str, dropout: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, hidden, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), causal))
        return x + self.dropout(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """One learned query looks at all tokens, and an MLP follows: (B, T, C) -> (B, C) (SigLIP's "MAP head").

    The mean treats all patches alike; a query can learn which of them to trust.
    """

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, hidden, activation)
        nn.init.normal_(self.query, std=width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q = self.q(self.query).view(1, self.heads, 1, C // self.heads).expand(B, -1, -1, -1)  # (B, K, 1, D)
        kv = self.kv(x).view(B, T, 2, self.heads, C // self.heads)  # (B, T, 2, K, D)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, K, T, D) each
        mixed = attend(q, k, v)  # (B, K, 1, D)
        pooled = self.out(mixed.reshape(B, C))  # heads side by side: (B, K, 1, D) -> (B, C)
        return pooled + self.mlp(self.norm(pooled))


def initialise(blocks: nn.ModuleList) -> None:
    """Normal weights, zero biases; the last map of each branch shrinks with the depth of the stack, so that the sum of
    all branches keeps its size (Radford et al. 2021, section 2.5, after GPT-2).
    """
    for block in blocks:
        assert isinstance(block, Block)
        C = block.attention.out.in_features
        first, _, last = block.mlp
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        branch = C**-0.5 * (2 * len(blocks)) ** -0.5
        nn.init.normal_(block.attention.qkv.weight, std=C**-0.5)
        nn.init.normal_(block.attention.out.weight, std=branch)
        nn.init.normal_(first.weight, std=(2 * C) ** -0.5)
        nn.init.normal_(last.weight, std=branch)
        for linear in (block.attention.qkv, block.attention.out, first, last):
            nn.init.zeros_(linear.bias)
