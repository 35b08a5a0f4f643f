"""Documents cut into passages: along their sections and paragraphs, and only where these are too long, within them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SENTENCE = re.compile(r"(?<=[.!?…。！？])\s+")


@dataclass(frozen=True)
class Section:
    """A heading, with those it stands under, and the paragraphs below it."""

    heading: str
    paragraphs: tuple[str, ...]


def chunk(sections: list[Section], words: int, overlap: int) -> Iterator[tuple[str, str]]:
    """(heading, text) of each passage, none of more than so many words.

    A passage never reaches from one section into the next. Paragraphs are kept whole where they fit, else cut between
    sentences, else between words. Where a section is cut, a passage begins with the last words of the one before it.

    Args:
        overlap: words that are repeated, at most half of `words`.
    """
    for section in sections:
        current: list[list[str]] = []  # pieces of the passage in work
        size = 0
        repeated = 0  # words at its start that the passage before it has, too
        for piece in pieces(section.paragraphs, words - overlap):
            if size + len(piece) > words:
                yield section.heading, join(current)
                tail = [word for part in current for word in part][-overlap:] if overlap else []
                current = [tail] if tail else []
                repeated = size = len(tail)
            current.append(piece)
            size += len(piece)
        if size > repeated:
            yield section.heading, join(current)


def pieces(paragraphs: tuple[str, ...], limit: int) -> Iterator[list[str]]:
    """What is not to be cut, as lists of words, each of at most so many."""
    for paragraph in paragraphs:
        words = paragraph.split()
        if len(words) <= limit:
            if words:
                yield words
            continue
        for sentence in SENTENCE.split(paragraph):
            part = sentence.split()
            for start in range(0, len(part), limit):
                yield part[start : start + limit]


def join(parts: list[list[str]]) -> str:
    """The text of some lists of words."""
    return " ".join(word for part in parts for word in part)
