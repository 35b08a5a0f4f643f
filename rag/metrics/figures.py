"""Pictures of what was measured: how often each search finds the passage, and how often each arm answers rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.files import write_figure
from rag import ARMS

COLOURS = {"em": "#2563eb", "f1": "#93c5fd"}
NAMES = {"em": "exact match", "f1": "F1"}


def save_recall(
    metrics: Mapping[str, float], arms: Sequence[str], cutoffs: Sequence[int], title: str, path: Path
) -> None:
    """A line an arm: the share of right passages among the first k.

    Args:
        metrics: with `recall_at_<k>_<arm>`.
    """
    figure = Figure(figsize=(5.4, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    ascending = sorted(cutoffs)
    for arm in arms:
        values = [metrics[f"recall_at_{k}_{arm}"] for k in ascending]
        axes.plot(ascending, values, marker="o", label=ARMS.get(arm, arm))
    axes.set(xscale="log", xlabel="passages", ylabel="recall", ylim=(None, 1.01))
    axes.set_xticks(ascending, [str(k) for k in ascending])
    axes.set_title(title, fontsize=9)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_figure(path, figure)


def save_answers(metrics: Mapping[str, float], arms: Sequence[str], title: str, path: Path) -> None:
    """Two bars an arm, with 95 percent intervals where there are some.

    Args:
        metrics: with `em_<arm>` and `f1_<arm>`, and their `_low` and `_high`.
    """
    figure = Figure(figsize=(1.8 + 1.1 * len(arms), 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for offset, name in ((-0.2, "em"), (0.2, "f1")):
        values = [metrics[f"{name}_{arm}"] for arm in arms]
        below = [value - metrics.get(f"{name}_{arm}_low", value) for arm, value in zip(arms, values, strict=True)]
        above = [metrics.get(f"{name}_{arm}_high", value) - value for arm, value in zip(arms, values, strict=True)]
        places = [place + offset for place in range(len(arms))]
        bars = axes.bar(places, values, 0.38, yerr=(below, above), capsize=3, color=COLOURS[name], label=NAMES[name])
        axes.bar_label(bars, [f"{100 * value:.0f}" for value in values], fontsize=8, padding=2)
    axes.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms])
    axes.set_ylim(0, 1.08)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    write_figure(path, figure)
