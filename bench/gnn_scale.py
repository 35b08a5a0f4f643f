"""Graphs beyond one step's memory: neighbour sampling against pure PyTorch, and what time and memory cost as graphs
grow.

    python -m bench.gnn_scale           edges sampled per second by one core, ours and vectorised PyTorch; JSON last
    python -m bench.gnn_scale --curve   seconds and peak memory, 10^4 to 10^8 edges; docs/results/gnn/scale.{json,png}

Legend: N nodes, M undirected edges, B seed nodes, n nodes of a block.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gnn_scale_peer import Blocks, TorchSampler, floyd, smallest_keys
from bench.rounds import peak_memory, quartiles
from common.files import write_figure, write_json
from gnn.config import ModelConfig, SyntheticConfig
from gnn.core.sparse import Structure
from gnn.data.storage import open_arrays, save_arrays
from gnn.data.synthetic import make_social
from gnn.model import build_model
from gnn.node.minibatch_task import as_structure
from gnn.node.neighbours import NeighborSampler, Sample, epoch_batch

MEAN_DEGREE = 40  # as in configs/sage_social_1m.yaml
SIZES = tuple(10**k for k in range(4, 9))
PHASES = ("generate", "full", "sampled")
LEAVE_FREE = 4.0  # GiB of the machine that a measurement must not touch
TIME_LIMIT = 420  # seconds a measurement, start of Python and reading included
RESULTS = Path("docs/results/gnn")


# -- ours against the peer ---------------------------------------------------------------------------------------------


def plain(sample: Sample) -> tuple[Blocks, Tensor]:
    return [(block.indptr, block.indices, block.num_src) for block in sample.blocks], sample.nodes


def check(
    graph: dict[str, np.ndarray], sampled: tuple[Blocks, Tensor], seeds: Tensor, fanouts: tuple[int, ...]
) -> None:
    """`SystemExit` unless every row holds min(degree, fanout) distinct real edges and the seeds come first."""
    blocks, nodes = sampled
    right = torch.equal(nodes[: len(seeds)], seeds) and len(nodes.unique()) == len(nodes)
    indptr, indices, total = graph["indptr"], graph["indices"], len(graph["indptr"]) - 1
    # ascending: rows ascend, and columns within a row
    known = np.repeat(np.arange(total), np.diff(indptr)) * total + indices
    for (ends, local, _), fanout in zip(reversed(blocks), fanouts, strict=True):
        rows = nodes[torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())].numpy()
        keys = rows * total + nodes[local.long()].numpy()
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        degree = np.diff(indptr)[nodes[: len(ends) - 1].numpy()]
        right &= bool((known[at] == keys).all()) and len(np.unique(keys)) == len(keys)
        right &= bool((ends.diff().numpy() == np.minimum(degree, fanout)).all())
    if not right:
        raise SystemExit("a sampler's blocks are wrong: nothing was timed")


def check_frequencies(
    sampler: Callable[[Tensor, int], tuple], hub: int, degree: int, fanout: int, draws: int = 400
) -> float:
    """Chi-square a degree of freedom of how often each neighbour of a hub is drawn at hop 1: about 1 when all are
    equally likely.
    """
    counts: dict[int, int] = {}
    for step in range(draws):
        blocks, nodes = sampler(torch.tensor([hub]), step)
        for node in nodes[blocks[-1][1].long()].tolist():
            counts[node] = counts.get(node, 0) + 1
    p = fanout / degree
    seen = np.zeros(degree)
    seen[: len(counts)] = list(counts.values())
    return float(((seen - draws * p) ** 2).sum() / (draws * p * (1 - p)) / degree)


def compare(args: argparse.Namespace) -> dict[str, object]:
    """Edges sampled per CPU-second, interleaved, after the checks."""
    torch.set_num_threads(1)
    graph = make_social(
        SyntheticConfig(nodes=args.edges * 2 // MEAN_DEGREE, edges=args.edges, communities=20, mixing=0.6, features=1)
    )
    indptr, indices = torch.from_numpy(graph["indptr"]), torch.from_numpy(graph["indices"])
    fanouts, ours = tuple(args.fanouts), NeighborSampler(indptr, indices, args.fanouts)
    peers = {f.__name__: TorchSampler(indptr, indices, fanouts, f) for f in (floyd, smallest_keys)}
    calls = {"ours": lambda seeds, step: plain(ours.sample(seeds, step))} | {
        name: peer.sample for name, peer in peers.items()
    }
    nodes = torch.arange(len(indptr) - 1)
    degree = indptr.diff()
    hub = int((degree - 20 * fanouts[0]).abs().argmin())
    uniform = {}
    for name, call in calls.items():
        check(graph, call(nodes[:: len(nodes) // 500], 1), nodes[:: len(nodes) // 500], fanouts)
        uniform[name] = round(check_frequencies(call, hub, int(degree[hub]), fanouts[0]), 3)
        if not 0.6 < uniform[name] < 1.4:
            raise SystemExit(
                f"{name}: neighbours are not equally likely (chi-square {uniform[name]} a freedom): nothing was timed"
            )
    rates: dict[str, list[float]] = {name: [] for name in (*calls, "again")}
    batches = [epoch_batch(nodes, args.batch, 0, step) for step in range(1, args.steps + 1)]
    for round_ in range(-1, args.rounds):  # the first is a warm-up
        for name, values in rates.items():
            call, edges, start = calls["ours" if name == "again" else name], 0, time.process_time()
            for step, seeds in enumerate(batches):
                edges += sum(len(block[1]) for block in call(seeds, step)[0])
            values.append(edges / (time.process_time() - start))
        if round_ < 0:
            rates = {name: [] for name in rates}
        else:
            print(
                f"round {round_ + 1}/{args.rounds}  "
                + "  ".join(f"{k} {v[-1] / 1e6:.2f} M/s" for k, v in rates.items()),
                flush=True,
            )
    return summarise(rates, args) | {"uniformity": uniform, "edges": len(indices) // 2, "nodes": len(nodes)}


def summarise(rates: dict[str, list[float]], args: argparse.Namespace) -> dict[str, object]:
    """Median of the per-round ratios with quartiles, against the faster peer; and the A/A control."""
    fastest = max(("floyd", "smallest_keys"), key=lambda name: statistics.median(rates[name]))
    own = [(a + b) / 2 for a, b in zip(rates["ours"], rates["again"], strict=True)]
    ratios = [a / b for a, b in zip(own, rates[fastest], strict=True)]
    control = [a / b for a, b in zip(rates["ours"], rates["again"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_iqr": quartiles(ratios),
        "aa_ratio": round(statistics.median(control), 4),
        "aa_iqr": quartiles(control),
        "ours": round(statistics.median(own)),
        "peer": round(statistics.median(rates[fastest])),
        "unit": "edges/s",
        "peer_method": fastest,
        "all": {name: round(statistics.median(values)) for name, values in rates.items()},
        "batch": args.batch,
        "fanouts": args.fanouts,
        "rounds": args.rounds,
        "threads": 1,
        "clock": "cpu time",
        "load": round(os.getloadavg()[0], 2),
        "device": platform.machine(),
        "versions": {"torch": torch.__version__, "numba": numba.__version__, "python": platform.python_version()},
    }


# -- cost against size -------------------------------------------------------------------------------------------------


def measure(phase: str, edges: int, folder: Path) -> dict[str, float]:
    """One phase at one size, alone in this process; `generate` leaves the graph in `folder` for the others, which
    map it into memory.
    """
    torch.set_num_threads(1)
    result: dict[str, float]
    if phase == "generate":
        make_social(settings_of(1000))  # compilation is not what is measured
        start = time.process_time()
        arrays = make_social(settings_of(edges))
        result = {
            "seconds": time.process_time() - start,
            "kept": len(arrays["indices"]) // 2,
            "nodes": len(arrays["indptr"]) - 1,
        }
        result["peak_gib"] = peak()
        save_arrays(folder, arrays)
        return result
    arrays, _ = open_arrays(folder)
    parts = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return (measure_full if phase == "full" else measure_sampled)(parts) | {"peak_gib": peak()}


def settings_of(edges: int) -> SyntheticConfig:
    nodes = max(500, edges * 2 // MEAN_DEGREE)
    return SyntheticConfig(nodes=nodes, edges=edges, communities=20, mixing=0.6, size_skew=0.5, signal=1.5)


def measure_full(parts: dict[str, Tensor]) -> dict[str, float]:
    """Forward and backward of a two-layer GCN (32 -> 64 -> 20) over the whole graph; the normalisation is made once
    and timed apart.
    """
    model = build_model(ModelConfig(layer="gcn", hidden=64, dropout=0.0), 32, 20)
    structure = Structure(parts["indptr"], parts["indices"], symmetric=True)
    start = time.process_time()
    structure.gcn()
    prepared, times = time.process_time() - start, []
    while sum(times) < 3 and len(times) < 20:  # the best of several, or one that takes long
        start = time.process_time()
        logits = model(parts["features"], structure)
        F.cross_entropy(logits[parts["train"]], parts["labels"][parts["train"]]).backward()
        times.append(time.process_time() - start)
    return {"seconds": min(times), "seconds_normalise": prepared}


def measure_sampled(parts: dict[str, Tensor]) -> dict[str, float]:
    """Training steps of GraphSAGE (32 -> 64 -> 20) on 1,024 seed nodes, 10 x 10 neighbours; sampling and copying of
    features included.
    """
    model = build_model(ModelConfig(layer="sage", hidden=64, dropout=0.0), 32, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    sampler, times, edges, sampling = NeighborSampler(parts["indptr"], parts["indices"], [10, 10]), [], 0, 0.0
    for step in range(1, 36):
        start = time.process_time()
        seeds = epoch_batch(parts["train"], 1024, 0, step)
        sample = sampler.sample(seeds, step)
        drawn = time.process_time()
        logits = model(
            parts["features"][sample.nodes], [as_structure(block, torch.device("cpu")) for block in sample.blocks]
        )
        optimizer.zero_grad()
        F.cross_entropy(logits, parts["labels"][seeds]).backward()
        optimizer.step()
        if step > 5:  # warm
            times.append(time.process_time() - start)
            edges, sampling = edges + sample.num_edges, sampling + drawn - start
    return {
        "seconds": statistics.median(times),
        "edges_per_second": edges / sum(times),
        "edges_sampled_per_second": edges / sampling,
        "batch_nodes": len(seeds),
    }


def peak() -> float:
    """Largest resident memory of this process so far, GiB; pages of mapped files that were read count."""
    return peak_memory() / 1024


def available() -> float:
    """Memory that this machine can still give, GiB (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


def run_alone(phase: str, edges: int, folder: Path) -> dict[str, float] | str:
    """`measure` in a fresh process, ended when it takes too long or leaves the machine too little memory; a reason
    instead of numbers.
    """
    command = [
        sys.executable,
        "-m",
        "bench.gnn_scale",
        "--phase",
        phase,
        "--edges",
        str(edges),
        "--folder",
        str(folder),
    ]
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out, text=True) as process:
        start, reason = time.perf_counter(), ""
        while process.poll() is None:
            time.sleep(0.1)
            reason = (
                "memory" if available() < LEAVE_FREE else "time" if time.perf_counter() - start > TIME_LIMIT else ""
            )
            if reason:
                process.kill()
                process.wait()
                return f"stopped: {reason}"
        out.seek(0)
        return (
            json.loads(out.read().splitlines()[-1])
            if process.returncode == 0
            else f"failed with status {process.returncode}"
        )


def curve(args: argparse.Namespace) -> None:
    """All phases at all sizes up to --edges; written after every size."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    points: list[dict[str, object]] = []
    for edges in [size for size in SIZES if size <= args.edges]:
        with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
            point: dict[str, object] = {"edges": edges}
            for phase in PHASES:
                skip = isinstance(point.get("generate"), str)
                point[phase] = "no graph" if skip else run_alone(phase, edges, Path(folder))
                print(f"{edges:.0e} edges, {phase}: {point[phase]}", flush=True)
        points.append(point)
        result = {
            "points": points,
            "mean_degree": MEAN_DEGREE,
            "threads": 1,
            "clock": "cpu time",
            "load": round(os.getloadavg()[0], 2),
            "device": platform.machine(),
            "versions": {"torch": torch.__version__, "numba": numba.__version__},
        }
        write_json(RESULTS / "scale.json", result)
        draw(points)


def draw(points: list[dict[str, object]]) -> None:
    """Seconds and memory over the number of edges, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {
        "generate": "make the network (DC-SBM)",
        "full": "full-batch GCN, forward and backward",
        "sampled": "one GraphSAGE step, at most 1,024 seed nodes",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=110, constrained_layout=True)
    for axis, key, title in zip(
        axes, ("seconds", "peak_gib"), ("CPU-seconds on one core", "peak resident memory, GiB")
    ):
        for phase, label in labels.items():
            known = [(p["edges"], p[phase][key]) for p in points if isinstance(p[phase], dict)]
            axis.loglog(*zip(*known), "o-", label=label)
        axis.set(xlabel="undirected edges", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    write_figure(RESULTS / "scale.png", figure)
    plt.close(figure)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", action="store_true", help="cost against size instead of the comparison of samplers")
    parser.add_argument(
        "--edges", type=int, default=0, help="edges drawn (20 million), or the largest size of --curve (10^8)"
    )
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10, 10])
    parser.add_argument("--steps", type=int, default=10, help="batches a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", default="", help="where --curve keeps the graph while it is measured (6 GB at 10^8 edges)"
    )
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)  # used by the program on itself
    args = parser.parse_args(argv)
    args.edges = args.edges or (SIZES[-1] if args.curve else 20_000_000)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.phase:
        print(json.dumps(measure(args.phase, args.edges, Path(args.folder))))
    elif args.curve:
        curve(args)
    else:
        print(json.dumps(compare(args)))


if __name__ == "__main__":
    main(sys.argv[1:])
