"""Scores of classifiers from their logits.

Legend: N rows, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits (N, K) whose largest entry is the label."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN); a class that neither occurs nor is predicted is left
    out.
    """
    predicted = logits.argmax(dim=1)
    num_classes = logits.shape[1]
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    # 2 TP + FP + FN
    total = torch.bincount(predicted, minlength=num_classes) + torch.bincount(labels, minlength=num_classes)
    return (2 * hits / total)[total > 0].mean().item()
