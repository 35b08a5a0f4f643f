"""Learning curves and films.

Legend: R runs, H x W pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import atomic_open, write_figure

# Okabe & Ito 2008: told apart by colour-blind people, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")
GIF_WIDTH = 320  # pixels
FPS = 25


def draw_curve(
    path: Path, curves: dict[str, list[list[tuple[float, float]]]], solved: float = math.inf, title: str = ""
) -> None:
    """Return over environment steps: for each name the median of its runs, with a band from the worst to the best.

    Args: curves: name -> runs -> (steps, mean return of the last 100 episodes). solved: a line at this return, if it is
        finite.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, (name, runs) in enumerate(curves.items()):
        grid = np.linspace(max(run[0][0] for run in runs), min(run[-1][0] for run in runs), 200)
        lines = np.stack([np.interp(grid, *np.array(run).T) for run in runs])  # (R, 200)
        colour = COLOURS[i % len(COLOURS)]
        if len(runs) > 1:
            axes.fill_between(grid, lines.min(axis=0), lines.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        label = f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name
        axes.plot(grid, np.median(lines, axis=0), color=colour, linewidth=1.8, label=label)
    if math.isfinite(solved):
        axes.axhline(solved, color="#475569", linestyle="--", linewidth=1, label=f"solved: {solved:g}")
    axes.set(xlabel="environment steps", ylabel="return, mean of the last 100 episodes", title=title)
    axes.xaxis.set_major_formatter(
        lambda steps, _: f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k" if steps else "0"
    )
    axes.grid(color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    write_figure(path, figure)


def save_gif(pictures: list[np.ndarray], path: Path, fps: float) -> None:
    """Pictures uint8 (H, W, 3) as a GIF of at most 320 pixels width, at most 25 frames a second."""
    every = max(1, round(fps / FPS))
    frames = [Image.fromarray(picture) for picture in pictures[::every]]
    if frames[0].width > GIF_WIDTH:
        size = (GIF_WIDTH, round(frames[0].height * GIF_WIDTH / frames[0].width))
        frames = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    frames = [frame.quantize(64) for frame in frames]
    with atomic_open(path) as file:
        frames[0].save(
            file, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 * every / fps), loop=0
        )
