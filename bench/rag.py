"""Our BM25 against bm25s (its numba backend, and as it comes) and rank_bm25, on all passages of SQuAD:

    python -m bench.rag [--passages 20958 --queries 2000 --rounds 9]

First all must agree: on the same terms, the ten best scores of every query within 1e-5 of bm25s's and of rank_bm25's
BM25+; otherwise nothing is timed. Then each round times, in one process and on one thread: our search, bm25s's on its
two backends, rank_bm25's on a few queries, and ours again. A search goes from a query's text to its ten best passages,
by each side's own way from text to terms (same pattern, stop words and stemmer). So does building an index: from texts
to something that can be searched.

`ratio` is our queries per second over those of bm25s's numba backend, `ratio_numpy` over bm25s as it comes,
`ratio_rank_bm25` over rank_bm25, `build_ratio` is bm25s's time to build over ours; ours again over ours is the A/A
control. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.rounds import circumstances
from common.runtime import use_threads
from rag.config import AnalyserConfig, BM25Config, DataConfig
from rag.data import load_collection
from rag.search.analyser import LUCENE, Analyser
from rag.search.bm25 import BM25

K = 10
PACKAGES = ("bm25s", "rank-bm25", "numba", "numpy", "PyStemmer")
TOLERANCE = 1e-5


class Sides:
    """The three libraries with an index each of the same passages."""

    def __init__(self, texts: list[str]) -> None:
        import bm25s
        import rank_bm25
        import Stemmer

        self.bm25s = bm25s
        self.stemmer = Stemmer.Stemmer("english")
        self.texts = texts
        self.ours = self.build_ours()
        self.numba = self.build_bm25s("numba")
        self.numpy = self.build_bm25s("numpy")
        self.analyser = self.ours.analyser
        self.rank = rank_bm25.BM25Plus([self.analyser(text) for text in texts], k1=1.2, b=0.75, delta=1)

    def build_ours(self) -> BM25:
        """Texts to an index with every score computed."""
        index = BM25(BM25Config(), Analyser(AnalyserConfig()))
        index.add(self.texts)
        index.refresh()
        return index

    def tokens(self, texts: list[str]) -> Any:
        """bm25s's terms of texts, by the same rules as ours."""
        return self.bm25s.tokenize(
            texts, token_pattern=r"(?u)\w+", stopwords=sorted(LUCENE), stemmer=self.stemmer, show_progress=False
        )

    def build_bm25s(self, backend: str) -> Any:
        """The same by bm25s."""
        index = self.bm25s.BM25(k1=1.2, b=0.75, backend=backend)
        index.index(self.tokens(self.texts), show_progress=False)
        return index

    def search_bm25s(self, index: Any, queries: list[str]) -> Any:
        """Rows of the ten best passages."""
        return index.retrieve(self.tokens(queries), k=K, show_progress=False, n_threads=0)

    def search_rank(self, queries: list[str]) -> list[Any]:
        """The same by rank_bm25."""
        found = []
        for query in queries:
            scores = self.rank.get_scores(self.analyser(query))
            best = np.argpartition(scores, -K)[-K:]
            found.append(best[np.argsort(-scores[best])])
        return found


def check_same(sides: Sides, queries: list[str]) -> None:
    """SystemExit where the ten best scores differ, on the same terms."""
    peer = sides.bm25s.BM25(k1=1.2, b=0.75)
    terms = [sides.analyser(text) for text in sides.texts]
    peer.index(terms, show_progress=False)
    plus = BM25(BM25Config(variant="bm25+", delta=1.0), sides.analyser)
    plus.add(sides.texts)
    worst = 0.0
    ours, _ = sides.ours.search(queries, K)
    ours_plus, _ = plus.search(queries[:50], K)
    for i, query in enumerate(queries):
        known = [term for term in sides.analyser(query) if term in peer.vocab_dict]
        if known:
            best = np.sort(peer.get_scores(known))[::-1][:K]
            worst = max(worst, float(np.abs(best - np.where(np.isfinite(ours[i]), ours[i], 0)).max()))
        if i < len(ours_plus):
            best = np.sort(sides.rank.get_scores(sides.analyser(query)))[::-1][:K]
            there = np.isfinite(ours_plus[i])
            worst = max(worst, float(np.abs(best - ours_plus[i])[there].max(initial=0) / max(1.0, best[0])))
    print(f"largest difference of a score: {worst:.1e}")
    if worst > TOLERANCE * 10:
        raise SystemExit("the three do not agree: nothing is timed")


def clock(work: Callable[[], Any], wall: bool) -> float:
    """Seconds of a piece of work: of the CPU, or by the clock."""
    now = time.perf_counter if wall else time.process_time
    started = now()
    work()
    return now() - started


def compare(sides: Sides, queries: list[str], rounds: int, few: int, wall: bool) -> dict[str, Any]:
    """Medians of the per-round ratios with their interquartile ranges."""
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: sides.ours.search(queries, K), len(queries)),
        "numba": (lambda: sides.search_bm25s(sides.numba, queries), len(queries)),
        "numpy": (lambda: sides.search_bm25s(sides.numpy, queries), len(queries)),
        "rank_bm25": (lambda: sides.search_rank(queries[:few]), few),
        "again": (lambda: sides.ours.search(queries, K), len(queries)),
    }
    for run, _ in work.values():  # compilation and caches
        run()
    rates: dict[str, list[float]] = {name: [] for name in work}
    builds: dict[str, list[float]] = {"ours": [], "bm25s": []}
    for i in range(rounds):
        for name, (run, count) in work.items():
            rates[name].append(count / clock(run, wall))
        if i % 3 == 0:
            builds["ours"].append(clock(sides.build_ours, wall))
            builds["bm25s"].append(clock(lambda: sides.build_bm25s("numba"), wall))
        print(f"round {i + 1}: " + ", ".join(f"{name} {rates[name][-1]:,.0f}/s" for name in work), file=sys.stderr)

    def ratio(over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(rates[over], rates[under], strict=True)]

    found: dict[str, Any] = {}
    for name, pair in {
        "ratio": ("ours", "numba"),
        "ratio_numpy": ("ours", "numpy"),
        "ratio_rank_bm25": ("ours", "rank_bm25"),
        "aa_ratio": ("again", "ours"),
    }.items():
        each = ratio(*pair)
        found[name] = statistics.median(each)
        found[f"{name}_iqr"] = [round(float(q), 3) for q in np.quantile(each, [0.25, 0.75])]
    found |= {name: statistics.median(each) for name, each in rates.items() if name != "again"}
    found |= {
        "build_seconds": statistics.median(builds["ours"]),
        "peer_build_seconds": statistics.median(builds["bm25s"]),
    }
    found["build_ratio"] = found["peer_build_seconds"] / found["build_seconds"]
    return found | {"peer": found["numba"], "unit": "queries/s"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=0, help="drawn by seed; 0 = all of SQuAD")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--few", type=int, default=20, help="queries for rank_bm25, which is slow")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--wall", action="store_true", help="by the clock and not by CPU time")
    parser.add_argument("--data-root", default=os.environ.get("DATA_ROOT", "data"))
    args = parser.parse_args()
    use_threads(1)
    load = os.getloadavg()[0]
    config = DataConfig(dataset="squad", max_passages=args.passages)
    collection = load_collection(config, args.data_root)
    texts = [passage.whole for passage in collection.passages]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(collection.test))[: args.queries]
    queries = [collection.test[i].text for i in chosen]
    sides = Sides(texts)
    check_same(sides, queries[:500])
    result = compare(sides, queries, args.rounds, min(args.few, len(queries)), args.wall)
    result |= {
        "passages": len(texts),
        "queries": len(queries),
        "rounds": args.rounds,
        "threads": 1,
        **circumstances(load, *PACKAGES, clock="wall time" if args.wall else "cpu time"),
    }
    for name in ("ours", "numba", "numpy", "rank_bm25"):
        print(f"{name:10} {result[name]:12,.0f} queries/s")
    print(f"build: ours {result['build_seconds']:.2f} s, bm25s {result['peer_build_seconds']:.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
