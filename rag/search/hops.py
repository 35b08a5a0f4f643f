"""Questions that no single passage answers: "Which region does the birthplace of Ada Brel belong to?"

The passage about the birthplace shares no name with the question, so no search for the question finds it. The passage
that says where Ada Brel was born names it. So one searches twice, the second time for what follows from the first
passage: what the question still asks, and the names that are new (in the spirit of Qi et al. 2019, "Answering complex
open-domain questions through iterative query generation", where a model is trained to write that second query).
"""

from __future__ import annotations

import re

from rag.data.corpus import Passage

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
