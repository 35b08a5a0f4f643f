"""All ways in which facts of the made-up world are asked for and stated, by relation."""

from __future__ import annotations

from rag.data.wordings import people, places, works
from rag.data.wordings.two_hops import compose

QUESTIONS = people.QUESTIONS | places.QUESTIONS | works.QUESTIONS
STATEMENTS = people.STATEMENTS | places.STATEMENTS | works.STATEMENTS
TWO_HOPS = compose(QUESTIONS)

__all__ = ["QUESTIONS", "STATEMENTS", "TWO_HOPS"]
