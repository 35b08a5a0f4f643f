"""How well public collections are searched without any training: by words, by vectors of a pretrained encoder, by both:

    python -m bench.rag_collections [--datasets cacm cranfield scifact] [--model NAME | --model none] [key=value ...]

Everything is at the settings' defaults: nothing was chosen on these questions. Vectors are kept in
`data_root/rag_cache`. Prints a table; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.config import resolve
from common.runtime import choose_device, choose_precision, use_threads
from rag.config import Config
from rag.data import load_collection
from rag.load import load_untrained
from rag.metrics.arms import measure, vector_files
from rag.metrics.scores import paired_bootstrap
from rag.negatives import CACHE, build_bm25
from rag.search.embed import Embedder
from rag.search.retriever import Retriever
from rag.search.vectors import VectorIndex

SHOWN = ("ndcg_at_10", "mrr_at_10", "recall_at_1", "recall_at_5", "recall_at_20", "recall_at_100")


def open_embedder(config: Config) -> Embedder:
    """The encoder that config.model names, as it comes: of the Hub, or the `encoder` folder of a run."""
    import torch

    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    return Embedder(*load_untrained(config.model, device), autocast, config.eval.batch_size)


def search_all(config: Config) -> dict[str, Any]:
    """Metrics of each way of searching one collection, and whether the hybrid is better than either half."""
    collection = load_collection(config.data, config.data_root)
    questions = collection.questions(config.eval.split)
    words = build_bm25(collection, config)
    arms = {"bm25": Retriever(collection.passages, replace(config.search, mode="bm25"), words)}
    if config.model.name != "none":
        embedder = open_embedder(config)
        folder = Path(config.data_root) / CACHE / "vectors"
        files = vector_files(
            collection, embedder, folder, config.index.shard, lambda text: print(text, file=sys.stderr)
        )
        vectors = VectorIndex(files, config.index).build()
        for mode, name in (("dense", "zero_shot"), ("hybrid", "hybrid")):
            settings = replace(config.search, mode=mode)  # type: ignore[arg-type]  # one of its choices
            arms[name] = Retriever(collection.passages, settings, words, vectors, embedder)
    results = {name: measure(arm, questions, config, iter) for name, arm in arms.items()}
    found: dict[str, Any] = {"questions": len(questions), "passages": len(collection.passages)}
    for name, result in results.items():
        found[name] = {metric: round(float(np.nanmean(value)), 4) for metric, value in result.each.items()}
    for other in set(results) - {"hybrid"} if "hybrid" in results else set():
        pair = (list(results[name].each["ndcg_at_10"]) for name in ("hybrid", other))
        found[f"hybrid_over_{other}"] = paired_bootstrap(*pair)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["cacm", "cranfield", "scifact"])
    parser.add_argument("--model", default="", help="an encoder; none = BM25 alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    use_threads(args.threads)
    chosen = [f"model.name={args.model}"] if args.model else []
    results = {}
    for dataset in args.datasets:
        config = resolve(Config, None, [f"data.dataset={dataset}", *chosen, *args.overrides])
        results[dataset] = search_all(config)
        for name in ("bm25", "zero_shot", "hybrid"):
            if name in results[dataset]:
                numbers = "  ".join(f"{metric} {results[dataset][name][metric]:.4f}" for metric in SHOWN)
                print(f"{dataset:10} {name:10} {numbers}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
