"""Graph networks at GPU scale:  python -m bench.gpu.gnn seeds|sage [--minutes 9] [--tiny]

    seeds   1,000 trainings of one small GCN at once (gnn_seeds.py): spread of the test accuracy, seeds a second beside
            `gnn.train`
    sage    sampled GraphSAGE on made-up social networks of 10^7 and 10^8 edges (gnn_sage.py): edges a second, where
            the time goes, memory

A part that runs out of time exits with status 75; the same command goes on, and what is measured is not measured again
(delete --work to begin anew). Results in --out: seeds_<config>.json, .csv and .png; sage.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu import campaign
from bench.gpu.gnn_sage import measure, wait_for
from bench.gpu.gnn_seeds import draw_histogram, train_together
from common.config import resolve
from common.errors import ProjectError, exits_cleanly
from common.files import write_csv, write_json
from common.logging import read_metrics
from common.runtime import choose_device
from gnn.config import Config
from gnn.node.minibatch_task import SampledNodeTask
from gnn.tasks import build_task

PUBLISHED = {"gcn_cora": 0.815, "gcn_citeseer": 0.703, "gcn_pubmed": 0.790}  # Kipf & Welling 2017, table 2
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MEAN_DEGREE = 40  # as in configs/sage_social_1m.yaml
TINY_EDGES = 20_000


# -- seeds -------------------------------------------------------------------------------------------------------------


def seeds(args: argparse.Namespace) -> int:
    """Train --count seeds, --chunk at a time; then the same training one by one. Returns the exit status."""
    budget, device = campaign.Budget.of(args), choose_device(args.device)
    config = resolve(Config, args.config, [f"device={device}", *args.overrides])
    task = build_task(config, device)
    task.build(0)
    name, chunk = args.config.stem, args.chunk or (args.count if device.type == "cuda" else 20)
    facts, path, kept = campaign.facts(device), args.out / f"seeds_{name}.json", args.work / f"seeds_{name}.json"
    settings = {"config": name, "overrides": args.overrides, "chunk": chunk, "machine": facts["machine"]}
    earlier = campaign.read_json(kept)
    rows, seconds = (earlier["rows"], earlier["seconds"]) if earlier.get("settings") == settings else ([], 0.0)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as `common.runtime.start` does for a training
    slowest = 0.0
    while len(rows) < args.count and not (slowest and budget.over(1.2 * slowest + args.reserve)):
        began = time.perf_counter()
        rows += train_together(task, len(rows), min(chunk, args.count - len(rows)))[0]
        wait_for(device)
        seconds, slowest = seconds + time.perf_counter() - began, max(slowest, time.perf_counter() - began)
        write_json(kept, {"settings": settings, "seconds": seconds, "rows": rows})
        print(f"{len(rows)} of {args.count} seeds, {seconds:.1f} s", flush=True)
    metrics = summary(rows) | {
        "seconds": seconds,
        "seeds_per_second": len(rows) / seconds,
        "gpu_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    content = {**settings, "seeds": len(rows), "steps": config.train.steps, "metrics": metrics, "one_by_one": {}}
    write_csv(args.out / f"seeds_{name}.csv", rows)
    title = f"{name}, {len(rows)} seeds"
    draw_histogram(args.out / f"seeds_{name}.png", [row["test_accuracy"] for row in rows], title, PUBLISHED.get(name))
    campaign.write_result(path, content, facts, seconds)
    for place in dict.fromkeys(("cpu", str(device))):
        if not budget.over(args.reserve / 2):
            rate = one_by_one(args, place, budget.left() - 10)
            content["one_by_one"][place] = {
                "seeds_per_second": rate,
                "seeds": args.singles,
                "processes": 1,
                "threads": 1,
                "times_faster_together": rate and len(rows) / seconds / rate,
            }
            campaign.write_result(path, content, facts, seconds)
    campaign.print_table(
        f"{title}, {facts['machine']}", [{"metric": key, "value": value} for key, value in metrics.items()]
    )
    campaign.print_table(
        "the same one by one", [{"device": place, **row} for place, row in content["one_by_one"].items()]
    )
    return 0 if len(rows) >= args.count else campaign.UNFINISHED


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean with its standard error, spread, extremes and quantiles of the test accuracy; means of what goes with it."""
    accuracy = [row["test_accuracy"] for row in rows]
    spread = statistics.stdev(accuracy) if len(rows) > 1 else 0.0
    found = {
        "test_accuracy": statistics.fmean(accuracy),
        "test_accuracy_std": spread,
        "test_accuracy_error": spread / len(rows) ** 0.5,
        "test_accuracy_min": min(accuracy),
        "test_accuracy_max": max(accuracy),
    }
    found |= {f"test_accuracy_q{100 * q:02.0f}": float(np.quantile(accuracy, q)) for q in QUANTILES}
    validation = [row["val_accuracy"] for row in rows]
    found |= {"val_accuracy": statistics.fmean(validation), "step": statistics.fmean(row["step"] for row in rows)}
    if len(set(validation)) > 1 and spread:  # whether choosing a seed by its validation accuracy would help
        found["correlation_val_test"] = float(np.corrcoef(validation, accuracy)[0, 1])
    return found


def one_by_one(args: argparse.Namespace, device: str, seconds: float) -> float | None:
    """Seeds a second of `gnn.train` on a device, its start and the first seed left out. None where it took longer
    than `seconds`.
    """
    folder = args.work / f"one_by_one_{device.replace(':', '')}"
    steps = resolve(Config, args.config, args.overrides).train.steps
    status = campaign.run_until(
        [
            sys.executable,
            "-m",
            "gnn.train",
            "--config",
            str(args.config),
            "--overwrite",
            *args.overrides,
            f"run_dir={folder}",
            f"device={device}",
            f"train.seeds={args.singles}",
            f"train.log_every={steps}",
        ],
        seconds,
        env={"OMP_NUM_THREADS": "1"},
    )
    if status not in (0, campaign.STOPPED):
        raise ProjectError(f"gnn.train on {device} ended with status {status}")
    rates = [line["steps_per_second"] for line in read_metrics(folder / "metrics.jsonl")][1:]  # a line a seed
    return len(rates) / sum(steps / rate for rate in rates) if rates else None


# -- sampled GraphSAGE -------------------------------------------------------------------------------------------------


SAGE_COLUMNS = (
    "edges",
    "batch",
    "place",
    "edges_per_s",
    "ms",
    "sample_ms",
    "copy_ms",
    "step_ms",
    "waiting",
    "val_accuracy",
    "gpu_peak_gib",
    "host_peak_gib",
    "generate_s",
)


def sage(args: argparse.Namespace) -> int:
    """Every size, on the GPU with the features there, with the features in the CPU's memory, and on the CPU. Returns
    the exit status.
    """
    budget = campaign.Budget.of(args)
    device = choose_device(args.device)
    facts = campaign.facts(device)
    settings = {
        "config": str(args.config),
        "overrides": args.overrides,
        "seconds": args.seconds,
        "machine": facts["machine"],
    }
    earlier = campaign.read_json(args.work / "sage.json")
    rows: list[dict[str, Any]] = earlier.get("rows", []) if earlier.get("settings") == settings else []
    known = {(row["edges_drawn"], row["batch"], row["place"]) for row in rows}
    status = 0
    longest = 2 * args.seconds  # of a measurement so far
    for edges in args.edges:
        wanted = [
            (batch, place) for batch in args.batch for place in places(device) if (edges, batch, place) not in known
        ]
        if not wanted:
            continue
        need = generation_seconds(rows, edges) + 1.3 * longest
        if budget.over(need):
            left = f"about {need:.0f} s are needed and {budget.left():.0f} are left"
            print(f"{edges:.0e} edges: not begun, {left}", flush=True)
            status = campaign.UNFINISHED
            break
        task, made = load(args, edges)
        for batch, place in wanted:
            if budget.over(1.3 * longest):
                status = campaign.UNFINISHED
                break
            began = time.perf_counter()
            where = torch.device("cpu") if place == "cpu" else device
            row = measure(task, where, place != "gpu, host features", batch, args.seconds, args.cores)
            longest = max(longest, time.perf_counter() - began)
            sizes = {"edges_drawn": edges, "edges": task.graph.num_edges, "nodes": task.graph.num_nodes}
            rows.append(sizes | {"batch": batch, "place": place, **row, "generate_s": made})
            keep_rows(args, settings, task, rows, facts, time.perf_counter() - began)
            print(f"{edges:.0e} edges, batch {batch}, {place}: {row['edges_per_s'] / 1e6:.2f} M edges/s", flush=True)
    campaign.print_table("GraphSAGE, sampled", [{key: row[key] for key in SAGE_COLUMNS} for row in rows])
    return status


def keep_rows(
    args: argparse.Namespace,
    settings: dict[str, Any],
    task: Any,
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    seconds: float,
) -> None:
    """Write what has been measured so far, for the next command and as a result."""
    content = {
        "settings": settings,
        "fanouts": list(task.config.sampling.fanouts),
        "hidden": task.config.model.hidden,
        "rows": rows,
    }
    write_json(args.work / "sage.json", content)
    campaign.write_result(args.out / "sage.json", content, facts, campaign.spend(args.work, "sage", seconds))


def places(device: torch.device) -> list[str]:
    """Where training is measured: on a GPU with the features in its memory or in the CPU's, and on the CPU."""
    return ["gpu", "gpu, host features", "cpu"] if device.type == "cuda" else ["cpu"]


def generation_seconds(rows: list[dict[str, Any]], edges: int) -> float:
    """What making a graph will take, from the largest made so far; somewhat more than in proportion, for caches are
    outgrown.
    """
    made = [(row["edges_drawn"], row["generate_s"]) for row in rows]
    size, seconds = max(made, default=(edges, 0.0))
    return 1.5 * seconds * edges / size


def load(args: argparse.Namespace, edges: int) -> tuple[SampledNodeTask, float]:
    """The network of so many drawn edges, in the CPU's memory, and the seconds of making it (compilation apart)."""
    words = [*args.overrides, "device=cpu", "train.decay=constant"]  # how many steps there will be is not known
    build_task(
        resolve(Config, args.config, [*words, "synthetic.nodes=500", "synthetic.edges=5000"]), torch.device("cpu")
    )
    config = resolve(
        Config,
        args.config,
        [*words, f"synthetic.nodes={max(500, 2 * edges // MEAN_DEGREE)}", f"synthetic.edges={edges}"],
    )
    start = time.perf_counter()
    task = build_task(config, torch.device("cpu"))
    assert isinstance(task, SampledNodeTask)
    return task, time.perf_counter() - start


# -- the command line --------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """`1e7,1e8` as integers, ascending."""
    return sorted({int(float(part)) for part in text.split(",")})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what --tiny and the part leave open filled in."""
    parser = campaign.parser("gnn", __doc__)
    parser.add_argument("part", choices=("seeds", "sage"))
    parser.add_argument(
        "--config",
        type=Path,
        help="default configs/gcn_cora.yaml, configs/sage_social_1m.yaml; --tiny: gcn_karate.yaml",
    )
    parser.add_argument("--count", type=int, default=1000, help="seeds: how many (default %(default)s)")
    parser.add_argument(
        "--chunk",
        type=int,
        default=0,
        help="seeds: at once, which bounds the memory (default all on a GPU, 20 on a CPU)",
    )
    parser.add_argument(
        "--singles", type=int, default=6, help="seeds: trained one by one for comparison, the first is not timed"
    )
    parser.add_argument(
        "--edges", type=numbers, default="1e7,1e8", help="sage: edges drawn, a list (default %(default)s)"
    )
    parser.add_argument(
        "--batch", type=numbers, default="1024,8192", help="sage: seed nodes a step, a list (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="sage: training time of each measurement (default %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the config, such as data_root=...")
    args = campaign.settle(parser.parse_intermixed_args(argv))
    args.cores = 1 if args.tiny else os.cpu_count() or 1
    args.reserve = 2.0 if args.tiny else 60.0  # seconds kept for the trainings one by one
    if args.tiny:
        args.count, args.singles, args.edges, args.batch, args.seconds = (
            min(args.count, 24),
            3,
            [TINY_EDGES],
            [256],
            0.3,
        )
        args.chunk = min(args.chunk or 12, 12)
    if not args.config:
        name = "sage_social_1m" if args.part == "sage" else "gcn_karate" if args.tiny else "gcn_cora"
        args.config = Path(f"configs/{name}.yaml")
    return args


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run one part; exit status 75 means that the same command goes on."""
    args = parse(argv)
    sys.exit({"seeds": seeds, "sage": sage}[args.part](args))


if __name__ == "__main__":
    main()
