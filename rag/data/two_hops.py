"""How a fact of what a fact names is asked for: "Where was the author of {s} born?"

Most such questions are composed: a question for the second fact, asked about a description by the first one. Those for
testing are not.

Legend: {s} stands for an entity.
"""

from __future__ import annotations

from itertools import product

from rag.data.asking import QUESTIONS
from rag.data.factwords import Wordings

DESCRIPTIONS = {  # relation: whom or what a question means by it, for training and for validation
    "author": (
        (
            "the author of {s}",
            "the person who wrote {s}",
            "the author who wrote {s}",
            "the one by whom {s} was written",
        ),
        (
            "the creator of {s}",
            "the person behind {s}",
        ),
    ),
    "birthplace": (
        (
            "the birthplace of {s}",
            "the town where {s} was born",
            "the native town of {s}",
            "the place in which {s} was born",
        ),
        (
            "the town of {s}'s birth",
            "the place that {s} comes from",
        ),
    ),
    "teacher": (
        (
            "the teacher of {s}",
            "the person who taught {s}",
            "the one under whom {s} studied",
            "the person from whom {s} learned",
        ),
        (
            "the tutor of {s}",
            "the one who prepared {s}",
        ),
    ),
    "setting": (
        (
            "the setting of {s}",
            "the town where {s} takes place",
            "the town in which {s} is set",
            "the place where {s} happens",
        ),
        (
            "the scene of {s}",
            "the town that forms the background of {s}",
        ),
    ),
}

WHOLE = {  # (a fact of the entity, a fact of what that names): questions that are not composed, for training and test
    ("author", "birthplace"): (
        (
            "Where was the author of {s} born?",
            "In which town was the author of {s} born?",
            "What is the birthplace of the author of {s}?",
        ),
        (
            "Which place does the writer of {s} hail from?",
            "Name the home town of whoever wrote {s}.",
        ),
    ),
    ("author", "profession"): (
        (
            "What was the profession of the author of {s}?",
            "What did the author of {s} do for a living?",
            "Which occupation did the author of {s} have?",
        ),
        (
            "What kind of job did the writer of {s} hold?",
            "How did whoever wrote {s} make money?",
        ),
    ),
    ("birthplace", "region"): (
        (
            "In which region was {s} born?",
            "In which region is the birthplace of {s}?",
            "Which region does the birthplace of {s} belong to?",
        ),
        (
            "What part of the country does {s} hail from?",
            "To which region should one go to see the home town of {s}?",
        ),
    ),
    ("birthplace", "founded"): (
        (
            "When was the birthplace of {s} founded?",
            "In which year was the town where {s} was born founded?",
            "What is the founding year of the birthplace of {s}?",
        ),
        (
            "What year marks the beginning of the home town of {s}?",
            "When did the town that {s} hails from come into existence?",
        ),
    ),
    ("teacher", "award"): (
        (
            "Which award did the teacher of {s} win?",
            "What award was the teacher of {s} given?",
            "Which prize did the teacher of {s} receive?",
        ),
        (
            "What distinction did the mentor of {s} obtain?",
            "Which honour came to the mentor of {s}?",
        ),
    ),
    ("setting", "product"): (
        (
            "What is the town known for in which {s} is set?",
            "What is made in the town where {s} takes place?",
            "Which goods come from the setting of {s}?",
        ),
        (
            "What do the people of the town that {s} describes manufacture?",
            "What is the speciality of the location of {s}?",
        ),
    ),
}


def composed(questions: tuple[str, ...], descriptions: tuple[str, ...]) -> tuple[str, ...]:
    """Every question, about everything that is described."""
    return tuple(question.format(s=description) for question, description in product(questions, descriptions))


TWO_HOPS = {
    (first, second): Wordings(
        tuple(dict.fromkeys((*whole, *composed(QUESTIONS[second].train, DESCRIPTIONS[first][0])))),  # each once
        composed(QUESTIONS[second].validation, DESCRIPTIONS[first][1]),
        test,
    )
    for (first, second), (whole, test) in WHOLE.items()
}
