"""Pictures of what a network has learned: PNG files of 800 pixels' width on a white ground, each under 300 kB.

Colours are those of Okabe & Ito 2008, which people with any colour vision can tell apart; beyond eight classes the
marker's shape changes as well. Unknown classes (-1) are grey.

Legend: N nodes, E entries of the adjacency, D width of an embedding, H heads.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from common.files import atomic_open
from common.report.text import words
from gnn.core.layout import project, spread_out, stress_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gnn.core.graph import Graph

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
UNKNOWN = "#B8BDC6"
INK = "#334155"
PALE = "#E2E8F0"
MAX_BYTES = 300_000
MAX_POINTS = 3_000  # of a t-SNE, whose cost grows faster than their number
MAX_LEGEND = 20  # classes; of more, a legend is longer than the picture
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.edgecolor": "#94A3B8",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": PALE,
}


@contextlib.contextmanager
def canvas(path: Path, height: float = 5.6) -> Iterator[Figure]:
    """A figure 8 inches (800 pixels) wide, written to `path` at the end of the block, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from PIL import Image, PngImagePlugin

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, height), dpi=100, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
        yield figure
        file = io.BytesIO()
        figure.savefig(file, format="png")
    if len(file.getvalue()) > MAX_BYTES:  # 256 colours are enough for what is drawn here
        image = Image.open(file).convert("RGB").quantize(256)
        file = io.BytesIO()
        note = PngImagePlugin.PngInfo()
        note.add_text("Software", "Matplotlib")  # by which reports know a chart
        image.save(file, format="png", optimize=True, pnginfo=note)
    with atomic_open(path) as target:
        target.write(file.getvalue())


def array(x: Tensor | np.ndarray) -> np.ndarray:
    """A tensor of any device as a numpy array."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def colour(c: int) -> str:
    """The colour of class c; grey for -1."""
    return UNKNOWN if c < 0 else COLOURS[c % len(COLOURS)]


def marker(c: int) -> str:
    """The marker's shape of class c."""
    return "o" if c < 0 else MARKERS[c // len(COLOURS) % len(MARKERS)]


def blank(axes: Axes) -> None:
    """No axes: positions mean nothing but nearness."""
    axes.set_axis_off()
    axes.margins(0.05)


def class_legend(axes: Axes, classes: Sequence[int], where: str = "lower center") -> None:
    """One entry a class in rows below the axes, or nothing if there are too many."""
    from matplotlib.lines import Line2D

    if len(classes) > MAX_LEGEND:
        return
    handles = [
        Line2D(
            [], [], linestyle="", marker=marker(c), color=colour(c), markersize=8, label="unknown" if c < 0 else str(c)
        )
        for c in classes
    ]
    axes.figure.legend(
        handles=handles,
        loc=f"outside {where}",
        ncols=min(len(handles), 10),
        frameon=False,
        title="class",
        handletextpad=0.1,
        columnspacing=1.2,
    )


# -- embeddings and errors ---------------------------------------------------------------------------------------------


def draw_embedding(path: Path, hidden: Tensor | np.ndarray, labels: Tensor | np.ndarray | None, title: str) -> None:
    """Rows of hidden (N, D) in the plane, coloured by labels (N,); of more than 3,000 rows a random part. See
    `project`.
    """
    rows = array(hidden)
    classes = np.full(len(rows), -1) if labels is None else array(labels)
    if len(rows) > MAX_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(rows), MAX_POINTS, replace=False))
        rows, classes = rows[chosen], classes[chosen]
    points = project(rows)
    with canvas(path, 6.4) as figure:
        axes = figure.subplots()
        size = 14 if len(points) > 1000 else 28 if len(points) > 100 else 60
        for c in np.unique(classes):  # grey first, below the others
            part = points[classes == c]
            axes.scatter(
                *part.T, s=size, c=colour(c), marker=marker(c), alpha=0.85, linewidths=0.25, edgecolors="white"
            )
        axes.set_title(title)
        blank(axes)
        class_legend(axes, np.unique(classes).tolist())


def draw_confusion(path: Path, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray, num_classes: int) -> None:
    """Share of each true class (row) that is predicted as each class (column), with counts; unknown labels are left
    out.
    """
    predicted, labels = array(predicted), array(labels)
    known = (labels >= 0) & (predicted >= 0)
    counts = np.bincount(labels[known] * num_classes + predicted[known], minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with canvas(path, 6.4) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.spines[:].set_visible(False)
        if num_classes <= 12:
            for i, j in zip(*counts.nonzero(), strict=True):
                axes.text(
                    j, i, f"{counts[i, j]:,}", ha="center", va="center", color="white" if shares[i, j] > 0.55 else INK
                )
            axes.set_xticks(range(num_classes))
            axes.set_yticks(range(num_classes))
        axes.tick_params(length=0)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(f"{counts.trace():,} of {counts.sum():,} right ({counts.trace() / max(counts.sum(), 1):.1%})")
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.85).outline.set_visible(False)


# -- graphs ------------------------------------------------------------------------------------------------------------


def draw_nodes(
    axes: Axes, points: np.ndarray, fill: np.ndarray, outline: np.ndarray | None, size: float, squares: np.ndarray
) -> None:
    """Nodes at points (N, 2): the fill's class inside, the outline's class around it; `squares` (N,) bool stand out
    by their shape.
    """
    fills = [colour(c) for c in fill]
    edges = ["white"] * len(fill) if outline is None else [colour(c) for c in outline]
    for part, shape in ((~squares, "o"), (squares, "s")):
        where = part.nonzero()[0]
        if len(where):
            axes.scatter(
                *points[where].T,
                s=size,
                c=[fills[i] for i in where],
                edgecolors=[edges[i] for i in where],
                marker=shape,
                linewidths=0.8 if outline is None else 3,
                zorder=2,
            )


def draw_graph(path: Path, graph: Graph, predicted: Tensor | np.ndarray, title: str = "") -> None:
    """A graph of up to a few hundred nodes: predicted class (N,) inside each node, true class around it, training
    nodes square.
    """
    from matplotlib.collections import LineCollection

    rows, columns = array(graph.edges())
    points = spread_out(stress_layout(rows, columns, graph.num_nodes))
    fill = array(predicted)
    truth = None if graph.labels is None else array(graph.labels)
    squares = np.zeros(graph.num_nodes, dtype=bool)
    squares[array(graph.train)] = True
    with canvas(path, 6.8) as figure:
        axes = figure.subplots()
        once = rows < columns
        axes.add_collection(
            LineCollection(
                np.stack([points[rows[once]], points[columns[once]]], axis=1), colors="#CBD5E1", linewidths=1
            )
        )
        size = float(np.clip(14_000 / graph.num_nodes, 60, 420))
        draw_nodes(axes, points, fill, truth, size, squares)
        if graph.num_nodes <= 60:
            for i, (x, y) in enumerate(points):
                dark = fill[i] >= 0 and COLOURS[fill[i] % len(COLOURS)] in ("#0072B2", "#000000", "#D55E00", "#009E73")
                axes.text(
                    x,
                    y,
                    str(i),
                    ha="center",
                    va="center_baseline",
                    fontsize=9,
                    color="white" if dark else "black",
                    zorder=3,
                )
        explained = ["fill: predicted"]
        shown = fill
        if truth is not None:
            explained.append("outline: true class")
            shown = np.concatenate([fill, truth])
        if squares.any():
            explained.append("square: training node")
        axes.set_title(title or f"{graph.name} ({', '.join(explained)})")
        blank(axes)
        class_legend(axes, np.unique(shown).tolist())


# -- curves ------------------------------------------------------------------------------------------------------------


def draw_bands(path: Path, series: dict[str, dict[int, list[float]]]) -> None:
    """For each name a panel: mean over the seeds at each step, and the range from the lowest to the highest seed.

    Args: series: name -> step -> the values of all seeds.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(series))
    lines = math.ceil(len(series) / columns)
    with canvas(path, 3.4 * lines if columns == 2 else 4.4) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for spare in panels[len(series) :]:
            spare.set_axis_off()
        for axes, (name, values) in zip(panels, series.items(), strict=False):
            steps = sorted(values)
            rows = [np.asarray(values[step], dtype=float) for step in steps]
            mean = np.array([row.mean() for row in rows])
            style: dict[str, Any] = {"marker": "o"} if len(steps) < 3 else {}
            axes.fill_between(
                steps,
                [row.min() for row in rows],
                [row.max() for row in rows],
                color=COLOURS[0],
                alpha=0.18,
                linewidth=0,
            )
            axes.plot(steps, mean, color=COLOURS[0], linewidth=1.6, **style)
            ordered = np.sort(mean)
            if "loss" in name and ordered[0] > 0 and ordered[-1] > 20 * ordered[0]:
                axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(visible=True)
            axes.set(title=words(name), xlabel="step")
        seeds = max((len(v) for values in series.values() for v in values.values()), default=0)
        if seeds > 1:
            figure.suptitle(f"mean and range of {seeds} trainings", fontsize=11)


def draw_depth(path: Path, curves: dict[str, dict[int, tuple[float, float]]], ylabel: str = "test accuracy") -> None:
    """Accuracy over the number of layers, one line a method with a band of one standard deviation: where deep networks
    wash out.

    Args: curves: method -> number of layers -> (mean, standard deviation), as fractions.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter

    with canvas(path, 5.0) as figure:
        axes = figure.subplots()
        depths = sorted({depth for values in curves.values() for depth in values})
        for i, (name, values) in enumerate(curves.items()):
            steps = sorted(values)
            mean, std = (np.array([values[step][k] for step in steps]) for k in (0, 1))
            axes.fill_between(steps, mean - std, mean + std, color=colour(i), alpha=0.15, linewidth=0)
            axes.plot(
                steps, mean, color=colour(i), marker=MARKERS[i % len(MARKERS)], markersize=6, linewidth=1.8, label=name
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(depths))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda depth, _: f"{depth:g}")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=True)
        axes.set(xlabel="layers", ylabel=ylabel)
        if curves:
            figure.legend(loc="outside upper center", ncols=min(len(curves), 4), frameon=False)
