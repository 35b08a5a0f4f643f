"""From many vectors of one image or text to a single one: what stands between a pretrained tower and its head.

Shapes:  B batch   L positions of a feature map, or tokens of a text   C width   K heads
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

PoolKind = Literal["mean", "mean_max", "attention"]
HEADS = 8  # of attention pooling; fewer where C is no multiple


class AttentionMean(nn.Module):
    """A weighted mean whose weights are learned: (B, L, C) -> (B, C).

    Each of the K heads looks at whole tokens, gives each of them a score, and weights its own C / K channels by the
    softmax of the scores. All scores start at zero, so that training starts with the plain mean. `AttentionPool` of
    transformer.py can do more, but maps every token three times: for 49 positions of 1,280 channels that costs more
    than the tower itself.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = HEADS if width % HEADS == 0 else 1
        self.score = nn.Linear(width, self.heads)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, tokens: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        B, L, C = tokens.shape
        scores = self.score(tokens)  # (B, L, K)
        if real is not None:
            scores = scores.masked_fill(~real[:, :, None], -torch.inf)
        weights = scores.float().softmax(dim=1).to(tokens.dtype)
        parts = tokens.view(B, L, self.heads, C // self.heads)
        return (weights[..., None] * parts).sum(dim=1).view(B, C)  # (B, L, K, 1) * (B, L, K, C / K) -> (B, C)


class Pooling(nn.Module):
    """(B, L, C) and which tokens are real, bool (B, L) or None for all -> (B, width).

    `width` is C, for mean_max 2 C: what there is on average beside what there is anywhere.
    """

    def __init__(self, kind: PoolKind, width: int):
        super().__init__()
        self.kind = kind
        self.width = 2 * width if kind == "mean_max" else width
        self.attention = AttentionMean(width) if kind == "attention" else None

    def forward(self, tokens: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        if self.attention is not None:
            return self.attention(tokens, real)
        if real is None:
            mean = tokens.mean(dim=1)
            return mean if self.kind == "mean" else torch.cat([mean, tokens.amax(dim=1)], dim=1)
        share = real.to(tokens.dtype) / real.sum(dim=1, keepdim=True)  # (B, L)
        mean = (share[:, :, None] * tokens).sum(dim=1)
        if self.kind == "mean":
            return mean
        highest = tokens.masked_fill(~real[:, :, None], -torch.inf).amax(dim=1)
        return torch.cat([mean, highest], dim=1)


class Given(nn.Module):
    """Vectors that are ready: (B, width) -> (B, width). The tower of a model whose features were computed before."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features
