"""One question in, ranked passages out: words, vectors or both, and what each stage took.

This is what `rag.eval`, a reader and `rag.ask` search with, whatever the index behind it.

Legend: Q queries, K results.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rag.config import RerankConfig, SearchConfig
from rag.data.corpus import Passage, Passages
from rag.search import fuse, hops
from rag.search.embed import Embedder, Reranker
from rag.search.vectors import check_queries

Array = np.ndarray[Any, Any]


class Lexical(Protocol):
    """Search by words: BM25, or Milvus."""

    def search(self, queries: Sequence[str], k: int) -> tuple[Array, Array]:
        """Scores (Q, k) and rows (Q, k), best first; -inf and -1 where there are no more."""
        ...


class Dense(Protocol):
    """Search by vectors: FAISS, or Milvus."""

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """The same for vectors (Q, D)."""
        ...


@dataclass(frozen=True)
class Hit:
    """A passage that was found. The score orders passages of one search and means nothing beside another's."""

    passage: Passage
    row: int
    score: float


@dataclass
class Found:
    """Rankings of several questions.

    Attributes:
        scores: (Q, K), best first, -inf for empty places.
        rows: (Q, K), -1 for empty places.
        seconds: stage -> time for all questions together.
    """

    scores: Array
    rows: Array
    seconds: dict[str, float] = field(default_factory=dict)


class Retriever:
    """Search as the config has it.

    Args:
        passages: what rows stand for.
        lexical, dense, embedder, reranker: the parts; those that `config.mode` does not use may be None.
    """

    def __init__(
        self,
        passages: Passages,
        config: SearchConfig,
        lexical: Lexical | None = None,
        dense: Dense | None = None,
        embedder: Embedder | None = None,
        reranker: Reranker | None = None,
        rerank: RerankConfig | None = None,
    ) -> None:
        self.passages = passages
        self.config = config
        self.lexical = lexical
        self.dense = dense
        self.embedder = embedder
        self.reranker = reranker
        self.rerank = rerank or RerankConfig()

    def find(self, questions: Sequence[str], k: int) -> Found:
        """The k best passages of each question; with `config.hops` 2, those of the question and of a second one that
        follows from what was found first (rag/search/hops.py), by turns.
        """
        check_queries(questions)
        seconds: dict[str, float] = {}
        scores, rows = self.rank(questions, k, seconds)
        if self.config.hops == 2:
            firsts = [self.passages[int(row)] if row >= 0 else None for row in rows[:, 0]]
            followed = [hops.follow_up(question, first) for question, first in zip(questions, firsts, strict=True)]
            _, further = self.rank(followed, k, seconds)
            scores, rows = fuse.by_turns(rows, further, k)
        return Found(scores, rows, seconds)

    def rank(self, questions: Sequence[str], k: int, seconds: dict[str, float]) -> tuple[Array, Array]:
        """Scores and rows of the k best, each (Q, k); adds what each stage took."""
        mode = self.config.mode
        depth = max(k, self.config.depth) if mode == "hybrid" or self.reranker else k
        lexical = dense = None
        if mode in ("bm25", "hybrid"):
            assert self.lexical is not None
            with Stage(seconds, "bm25"):
                lexical = self.lexical.search(questions, depth)
        if mode in ("dense", "hybrid"):
            assert self.dense is not None and self.embedder is not None
            with Stage(seconds, "encode"):
                vectors = self.embedder.questions(questions)
            with Stage(seconds, "dense"):
                dense = self.dense.search(vectors, depth)
        if mode == "hybrid":
            with Stage(seconds, "fuse"):
                scores, rows = self.fuse(lexical, dense, depth)
        else:
            scores, rows = lexical or dense  # type: ignore[misc]  # the one there is
        if self.reranker is not None:
            with Stage(seconds, "rerank"):
                scores, rows = self.reranker.rank(questions, rows, self.passages, self.rerank.depth)
        return scores[:, :k], rows[:, :k]

    def fuse(
        self, lexical: tuple[Array, Array] | None, dense: tuple[Array, Array] | None, k: int
    ) -> tuple[Array, Array]:
        """One ranking of two."""
        assert lexical is not None and dense is not None
        if self.config.fusion == "rrf":
            return fuse.reciprocal_rank([lexical[1], dense[1]], k, self.config.rrf_k)
        weight = self.config.dense_weight
        return fuse.weighted_scores([lexical, dense], [1 - weight, weight], k)

    def search(self, questions: Sequence[str], k: int = 0) -> list[list[Hit]]:
        """The k best passages of each question (0: search.k) with their texts; empty places are left out."""
        found = self.find(questions, k or self.config.k)
        return [
            [
                Hit(self.passages[int(row)], int(row), float(score))
                for score, row in zip(scores, rows, strict=True)
                if row >= 0
            ]
            for scores, rows in zip(found.scores, found.rows, strict=True)
        ]


class Stage:
    """Adds the time of a block to a table."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds = seconds
        self.name = name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.started
