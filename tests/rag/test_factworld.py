"""A world in which nothing leaks: not from training to test, not by memory, not by guessing."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from rag.config import DataConfig
from rag.data import factwords as words
from rag.data import factworld
from rag.data.wordings import QUESTIONS, STATEMENTS, TWO_HOPS

CONFIG = DataConfig(entities=300, world=5)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def world():
    return factworld.make_world(CONFIG)


@pytest.fixture(scope="module")
def data():
    return factworld.load(CONFIG)


def test_a_world_is_a_function_of_its_seed(data):
    again = factworld.load(CONFIG)
    assert again.passages.fingerprint() == data.passages.fingerprint() and again.test == data.test
    other = factworld.load(DataConfig(entities=300, world=6))
    assert not {p.title for p in other.passages} & {p.title for p in data.passages}


def test_every_answer_stands_in_its_passages(data):
    for split in ("train", "validation", "test"):
        for question in data.questions(split):
            texts = [data.passages[row].text for row in data.rows_of(question)]
            assert len(texts) == (2 if question.kind == "two_hop" else 1)
            assert any(question.answers[0] in text for text in texts), question


def test_nothing_of_a_tested_entity_is_in_training(world, data):
    """Neither a name nor a fact that names an entity crosses from one split into another."""
    for split in ("train", "validation", "test"):
        names = {item.name for item in world.entities if item.split == split}
        others = {item.name for item in world.entities if item.split != split}
        for question in data.questions(split):
            assert not any(name in question.text for name in others)
            assert question.answers[0] not in others
        assert {question.group for question in data.questions(split)} <= names
    assert len({item.name for item in world.entities}) == 300


def wording(text: str, names: list[str]) -> str:
    """A question without the name in it."""
    return re.sub("|".join(map(re.escape, names)), "X", text)


def bare(sentence: str) -> str:
    """Its words alone."""
    return " ".join(re.findall(r"[a-z{}]+", sentence.lower()))


def test_no_split_is_worded_as_another(world, data):
    names = sorted((item.name for item in world.entities), key=len, reverse=True)
    asked = {split: {wording(q.text, names) for q in data.questions(split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert asked[one] and asked[other] and not asked[one] & asked[other]
    for wordings in (*QUESTIONS.values(), *TWO_HOPS.values(), *STATEMENTS.values()):
        held_out = [bare(sentence) for sentence in (*wordings.validation, *wordings.test)]
        every = [*held_out, *map(bare, wordings.train)]
        assert len(set(every)) == len(every)
        assert not any("[" in sentence for sentence in held_out), "counted one by one"
        for sentence in wordings.train:
            learned = re.compile(pattern(sentence))
            assert not [text for text in held_out if learned.fullmatch(text)], sentence
        assert len(wordings.train) >= 10 and len(wordings.validation) >= 2 and len(wordings.test) >= 2


def pattern(sentence: str) -> str:
    """What finds a bare text that is this sentence in one of its alternatives."""
    parts = words.ALTERNATIVES.split(sentence)  # plain text, alternatives, plain text, ...
    texts = [re.escape(bare(part)) for part in parts]
    texts[1::2] = ["(?:" + "|".join(re.escape(bare(each)) for each in part.split("|")) + ")" for part in parts[1::2]]
    return " *".join(texts)


def test_a_sentence_has_one_of_each_of_its_alternatives():
    rng = np.random.default_rng(0)
    said = {words.worded(("[Who|Which person] wrote [|the book ]{s}?",), rng) for _ in range(60)}
    assert said == {f"{who} wrote {what}{{s}}?" for who in ("Who", "Which person") for what in ("", "the book ")}
    assert re.fullmatch(pattern("[Who|Which person] wrote [|the book ]{s}?"), "who wrote the book {s}")
    assert not re.fullmatch(pattern("[Who|Which person] wrote {s}?"), "who wrote the book {s}")


def test_a_third_of_what_is_said_for_testing_is_said_nowhere_else(world):
    """Passages about tested entities have sentences of their own; those of validation and test never meet."""
    patterns = {split: kept_sentences(split) for split in SPLITS}
    for split in SPLITS:
        texts = [p.text for p in world.passages() if world.by_name[p.title].split == split]
        for other in SPLITS[1:]:
            said = sum(bool(pattern.search(text)) for text in texts for pattern in patterns[other])
            assert (said > len(texts) / 4) == (split == other), (split, other, said, len(texts))


def kept_sentences(split: str) -> list[re.Pattern[str]]:
    """What finds the sentences that only one split's passages have, whatever they are about."""
    whole = [text for wordings in STATEMENTS.values() for text in wordings.of(split)]
    parts = [re.escape(text).replace(r"\{s\}", r"[\w ]+").replace(r"\{v\}", r"[\w ]+") for text in whole]
    return [re.compile(rf"(^|\. ){part}", re.IGNORECASE) for part in parts]


def test_guessing_does_not_pay(data):
    """The commonest answer to each kind of question in training, given to all test questions of the kind."""
    common: dict[str, Counter[str]] = {}
    for question in data.train:
        common.setdefault(question.id.split("/")[2], Counter())[question.answers[0]] += 1
    right = [common[q.id.split("/")[2]].most_common(1)[0][0] == q.answers[0] for q in data.test]
    assert sum(right) / len(right) < 0.05


def test_the_question_does_not_hold_its_answer(data):
    for question in data.test + data.train:
        assert question.answers[0] not in question.text


def test_an_edited_passage_says_something_else_in_the_same_words(world, data):
    for question in data.test[::7]:
        passage, answer = world.edited(question)
        row = data.passages.row_of(passage.id)
        assert passage.id in question.gold and answer != question.answers[0]
        before = data.passages[row]
        assert answer in passage.text and before.text != passage.text
        assert before.text.replace(question.answers[0], answer).lower() == passage.text.lower()
