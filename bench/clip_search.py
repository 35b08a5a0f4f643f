"""What `clip.search` costs as the folder grows: time to build, memory, milliseconds a query, and how many of the
nearest images the approximate index finds.

    python -m bench.clip_search --embeddings runs/lit_flickr8k/embeddings.npz [--count 100000]

Real embeddings, as `clip.eval` writes them, are filled up to `--count` with synthetic ones: each is a real one moved by
Gaussian noise to a cosine of about 0.8, so that the cloud keeps the clusters that photographs have. Queries are the
real captions' embeddings, which lie apart from all images: harder for a graph than images as queries, and what people
ask. Without --embeddings everything is synthetic, and said so.

One thread, wall time; the memory of an index is what the process grows by, measured in a process of its own. Writes
docs/results/clip/search.json; the last line of stdout is its content.

Legend: N images, Q queries, E numbers of an embedding, K results.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.rounds import circumstances, report
from clip.gallery import index as neighbours
from clip.gallery.store import Entry, Stamp, Store

RESULTS = Path("docs/results/clip/search.json")
COSINE = 0.8  # of a synthetic embedding to the real one that it was made of
CLUSTERS = 1000  # of embeddings that are all synthetic
BREADTHS = (16, 32, 64, 128, 256, 512)  # candidates kept while the graph is walked
K = 10


def unit(x: np.ndarray) -> np.ndarray:
    """Of length 1, float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def around(centres: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` vectors (count, E) at a cosine of about `COSINE` to one of the centres (M, E) each."""
    E = centres.shape[1]
    noise = rng.normal(size=(count, E)) * (1 / COSINE**2 - 1) ** 0.5 / E**0.5
    return unit(centres[rng.integers(len(centres), size=count)] + noise)


def make_vectors(files: list[Path], count: int, queries: int, dimensions: int) -> dict[str, Any]:
    """Images (N, E), queries (Q, E), and how many of the images are real."""
    rng = np.random.default_rng(0)
    if not files:
        centres = unit(rng.normal(size=(CLUSTERS, dimensions)))
        return {"images": around(centres, count, rng), "queries": around(centres, queries, rng), "real": 0}
    loaded = []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            loaded.append((arrays["image"], arrays["text"]))
    real = unit(np.concatenate([image for image, _ in loaded]))[:count]
    texts = unit(np.concatenate([text for _, text in loaded]))
    chosen = rng.permutation(len(texts))[:queries]
    filled = np.concatenate([real, around(real, count - len(real), rng)])
    return {"images": filled, "queries": texts[chosen], "real": len(real)}


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact K nearest that are among those found: both (Q, K)."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return sum(hits) / exact.size


def milliseconds(index: Any, queries: np.ndarray, repeats: int) -> dict[str, Any]:
    """A query alone, as a person asks, and in a batch."""
    alone = []
    for query in queries:
        start = time.perf_counter()
        neighbours.search(index, query[None], K)
        alone.append(1000 * (time.perf_counter() - start))
    batch = []
    for _ in range(repeats):
        start = time.perf_counter()
        neighbours.search(index, queries, K)
        batch.append(1000 * (time.perf_counter() - start) / len(queries))
    low, *_, high = statistics.quantiles(alone, n=20)
    return {
        "ms_per_query": round(statistics.median(alone), 4),
        "ms_per_query_5_95": [round(low, 4), round(high, 4)],
        "ms_per_query_in_batch": round(statistics.median(batch), 4),
    }


def resident() -> float:
    """MB of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def build_alone(file: Path, kind: neighbours.Kind) -> None:
    """In a process of its own: seconds to build one index, and what it takes; JSON on stdout."""
    library = neighbours.faiss()
    library.omp_set_num_threads(1)
    images = np.load(file, allow_pickle=False)
    ids = np.arange(1, len(images) + 1)
    neighbours.build(kind, ids[:200], images[:200])  # the library's own buffers are not the index's
    before = resident()
    start = time.perf_counter()
    index = neighbours.build(kind, ids, images)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "build_seconds": round(seconds, 5),
                "memory_mb": round(resident() - before, 1),
                "file_mb": round(len(library.serialize_index(index)) / 1e6, 1),
            }
        )
    )


def measure_build(images: np.ndarray, kind: str, folder: Path) -> dict[str, Any]:
    """`build_alone`, run and read."""
    path = folder / "images.npy"
    np.save(path, images)
    command = [sys.executable, "-m", "bench.clip_search", "--build", kind, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"the index could not be built: {answer.stderr.strip().splitlines()[-1]}")
    return json.loads(answer.stdout.splitlines()[-1])


def measure_store(images: np.ndarray, folder: Path) -> dict[str, Any]:
    """The file of embeddings: seconds to write it in batches as `clip.search` does, to read it, and its size."""
    store = Store(folder / "index.sqlite", "0" * 64, "bench", folder)
    start = time.perf_counter()
    for i in range(0, len(images), 64):
        store.put(
            [
                Entry(b"%d.jpg" % j, Stamp(1, j), j.to_bytes(32, "big"), images[j])
                for j in range(i, min(i + 64, len(images)))
            ]
        )
    written = time.perf_counter()
    ids, vectors = store.vectors()
    read = time.perf_counter()
    assert len(ids) == len(images)
    assert np.array_equal(vectors, images)
    store.close()
    return {
        "write_seconds": round(written - start, 2),
        "read_seconds": round(read - written, 2),
        "file_mb": round(store.path.stat().st_size / 1e6, 1),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured."""
    library = neighbours.faiss()
    library.omp_set_num_threads(1)
    load = os.getloadavg()[0]
    data = make_vectors(args.embeddings, args.count, args.queries, args.dimensions)
    images, queries = data["images"], data["queries"]
    with tempfile.TemporaryDirectory() as folder:
        built = {kind: measure_build(images, kind, Path(folder)) for kind in neighbours.KINDS}
        store = measure_store(images, Path(folder))
    ids = np.arange(1, len(images) + 1)
    flat = neighbours.build("flat", ids, images)
    exact = neighbours.search(flat, queries, K)[1]
    result: dict[str, Any] = {
        "bench": f"search among {len(images)} embeddings of {images.shape[1]} numbers",
        "images": len(images),
        "real": data["real"],
        "queries": {"count": len(queries), "real": bool(args.embeddings)},
        "store": store,
        "flat": built["flat"] | milliseconds(flat, queries, args.repeats) | {"recall_at_10": 1.0},
    }
    graph = neighbours.build("hnsw", ids, images)
    plain = library.downcast_index(graph.index)
    sweep = []
    for breadth in BREADTHS:
        plain.hnsw.efSearch = breadth
        found = neighbours.search(graph, queries, K)[1]
        sweep.append({"breadth": breadth, "recall_at_10": round(recall(found, exact), 4)})
        sweep[-1] |= milliseconds(graph, queries, args.repeats)
        print(json.dumps(sweep[-1]), flush=True)
    used = next(line for line in sweep if line["breadth"] == neighbours.SEARCH_BREADTH)
    settings = {"neighbours": neighbours.NEIGHBOURS, "build_breadth": neighbours.BUILD_BREADTH}
    result["hnsw"] = built["hnsw"] | used | settings | {"sweep": sweep}
    return result | {
        "threads": 1,
        **circumstances(load, "faiss-cpu", "numpy", clock="wall time"),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.clip_search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, nargs="+", default=[], help="embeddings.npz of evaluated runs")
    parser.add_argument("--count", type=int, default=100_000, help="images (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--dimensions", type=int, default=512, help="without --embeddings (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of the batch of queries (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--build", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("count", "queries", "dimensions", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.count < 200 or args.queries < 2:
        parser.error("--count must be at least 200, --queries at least 2")
    for file in args.embeddings:
        if not file.is_file():
            parser.error(f"--embeddings: {file} is not there; run clip.eval first")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    if args.build:
        build_alone(Path(args.build[1]), args.build[0])
        return
    report(run(args), args.out)


if __name__ == "__main__":
    main()
