"""Marking answers: offsets, no answer, the best of several passages, and learning it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from common.config import Options, resolve
from common.errors import ProjectError
from common.run import Run
from rag.config import Config, ModelConfig
from rag.data import load_collection
from rag.data.corpus import Passage
from rag.model.encoder import Tokenizer, learn_word_pieces
from rag.reader.examples import Asked, Context, Contexts
from rag.reader.extractive import (
    ExtractiveReader,
    SpanTask,
    best_spans,
    build_spans,
    encode_pairs,
    locate,
    span_loss,
)
from rag.reader.weights import open_reader
from rag.train_reader import open_search, train
from tests.helpers import status

CPU = torch.device("cpu")
TEXTS = [
    "Ada Lovelace was born in London in 1815.",
    "The town of Brel lies on the river Aln, and Ada never went there.",
]
MODEL = ModelConfig(name="scratch", width=32, layers=2, heads=2, query_length=16, passage_length=48, vocabulary=300)
SETTINGS = [
    "data.entities=60",
    "reader.kind=extractive",
    "model.name=scratch",
    "model.width=32",
    "model.heads=2",
    "model.vocabulary=400",
    "model.dropout=0",
    "model.query_length=32",
    "model.passage_length=160",
    "reader_train.batch_size=2",
    "reader_train.steps=3",
    "reader_train.lr=1e-3",
    "reader_train.log_every=1",
    "device=cpu",
    "precision=fp32",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(learn_word_pieces(TEXTS * 3, 300), MODEL)


def make(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = Config(model=MODEL, reader=replace(Config().reader, kind="extractive", passages=3))
    model = build_spans(config, len(tokenizer.inner)).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)
    return ExtractiveReader(config, model, tokenizer, CPU)


def test_places_of_answers_are_places_in_the_text(tokenizer):
    answers = ["London", "river Aln", "", "absent"]
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[1]]
    pairs = encode_pairs(tokenizer, ["Who was born where?"] * 4, texts, CPU)
    spans = locate(pairs, texts, answers)
    for row in range(2):
        first, last = spans[row].tolist()
        begin, end = int(pairs.offsets[row, first, 0]), int(pairs.offsets[row, last, 1])
        assert texts[row][begin:end].strip() == answers[row]  # byte-level tokens take the space before them in
        assert pairs.allowed[row, first] and first > 0
    assert spans[2:].tolist() == [[0, 0], [0, 0]]
    ids = pairs.tokens["input_ids"]
    asked = len(tokenizer.inner("Who was born where?", add_special_tokens=False)["input_ids"])
    assert pairs.allowed[:, 0].all() and not pairs.allowed[:, 1 : asked + 2].any(), "a question holds no answer"
    assert not pairs.allowed[ids == 0].any() and not pairs.allowed[:, 1:][(ids == 3)[:, 1:]].any()


def test_only_passages_are_cut_and_what_is_cut_away_is_no_answer(tokenizer):
    text = "the town of Brel " * 40 + "London"
    question = "Who was born in the town where the river is?"
    pairs = encode_pairs(tokenizer, [question], [text], CPU)
    ids = pairs.tokens["input_ids"][0].tolist()
    asked = tokenizer.inner(question, add_special_tokens=False)["input_ids"]
    assert len(ids) == 64 and ids[1 : len(asked) + 1] == asked
    assert locate(pairs, [text], ["London"]).tolist() == [[0, 0]]
    with pytest.raises(ProjectError, match="no room"):
        encode_pairs(tokenizer, ["who was born " * 30], [text], CPU)


def test_special_tokens_in_passages_are_letters(tokenizer):
    pairs = encode_pairs(tokenizer, ["who?"], ["It was [SEP] Ada [CLS] [MASK]"], CPU)
    assert int((pairs.tokens["input_ids"] == 3).sum()) == 2 and int((pairs.tokens["input_ids"] == 2).sum()) == 1


def test_the_best_span_is_the_best_by_trying_all():
    torch.manual_seed(0)
    scores = torch.randn(5, 12, 2)
    scores[:, 1:4] = -torch.inf
    first, last, margin = best_spans(scores, 3)
    for row in range(5):
        tried = {
            (i, j): float(scores[row, i, 0] + scores[row, j, 1]) for i in range(4, 12) for j in range(i, min(12, i + 3))
        }
        best = max(tried, key=tried.get)
        assert (int(first[row]), int(last[row])) == best
        assert float(margin[row]) == pytest.approx(tried[best] - float(scores[row, 0].sum()), abs=1e-5)


def test_the_loss_is_the_mean_of_two_cross_entropies():
    torch.manual_seed(0)
    scores = torch.randn(3, 7, 2)
    spans = torch.tensor([[1, 3], [0, 0], [6, 6]])
    expected = sum(torch.nn.functional.cross_entropy(scores[..., side], spans[:, side]) for side in range(2)) / 2
    assert torch.allclose(span_loss(scores, spans), expected)


def test_answers_stand_in_the_passage_they_cite_and_batches_do_not_matter(tokenizer):
    reader = make(tokenizer)
    passages = [Passage("a", TEXTS[0]), Passage("b", TEXTS[1], "Brel")]
    questions = ["Who was born in London?", "where?", "Which river is it that the town lies on?"]
    together = reader.answer(questions, [passages, passages[::-1], passages[:1]])
    for i, answer in enumerate(together):
        (alone,) = reader.answer([questions[i]], [answer.passages])
        assert (alone.text, alone.cited) == (answer.text, answer.cited)
        assert math.isclose(alone.confidence, answer.confidence, abs_tol=1e-5)
        (place,) = answer.cited
        assert answer.text and answer.text in answer.passages[place].whole
        assert answer.no_answer == pytest.approx(1 - answer.confidence)
    each = [reader.answer([questions[0]], [[p]])[0] for p in passages]
    best = max(each, key=lambda answer: answer.confidence)
    assert together[0].text == best.text
    assert [a.text for a in reader.answer(["who?", "who?"], None)] == ["", ""]
    assert reader.answer(["who?"], [[]])[0].no_answer == 1
    *_, last = reader.stream(questions[0], passages)
    assert last == reader.answer([questions[0]], [passages])[0]


@pytest.fixture
def config(tmp_path):
    return resolve(Config, None, [*SETTINGS, f"run_dir={tmp_path}"])


def test_a_context_becomes_pairs(config):
    context = Context(
        (Passage("a", "It was Ada."), Passage("b", "It was Eve.")),
        (Asked("who?", "Eve", (1,)), Asked("where?", "", ())),
    )
    collection = load_collection(config.data, "data")
    with Run(config, Options("train")) as run:
        task = SpanTask(config, run, collection)
        rows = task.row(context)
        assert [answer for _, _, answer in rows] == ["", "Eve", "", ""]
        batch = task.collate([rows])
        assert (batch.spans.sum(1) > 0).tolist() == [False, True, False, False]
        assert task.row(replace(context, asked=())) is None


def test_it_learns_two_contexts_by_heart_and_says_them(config):
    collection = load_collection(config.data, "data")
    with Run(config, Options("train")) as run:
        task = SpanTask(config, run, collection)
        contexts = Contexts(collection, open_search(config, collection), config)
        drawn = [contexts.draw(0, i) for i in range(2)]
        batch = task.collate([task.row(context) for context in drawn])
        optimizer = torch.optim.Adam(task.model.parameters(), 3e-3)
        task.model.train()
        for _ in range(220):
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05
        task.model.eval()
        asked = [(asked, context.passages) for context in drawn for asked in context.asked]
        assert any(item.sources for item, _ in asked)
        for item, passages in asked:
            (answer,) = task.reader().answer([item.question], [passages])
            assert (answer.text if answer.confidence > 0.5 else "") == item.answer


def test_a_run_and_its_reader(config):
    assert status(train, config, Options("train")) == 0
    again = replace(config, reader_train=replace(config.reader_train, steps=4))
    assert status(train, again, Options("train", resume=True)) == 0
    used = replace(config, model=ModelConfig(), reader=replace(config.reader, kind="generative"))
    reader, name = open_reader(used, CPU, torch.float32)
    assert "extractive" in name
    question = load_collection(config.data, "data").test[0]
    assert reader.answer([question.text], [[Passage("a", "It was Ada.")]])[0].text
    bare = replace(config, run_dir=config.run_dir + "/other")
    with pytest.raises(ProjectError, match="has to be trained first"):
        open_reader(bare, CPU, torch.float32)
