"""What every dataset becomes: passages to search, and questions whose right passages are known.

Legend: R rows, the places of passages in the corpus, counted from 0.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from common.errors import ProjectError
from common.runtime import mix_seed

PASSAGE_STREAM = 7_100_001  # keeps the random numbers of each purpose apart
QUESTION_STREAM = 7_100_002
GROUP_STREAM = 7_100_003
SPLITS = ("train", "validation", "test")
NAMED = 5  # of many, so many are named in a message
SCAN = 1 << 24  # bytes looked through for line ends at once


@dataclass(frozen=True)
class Passage:
    """A piece of text that can be found.

    Attributes:
        id: the dataset's own, or file and number.
        group: what belongs together when questions are split: an article, a file.
    """

    id: str
    text: str
    title: str = ""
    group: str = ""

    @property
    def whole(self) -> str:
        """Title and text, as they are searched."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Question:
    """A question with what is known of its answer.

    Attributes:
        answers: right answers, any of which will do; empty where the dataset has none.
        gold: id of each relevant passage -> grade; empty where nobody has judged passages.
        group: of its passage, so that no article is in two splits.
        kind: such as one_hop; measured apart where there are several.
    """

    id: str
    text: str
    answers: tuple[str, ...] = ()
    gold: dict[str, int] = field(default_factory=dict)
    group: str = ""
    kind: str = ""

    @property
    def relevant(self) -> list[str]:
        """Ids of the passages with a grade above 0."""
        return [passage for passage, grade in self.gold.items() if grade > 0]


class Passages(Sequence[Passage]):
    """Passages in memory."""

    def __init__(self, items: Iterable[Passage]) -> None:
        self._items = list(items)
        self._rows = {passage.id: row for row, passage in enumerate(self._items)}

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, row: int) -> Passage: ...
    @overload
    def __getitem__(self, row: slice) -> list[Passage]: ...
    def __getitem__(self, row: int | slice) -> Passage | list[Passage]:
        return self._items[row]

    def ranked(self, rows: Iterable[int]) -> list[Passage]:
        """The passages of a ranking; a place without one has row -1 and is left out."""
        return [self[int(row)] for row in rows if row >= 0]

    def row_of(self, passage_id: str) -> int | None:
        """The row of an id; None for one that is not here."""
        return self._rows.get(passage_id)

    def fingerprint(self) -> str:
        """SHA-256 over ids and texts in their order: what decides whether vectors on the disk are of these."""
        digest = hashlib.sha256()
        for passage in self:
            digest.update(f"{passage.id}\n{passage.title}\n{passage.text}\n\n".encode())
        return digest.hexdigest()


class LineTable(Passages):
    """Passages that stay in a text file, one a line: millions of them cost eight bytes each.

    Args:
        parse: from a line to its passage.
        first: the id of the first line; the others count on from there.
        header: lines at the top that are none.
    """

    def __init__(self, path: Path, parse: Callable[[str], Passage], first: int = 0, header: int = 0) -> None:
        self.path = path
        self._parse = parse
        self._first = first
        self._file = path.open("rb")
        self._text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = line_starts(self._text)[header:]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        line = self._text[self._starts[row] : self._starts[row + 1]]
        passage = self._parse(line.decode("utf-8", errors="replace").rstrip("\r\n"))
        self.check_id(passage, row)
        return passage

    def check_id(self, passage: Passage, row: int) -> None:
        """`ProjectError` for a line whose id is not the next number: judgements would speak of other passages."""
        if passage.id != str(row + self._first):
            raise ProjectError(f"{self.path}, passage {row + self._first}: has the id {passage.id[:50]!r}")

    def row_of(self, passage_id: str) -> int | None:
        row = int(passage_id) - self._first if passage_id.isdecimal() else -1
        return row if 0 <= row < len(self) else None

    def fingerprint(self) -> str:
        """Of the file's name, size and time: reading gigabytes at every start would cost minutes."""
        about = self.path.stat()
        return hashlib.sha256(f"{self.path.name} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()


def line_starts(text: mmap.mmap) -> np.ndarray[Any, Any]:
    """Where each line begins, and at the end the length of the whole. int64 (R + 1,)"""
    ends = []
    for start in range(0, len(text), SCAN):
        part = np.frombuffer(text[start : start + SCAN], np.uint8)
        ends.append(np.flatnonzero(part == ord("\n")) + start + 1)
    starts = np.concatenate([[0], *ends])
    return starts if starts[-1] == len(text) else np.append(starts, len(text))


@dataclass
class Collection:
    """A corpus with its questions.

    Attributes:
        notes: what a person should know, such as files that were left out.
        complete: whether every passage was judged for every question: no other answers it, whatever its words.
    """

    name: str
    passages: Passages
    train: list[Question] = field(default_factory=list)
    validation: list[Question] = field(default_factory=list)
    test: list[Question] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def questions(self, split: str) -> list[Question]:
        """The questions of train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def rows_of(self, question: Question) -> list[int]:
        """Rows of a question's relevant passages."""
        rows = (self.passages.row_of(passage) for passage in question.relevant)
        return [row for row in rows if row is not None]


def check(collection: Collection) -> Collection:
    """The collection, if one can trust a number measured on it; else `ProjectError`.

    There must be passages; every judged passage must be among them; no article may have questions in two splits.
    (Where questions are judged on some passages of a corpus, most passages must belong to none of the tested ones, or
    finding the right one would be easier than it looks: that is noted.)
    """
    if len(collection.passages) == 0:
        raise ProjectError(f"{collection.name} has no passages: nothing can be searched")
    splits = {name: collection.questions(name) for name in SPLITS}
    for name, questions in splits.items():
        for question in questions:
            if not question.text.strip():
                raise ProjectError(f"{collection.name}: question {question.id!r} of {name} is empty")
            lost = [item for item in question.relevant if collection.passages.row_of(item) is None]
            if lost:
                raise ProjectError(
                    f"{collection.name}: question {question.id!r} of {name} has the passage {lost[0]!r}, which is "
                    "not in the corpus"
                )
    groups = {name: {question.group for question in questions} - {""} for name, questions in splits.items()}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if both := groups[one] & groups[other]:
            raise ProjectError(f"{collection.name}: {sorted(both)[0]!r} has questions in {one} and in {other}")
    tested = {passage for question in collection.test for passage in question.relevant}
    if len(tested) == len(collection.passages):
        collection.notes.append("note: every passage answers a test question; a real corpus has others, too")
    return collection


def unique(passages: Iterable[Passage], notes: list[str]) -> Passages:
    """Passages without those whose id has been there before, which are counted and named."""
    kept: dict[str, Passage] = {}
    twice: Counter[str] = Counter()
    for passage in passages:
        if passage.id in kept:
            twice[passage.id] += 1
        else:
            kept[passage.id] = passage
    if twice:
        notes.append(f"{twice.total()} passages left out whose id was there before: {named(twice)}")
    return Passages(kept.values())


def named(items: Iterable[str]) -> str:
    """A few of the items, and how many more there are."""
    each = list(items)
    more = f" and {len(each) - NAMED} more" if len(each) > NAMED else ""
    return ", ".join(each[:NAMED]) + more


def by_kind(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Where the questions of each kind are; nothing where all are of one."""
    kinds = sorted({question.kind for question in questions} - {""})
    if len(kinds) < 2:
        return {}
    return {kind: [i for i, question in enumerate(questions) if question.kind == kind] for kind in kinds}


def drawn(count: int, total: int, *seed: int) -> np.ndarray[Any, Any]:
    """So many of 0 ... total-1, without repetition, ascending, as the seed has it; all of them for a count of 0 or too
    many.
    """
    if count == 0 or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(mix_seed(*seed)).choice(total, count, replace=False))


def split_by_group(questions: list[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """The questions in two: those of most groups, and those of a share of the groups, drawn by seed. A question
    without a group is one of its own.
    """
    groups = sorted({question.group or question.id for question in questions})
    chosen = {groups[i] for i in drawn(max(1, round(share * len(groups))), len(groups), seed, GROUP_STREAM)}
    first = [question for question in questions if (question.group or question.id) not in chosen]
    return first, [question for question in questions if (question.group or question.id) in chosen]


def shrink(collection: Collection, max_passages: int, max_questions: int, seed: int) -> Collection:
    """A smaller collection for trying things out: passages drawn by seed, whatever they answer, and the questions that
    still have theirs; then so many of the training questions.
    """
    if 0 < max_passages < len(collection.passages):
        rows = drawn(max_passages, len(collection.passages), seed, PASSAGE_STREAM)
        passages = Passages(collection.passages[int(row)] for row in rows)

        def kept(questions: list[Question]) -> Iterator[Question]:
            for question in questions:
                gold = {name: grade for name, grade in question.gold.items() if passages.row_of(name) is not None}
                if any(grade > 0 for grade in gold.values()) or not question.gold:
                    yield replace(question, gold=gold)

        train, validation, test = (list(kept(collection.questions(split))) for split in SPLITS)
        collection = replace(collection, passages=passages, train=train, validation=validation, test=test)
    chosen = drawn(max_questions, len(collection.train), seed, QUESTION_STREAM)
    return replace(collection, train=[collection.train[i] for i in chosen])
