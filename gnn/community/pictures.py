"""Pictures of communities: the graph with its groups coloured, and groups against known classes.

Legend: N nodes, E entries of the adjacency, D width of an embedding, k communities, K classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gnn.community.metrics import as_labels
from gnn.core.graph import Graph
from gnn.core.layout import project
from gnn.core.pictures import COLOURS, MAX_POINTS, UNKNOWN, blank, canvas

MORE = (
    "#7F3C8D",
    "#11A579",
    "#3969AC",
    "#A5AA99",
    "#E73F74",
    "#80BA5A",
    "#CF1C90",
    "#F97B72",
    "#4B4B8F",
    "#8C6D31",
    "#17BECF",
    "#B5CF6B",
)
PALETTE = COLOURS[:7] + MORE  # the largest communities in this order; all others are grey


def by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Communities renumbered 0 ... k-1 from the largest to the smallest, (N,)."""
    dense = as_labels(labels)
    rank = np.argsort(np.argsort(-np.bincount(dense), kind="stable"), kind="stable")
    return rank[dense]


def draw_communities(
    path: Path, graph: Graph, hidden: NDArray[np.float32], labels: NDArray[np.int64], title: str
) -> None:
    """Nodes placed by a t-SNE of embeddings (N, D) and coloured by community (N,), over thin edges; of large graphs a
    random part.

    An edge within a community has its colour, an edge between two is grey.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    chosen = np.arange(graph.num_nodes)
    if graph.num_nodes > MAX_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(graph.num_nodes, MAX_POINTS, replace=False))
    place = np.full((graph.num_nodes, 2), np.nan)
    place[chosen] = project(hidden[chosen])
    ranks = by_size(labels)
    colours = np.array([*PALETTE, UNKNOWN])[np.minimum(ranks, len(PALETTE))]  # (N,)
    rows, columns = graph.edges().cpu().numpy()
    keep = (rows < columns) & np.isfinite(place[rows, 0]) & np.isfinite(place[columns, 0])
    rows, columns = rows[keep], columns[keep]
    inside = ranks[rows] == ranks[columns]
    density = float(np.clip(3000 / max(len(rows), 1), 0.1, 1.0))  # many edges are drawn thinner and paler
    with canvas(path, 7.2) as figure:
        axes = figure.subplots()
        for part, shade, alpha in ((~inside, "#94A3B8", 0.35), (inside, None, 0.5)):
            lines = np.stack([place[rows[part]], place[columns[part]]], axis=1)  # (edges, 2 ends, 2)
            axes.add_collection(
                LineCollection(
                    lines,
                    colors=shade or colours[rows[part]].tolist(),
                    alpha=alpha * density**0.5,
                    linewidths=0.3 + 0.5 * density,
                    zorder=1,
                )
            )
        size = 12 if len(chosen) > 1000 else 26 if len(chosen) > 100 else 90
        axes.scatter(*place[chosen].T, s=size, c=colours[chosen], linewidths=0.25, edgecolors="white", zorder=2)
        axes.set_title(title)
        blank(axes)
        counts = np.bincount(ranks)
        handles = [
            Line2D([], [], linestyle="", marker="o", color=PALETTE[c], markersize=8, label=f"{counts[c]:,}")
            for c in range(min(len(counts), 10))
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            frameon=False,
            handletextpad=0.1,
            columnspacing=1.2,
            title="nodes in each community" if len(counts) <= 10 else "nodes in the ten largest communities",
        )


def draw_against_classes(path: Path, labels: NDArray[np.int64], classes: NDArray[np.int64], name: str) -> None:
    """Which classes each community is made of: shares of a community's nodes, communities from the largest to the
    smallest.

    Classes (N,) of -1 are unknown and left out. Columns are ordered so that a perfect match is a diagonal; at most 60
    rows are drawn.
    """
    known = classes >= 0
    if not known.any():
        return
    ranks = by_size(labels[known])
    kinds = as_labels(classes[known])
    table = np.zeros((ranks.max() + 1, kinds.max() + 1), int)  # (k, K)
    np.add.at(table, (ranks, kinds), 1)
    order = np.lexsort((-table.max(axis=0), table.argmax(axis=0)))  # classes by the community that holds most of them
    names = np.unique(classes[known])[order]
    table = table[:60, order]
    shares = table / table.sum(axis=1, keepdims=True)
    small = table.size <= 150
    with canvas(path, float(np.clip(1.6 + 0.42 * len(table), 3.2, 8.0))) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if small:
            for (i, j), count in np.ndenumerate(table):
                axes.text(
                    j,
                    i,
                    str(count) if count else "",
                    ha="center",
                    va="center",
                    color="white" if shares[i, j] > 0.55 else "#334155",
                )
        axes.set_xticks(range(len(names)), [str(c) for c in names], fontsize=10 if len(names) <= 20 else 7)
        sizes = table.sum(axis=1)
        step = 1 if len(table) <= 30 else 2
        axes.set_yticks(
            range(0, len(table), step),
            [f"{sizes[i]:,}" for i in range(0, len(table), step)],
            fontsize=10 if small else 8,
        )
        axes.set_xlabel("class")
        axes.set_ylabel("nodes in the community")
        axes.set_title(f"{name}: communities against classes" + (", counts" if small else ""))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label="share of the community", shrink=0.9).outline.set_visible(False)
