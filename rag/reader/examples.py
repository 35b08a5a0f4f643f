"""Contexts to learn reading from: the right passages among others that look alike, or the others alone.

Everything drawn is a function of (seed, epoch, place), so that a resumed training sees what an unbroken one does.
Worked examples for a model that is not finetuned come from here, too; all of this is from training questions only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.errors import ProjectError
from common.runtime import mix_seed
from rag.config import Config
from rag.data.corpus import Collection, Passage, Question
from rag.metrics.scores import answer_at
from rag.reader.prompt import Example
from rag.search.retriever import Retriever

CONTEXT_STREAM, ORDER_STREAM, EXAMPLE_STREAM = range(7_400_001, 7_400_004)
EXAMPLE_WORDS = 60  # of a passage in a worked example
EXAMPLE_PASSAGES = 2
EXAMPLE_ANSWER = 4  # words of an answer in a worked example, at most: they show what a short answer is
TRIES = 50  # questions looked at for each worked example

# for a corpus without questions, such as a person's own documents
PLAIN_EXAMPLES = (
    Example(
        "When was the lighthouse at Norrvik first lit?",
        (
            Passage("a", "The keeper's house at Norrvik is open to visitors from May to September.", "Norrvik house"),
            Passage(
                "b", "Built of granite, the lighthouse at Norrvik was first lit in 1862 and still works.", "Norrvik"
            ),
        ),
        "1862",
        (1,),
    ),
    Example(
        "Who repairs the bells of Saint Odo?",
        (
            Passage(
                "c", "The four bells of Saint Odo are repaired by Maren Tolle, as they were by her father.", "Bells"
            ),
            Passage("d", "Saint Odo has a choir of thirty voices, which sings on Sundays.", "Choir"),
        ),
        "Maren Tolle",
        (0,),
    ),
    Example(
        "What does the ferry to Lysholm carry in winter?",
        (
            Passage("e", "A new ferry terminal is planned in Lysholm, where the old one leaks.", "Terminal"),
            Passage(
                "f", "In summer the ferry to Lysholm carries cars; in winter it carries mail and medicine.", "Ferry"
            ),
        ),
        "mail and medicine",
        (1,),
    ),
)


@dataclass(frozen=True)
class Asked:
    """A question about a context.

    Attributes:
        sources: places of the passages that answer it, from 0, in the order of the question's judgements; none where
            they do not.
        answer: as it stands in the passage; empty where there is none.
    """

    question: str
    answer: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """Passages, and questions about them."""

    passages: tuple[Passage, ...]
    asked: tuple[Asked, ...]


class Contexts:
    """All contexts that training draws from: questions with the same right passages belong to one.

    Args:
        retriever: over the collection's passages; it finds what looks alike.
    """

    def __init__(self, collection: Collection, retriever: Retriever, config: Config) -> None:
        self.collection = collection
        self.retriever = retriever
        self.config = config.reader_train
        self.seed = config.seed
        groups: dict[tuple[str, ...], list[Question]] = {}
        for question in collection.train:
            if question.answers:
                # where nobody has judged passages, each question is a context of its own
                key = tuple(sorted(question.relevant)) or (f"question {question.id}",)
                groups.setdefault(key, []).append(question)
        self.groups = list(groups.values())
        self.about: dict[str, list[int]] = {}  # passage -> groups of questions that need it
        for index, key in enumerate(groups):
            for passage in key:
                self.about.setdefault(passage, []).append(index)
        if not self.groups:
            raise ProjectError(
                f"{collection.name} has no training questions with answers; a reader cannot learn from it"
            )

    def __len__(self) -> int:
        return len(self.groups)

    def order(self, epoch: int) -> list[int]:
        """The order in which an epoch goes through the contexts."""
        rng = np.random.default_rng(mix_seed(self.seed, ORDER_STREAM, epoch))
        return [int(i) for i in rng.permutation(len(self.groups))]

    def draw(self, epoch: int, index: int) -> Context:
        """One context as an epoch has it."""
        config = self.config
        rng = np.random.default_rng(mix_seed(self.seed, CONTEXT_STREAM, epoch, index))
        group = self.groups[index]
        questions = [group[int(i)] for i in rng.permutation(len(group))[: config.questions]]
        lead = questions[0]
        right, others = self.candidates(lead)
        missing = bool(rng.random() < config.unanswerable) or not right
        kept = incomplete(right, lead, rng) if missing else right
        most = max(config.passages, len(kept))
        count = int(rng.integers(max(config.fewest, len(kept)), most + 1)) - len(kept)
        if config.others == "words":  # else the best, just as the reader will be shown them
            rng.shuffle(others)
        passages = [self.cut(passage, lead.answers, rng) for passage in kept]
        passages += [self.cut(passage, (), rng) for passage in others[:count]]
        order = [int(i) for i in rng.permutation(len(passages))]
        shown = tuple(passages[i] for i in order)
        alike = [passage.id for passage in [*right, *others[count:]]]
        further = self.further([passage.id for passage in shown], alike, index, rng)
        complete = self.collection.complete
        asked = [
            ask(question, shown, places_of(question.relevant or [passage.id for passage in right], shown), complete)
            for question in [*questions, *further]
        ]
        return Context(shown, tuple(each for each in asked if each is not None))

    def further(self, shown: list[str], alike: list[str], lead: int, rng: np.random.Generator) -> list[Question]:
        """Questions of other groups, one each: half of them are answered by the other passages that are shown, half
        need one that looks alike and is not shown. The same text with other questions teaches which name an answer
        belongs to.

        Args:
            shown, alike: ids of passages that are shown, and of others.
            lead: the group that the context was drawn for.
        """
        if not self.config.further:
            return []
        near = dict.fromkeys(group for passage in [*shown, *alike] for group in self.about.get(passage, ()))
        near.pop(lead, None)
        answered = [group for group in near if {*self.groups[group][0].relevant} <= {*shown}]
        open_ = [group for group in near if group not in answered]
        half = self.config.further // 2
        chosen = [*rng.permutation(answered)[: self.config.further - half], *rng.permutation(open_)[:half]]
        return [self.groups[int(group)][int(rng.integers(len(self.groups[int(group)])))] for group in chosen]

    def candidates(self, question: Question) -> tuple[list[Passage], list[Passage]]:
        """The right passages of a question, and the best others that are found for it.

        Where not every passage has been judged, one with the answer's words may be right as well, and is left out.
        """
        found = [hit.passage for hit in self.retriever.search([question.text], self.config.depth)[0]]
        right = [self.collection.passages[row] for row in self.collection.rows_of(question)]
        if not question.gold:  # the best that has the answer's words, as DPR's authors do for such datasets
            right = [passage for passage in found if has_answer(passage, question)][:1]
        mine = {passage.id for passage in right}
        others = [passage for passage in found if passage.id not in mine]
        if not self.collection.complete:
            others = [passage for passage in others if not has_answer(passage, question)]
        return right, others or [p for p in self.strangers(question) if p.id not in mine]

    def strangers(self, question: Question) -> list[Passage]:
        """A few passages that have nothing to do with a question, where BM25 finds none that look alike."""
        rng = np.random.default_rng(mix_seed(self.seed, CONTEXT_STREAM, len(question.text)))
        drawn = rng.integers(0, len(self.collection.passages), 4 * self.config.passages)
        found = (self.collection.passages[int(row)] for row in drawn)
        return [passage for passage in found if not has_answer(passage, question)]

    def cut(self, passage: Passage, answers: Sequence[str], rng: np.random.Generator) -> Passage:
        """At most `window` words of a passage."""
        return replace(passage, text=window(passage.text, answers, self.config.window, rng))


def incomplete(right: list[Passage], question: Question, rng: np.random.Generator) -> list[Passage]:
    """What is shown of the right passages where the answer is to be missing. Of one: nothing. Of several, in half of
    the cases those that only lead to the answer: a first step without the second, which is what a search finds that
    knows the first name alone, and the likeliest to be taken for an answer.
    """
    if len(right) < 2 or rng.random() >= 0.5:
        return []
    return [passage for passage in right if not has_answer(passage, question)]


def has_answer(passage: Passage, question: Question) -> bool:
    """Whether one of the question's answers stands in a passage."""
    return answer_at([passage.whole], question.answers, 1) > 0


def places_of(right: Sequence[str], passages: Sequence[Passage]) -> tuple[int, ...]:
    """Where the passages with these ids stand, in the order in which they are named; nowhere unless all do."""
    places = {passage.id: place for place, passage in enumerate(passages)}
    if not all(name in places for name in right):
        return ()
    return tuple(places[name] for name in right)


def ask(question: Question, passages: Sequence[Passage], sources: tuple[int, ...], complete: bool) -> Asked | None:
    """A question about passages of which some are right; None where a part that was cut away has the answer, or where
    none is right and one has the answer's words all the same, unless judgements are complete: then it says something
    else in these words.
    """
    if complete and not sources:
        return Asked(question.text, "", ())
    shown = [passages[place] for place in sources] or list(passages)
    answer = next((text for text in question.answers if answer_at([p.whole for p in shown], [text], len(shown))), "")
    if bool(answer) != bool(sources):
        return None
    return Asked(question.text, answer, sources)


def window(text: str, answers: Sequence[str], words: int, rng: np.random.Generator) -> str:
    """A run of so many words of a text, drawn among those that have one of the answers whole; 0 = the whole text."""
    places = [match.span() for match in re.finditer(r"\S+", text)]
    if words == 0 or len(places) <= words:
        return text
    low, high = 0, len(places) - words
    for answer in answers:
        at = text.find(answer)
        if at >= 0:
            first = next(i for i, (_, end) in enumerate(places) if end > at)
            last = next(i for i, (_, end) in enumerate(places) if end >= at + len(answer))
            low, high = min(max(0, last - words + 1), high), min(first, high)
            break
    start = int(rng.integers(min(low, high), high + 1))
    return text[places[start][0] : places[start + words - 1][1]]


def worked_examples(collection: Collection, config: Config) -> list[Example]:
    """Worked examples from training questions, drawn by seed: each with its right passage, shortened around the
    answer, and another passage from elsewhere. `PLAIN_EXAMPLES` for a collection without such questions.
    """
    wanted = config.reader.examples
    usable = [q for q in collection.train if q.answers and len(q.relevant) == 1]
    if not usable:
        return list(PLAIN_EXAMPLES[:wanted])
    rng = np.random.default_rng(mix_seed(config.seed, EXAMPLE_STREAM))
    examples: list[Example] = []
    for place in rng.permutation(len(usable))[: TRIES * max(1, wanted)]:
        if len(examples) == wanted:
            break
        question = usable[int(place)]
        right = collection.passages[collection.rows_of(question)[0]]
        text = window(right.text, question.answers, EXAMPLE_WORDS, rng)
        other = collection.passages[int(rng.integers(0, len(collection.passages)))]
        answer = min(question.answers, key=len)
        if (
            answer not in text
            or len(answer.split()) > EXAMPLE_ANSWER
            or other.group == right.group
            or has_answer(other, question)
        ):
            continue
        passages = [replace(right, text=text), replace(other, text=window(other.text, (), EXAMPLE_WORDS, rng))]
        passages = passages[: min(EXAMPLE_PASSAGES, config.reader.passages)]
        turn = len(passages) == 2 and len(examples) % 2 == 0  # else a model may learn that the first is always right
        shown = tuple(reversed(passages)) if turn else tuple(passages)
        examples.append(Example(question.text, shown, answer, (int(turn),)))
    return examples
