"""Pictures of a link predictor: what scores links and non-links get, and what that is worth at each threshold.

Legend: P positives, K negatives a positive.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from gnn.core.pictures import COLOURS, INK, canvas
from gnn.link.metrics import auc, average_precision

NAMES = {"positive": "links", "uniform": "uniform pairs", "hard": "hard negatives"}
TINTS = {"positive": COLOURS[0], "uniform": COLOURS[2], "hard": COLOURS[1]}


def draw_scores(path: Path, scores: dict[str, Tensor], title: str) -> None:
    """Histograms of the logits of test links (P,), uniform pairs and hard negatives (any shape), each of area one.

    The range is cut at the outermost thousandths, so that a single pair cannot squeeze all others into one bar.
    """
    values = {name: part.double().flatten().numpy() for name, part in scores.items()}
    low = min(np.quantile(part, 0.001) for part in values.values())
    high = max(np.quantile(part, 0.999) for part in values.values())
    bins = np.linspace(low, high + 1e-9, 50)
    with canvas(path, 4.4) as figure:
        axes = figure.subplots()
        for name, part in values.items():
            weights = np.full(len(part), 1 / len(part))
            axes.hist(part.clip(low, high), bins, weights=weights, histtype="stepfilled", alpha=0.25, color=TINTS[name])
            axes.hist(
                part.clip(low, high),
                bins,
                weights=weights,
                histtype="step",
                linewidth=1.6,
                color=TINTS[name],
                label=f"{NAMES[name]} ({len(part):,})",
            )
        axes.set(xlabel="score (logit)", ylabel="share", title=title)
        axes.legend(frameon=False)


def draw_thresholds(path: Path, scores: dict[str, Tensor], title: str) -> None:
    """ROC and precision-recall curves of links against uniform pairs and against hard negatives.

    Links and negatives weigh the same in all, so that the precision of a guess is one half for both kinds. Arguments as
    `draw_scores`.
    """
    positive = scores["positive"].double().flatten()
    with canvas(path, 4.4) as figure:
        left, right = figure.subplots(1, 2)
        for name in ("uniform", "hard"):
            negative = scores[name].double().flatten()
            caught, wrong = rates(positive, negative)
            area = auc(positive, negative)
            precision = average_precision(positive, negative, len(positive) / len(negative))
            left.plot(wrong, caught, color=TINTS[name], linewidth=1.8, label=f"{NAMES[name]}, AUC {area:.3f}")
            right.plot(
                caught,
                caught / (caught + wrong),
                color=TINTS[name],
                linewidth=1.8,
                label=f"{NAMES[name]}, AP {precision:.3f}",
            )
        left.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        right.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
        left.set(xlabel="share of negatives above the threshold", ylabel="share of links above the threshold")
        right.set(xlabel="recall", ylabel="precision", ylim=(0.3, 1.02))
        for axes, where in ((left, "lower right"), (right, "lower left")):
            axes.legend(frameon=False, loc=where)
        figure.suptitle(title, fontsize=12)


def rates(positive: Tensor, negative: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Shares of positives and of negatives that score at least as high as each positive, highest first; both (P,)
    arrays.
    """
    threshold = np.sort(positive.numpy())[::-1]
    positives_below = np.searchsorted(np.sort(positive.numpy()), threshold, side="left")
    negatives_below = np.searchsorted(np.sort(negative.numpy()), threshold, side="left")
    caught = (len(positive) - positives_below) / len(positive)
    wrong = (len(negative) - negatives_below) / len(negative)
    return caught, wrong
