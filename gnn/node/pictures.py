"""Pictures of attention: what a node listens to, and how far that is from listening to all neighbours alike.

Legend: N nodes, E entries of the adjacency, H heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from gnn.core.layout import spread_out, stress_layout
from gnn.core.pictures import COLOURS, UNKNOWN, array, blank, canvas, class_legend, draw_nodes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gnn.core.graph import Graph
    from gnn.core.sparse import Structure


@torch.no_grad()
def attention_of(model: nn.Module, graph: Graph, structure: Structure) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns (E,) and attention weights (H, E) of the first layer, loops included; the model in evaluation
    mode.
    """
    layer = model.layers[0]
    _, weights, _ = layer.attend(graph.features, structure)
    pattern = structure.with_loops.pattern
    return (
        array(pattern.rows).astype(np.int64),
        array(pattern.indices).astype(np.int64),
        array(weights).reshape(layer.heads, -1),
    )


def row_entropy(rows: np.ndarray, weights: np.ndarray, num_nodes: int) -> np.ndarray:
    """Entropy in nats of each node's weights: weights (H, E) to (H, N)."""
    terms = -weights * np.log(np.maximum(weights, 1e-30))
    return np.stack([np.bincount(rows, weights=term, minlength=num_nodes) for term in terms])


def choose_centre(
    rows: np.ndarray, columns: np.ndarray, gap: np.ndarray, degree: np.ndarray, labels: np.ndarray
) -> int:
    """A node with a neighbourhood that fits a picture, if possible with neighbours of other classes, whose attention is
    least uniform.

    Args: gap (N,) between the largest possible entropy and that of the attention averaged over heads; degree (N,)
        without loops.
    """
    # at least the size of the two-hop neighbourhood
    reach = np.bincount(rows, weights=degree[columns], minlength=len(degree))
    mixed = np.bincount(rows, weights=labels[rows] != labels[columns], minlength=len(degree)) >= 2
    for low, high, most in ((4, 10, 50), (3, 15, 80), (2, 30, 150), (1, 60, 400)):
        fits = (degree >= low) & (degree <= high) & (reach <= most)
        if fits.any():
            return int(np.where(fits & mixed if (fits & mixed).any() else fits, gap, -np.inf).argmax())
    return int(degree.argmin() if degree.max() > 60 else degree.argmax())


def draw_attention(path: Path, model: nn.Module, graph: Graph, structure: Structure) -> None:
    """What one node and its neighbours listen to in the first layer, and how far all nodes' attention is from uniform.

    Left: a two-hop neighbourhood; each edge has the weight, averaged over heads, that its end nearer to the centre
        gives to the other.
    Width: the weight. Colour: the weight times the number of neighbours (itself included), which is 1 where attention
        is uniform.
    Right: entropies of the weights over nodes and heads, and those of uniform weights over the same neighbours.
    """
    rows, columns, weights = attention_of(model, graph, structure)
    N = graph.num_nodes
    degree = np.bincount(rows, minlength=N) - 1  # without the loop
    mean = weights.mean(axis=0)
    gap = np.log(degree + 1) - row_entropy(rows, mean[None], N)[0]
    centre = choose_centre(rows, columns, gap, degree, np.zeros(N) if graph.labels is None else array(graph.labels))
    hop = np.full(N, 3)
    hop[centre] = 0
    for distance in (1, 2):
        reached = columns[hop[rows] == distance - 1]
        hop[reached] = np.minimum(hop[reached], distance)
    with canvas(path, 5.2) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        draw_neighbourhood(figure, left, graph, (rows, columns, mean * (degree[rows] + 1), mean), hop)
        draw_entropies(right, row_entropy(rows, weights, N)[:, degree > 0].ravel(), np.log(degree[degree > 0] + 1))


def draw_entropies(axes: Axes, learned: np.ndarray, uniform: np.ndarray) -> None:
    """Two histograms in one: entropies in nats of learned attention, and of uniform attention over the same
    neighbours.
    """
    top = float(np.quantile(uniform, 0.995)) if len(uniform) else 1.0  # a few hubs would squeeze the rest
    for values, name, kind, tint in ((uniform, "uniform", "bar", UNKNOWN), (learned, "learned", "step", COLOURS[1])):
        if len(values):
            axes.hist(
                values,
                np.linspace(0, 1.05 * top, 32),
                weights=np.full(len(values), 1 / len(values)),
                histtype=kind,
                color=tint,
                linewidth=1.8,
                label=f"{name}: mean {values.mean():.3f}",
            )
    axes.set(xlabel="entropy of a node's attention (nats)", ylabel="share of nodes and heads")
    if len(uniform):
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_neighbourhood(
    figure: Figure, axes: Axes, graph: Graph, attention: tuple[np.ndarray, ...], hop: np.ndarray
) -> None:
    """Nodes within two hops of the centre, fill = class. attention: rows, columns, colour value and weight of each
    entry (E,).
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import TwoSlopeNorm

    near = np.flatnonzero(hop <= 2)
    place = np.full(len(hop), -1)
    place[near] = np.arange(len(near))
    # of the two directions the one towards the centre; between equals the first
    towards = (hop[attention[0]] <= 2) & (
        (hop[attention[0]] < hop[attention[1]])
        | ((hop[attention[0]] == hop[attention[1]]) & (attention[0] < attention[1]))
    )
    towards &= hop[attention[1]] <= 2
    rows, columns, ratio, weight = (part[towards] for part in attention)
    points = stress_layout(
        np.concatenate([place[rows], place[columns]]), np.concatenate([place[columns], place[rows]]), len(near)
    )
    points = spread_out(points)
    reach = max(float(np.abs(ratio - 1).max(initial=0.0)), 0.01)
    norm = TwoSlopeNorm(1.0, max(1 - reach, 0.0) if reach < 1 else 0.0, 1 + reach)
    lines = LineCollection(
        np.stack([points[place[rows]], points[place[columns]]], axis=1),
        cmap="coolwarm",
        norm=norm,
        array=ratio,
        linewidths=1 + 6 * weight / max(weight.max(initial=0.0), 1e-9),
    )
    axes.add_collection(lines)
    classes = np.full(len(near), -1) if graph.labels is None else array(graph.labels)[near]
    draw_nodes(axes, points, classes, None, float(np.clip(6_000 / len(near), 30, 220)), hop[near] == 0)
    centre = int(near[hop[near] == 0][0])
    axes.set_title(f"node {centre} of {graph.name} (square), two hops")
    blank(axes)
    class_legend(axes, np.unique(classes).tolist())
    figure.colorbar(
        ScalarMappable(norm, "coolwarm"),
        ax=axes,
        location="bottom",
        shrink=0.8,
        aspect=30,
        pad=0.02,
        label="attention / uniform attention",
    ).outline.set_visible(False)
