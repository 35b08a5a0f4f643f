"""BM25: how well a passage's words answer a query's, computed before anybody asks.

A query's score of a passage is a sum over the query's terms of `idf * saturation`, both of which depend on the
collection and not on the query. So each is multiplied out once and kept in a sparse matrix, terms by passages, and a
search only adds up the columns of the query's terms (BM25S: Lù 2024). What this index adds to that idea: passages come
and go. A change leaves the matrix as it is and marks it as of yesterday; a column is computed anew, from the counts
beside it, when a query first asks for its term. Scores are therefore always those of an index built from scratch, to
the last bit, and a change costs nothing but what is asked for.

Five members of the family (Kamphuis et al. 2020 compare them); with f the count of a term in a passage of length l,
n = 1 - b + b l / mean(l), N passages and df of them with the term:

    lucene     log(1 + (N - df + .5) / (df + .5))           f / (f + k1 n)
    robertson  max(0, log((N - df + .5) / (df + .5)))       f / (f + k1 n)
    atire      log(N / df)                                  f (k1 + 1) / (f + k1 n)
    bm25l      log((N + 1) / (df + .5))                     (k1 + 1) (c + delta) / (k1 + c + delta),  c = f / n
    bm25+      log((N + 1) / df)                            f (k1 + 1) / (f + k1 n) + delta

The last two give something to passages without the term, too: the same to each, so the matrix holds what is above that.

Legend: R rows (passages, numbered as they came; a number is never used again), T terms, P postings, Q queries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.errors import ProjectError
from common.files import read_json, sha256
from rag.config import AnalyserConfig, BM25Config
from rag.search import postings
from rag.search.analyser import Analyser

FORMAT = 1
STALE = -1
MERGE_BELOW = 2  # a segment is merged with the one before it unless that is at least so many times as large
CHUNK = 4096  # texts turned into numbers at a time: bounds the lists of Python objects

Array = np.ndarray[Any, Any]


@dataclass
class Segment:
    """The postings of a range of rows, by term: where term t stands, and how often, are entries
    `indptr[t]:indptr[t+1]` of the arrays.
    """

    start: int  # first row
    end: int  # one past the last
    indptr: Array  # int64 (T + 1,)
    rows: Array  # int32 (P,), ascending within a term
    counts: Array  # int32 (P,)
    impacts: Array  # float32 (P,): what a posting adds to a score

    def column(self, term: int) -> slice:
        """Where a term's postings are; nothing for one that came after this segment."""
        if term >= len(self.indptr) - 1:
            return slice(0, 0)
        return slice(int(self.indptr[term]), int(self.indptr[term + 1]))

    def widen(self, terms: int) -> None:
        """Make room for terms that came after this segment."""
        missing = terms - (len(self.indptr) - 1)
        if missing > 0:
            self.indptr = np.concatenate([self.indptr, np.full(missing, self.indptr[-1])])


class BM25:
    """A lexical index that grows and shrinks.

    Args:
        config: variant and its constants.
        analyser: what makes terms of text; of queries, too.
    """

    def __init__(self, config: BM25Config, analyser: Analyser) -> None:
        self.config = config
        self.analyser = analyser
        self.vocabulary: dict[str, int] = {}
        self.lengths = np.zeros(0, np.int32)  # (R,) terms a row
        self.alive = np.zeros(0, bool)  # (R,)
        self.segments: list[Segment] = []
        self.epoch = 0  # counts changes
        self._idf = np.zeros(0)  # (T,) as of `_idf_at`
        self._idf_at = np.zeros(0, np.int64)
        self._norm: Array | None = None  # (R,) n of the formulas, as of this epoch

    # -- changes -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of passages that are there."""
        return int(self.alive.sum())

    @property
    def num_rows(self) -> int:
        """Number of rows ever given, those of removed passages included."""
        return len(self.lengths)

    def add(self, texts: Iterable[str]) -> range:
        """Add passages; returns their rows. Text without a term gets a row, too, and is never found."""
        tokens, starts = self._encode(texts)
        return self.add_tokens(tokens, starts)

    def add_tokens(self, tokens: Array, starts: Array) -> range:
        """Add passages whose terms are numbers already: passage i has `tokens[starts[i]:starts[i+1]]`."""
        first = self.num_rows
        lengths = np.diff(starts).astype(np.int32)
        rows = range(first, first + len(lengths))
        if len(rows) == 0:
            return rows
        indptr, where, counts = postings.invert(tokens, starts, len(self.vocabulary))
        where += first
        self.lengths = np.concatenate([self.lengths, lengths])
        self.alive = np.concatenate([self.alive, np.ones(len(rows), bool)])
        self.segments.append(Segment(first, rows.stop, indptr, where, counts, np.zeros(len(where), np.float32)))
        self._changed()
        while len(self.segments) > 1 and len(self.segments[-2].rows) < MERGE_BELOW * len(self.segments[-1].rows):
            last = self.segments.pop()
            self.segments[-1] = self._merge(self.segments[-1], last)
        return rows

    def remove(self, rows: Iterable[int]) -> None:
        """Take passages out; a row that is not there is a `ValueError`, and then none is removed."""
        gone = np.fromiter(rows, np.int64)
        if len(gone) == 0:
            return
        if gone.min() < 0 or gone.max() >= self.num_rows or not self.alive[gone].all():
            raise ValueError("a row to remove is not in the index")
        self.alive = self.alive.copy()  # it may be mapped from a file
        self.alive[gone] = False
        self._changed()

    def _changed(self) -> None:
        self.epoch += 1
        self._norm = None

    def _encode(self, texts: Iterable[str]) -> tuple[Array, Array]:
        """Numbers of all terms one after the other, and where each text's begin; new terms get the next numbers."""
        vocabulary = self.vocabulary
        parts: list[Array] = []
        lengths = [0]
        numbers: list[int] = []
        for text in texts:
            before = len(numbers)
            numbers += [vocabulary.setdefault(term, len(vocabulary)) for term in self.analyser(text)]
            lengths.append(len(numbers) - before)
            if len(lengths) % CHUNK == 0:
                parts.append(np.array(numbers, np.int32))
                numbers = []
        parts.append(np.array(numbers, np.int32))
        return np.concatenate(parts), np.cumsum(np.array(lengths, np.int64))

    def _merge(self, first: Segment, second: Segment) -> Segment:
        """One segment in the place of two neighbours, without the postings of removed passages."""
        terms = len(self.vocabulary)
        first.widen(terms)
        second.widen(terms)
        indptr, rows, counts = postings.merge(
            first.indptr, first.rows, first.counts, second.indptr, second.rows, second.counts, self.alive
        )
        return Segment(first.start, second.end, indptr, rows, counts, np.zeros(len(rows), np.float32))

    # -- weights -------------------------------------------------------------------------------------------------------

    def idf(self, df: Array, num_passages: int) -> Array:
        """Inverse document frequency, never negative. float64, of the shape of `df`."""
        n = float(num_passages)
        if self.config.variant == "lucene":
            return np.log1p((n - df + 0.5) / (df + 0.5))
        if self.config.variant == "robertson":  # a term in more than half of all passages would count against them
            return np.maximum(0.0, np.log((n - df + 0.5) / (df + 0.5)))
        if self.config.variant == "atire":
            return np.log(n / df)
        if self.config.variant == "bm25l":
            return np.log((n + 1) / (df + 0.5))
        return np.log((n + 1) / df)

    def saturation(self, counts: Array, norm: Array) -> Array:
        """What a term's count in a passage is worth, beyond its worth to a passage without the term."""
        k1, delta = self.config.k1, self.config.delta
        if self.config.variant in ("lucene", "robertson"):
            return counts / (counts + k1 * norm)
        if self.config.variant == "bm25l":
            c = counts / norm
            return (k1 + 1) * (c + delta) / (k1 + c + delta) - self.absent
        return (k1 + 1) * counts / (counts + k1 * norm)  # atire; bm25+: delta goes to every passage

    @property
    def absent(self) -> float:
        """Saturation of a term that the passage does not have: 0 but for bm25l and bm25+."""
        k1, delta = self.config.k1, self.config.delta
        if self.config.variant == "bm25l":
            return (k1 + 1) * delta / (k1 + delta)
        return delta if self.config.variant == "bm25+" else 0.0

    def refresh(self, terms: Iterable[int] | None = None) -> None:
        """Bring the columns of these terms, or of all, up to the present collection."""
        if self._norm is None:
            count = max(1, len(self))
            mean = max(1e-9, float(self.lengths[self.alive].sum(dtype=np.int64)) / count)
            self._norm = 1 - self.config.b + self.config.b * self.lengths / mean
        missing = len(self.vocabulary) - len(self._idf)
        if missing > 0:
            self._idf = np.concatenate([self._idf, np.zeros(missing)])
            self._idf_at = np.concatenate([self._idf_at, np.full(missing, STALE, np.int64)])
        if terms is None:
            self._refresh_all()
            return
        for term in terms:
            if self._idf_at[term] != self.epoch:
                self._refresh_one(term)

    def _refresh_one(self, term: int) -> None:
        assert self._norm is not None
        columns = [(segment, segment.column(term)) for segment in self.segments]
        df = np.array(sum(int(self.alive[segment.rows[place]].sum()) for segment, place in columns))
        self._idf[term] = self.idf(df, len(self)) if df else 0.0
        self._idf_at[term] = self.epoch
        for segment, place in columns:
            if place.stop > place.start:
                rows = segment.rows[place]
                worth = self.saturation(segment.counts[place], self._norm[rows])
                segment.impacts[place] = self._idf[term] * worth * self.alive[rows]

    def _refresh_all(self) -> None:
        """The same for all terms at once: what happens after a large change, and before saving."""
        assert self._norm is not None
        df = np.zeros(len(self.vocabulary), np.int64)
        for segment in self.segments:
            segment.widen(len(self.vocabulary))
            df += postings.living(segment.indptr, segment.rows, self.alive)
        with np.errstate(divide="ignore"):
            self._idf = np.where(df > 0, self.idf(df, len(self)), 0.0)
        self._idf_at[:] = self.epoch
        for segment in self.segments:
            each = np.repeat(self._idf, np.diff(segment.indptr))
            worth = self.saturation(segment.counts, self._norm[segment.rows])
            segment.impacts = (each * worth * self.alive[segment.rows]).astype(np.float32)

    # -- searching -----------------------------------------------------------------------------------------------------

    def encode_queries(self, queries: Sequence[str]) -> tuple[Array, Array]:
        """Numbers of the queries' known terms, and where each query's begin. A term that stands twice counts twice."""
        numbers: list[int] = []
        starts = [0]
        for query in queries:
            found = (self.vocabulary.get(term) for term in self.analyser(query))
            numbers += [number for number in found if number is not None]
            starts.append(len(numbers))
        return np.array(numbers, np.int32), np.array(starts, np.int64)

    def search(self, queries: Sequence[str], k: int) -> tuple[Array, Array]:
        """The k best passages of each query, best first; equal scores in the order of their rows.

        Returns:
            scores (Q, k) float32 and rows (Q, k) int64; where fewer passages share a term with the query, -inf and -1.
        """
        return self.search_tokens(*self.encode_queries(queries), k)

    def search_tokens(self, tokens: Array, starts: Array, k: int) -> tuple[Array, Array]:
        """`search` for queries whose terms are numbers already."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if len(self._idf_at) < len(self.vocabulary) or np.any(self._idf_at[tokens] != self.epoch):
            self.refresh(np.unique(tokens).tolist())
        found = []
        for segment in self.segments:
            segment.widen(len(self.vocabulary))
            size = segment.end - segment.start
            found.append(
                postings.top_k(
                    tokens, starts, segment.indptr, segment.rows, segment.impacts, segment.start, size, min(k, size)
                )
            )
        scores, rows = merge_top(found, len(starts) - 1, k)
        if self.absent and len(tokens):
            sums = np.concatenate([[0.0], np.cumsum(self._idf[tokens] * self.absent)])
            scores += (sums[starts[1:]] - sums[starts[:-1]])[:, None].astype(np.float32)  # -inf stays
        return scores, rows

    def scores(self, query: str) -> Array:
        """The score of every row, 0 for those removed. float32 (R,)"""
        tokens, _ = self.encode_queries([query])
        self.refresh(np.unique(tokens).tolist())
        result = np.zeros(self.num_rows, np.float32)
        for token in tokens:
            for segment in self.segments:
                place = segment.column(int(token))
                result[segment.rows[place]] += segment.impacts[place]
        constant = float((self._idf[tokens] * self.absent).sum())
        return np.where(self.alive, result + np.float32(constant), np.float32(0))

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the index, all columns up to date, into a new or empty folder; `Generations` makes that atomic."""
        folder.mkdir(parents=True, exist_ok=True)
        while len(self.segments) > 1:
            last = self.segments.pop()
            self.segments[-1] = self._merge(self.segments[-1], last)
        self.refresh()
        arrays = {"lengths": self.lengths, "alive": self.alive, "idf": self._idf}
        for segment in self.segments:
            arrays |= {name: getattr(segment, name) for name in ("indptr", "rows", "counts", "impacts")}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        (folder / "vocabulary.txt").write_text("\n".join(self.vocabulary), encoding="utf-8")
        about = {
            "format": FORMAT,
            "bm25": asdict(self.config),
            "analyser": asdict(self.analyser.config),
            "fingerprint": self.analyser.fingerprint,
            "vocabulary": sha256(folder / "vocabulary.txt"),
            "sizes": {name: len(array) for name, array in arrays.items()},
        }
        (folder / "bm25.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> BM25:
        """The index of a folder with the analyser it was made with; the large arrays stay on the disk until they are
        read, and what a later change computes anew stays in memory. `ProjectError` where it is missing, damaged, or
        where this machine's stemmer or stop words would treat queries otherwise.
        """
        about = read_json(folder / "bm25.json")
        if about.get("format") != FORMAT:
            raise ProjectError(f"{folder} holds no lexical index of format {FORMAT}; build it anew")
        analyser = Analyser(AnalyserConfig(**about["analyser"]))
        if analyser.fingerprint != about["fingerprint"]:
            raise ProjectError(
                f"{folder}: this machine's PyStemmer or list of stop words gives other terms than the index was made "
                "with; build it anew"
            )
        index = cls(BM25Config(**about["bm25"]), analyser)
        try:
            mapped = {
                name: open_array(folder / f"{name}.npy", "c" if name == "impacts" else "r", size)
                for name, size in about["sizes"].items()
            }
            terms = (folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError, EOFError) as error:
            raise ProjectError(f"{folder}: the lexical index is damaged: {error}; build it anew") from None
        fits = {name: len(array) for name, array in mapped.items()} == about["sizes"]
        if not fits or sha256(folder / "vocabulary.txt") != about["vocabulary"]:
            raise ProjectError(f"{folder}: the lexical index is damaged; build it anew")
        index.vocabulary = {term: i for i, term in enumerate(terms) if term}
        index.lengths = mapped["lengths"]
        index.alive = mapped["alive"]
        index._idf = np.array(mapped["idf"])
        index._idf_at = np.zeros(len(index._idf), np.int64)
        if "rows" in mapped:
            arrays = [mapped[name] for name in ("indptr", "rows", "counts", "impacts")]
            index.segments = [Segment(0, index.num_rows, *arrays)]
        return index


def open_array(path: Path, mode: Literal["r", "c"], size: int) -> Array:
    """An array in a file, read as it is used; an empty one cannot be mapped."""
    return np.load(path, mmap_mode=mode if size else None, allow_pickle=False)


def merge_top(found: list[tuple[Array, Array]], queries: int, k: int) -> tuple[Array, Array]:
    """The k best of several lists of (scores, rows) (Q, k_i), filled up with (-inf, -1)."""
    scores = np.concatenate([part[0] for part in found] + [np.full((queries, k), -np.inf, np.float32)], axis=1)
    rows = np.concatenate([part[1] for part in found] + [np.full((queries, k), -1, np.int64)], axis=1)
    if len(found) > 1:
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return scores[:, :k], rows[:, :k]
