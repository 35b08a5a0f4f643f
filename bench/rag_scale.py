"""How vector search grows: build time, memory, latency and recall of flat search, HNSW and IVF-PQ at 10^4, 10^5, 10^6
and more synthetic vectors:

    python -m bench.rag_scale [--sizes 10000 100000 1000000 2000000] [--kinds ivfpq hnsw] [--out docs/results/rag]

Vectors of 384 numbers and length 1 in clusters of some 250: a centre, plus a draw from a 32-dimensional subspace of
the cluster's own, plus a little noise in all directions. Embeddings of text are like that: near each other by topic,
and of far fewer degrees of freedom than numbers. Queries are drawn the same way and are not among the vectors. The
truth is flat search. Recall@10 is the share of the ten nearest that are found, after exact re-ranking.

Each size and kind is measured in a process of its own, so that its peak memory is its own. Writes `scale.json` and
`scale.png`; the last line of stdout is the JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.rounds import peak_memory
from common.files import write_figure, write_json
from common.runtime import mix_seed, use_threads
from rag.config import IndexConfig
from rag.search.vectors import VectorFiles, VectorIndex

D, CLUSTER, INNER = 384, 250, 32
SHARD = 50_000
QUERIES = 200
PQ_BYTES = 48  # and 8 for a number: 56 a vector
Array = np.ndarray[Any, Any]


def draw(count: int, total: int, *seed: int) -> Array:
    """Clustered vectors of length 1, from a world of so many: float32 (count, D)."""
    world = np.random.default_rng(12345)
    centres = world.standard_normal((max(16, total // CLUSTER), D), np.float32)
    bases = world.standard_normal((64, INNER, D)).astype(np.float32) / np.sqrt(INNER)
    rng = np.random.default_rng(mix_seed(*seed))
    which = rng.integers(0, len(centres), count)
    vectors = centres[which]
    inner = rng.standard_normal((count, INNER)).astype(np.float32)
    for basis in range(64):
        rows = np.flatnonzero(which % 64 == basis)
        vectors[rows] += inner[rows] @ bases[basis]
    vectors += 0.1 * rng.standard_normal((count, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_files(folder: Path, count: int) -> VectorFiles:
    """The first `count` vectors, in files; those that are there already are kept."""
    files = VectorFiles(folder, D)
    for start in range(len(files), count, SHARD):
        files.append(draw(min(SHARD, count - start), count, 1, start))
    return files


def settings(kind: str, count: int) -> IndexConfig:
    """The index of one kind for so many vectors."""
    probe = 64 if count >= 1_000_000 else 32
    return IndexConfig(
        kind=kind,  # type: ignore[arg-type]  # one of its choices
        pq_bytes=PQ_BYTES,
        probe=probe,
        rerank=200,
        shard=SHARD,
        hnsw_build=100,
        train_vectors=min(count, 200_000),
    )


def measure(kind: str, count: int, folder: Path, truth: Path, threads: int) -> dict[str, Any]:
    """Build, then search one query at a time; for `flat` the truth is written down."""
    use_threads(threads)
    import faiss

    faiss.omp_set_num_threads(threads)
    files = VectorFiles(folder, D)
    before = peak()
    started = time.perf_counter()
    index = VectorIndex(files, settings(kind, count)).build()
    built = time.perf_counter() - started
    saved = folder.parent / f"{kind}-{count}"
    index.save(saved)
    built_peak = peak()
    size = sum(path.stat().st_size for path in saved.iterdir())
    index = VectorIndex.load(saved, files, settings(kind, count))
    shutil.rmtree(saved)
    queries = draw(QUERIES, count, 2)
    index.search(queries[:5], 10)
    times, rows = [], []
    for query in queries:
        started = time.perf_counter()
        rows.append(index.search(query[None], 10)[1][0])
        times.append(time.perf_counter() - started)
    found = np.stack(rows)
    if kind == "flat":
        np.save(truth, found, allow_pickle=False)
    right = np.load(truth, allow_pickle=False)
    recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), right.tolist(), strict=True)]))
    return {
        "kind": kind,
        "vectors": count,
        "described": index.described,
        "build_seconds": round(built, 2),
        "peak_megabytes_before": before,
        "peak_megabytes_building": built_peak,
        "index_bytes_a_vector": round(size / count, 1),
        "recall_at_10": round(recall, 4),
        "ms_median": round(1000 * float(np.median(times)), 3),
        "ms_p95": round(1000 * float(np.quantile(times, 0.95)), 3),
        "threads": threads,
        "load": os.getloadavg()[0],
    }


def peak() -> int:
    """The most memory that this process has had, in megabytes."""
    return round(peak_memory())


def work(queue: Any, *arguments: Any) -> None:
    """`measure` in a process of its own."""
    queue.put(measure(*arguments))


def extrapolate(results: list[dict[str, Any]], count: float = 1e9) -> dict[str, Any]:
    """What a billion passages would take, from the largest IVF-PQ that was measured. An extrapolation and no
    measurement: cells and probed cells are assumed to grow so that a search reads as many codes for each result.
    """
    largest = max((item for item in results if item["kind"] == "ivfpq"), key=lambda item: item["vectors"], default=None)
    if largest is None:
        return {}
    times = count / largest["vectors"]
    return {
        "extrapolation_from": largest["vectors"],
        "vectors": count,
        "codes_gigabytes": round(count * largest["index_bytes_a_vector"] / 1e9, 1),
        "vectors_gigabytes": round(count * D * 4 / 1e9, 1),
        "build_hours_if_linear": round(times * largest["build_seconds"] / 3600, 1),
        # cells as the square root of the vectors, so each holds as many times more, and so does what a probe reads
        "ms_if_as_square_root": round(largest["ms_median"] * times**0.5, 1),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Build time, memory, latency and recall over the number of vectors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "build_seconds": "build (s)",
        "peak_megabytes_building": "peak memory while building (MB)",
        "ms_median": "a query (ms, median)",
        "recall_at_10": "recall@10",
    }
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), dpi=110, layout="constrained")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for kind in dict.fromkeys(item["kind"] for item in results):
            points = [(item["vectors"], item[name]) for item in results if item["kind"] == kind]
            axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set_xscale("log")
        axis.set_xlabel("vectors")
        axis.set_title(label)
        if name == "recall_at_10":
            axis.set_ylim(0, 1.05)
        else:
            axis.set_yscale("log")
    axes[0].legend()
    write_figure(path, figure)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 2_000_000])
    parser.add_argument("--kinds", nargs="+", default=["ivfpq", "hnsw"], choices=["ivfpq", "hnsw"])
    parser.add_argument("--hnsw-most", type=int, default=1_000_000, help="HNSW keeps all vectors in memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/rag_scale"), help="for vectors: 1.5 GB a million")
    parser.add_argument("--out", type=Path, default=Path("docs/results/rag"))
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results: list[dict[str, Any]] = []
    for count in args.sizes:
        folder = args.folder / f"vectors-{count}"
        make_files(folder, count)
        for kind in ["flat", *(kind for kind in args.kinds if kind != "hnsw" or count <= args.hnsw_most)]:
            queue = spawn.Queue()
            child = spawn.Process(
                target=work, args=(queue, kind, count, folder, args.folder / f"truth-{count}.npy", args.threads)
            )
            child.start()
            results.append(queue.get())
            child.join()
            item = results[-1]
            print(
                f"{count:>9,} {kind:6} build {item['build_seconds']:8.1f} s  {item['peak_megabytes_building']:6} MB  "
                f"{item['index_bytes_a_vector']:7.1f} B/vector  recall@10 {item['recall_at_10']:.3f}  "
                f"{item['ms_median']:.2f} ms",
                file=sys.stderr,
                flush=True,
            )
        shutil.rmtree(folder)
    circumstances = {"platform": platform.platform(), "faiss": version("faiss-cpu"), "dimension": D, "queries": QUERIES}
    summary = {"results": results, "extrapolation": extrapolate(results), **circumstances}
    write_json(args.out / "scale.json", summary)
    plot(results, args.out / "scale.png")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
