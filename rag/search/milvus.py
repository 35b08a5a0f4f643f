"""The same two searches in Milvus: vectors and words in one collection, in a file beside this program (milvus-lite) or
on a cluster, by one setting: `index.uri=http://host:19530`.

What Milvus stores of a passage is its row, its terms and its vector; texts stay with us. Terms are made by our
analyser and written so that Milvus's own can do nothing but split them, so both backends count the same terms, by the
same formula (Lucene's, times k1 + 1). What differs: Milvus keeps the statistics of each segment apart, so that where
there are several, or passages were deleted since, its scores are not quite those of the collection as a whole.

Legend: Q queries, K results, N passages, D dimensions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ConfigError
from common.errors import ProjectError, first_line
from rag.config import BM25Config, IndexConfig
from rag.data.corpus import Passages
from rag.search.analyser import Analyser
from rag.search.vectors import VectorFiles

Array = np.ndarray[Any, Any]
BATCH = 500  # passages sent at once
QUERIES = 100  # asked at once
LONGEST = 65_000  # bytes of terms that a passage may have
PLAIN = re.compile(r"[a-z0-9]+")
# what Milvus calls our kinds of index
KINDS = {"flat": "FLAT", "hnsw": "HNSW", "ivfpq": "IVF_PQ"}


class MilvusIndex:
    """A collection in Milvus.

    Args:
        config: `uri`, `collection` and which index.
        default: the file that an empty `index.uri` stands for.
        dimension: of the vectors.
    Attributes:
        words: search by words; `search(queries, k)` as `rag.search.bm25.BM25` has it.
        vectors: search by vectors; as `rag.search.vectors.VectorIndex`.
    """

    def __init__(
        self, config: IndexConfig, bm25: BM25Config, analyser: Analyser, default: Path, dimension: int
    ) -> None:
        try:
            # what goes wrong is raised; gRPC's own lines about idle connections would stand among a person's answers
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            from pymilvus import MilvusClient
        except ImportError:
            raise ProjectError("index.backend=milvus needs pymilvus: pip install 'seven-projects[milvus]'") from None
        if bm25.variant != "lucene":
            raise ConfigError("bm25.variant", "must be lucene for index.backend=milvus, which knows no other")
        self.config = config
        self.bm25 = bm25
        self.analyser = analyser
        self.dimension = dimension
        self.name = config.collection
        uri = config.uri or str(default)
        try:
            if "://" not in uri:
                Path(uri).parent.mkdir(parents=True, exist_ok=True)
            self.client = MilvusClient(uri)
            if self.client.has_collection(self.name):
                self._check_dimension()
            else:
                self._create()
            self.client.load_collection(self.name)
        except (OSError, self.failures()) as error:
            raise ProjectError(f"no Milvus at {uri}: {first_line(error)}") from None
        self.words = Words(self)
        self.vectors = Vectors(self)

    @staticmethod
    def failures() -> Any:
        """The class of Milvus's errors."""
        from pymilvus.exceptions import MilvusException

        return MilvusException

    def _create(self) -> None:
        from pymilvus import DataType, Function, FunctionType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        standard = {"tokenizer": "standard"}
        schema.add_field("terms", DataType.VARCHAR, max_length=65_535, enable_analyzer=True, analyzer_params=standard)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=self.dimension)
        schema.add_function(Function("bm25", FunctionType.BM25, ["terms"], ["sparse"]))
        indexes = self.client.prepare_index_params()
        indexes.add_index("dense", index_type=KINDS[self.config.kind], metric_type="IP")
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
        settings = {"dense": self._dense_settings(), "sparse": {"bm25_k1": self.bm25.k1, "bm25_b": self.bm25.b}}
        for index in indexes:  # handed to add_index, they would be flattened, and milvus-lite would not see them
            index.get_index_configs()["params"] = settings[index.field_name]
        self.client.create_collection(self.name, schema=schema, index_params=indexes)

    def _dense_settings(self) -> dict[str, int]:
        if self.config.kind == "hnsw":
            return {"M": self.config.hnsw_links, "efConstruction": self.config.hnsw_build}
        if self.config.kind == "ivfpq":
            return {"nlist": self.config.cells or 1024, "m": self.config.pq_bytes, "nbits": 8}
        return {}

    def search_settings(self, k: int) -> dict[str, int]:
        """What a search by vectors is told beside the vectors."""
        if self.config.kind == "hnsw":
            return {"ef": max(self.config.hnsw_search, k)}
        return {"nprobe": self.config.probe} if self.config.kind == "ivfpq" else {}

    def _check_dimension(self) -> None:
        fields = self.client.describe_collection(self.name)["fields"]
        found = {field["name"]: field.get("params", {}).get("dim") for field in fields}
        if set(found) != {"row", "terms", "sparse", "dense"} or int(found["dense"]) != self.dimension:
            raise ProjectError(
                f"the Milvus collection {self.name!r} is of another index or encoder (its vectors have "
                f"{found.get('dense')} numbers, not {self.dimension}); choose another index.collection"
            )

    def __len__(self) -> int:
        """Number of passages in the collection."""
        answer = self.client.query(self.name, filter="row >= 0", output_fields=["count(*)"], consistency_level="Strong")
        return int(answer[0]["count(*)"])

    def add(self, rows: Sequence[int], texts: Sequence[str], vectors: Array) -> None:
        """Put passages in; a row that is there already is replaced."""
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            items = [
                {"row": int(row), "terms": self.as_terms(text), "dense": vector.tolist()}
                for row, text, vector in zip(rows[part], texts[part], vectors[part], strict=True)
            ]
            self.client.upsert(self.name, items)

    def remove(self, rows: Iterable[int]) -> None:
        """Take passages out."""
        each = [int(row) for row in rows]
        for start in range(0, len(each), BATCH):
            self.client.delete(self.name, ids=each[start : start + BATCH])

    def rows(self) -> set[int]:
        """The rows that are in the collection."""
        found: set[int] = set()
        walk = self.client.query_iterator(self.name, batch_size=BATCH, filter="row >= 0", output_fields=["row"])
        while batch := walk.next():
            found |= {int(item["row"]) for item in batch}
        walk.close()
        return found

    def synchronise(self, passages: Passages, files: VectorFiles, alive: Array) -> None:
        """Make the collection that of these passages: put in what is missing, take out what is not alive. Doing it
        twice, or again after an interruption, changes nothing more.
        """
        there = self.rows()
        self.remove(there - set(np.flatnonzero(alive).tolist()))
        missing = [int(row) for row in np.flatnonzero(alive) if int(row) not in there]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            self.add(part, [passages[row].whole for row in part], files.take(np.array(part, np.int64)))

    def as_terms(self, text: str) -> str:
        """The terms of a text, each a word of plain letters and digits whatever it was."""
        words = (term if PLAIN.fullmatch(term) else "x" + term.encode().hex() for term in self.analyser(text))
        return " ".join(words).encode()[:LONGEST].decode(errors="ignore")

    def ask(self, field: str, data: list[Any], k: int, settings: dict[str, Any]) -> tuple[Array, Array]:
        """Search in one of the two fields: scores (Q, k) and rows (Q, k), best first; -inf and -1 where there are no
        more.
        """
        scores = np.full((len(data), k), -np.inf, np.float32)
        rows = np.full((len(data), k), -1, np.int64)
        for start in range(0, len(data), QUERIES):
            answers = self.client.search(
                self.name,
                data=data[start : start + QUERIES],
                anns_field=field,
                limit=k,
                search_params={"params": settings},
                output_fields=["row"],
                consistency_level="Strong",
            )
            for query, hits in enumerate(answers, start=start):
                # milvus-lite gives BM25 scores with a minus sign, a cluster without
                found = sorted((-abs(hit["distance"]) if field == "sparse" else -hit["distance"], int(hit["row"]))
                               for hit in hits)  # fmt: skip
                for place, (score, row) in enumerate(found):
                    scores[query, place] = -score
                    rows[query, place] = row
        return scores, rows

    def close(self) -> None:
        """Let the file or the connection go."""
        self.client.close()


class Words:
    """Search by words in a collection."""

    def __init__(self, index: MilvusIndex) -> None:
        self.index = index

    def search(self, queries: Sequence[str], k: int) -> tuple[Array, Array]:
        """As `BM25.search`."""
        terms = [self.index.as_terms(query) for query in queries]
        asked = [i for i, text in enumerate(terms) if text]
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        if asked:
            scores[asked], rows[asked] = self.index.ask("sparse", [terms[i] for i in asked], k, {})
        return scores, rows


class Vectors:
    """Search by vectors in a collection."""

    def __init__(self, index: MilvusIndex) -> None:
        self.index = index

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """As `VectorIndex.search`; without exact re-ranking, which a cluster does itself where it is told to."""
        if queries.shape[1] != self.index.dimension:
            raise ProjectError(f"a query has {queries.shape[1]} numbers, but the index {self.index.dimension}")
        return self.index.ask("dense", queries.tolist(), k, self.index.search_settings(k))
