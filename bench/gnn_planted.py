"""Recovery of planted communities down to the detectability threshold.

    python -m bench.gnn_planted [--nodes 4000 --seeds 3]

Symmetric stochastic blocks: q groups of N / q nodes, mean degree c, an edge within a group c_in / c_out times as likely
as one between two. Below |c_in - c_out| = q sqrt(c) no method that runs in reasonable time is known to do better than
chance, and for q <= 4 groups that are assortative none can (Decelle et al. 2011). Every method gets the edges; all but
Louvain and Leiden are told q as well.

Writes docs/results/gnn/planted.json and planted.png; the last line of stdout is the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from common.files import write_json
from gnn.community.dmon import DMoN, dmon_loss, harden
from gnn.community.louvain_leiden import leiden, louvain
from gnn.community.metrics import contingency, nmi
from gnn.community.spectral import bethe_hessian_communities, spectral_communities
from gnn.config import CommunityConfig, ModelConfig
from gnn.core.graph import Graph, build_graph
from gnn.core.pictures import COLOURS, MARKERS, canvas
from gnn.core.sparse import Pattern, SparseFeatures

TITLES = {
    "bethe_hessian": "Bethe-Hessian",
    "spectral": "spectral, regularised",
    "dmon": "DMoN, edges only",
    "leiden": "Leiden",
    "louvain": "Louvain",
}
TOLD = ("bethe_hessian", "spectral", "dmon")  # methods that know q


def threshold(groups: int, degree: float) -> float:
    """The ratio c_out / c_in at which c_in - c_out = q sqrt(c): (sqrt(c) - 1) / (sqrt(c) + q - 1)."""
    return (math.sqrt(degree) - 1) / (math.sqrt(degree) + groups - 1)


def planted_blocks(nodes: int, groups: int, degree: float, ratio: float, seed: int) -> tuple[Graph, NDArray[np.int64]]:
    """A graph with expected degree c and c_out / c_in = ratio, and the group of each node, int64 (N,)."""
    rng = np.random.default_rng((seed, round(ratio * 1e6)))
    truth = np.arange(nodes) % groups
    share = 1 / (1 + (groups - 1) * ratio)  # c_in / (q c): of the expected edges, those within a group
    inside = rng.poisson(share * nodes * degree / 2)
    total = inside + rng.poisson((1 - share) * nodes * degree / 2)
    left = rng.integers(0, nodes, total)
    step = np.where(np.arange(total) < inside, 0, rng.integers(1, groups, total))  # from one group to another
    right = rng.integers(0, nodes // groups, total) * groups + (left + step) % groups
    return build_graph(torch.from_numpy(np.stack([left, right])), nodes), truth


def dmon(graph: Graph, groups: int, seed: int, steps: int = 150) -> NDArray[np.int64]:
    """Deep modularity network whose only features are the node ids."""
    torch.manual_seed(seed)
    x = SparseFeatures(
        Pattern(torch.arange(graph.num_nodes + 1), torch.arange(graph.num_nodes), (graph.num_nodes,) * 2),
        torch.ones(graph.num_nodes),
    )
    model = DMoN(
        ModelConfig(hidden=32, layers=1, activation="selu", dropout=0.0),
        CommunityConfig(dropout=0.0),
        graph.num_nodes,
        groups,
    )
    structure, optimizer = graph.structure(), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        dmon_loss(model(x, structure), structure, 1.0).backward()
        optimizer.step()
    with torch.no_grad():
        return harden(model(x, structure)).numpy()


def run_all(graph: Graph, groups: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Labels int64 (N,) by method."""
    csr = graph.indptr.numpy(), graph.indices.numpy()
    return {
        "louvain": louvain(*csr, seed=seed, restarts=5).labels,
        "leiden": leiden(*csr, seed=seed, restarts=5).labels,
        "spectral": spectral_communities(*csr, groups, seed),
        "bethe_hessian": bethe_hessian_communities(*csr, groups, seed),
        "dmon": dmon(graph, groups, seed),
    }


def overlap(labels: NDArray[np.int64], truth: NDArray[np.int64], groups: int) -> float:
    """Share of nodes in their group under the best matching of q communities to groups, rescaled: 0 = a constant
    guess, 1 = exact.
    """
    table = contingency(labels, truth)
    counts = np.zeros((len(table.left), len(table.right)))
    counts[table.rows, table.columns] = table.cells
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float((counts[rows, columns].sum() / len(truth) - 1 / groups) / (1 - 1 / groups))


def sweep(nodes: int, groups: int, degree: float, seeds: int, ratios: list[float]) -> list[dict[str, object]]:
    """One row for each ratio and method: mean and standard deviation of NMI and overlap, number of communities,
    CPU-seconds.
    """
    rows = []
    for ratio in ratios:
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in TITLES}
        for seed in range(seeds):
            graph, truth = planted_blocks(nodes, groups, degree, ratio, seed)
            for name, labels in run_all(graph, groups, seed).items():
                found[name].append((nmi(labels, truth), overlap(labels, truth, groups), len(np.unique(labels))))
        for name, values in found.items():
            mean, spread = np.mean(values, axis=0), np.std(values, axis=0, ddof=min(1, seeds - 1))
            rows.append(
                {
                    "ratio": ratio,
                    "method": name,
                    "nmi": mean[0],
                    "nmi_std": spread[0],
                    "overlap": mean[1],
                    "overlap_std": spread[1],
                    "num_communities": mean[2],
                }
            )
        print(
            f"c_out/c_in {ratio:.3f}  "
            + "  ".join(f"{row['method']} {row['nmi']:.3f}" for row in rows[-len(TITLES) :]),
            flush=True,
        )
    return rows


def draw(path: Path, rows: list[dict], critical: float, title: str) -> None:
    """NMI of all methods, and overlap of those that know q, against the ratio; the threshold as a line."""
    panels = (("nmi", "normalised mutual information", tuple(TITLES)), ("overlap", "overlap", TOLD))
    with canvas(path, 4.4) as figure:
        for axes, (metric, label, methods) in zip(figure.subplots(1, 2), panels):
            axes.axvspan(critical, 1.0, color="#F1F5F9", zorder=0)
            axes.axvline(critical, color="#64748B", linestyle="--", linewidth=1.2)
            for i, name in enumerate(TITLES):
                if name in methods:
                    part = [row for row in rows if row["method"] == name]
                    x, y, error = (
                        np.array([row[key] for row in part], float) for key in ("ratio", metric, f"{metric}_std")
                    )
                    axes.fill_between(x, y - error, y + error, color=COLOURS[i], alpha=0.15, linewidth=0)
                    axes.plot(
                        x, y, color=COLOURS[i], marker=MARKERS[i], markersize=4.5, linewidth=1.6, label=TITLES[name]
                    )
            axes.set(
                xlabel="$c_{out}/c_{in}$", ylabel=label, ylim=(-0.03, 1.03), xlim=(0, max(row["ratio"] for row in rows))
            )
            axes.text(critical + 0.01, 0.97, "undetectable", color="#64748B", fontsize=9, va="top")
            axes.grid(axis="y", linewidth=0.6)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(TITLES),
            frameon=False,
            fontsize=9.5,
            columnspacing=1.2,
        )
        figure.suptitle(title, fontsize=12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4000)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--degree", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=12, help="ratios between 0.02 and 0.5")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gnn"))
    arguments = parser.parse_args()
    nodes, groups, degree = arguments.nodes // arguments.groups * arguments.groups, arguments.groups, arguments.degree
    torch.set_num_threads(1)
    started, critical = time.perf_counter(), threshold(groups, degree)
    rows = sweep(nodes, groups, degree, arguments.seeds, np.linspace(0.02, 0.5, arguments.points).round(4).tolist())
    result = {
        "project": "gnn",
        "command": "python -m bench.gnn_planted",
        "nodes": nodes,
        "groups": groups,
        "mean_degree": degree,
        "seeds": list(range(arguments.seeds)),
        "threshold": critical,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "planted.json", result)
    draw(
        arguments.out / "planted.png",
        rows,
        critical,
        f"Planted groups: N = {nodes:,}, q = {groups}, mean degree {degree:g}",
    )
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
