"""The parts of a search put together: modes, empty questions, ranking again, times of the stages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.config import resolve
from common.errors import ProjectError
from rag.config import AnalyserConfig, BM25Config, Config, IndexConfig, RerankConfig, SearchConfig
from rag.data import Collection, Passage, Passages, Question, load_collection
from rag.data.wordings.two_hops import WHOLE
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25
from rag.search.embed import Reranker
from rag.search.fuse import by_turns
from rag.search.hops import by_steps, follow_up
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


# -- two steps ---------------------------------------------------------------------------------------------------------


def test_the_second_question_asks_for_what_is_new():
    passage = Passage("p", "Ada Brel was born in Coldhaven. There she met Tom Rusk.", "Ada Brel")
    question = "Which region does the birthplace of Ada Brel belong to?"
    words = follow_up(question, passage).split()
    assert {"region", "birthplace", "belong", "Coldhaven", "Tom", "Rusk"} <= set(words)
    assert not {"Ada", "Brel"} & set(words) and len(words) == len(set(words))
    assert follow_up(question, None) == question
    assert follow_up("Ada Brel?", Passage("p", "Ada Brel.")) == "Ada Brel?"  # nothing is left: as it was
    assert follow_up("Where did she go?", Passage("p", "She went.", "Brel")) == "Where did go"


def test_an_ending_does_not_make_a_name_new():
    passage = Passage("p", "Ada Brel grew up in Coldhaven.", "Ada Brel")
    for question in (
        "Which region is the town of Ada Brel's birth in?",
        "Which region is the town of Ada Brel’s birth in?",
    ):
        words = follow_up(question, passage).split()
        assert "Coldhaven" in words and not any(word.startswith("Brel") for word in words)


def test_training_asks_as_two_searches_do():
    passages = Passages(
        [
            Passage("birth", "Ada Brel was born in Coldhaven.", "Ada Brel"),
            Passage("town", "Coldhaven belongs to Juthe.", "Coldhaven"),
        ]
    )
    two = Question("q", "Which region is Ada Brel from?", ("Juthe",), {"birth": 2, "town": 1}, "Ada Brel", "two_hop")
    one = Question("r", "Where was Ada Brel born?", ("Coldhaven",), {"birth": 1}, "Ada Brel", "one_hop")
    steps = by_steps(Collection("made up", passages, train=[two, one], validation=[two], test=[two]))
    first, second, single = steps.train
    assert (first.text, first.gold) == (two.text, {"birth": 2}) and single == one
    assert second.text == follow_up(two.text, passages[0]) and second.gold == {"town": 1}
    assert len({each.id for each in steps.train}) == 3 and steps.validation == [first, second]
    assert steps.test == [two], "what is reported is asked as it is"


def test_rankings_by_turns():
    first = np.array([[1, 2, 3, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
    second = np.array([[2, 9, 1, 8], [-1, -1, -1, -1], [-1, -1, -1, -1]])
    scores, rows = by_turns(first, second, 4)
    assert rows.tolist() == [[1, 2, 9, 3], [5, -1, -1, -1], [-1, -1, -1, -1]]
    assert scores[0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert np.isinf(scores[1, 1:]).all() and np.isinf(scores[2]).all()


def test_two_steps_find_what_one_does_not():
    texts = ["Ada was born in Coldhaven.", "Coldhaven belongs to the region of Juthe.", "A region has no birthplace."]
    words = BM25(BM25Config(), Analyser(AnalyserConfig()))
    words.add(texts)
    passages = Passages(Passage(f"p{i}", text) for i, text in enumerate(texts))
    question = ["What does the town where Ada was born belong to?"]
    once, twice = (
        Retriever(passages, SearchConfig(mode="bm25", k=2, hops=hops), words).find(question, 2) for hops in (1, 2)
    )
    assert once.rows[0, 0] == twice.rows[0, 0] == 0
    assert twice.rows[0].tolist() == [0, 1] and set(twice.seconds) == {"bm25"}
    nothing = Retriever(passages, SearchConfig(mode="bm25", k=2, hops=2), words).find(["zzz"], 2)
    assert nothing.rows.tolist() == [[-1, -1]]


def test_two_steps_in_a_made_up_world():
    """Of questions that need two passages, words alone find both for few in one step, and for many in two. They are
    asked plainly: words are what BM25 needs, and the wordings of a split are chosen to have few in common.
    """
    config = resolve(Config, None, ["data.entities=400", "search.mode=bm25"])
    collection = load_collection(config.data, "data")
    words = BM25(config.bm25, Analyser(config.analyser))
    words.add(passage.whole for passage in collection.passages)
    questions = [question for question in collection.validation if question.kind == "two_hop"]

    def plain(question: Question) -> str:
        _, _, second, _, first = question.id.split("/")
        return WHOLE[first, second][0][0].format(s=question.group)

    def complete(hops: int) -> float:
        retriever = Retriever(collection.passages, replace(config.search, hops=hops), words)
        found = retriever.find([plain(question) for question in questions], 5).rows.tolist()
        right = [set(collection.rows_of(question)) <= set(its) for question, its in zip(questions, found)]
        return float(np.mean(right))

    assert len(questions) > 30
    assert complete(1) < 0.07
    assert complete(2) > 0.4
