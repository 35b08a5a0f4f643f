"""An index of a person's documents: passages, words and vectors in one folder, brought up to date file by file.

Nothing is changed in place: a new state is written beside the old one and takes its place once it is whole, with hard
links to what has stayed the same. Whoever is killed while indexing leaves the old state behind, and the vectors made
until then are used by the next attempt.

Legend: R rows; a passage keeps its row for as long as it exists, and rows of deleted passages are given up when they
are the greater part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ProjectError
from common.files import atomic_open, read_json, write_json
from rag.config import Config
from rag.data.corpus import LineTable, Passage
from rag.data.documents import changes, read_document, scan
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25
from rag.search.embed import Embedder, Reranker, embed_into
from rag.search.generations import Generations, link
from rag.search.retriever import Dense, Lexical, Retriever
from rag.search.vectors import VectorFiles, VectorIndex

FORMAT = 1
PASSAGES, FILES, WORDS, VECTORS = "passages.jsonl", "files.json", "words", "vectors"
COMPACT = 0.5  # share of rows that are gone at which they are given up

Say = Callable[[str], None]


class StoredPassages(LineTable):
    """Passages in a JSONL file, with ids of any kind."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, parse)
        self._known: dict[str, int] = {}

    def check_id(self, passage: Passage, row: int) -> None:
        """Any id will do."""

    def row_of(self, passage_id: str) -> int | None:
        if not self._known:
            self._known = {passage.id: row for row, passage in enumerate(self)}
        return self._known.get(passage_id)


def parse(line: str) -> Passage:
    """A line of passages.jsonl."""
    return Passage(**json.loads(line))


@dataclass
class Update:
    """What an update did: files added, changed and deleted, passages now, and notes on files that were left out."""

    added: list[str]
    changed: list[str]
    deleted: list[str]
    passages: int
    notes: list[str]


class Library:
    """The index in a folder, opened or about to be made.

    Args:
        folder: of the index; may not exist yet.
        config: analyser, BM25, vector index and how documents are cut. `ProjectError` where an index that is there was
            made with others.
        embedder: the encoder; vectors of another one are refused.
    """

    def __init__(self, folder: Path, config: Config, embedder: Embedder, encoder: str, say: Say) -> None:
        self.states = Generations(folder)
        self.config = config
        self.embedder = embedder
        self.say = say
        self.facts = describe(config, embedder, encoder)
        before = self.states.facts()
        if self.states.current() is not None:
            refuse_others(before.get("made", {}), self.facts, folder)

    # -- reading -------------------------------------------------------------------------------------------------------

    def retriever(self, reranker: Reranker | None = None) -> Retriever:
        """Search in the current state. `ProjectError` where there is none yet."""
        folder = self.states.current()
        if folder is None:
            raise ProjectError(f"{self.states.folder} holds no index yet: python -m rag.index --corpus <folder>")
        passages = StoredPassages(folder / PASSAGES)
        words: Lexical
        vectors: Dense
        files = VectorFiles(folder / VECTORS, self.embedder.model.dimension)
        if self.config.index.backend == "milvus":
            index = self._milvus()
            alive = np.load(folder / VECTORS / "alive.npy", allow_pickle=False)
            index.synchronise(passages, files, alive)
            words, vectors = index.words, index.vectors
        else:
            words = BM25.load(folder / WORDS)
            vectors = VectorIndex.load(folder / VECTORS, files, self.config.index)
        return Retriever(passages, self.config.search, words, vectors, self.embedder, reranker, self.config.rerank)

    def _milvus(self) -> Any:
        from rag.search.milvus import MilvusIndex

        default = self.states.folder / "milvus.db"
        analyser = Analyser(self.config.analyser)
        return MilvusIndex(self.config.index, self.config.bm25, analyser, default, self.embedder.model.dimension)

    # -- writing -------------------------------------------------------------------------------------------------------

    def update(self, documents: Path) -> Update:
        """Bring the index up to date with a folder: files that are new or have changed are read, cut and encoded,
        those of files that are gone are taken out; the others are not touched.
        """
        found = scan(documents, self.config.data)
        current = self.states.current()
        noted = read_json(current / FILES) if current is not None else {}
        before = {name: str(item["sha256"]) for name, item in noted.items()}
        what = changes(before, found.files)
        if not any(what.values()) and current is not None:
            total = sum(len(item["rows"]) for item in noted.values())
            return Update([], [], [], total, found.notes())
        new = [
            passage
            for name in found.files
            if name in what["added"] or name in what["changed"]
            for passage in read_document(documents, name, self.config.data, found)
        ]
        stale = {*what["changed"], *what["deleted"]}
        gone = [row for name, item in noted.items() if name in stale for row in item["rows"]]
        kept = {name: item for name, item in noted.items() if name not in stale}
        total = sum(len(item["rows"]) for item in kept.values()) + len(new)
        if total == 0:
            raise ProjectError(f"{documents} holds no text: {'; '.join(found.notes()) or 'its documents are empty'}")
        key = hashlib.sha256(json.dumps([self.facts, found.files, before], sort_keys=True).encode()).hexdigest()[:16]
        with self.states.next(key, {"made": self.facts, "documents": str(documents), "passages": total}) as folder:
            first = self._write(folder, current, gone, new)
            for offset, passage in enumerate(new):
                item = kept.setdefault(passage.group, {"sha256": found.files[passage.group], "rows": []})
                item["rows"].append(first + offset)
            for name in found.files:  # without text, and so without a passage: not read again until it changes
                kept.setdefault(name, {"sha256": found.files[name], "rows": []})
            write_json(folder / FILES, kept)
        self._compact_where_due(total)
        return Update(what["added"], what["changed"], what["deleted"], total, found.notes())

    def _write(self, folder: Path, current: Path | None, gone: list[int], new: list[Passage]) -> int:
        """The next state: the current one without some rows and with some passages. Returns the first new row."""
        dimension = self.embedder.model.dimension
        first = len(StoredPassages(current / PASSAGES)) if current is not None else 0
        with atomic_open(folder / PASSAGES) as file:
            if current is not None:
                file.write((current / PASSAGES).read_bytes())
            for passage in new:
                file.write((json.dumps(asdict(passage), ensure_ascii=False) + "\n").encode())
        if current is not None:
            for path in sorted((current / VECTORS).glob("vectors-*.npy")):
                link(path, folder / VECTORS / path.name)
        files = VectorFiles(folder / VECTORS, dimension)
        passages = StoredPassages(folder / PASSAGES) if first + len(new) else None
        if passages is not None:
            embed_into(files, passages, self.embedder, self.config.index.shard)
        if current is None:
            vectors = VectorIndex(files, self.config.index).build(self.config.seed)
            words = BM25(self.config.bm25, Analyser(self.config.analyser))
        else:
            old = VectorFiles(current / VECTORS, dimension)
            vectors = VectorIndex.load(current / VECTORS, old, self.config.index, growing=True)
            vectors.files = files
            vectors.extend()
            words = BM25.load(current / WORDS)
        words.remove(gone)
        vectors.remove(gone)
        words.add(passage.whole for passage in new)
        words.save(folder / WORDS)
        vectors.save(folder / VECTORS)
        return first

    def _compact_where_due(self, living: int) -> None:
        """Give up the rows of deleted passages where they are the greater part."""
        current = self.states.current()
        assert current is not None
        passages = StoredPassages(current / PASSAGES)
        if living > (1 - COMPACT) * len(passages):
            return
        noted = read_json(current / FILES)
        rows = sorted(row for item in noted.values() for row in item["rows"])
        place = {row: i for i, row in enumerate(rows)}
        old = VectorFiles(current / VECTORS, self.embedder.model.dimension)
        facts = {name: value for name, value in self.states.facts().items() if name != "generation"}
        with self.states.next(f"compact-{current.name}", facts) as folder:
            with atomic_open(folder / PASSAGES) as file:
                for row in rows:
                    file.write((json.dumps(asdict(passages[row]), ensure_ascii=False) + "\n").encode())
            files = VectorFiles(folder / VECTORS, self.embedder.model.dimension)
            for start in range(len(files), len(rows), self.config.index.shard):
                files.append(old.take(np.array(rows[start : start + self.config.index.shard], np.int64)))
            VectorIndex(files, self.config.index).build(self.config.seed).save(folder / VECTORS)
            words = BM25(self.config.bm25, Analyser(self.config.analyser))
            words.add(passage.whole for passage in StoredPassages(folder / PASSAGES))
            words.save(folder / WORDS)
            for item in noted.values():
                item["rows"] = [place[row] for row in item["rows"]]
            write_json(folder / FILES, noted)
        if self.config.index.backend == "milvus":  # rows have other passages now
            index = self._milvus()
            index.remove(index.rows())
            index.close()
        self.say(f"gave up the rows of {len(passages) - living} deleted passages")


def describe(config: Config, embedder: Embedder, encoder: str) -> dict[str, Any]:
    """All that an index depends on beside the documents, by the names of the settings."""
    return {
        "format": FORMAT,
        "analyser": Analyser(config.analyser).fingerprint,
        "bm25": asdict(config.bm25),
        "model.name": config.model.name,
        "encoder": encoder,
        "dimension": embedder.model.dimension,
        "index.backend": config.index.backend,
        "index.kind": config.index.kind,
        "data.chunk_words": config.data.chunk_words,
        "data.chunk_overlap": config.data.chunk_overlap,
    }


def refuse_others(made: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """`ProjectError` naming the first thing in which an index differs from what is asked for."""
    for name, value in now.items():
        if made.get(name) != value:
            raise ProjectError(
                f"the index in {folder} was made with {name}={made.get(name)}, not {value}: results would be wrong. "
                "Use those settings, choose another run_dir, or delete the index"
            )
