"""Vectors on the disk, and three ways of finding those nearest to a question's: all of them (flat), along a graph of
neighbours (HNSW), or in a few of many cells, shortened to some bytes each (IVF-PQ). The searching is FAISS's.

The two approximate ways only propose: the exact product with the vectors on the disk decides the order of the best
`index.rerank` candidates.

Memory: vectors are read from files that the operating system maps in and out. Building holds one shard, and what FAISS
keeps: for HNSW all vectors and their links, D * 4 + hnsw_links * 8 bytes each; for IVF-PQ pq_bytes + 8 each, and
`index.train_vectors` whole vectors while cells and codes are learned.

Legend: N vectors (rows, in the order in which they came), D dimensions, Q queries, K results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ConfigError
from common.errors import ProjectError
from common.files import atomic_open
from common.runtime import mix_seed
from rag.config import IndexConfig
from rag.search.bm25 import merge_top

Array = np.ndarray[Any, Any]
SAMPLE_STREAM = 7_300_001
QUERIES = 256  # searched at once: bounds the memory of what is re-ranked
UNIT = 1e-3  # a vector's length may be so far from 1


class VectorFiles:
    """Vectors in numbered files, each whole or absent. They are of length 1: a product is a cosine."""

    def __init__(self, folder: Path, dimension: int) -> None:
        self.folder = folder
        self.dimension = dimension
        self._shards: list[Array] = []
        self._starts = [0]
        while (path := self.path(len(self._shards))).is_file():
            self._open(path)

    def __len__(self) -> int:
        return self._starts[-1]

    def path(self, number: int) -> Path:
        """Where a shard is or would be."""
        return self.folder / f"vectors-{number:05d}.npy"

    def _open(self, path: Path) -> None:
        try:
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ProjectError(f"{path} is damaged: {error}; delete it, and it is made anew") from None
        if shard.ndim != 2 or shard.shape[1] != self.dimension:
            raise ProjectError(
                f"{path} holds vectors of shape {shard.shape}, but the encoder gives {self.dimension} numbers: it is "
                "of another encoder; build the index anew"
            )
        self._shards.append(shard)
        self._starts.append(self._starts[-1] + len(shard))

    def append(self, vectors: Array) -> None:
        """Write the next shard: float32 (n, D). ValueError for vectors that are not of length 1."""
        lengths = np.linalg.norm(vectors, axis=1)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not (abs(lengths - 1) < UNIT).all():
            raise ValueError(f"vectors of length 1 and shape (n, {self.dimension}) are needed, got {vectors.shape}")
        path = self.path(len(self._shards))
        with atomic_open(path) as file:
            np.save(file, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)
        self._open(path)

    def blocks(self, size: int) -> Iterator[tuple[int, Array]]:
        """(first row, vectors) of consecutive parts of at most so many rows, as they are on the disk."""
        for start, shard in zip(self._starts, self._shards, strict=False):
            for place in range(0, len(shard), size):
                yield start + place, shard[place : place + size]

    def take(self, rows: Array) -> Array:
        """The vectors of these rows: int64 (...) -> float32 (..., D)."""
        flat = rows.reshape(-1)
        found = np.empty((len(flat), self.dimension), np.float32)
        shard_of = np.searchsorted(self._starts, flat, side="right") - 1
        for number in np.unique(shard_of):
            where = np.flatnonzero(shard_of == number)
            found[where] = self._shards[number][flat[where] - self._starts[number]]
        return found.reshape(*rows.shape, self.dimension)


class VectorIndex:
    """Nearest vectors by cosine.

    Args:
        files: the vectors.
        config: which index.
        alive: bool (N,), rows that may be found; None for all.
    """

    def __init__(self, files: VectorFiles, config: IndexConfig, alive: Array | None = None) -> None:
        self.files = files
        self.config = config
        self.alive = np.ones(len(files), bool) if alive is None else np.asarray(alive)
        self._faiss: Any = None

    # -- building ------------------------------------------------------------------------------------------------------

    def build(self, seed: int = 0, track: Any = iter) -> VectorIndex:
        """Make the graph or the cells from the files; nothing for `flat`. Returns itself."""
        faiss = library()
        dimension = self.files.dimension
        if self.config.kind == "hnsw":
            self._faiss = faiss.IndexHNSWFlat(dimension, self.config.hnsw_links, faiss.METRIC_INNER_PRODUCT)
            self._faiss.hnsw.efConstruction = self.config.hnsw_build
        elif self.config.kind == "ivfpq":
            self._faiss = self._train_cells(seed)
        self._add_from(0, track)
        return self

    def _train_cells(self, seed: int) -> Any:
        faiss = library()
        check_bytes(self.config, self.files.dimension)
        count = len(self.files)
        cells = self.config.cells or max(1, round(4 * math.sqrt(count)))
        cells = min(cells, max(1, count // 40))  # k-means wants some 40 vectors for each cell
        bits = 8 if count >= 256 * 4 else max(1, int(math.log2(max(2, count // 4))))  # codes of few vectors are short
        rng = np.random.default_rng(mix_seed(seed, SAMPLE_STREAM))
        rows = np.arange(count)
        if count > self.config.train_vectors:
            rows = np.sort(rng.choice(count, self.config.train_vectors, replace=False))
        coarse = faiss.IndexFlatIP(self.files.dimension)
        # (index_factory would also look for an order of the codes that Hamming distances could use: minutes of work)
        index = faiss.IndexIVFPQ(
            coarse, self.files.dimension, cells, self.config.pq_bytes, bits, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.spherical = True  # centres of length 1, too
        index.cp.seed = seed % 2**31
        for clustering in (index.cp, index.pq.cp):
            clustering.min_points_per_centroid = 1  # no warning: small collections are searched well enough
        index.train(self.files.take(rows))
        return index

    def _add_from(self, first: int, track: Any) -> None:
        if self._faiss is not None:
            for start, block in track(self.files.blocks(self.config.shard)):
                if start + len(block) > first:
                    self._faiss.add(np.ascontiguousarray(block[max(0, first - start) :], np.float32))

    def extend(self, track: Any = iter) -> None:
        """Take in the vectors that came to the files since; IVF-PQ keeps its cells and codes."""
        self.alive = np.concatenate([self.alive, np.ones(len(self.files) - len(self.alive), bool)])
        if self._faiss is not None:
            self._add_from(self._faiss.ntotal, track)

    def remove(self, rows: Iterable[int]) -> None:
        """Rows that are not to be found any more."""
        self.alive = self.alive.copy()
        self.alive[list(rows)] = False

    def save(self, folder: Path) -> None:
        """Write what is beside the vectors: which rows are alive, and FAISS's index."""
        faiss = library()
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "alive.npy", self.alive, allow_pickle=False)
        if self._faiss is not None:
            faiss.write_index(self._faiss, str(folder / "index.faiss"))

    @classmethod
    def load(cls, folder: Path, files: VectorFiles, config: IndexConfig, growing: bool = False) -> VectorIndex:
        """The index of a folder. FAISS's part of IVF-PQ stays on the disk until it is read, unless it is to grow."""
        faiss = library()
        try:
            index = cls(files, config, np.load(folder / "alive.npy", allow_pickle=False))
            if config.kind != "flat":
                flags = faiss.IO_FLAG_MMAP if config.kind == "ivfpq" and not growing else 0
                index._faiss = faiss.read_index(str(folder / "index.faiss"), flags)
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            reason = str(error).splitlines()[-1][:200]
            raise ProjectError(f"{folder}: the vector index cannot be read: {reason}; build it anew") from None
        known = len(files) if index._faiss is None else index._faiss.ntotal
        if len(index.alive) != len(files) or known != len(files):
            raise ProjectError(f"{folder}: the vector index is of {known} vectors, but there are {len(files)}")
        return index

    # -- searching -----------------------------------------------------------------------------------------------------

    @property
    def described(self) -> str:
        """Which index this is, with what its speed and recall depend on."""
        if self.config.kind == "hnsw":
            return f"hnsw, {self.config.hnsw_links} links, {self.config.hnsw_search} candidates"
        if self.config.kind == "ivfpq":
            cells = self._faiss.nlist if self._faiss is not None else self.config.cells
            return f"ivfpq, {min(self.config.probe, cells)} of {cells} cells, {self.config.pq_bytes} bytes a vector"
        return "flat"

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """The k nearest rows of each query, best first, equal cosines in the order of their rows.

        Args: queries float32 (Q, D), of length 1.
        Returns: cosines (Q, k) float32 and rows (Q, k) int64; -inf and -1 where there are no more.
        """
        if queries.ndim != 2 or queries.shape[1] != self.files.dimension:
            raise ProjectError(
                f"a query has {queries.shape[-1]} numbers, but the index holds vectors of {self.files.dimension}: it "
                "is of another encoder"
            )
        queries = np.ascontiguousarray(queries, np.float32)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if self._faiss is None:
            return self._search_flat(queries, k)
        parts = [self._search_faiss(queries[i : i + QUERIES], k) for i in range(0, len(queries), QUERIES)]
        if not parts:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _search_flat(self, queries: Array, k: int) -> tuple[Array, Array]:
        faiss = library()
        size = max(1, self.config.memory_megabytes * 1_000_000 // (4 * self.files.dimension))
        best: list[tuple[Array, Array]] = []
        for start, block in self.files.blocks(size):
            living = self.alive[start : start + len(block)]
            wanted = min(len(block), k + int((~living).sum()))  # enough, whichever of the best are gone
            scores, rows = faiss.knn(queries, np.asarray(block), wanted, metric=faiss.METRIC_INNER_PRODUCT)
            there = living[rows]
            part = np.where(there, scores, -np.inf), np.where(there, rows + start, -1)
            best = [merge_top([*best, part, nothing(len(queries))], len(queries), k)]
        return merge_top([*best, nothing(len(queries)), nothing(len(queries))], len(queries), k)

    def _search_faiss(self, queries: Array, k: int) -> tuple[Array, Array]:
        faiss = library()
        wanted = min(len(self.files), max(k, self.config.rerank))
        selector = None if self.alive.all() else faiss.IDSelectorBitmap(np.packbits(self.alive, bitorder="little"))
        if self.config.kind == "hnsw":
            effort = max(self.config.hnsw_search, wanted)
            how = faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
        else:
            probe = min(self.config.probe, self._faiss.nlist)
            how = faiss.SearchParametersIVF(nprobe=probe, sel=selector)
        scores, rows = self._faiss.search(queries, wanted, params=how)
        if self.config.rerank:
            vectors = self.files.take(np.maximum(rows, 0))  # (Q, wanted, D)
            scores = np.einsum("qd,qkd->qk", queries, vectors)
        scores = np.where(rows >= 0, scores, -np.inf).astype(np.float32)
        return merge_top([(scores, rows), nothing(len(queries))], len(queries), k)


def library() -> Any:
    """FAISS, whose own type hints do not know its search parameters."""
    import faiss

    return faiss


def nothing(queries: int) -> tuple[Array, Array]:
    """Results without a place, so that lists of results are sorted."""
    return np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)


def check_bytes(config: IndexConfig, dimension: int) -> None:
    """`ConfigError` where a vector cannot be cut into so many parts."""
    if config.kind == "ivfpq" and dimension % config.pq_bytes:
        near = [n for n in range(1, dimension + 1) if dimension % n == 0 and n <= 2 * config.pq_bytes]
        raise ConfigError("index.pq_bytes", f"must divide the {dimension} numbers of a vector, such as {near[-3:]}")


def check_queries(queries: Sequence[str]) -> None:
    """`ProjectError` for a question without a word."""
    for query in queries:
        if not query.strip():
            raise ProjectError("an empty question has no answer; ask something")
