"""Milvus's embedded file against our own two indexes: equal results within ties."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import ConfigError
from common.errors import ProjectError
from rag.config import AnalyserConfig, BM25Config, IndexConfig
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25
from rag.search.vectors import VectorFiles, VectorIndex

pytest.importorskip("pymilvus", reason="pip install 'seven-projects[milvus]'")
pytest.importorskip("milvus_lite", reason="pip install 'seven-projects[milvus]'")

from rag.search.milvus import MilvusIndex

D = 16
CONSTANTS = BM25Config(k1=0.9, b=0.4)
WORDS = ["the", "naïve", "dogs", "dog", "running", "x²", "1,024", "日本", "system", *(f"word{i}" for i in range(30))]


def same_within_ties(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    """Equal scores place by place, and equal rows wherever a score is not that of the place's neighbours or last."""
    np.testing.assert_allclose(theirs[0], ours[0], rtol=1e-4, atol=1e-5)
    for scores, mine, other in zip(ours[0], ours[1], theirs[1], strict=True):
        for place, row in enumerate(mine[:-1]):
            tied = np.isclose(scores, scores[place], rtol=1e-4)
            if row >= 0 and tied.sum() == 1:
                assert other[place] == row


@pytest.fixture
def both(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 30))) for _ in range(150)]
    vectors = rng.standard_normal((150, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    analyser = Analyser(AnalyserConfig())
    lexical = BM25(CONSTANTS, analyser)
    lexical.add(texts)
    files = VectorFiles(tmp_path / "v", D)
    files.append(vectors)
    milvus = MilvusIndex(IndexConfig(backend="milvus"), CONSTANTS, analyser, tmp_path / "milvus.db", D)
    milvus.add(range(150), texts, vectors)
    yield lexical, VectorIndex(files, IndexConfig()), milvus, texts, vectors
    milvus.close()


def test_equal_results(both):
    lexical, dense, milvus, _, _ = both
    rng = np.random.default_rng(1)
    queries = [" ".join(rng.choice(WORDS, rng.integers(1, 5), replace=False)) for _ in range(20)] + ["unheard", "the"]
    vectors = rng.standard_normal((20, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    same_within_ties(dense.search(vectors, 10), milvus.vectors.search(vectors, 10))
    scores, rows = lexical.search(queries, 10)
    same_within_ties((scores * (CONSTANTS.k1 + 1), rows), milvus.words.search(queries, 10))
    assert len(milvus) == 150
    gone = rows[0, :3].tolist()
    lexical.remove(gone)
    dense.remove(gone)
    milvus.remove(gone)
    assert milvus.rows() == set(range(150)) - set(gone) and len(milvus) == 147
    same_within_ties(dense.search(vectors, 10), milvus.vectors.search(vectors, 10))
    scores, rows = lexical.search(queries, 10)
    same_within_ties((scores * (CONSTANTS.k1 + 1), rows), milvus.words.search(queries, 10))


def test_another_dimension_is_refused(both, tmp_path):
    milvus = both[2]
    with pytest.raises(ProjectError, match="of another index or encoder"):
        other = MilvusIndex.__new__(MilvusIndex)
        other.client, other.name, other.dimension = milvus.client, milvus.name, D + 1
        other._check_dimension()
    with pytest.raises(ProjectError, match="a query has 17"):
        milvus.vectors.search(np.ones((1, D + 1)), 1)
    with pytest.raises(ConfigError, match=r"bm25.variant: must be lucene"):
        MilvusIndex(IndexConfig(), BM25Config(variant="atire"), milvus.analyser, tmp_path / "x.db", D)


def test_nobody_there():
    config = IndexConfig(backend="milvus", uri="http://127.0.0.1:9")
    with pytest.raises(ProjectError, match="no Milvus at http"):
        MilvusIndex(config, CONSTANTS, Analyser(AnalyserConfig()), None, D)
