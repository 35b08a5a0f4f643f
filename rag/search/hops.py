"""Questions that no single passage answers: "Which region does the birthplace of Ada Brel belong to?"

The passage about the birthplace shares no name with the question, so no search for the question finds it. The passage
that says where Ada Brel was born names it. So one searches twice, the second time for what follows from the first
passage: what the question still asks, and the names that are new (in the spirit of Qi et al. 2019, "Answering complex
open-domain questions through iterative query generation", where a model is trained to write that second query).

Legend: Q questions, K places.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from rag.data.corpus import Passage

Array = np.ndarray[Any, Any]
WORD = re.compile(r"\w[\w'’-]*")


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
    known = {word.lower() for word in asked} & {word.lower() for word in [*told, *WORD.findall(first.title)]}
    open_ = [word for word in asked if word.lower() not in known]
    names = [word for word in told if word[0].isupper() and word.lower() not in known]
    return " ".join([*open_, *dict.fromkeys(names)]) or question


def by_turns(first: Array, second: Array, k: int) -> tuple[Array, Array]:
    """One ranking of two: the best of the first, the best of the second, the second best of the first, and so on, each
    passage once.

    Args:
        first, second: rows, best first, -1 for empty places, each (Q, K).
    Returns:
        scores (Q, k), 1 / place: they order and mean nothing else; rows (Q, k); -inf and -1 where there are no more.
    """
    scores = np.full((len(first), k), -np.inf, np.float32)
    best = np.full((len(first), k), -1, np.int64)
    for query, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        turns = [row for pair in zip(one, other, strict=True) for row in pair if row >= 0]
        rows = list(dict.fromkeys(turns))[:k]
        best[query, : len(rows)] = rows
        scores[query, : len(rows)] = 1.0 / np.arange(1, len(rows) + 1)
    return scores, best
