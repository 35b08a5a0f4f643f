"""Pictures of what a model finds: retrieved images, failures, and a matrix of similarities.

Legend: Q queries, K images found for each, N images, M captions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from clip.data.pairs import NO_CROP, Pairs
from clip.model.images import Preprocess
from common.files import write_figure

RIGHT, WRONG = "#15803d", "#b91c1c"  # frames of what was asked for, and of what was not
INCH = 1.15  # of a picture's side on a sheet


def save_retrieved(
    pairs: Pairs,
    preprocess: Preprocess,
    captions: Sequence[str],
    targets: Sequence[int],
    found: Sequence[Sequence[int]],
    title: str,
    path: Path,
) -> None:
    """A row a caption: its text, then the images found for it, best first. A green frame is round the right one.

    Args:
        targets: (Q,) number of each caption's image in `pairs`; found: (Q, K) numbers.
    """
    rows = len(captions)
    columns = max(len(each) for each in found)
    figure = Figure(figsize=(3.2 + INCH * columns, 0.5 + INCH * rows), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns + 1, squeeze=False, width_ratios=[2.6] + [1] * columns)
    for row, (caption, target, numbers) in enumerate(zip(captions, targets, found, strict=True)):
        axes[row, 0].axis("off")
        text = textwrap.fill(caption, 34)
        axes[row, 0].text(1, 0.5, text, ha="right", va="center", fontsize=8, transform=axes[row, 0].transAxes)
        for column in range(columns):
            box = axes[row, column + 1]
            box.set_xticks([])
            box.set_yticks([])
            if column >= len(numbers):
                box.axis("off")
                continue
            box.imshow(pairs.pixels(numbers[column], preprocess, NO_CROP, 0, 0).transpose(1, 2, 0))
            is_right = numbers[column] == target
            for side in box.spines.values():
                side.set_color(RIGHT if is_right else WRONG)
                side.set_linewidth(3 if is_right else 1)
    write_figure(path, figure)


def save_matrix(similarity: np.ndarray, captions: Sequence[str], title: str, path: Path) -> None:
    """Cosines of images (rows) and captions (columns), (N, N): the diagonal belongs together."""
    size = len(captions)
    figure = Figure(figsize=(9.5, 6.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(similarity, cmap="viridis")
    axes.set_yticks(range(size), [textwrap.shorten(text, 70) for text in captions], fontsize=6)
    axes.set_xticks(range(size), [str(i + 1) for i in range(size)], fontsize=6)
    axes.set_xlabel("image", fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.colorbar(drawn, shrink=0.7, label="cosine")
    write_figure(path, figure)
