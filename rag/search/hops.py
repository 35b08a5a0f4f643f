"""Questions that no single passage answers: "Which region does the birthplace of Ada Brel belong to?"

The passage about the birthplace shares no name with the question, so no search for the question finds it. The passage
that says where Ada Brel was born names it. So one searches twice, the second time for what follows from the first
passage: what the question still asks, and the names that are new (in the spirit of Qi et al. 2019, "Answering complex
open-domain questions through iterative query generation", where a model is trained to write that second query).
"""

from __future__ import annotations

import re
from dataclasses import replace

from rag.data.corpus import Collection, Passage, Question

WORD = re.compile(r"\w[\w'’-]*")
POSSESSIVE = re.compile(r"['’]s?$")


def follow_up(question: str, first: Passage | None) -> str:
    """The second question: the words of the first that the passage does not have, then the passage's names that the
    question does not have. The question itself where there is no passage, or where nothing remains.

    Words with a capital count as names. That takes the first word of a sentence for one, too, which costs little, and
    does nothing for languages that write names as other words.
    """
    if first is None:
        return question
    asked = WORD.findall(question)
    told = WORD.findall(first.text)
    known = {plain(word) for word in asked} & {plain(word) for word in [*told, *WORD.findall(first.title)]}
    open_ = [word for word in asked if plain(word) not in known]
    names = [word for word in told if word[0].isupper() and plain(word) not in known]
    return " ".join([*open_, *dict.fromkeys(names)]) or question


def plain(word: str) -> str:
    """A word as it is compared: "Brel's" is Brel, whom the passage names without the ending."""
    return POSSESSIVE.sub("", word.lower())


def by_steps(collection: Collection) -> Collection:
    """The collection with training and validation questions as two searches ask them, so that a retriever learns both:
    a question that needs several passages asks for the first of them in its own words, and for each further one in
    those of `follow_up` (as Xiong et al. 2021, "Answering complex open-domain questions with multi-hop dense
    retrieval", train with the question and the passage before). The order is that of the question's judgements.
    """
    train = [step for question in collection.train for step in steps_of(question, collection)]
    validation = [step for question in collection.validation for step in steps_of(question, collection)]
    return replace(collection, train=train, validation=validation)


def steps_of(question: Question, collection: Collection) -> list[Question]:
    """A question as one for each of its passages; as it is where it has one or none."""
    right = collection.passages.ranked(collection.rows_of(question))
    if len(right) < 2:
        return [question]
    steps = []
    before: Passage | None = None
    for place, passage in enumerate(right, start=1):
        text = follow_up(question.text, before)
        gold = {passage.id: question.gold[passage.id]}
        steps.append(replace(question, id=f"{question.id}/{place}", text=text, gold=gold))
        before = passage
    return steps
