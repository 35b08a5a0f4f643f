"""The parts of a search put together: modes, empty questions, ranking again, times of the stages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import ProjectError
from rag.config import AnalyserConfig, BM25Config, IndexConfig, RerankConfig, SearchConfig
from rag.data import Passage, Passages
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25
from rag.search.embed import Reranker
from rag.search.retriever import Retriever
from rag.search.vectors import VectorFiles, VectorIndex

TEXTS = ["red apple", "green apple", "blue sky", "red sky at night", "a long walk"]


class Embedder:
    """Vectors by hand: the question `sky` is nearest to passages 3 and 2."""

    def questions(self, texts):
        vectors = np.array([[0.6, 0.8] if "sky" in text else [1.0, 0.0] for text in texts], np.float32)
        return vectors


class Longest(Reranker):
    """Takes the longest passage for the best."""

    def __init__(self):
        self.asked = []

    def scores(self, questions, texts):
        self.asked += list(zip(questions, texts, strict=True))
        return np.array([len(text) for text in texts], np.float32)


@pytest.fixture
def retriever(tmp_path):
    angles = np.array([0.0, 0.3, 0.8, 0.93, 1.5])
    files = VectorFiles(tmp_path, 2)
    files.append(np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32))
    words = BM25(BM25Config(), Analyser(AnalyserConfig()))
    words.add(TEXTS)
    passages = Passages(Passage(f"p{i}", text) for i, text in enumerate(TEXTS))
    settings = SearchConfig(k=3, depth=4)
    return Retriever(passages, settings, words, VectorIndex(files, IndexConfig()), Embedder())


def rows(retriever, mode: str, **settings) -> list[int]:
    retriever.config = replace(retriever.config, mode=mode, **settings)
    return [hit.row for hit in retriever.search(["sky"])[0]]


def test_modes(retriever):
    assert rows(retriever, "bm25") == [2, 3]  # the shorter passage first; only those with the word
    assert rows(retriever, "dense") == [3, 2, 4]
    assert rows(retriever, "hybrid") == [2, 3, 4]  # ranks 1 and 2, then 2 and 1: equal, by row
    assert rows(retriever, "hybrid", fusion="score", dense_weight=1.0)[0] == 3
    assert rows(retriever, "hybrid", fusion="score", dense_weight=0.0)[0] == 2
    hit = retriever.search(["sky"], 1)[0]
    assert len(hit) == 1 and hit[0].passage.text == "blue sky"


def test_times_of_stages_are_told(retriever):
    found = retriever.find(["sky", "apple"], 2)
    assert set(found.seconds) == {"bm25", "encode", "dense", "fuse"} and found.rows.shape == (2, 2)
    assert min(found.seconds.values()) >= 0


def test_ranking_again_changes_only_the_first(retriever):
    retriever.reranker = Longest()
    retriever.rerank = RerankConfig(depth=2)
    assert rows(retriever, "hybrid") == [3, 2, 4]
    assert len(retriever.reranker.asked) == 2
    retriever.rerank = RerankConfig(depth=50)
    assert rows(retriever, "bm25") == [3, 2]  # empty places are not read
    found = retriever.find(["unheard of"], 3)
    assert found.rows.tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_questions_are_refused(question, retriever):
    with pytest.raises(ProjectError, match="an empty question has no answer"):
        retriever.search(["sky", question])
