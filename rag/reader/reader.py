"""Answers with sources, from a language model: with passages, or from memory by the same weights.

The confidence of an answer is a probability that the reader itself assigns:

    (1 - P(no answer)) * exp(mean over the answer's tokens of log P(token | before))

where P(no answer) is that of the abstention word in place of a first token; near 0 for a model that was not finetuned
to say it. The answer is what the reader would say if it had to: whether it is shown or withheld is decided afterwards,
by comparing the confidence with a threshold that was set on validation questions.

Legend: Q questions, B prompts read at once.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rag.data.corpus import Passage
from rag.metrics.scores import normalise
from rag.reader.decode import Decoder, Rules
from rag.reader.prompt import CITED, Prompt, Prompter, parse
from rag.settings import ReaderConfig

LEADING = re.compile(rf"({CITED.pattern})+")  # citations at the beginning
Track = Callable[[Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Answer:
    """What a reader said.

    Attributes:
        text: the answer without citations.
        passages: what it was shown, in the order of their numbers.
        cited: places among these, from 0, that it named as sources.
        confidence: in [0, 1].
        log_prob: mean over the answer's tokens.
        no_answer: probability that there is no answer in the passages.
    """

    text: str
    passages: tuple[Passage, ...] = ()
    cited: tuple[int, ...] = ()
    confidence: float = 0.0
    log_prob: float = 0.0
    no_answer: float = 0.0


class Reader(Protocol):
    """Whatever answers questions.

    Attributes:
        seconds: stage -> time for all questions so far.
    """

    seconds: dict[str, float]

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]] | None) -> list[Answer]:
        """Answers of Q questions, each with its passages, best first; None = without any."""
        ...

    def stream(self, question: str, passages: Sequence[Passage] | None) -> Iterator[str | Answer]:
        """The answer to one question bit by bit, as it is written, and at the end the whole of it."""
        ...


@dataclass
class GenerativeReader:
    """A language model that reads.

    Args:
        decoder: goes on with token numbers.
        prompter: turns questions and passages into them.
        rules: see `stop_rules`.
    """

    config: ReaderConfig
    decoder: Decoder
    prompter: Prompter
    rules: Rules
    track: Track = iter
    seconds: dict[str, float] = field(default_factory=lambda: {"prompt": 0.0, "read": 0.0, "write": 0.0})

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]] | None) -> list[Answer]:
        """See `Reader`. Prompts of similar length are read together; the order of the answers is the questions'."""
        started = time.perf_counter()
        given = [None] * len(questions) if passages is None else passages
        prompts = [self.prompter.build(question, its) for question, its in zip(questions, given, strict=True)]
        self.seconds["prompt"] += time.perf_counter() - started
        answers: list[Answer | None] = [None] * len(prompts)
        prefix = self.prompter.closed_prefix if passages is None else self.prompter.prefix
        for rows in self.track(batches([len(p.ids) for p in prompts], len(prefix), self.config.batch_tokens)):
            for row, answer in zip(rows, self._batch(prefix, [prompts[row] for row in rows]), strict=True):
                answers[row] = answer
        return [answer for answer in answers if answer is not None]

    def stream(self, question: str, passages: Sequence[Passage] | None) -> Iterator[str | Answer]:
        """See `Reader`."""
        prompt = self.prompter.build(question, passages)
        prefix = self.prompter.closed_prefix if passages is None else self.prompter.prefix
        said: list[int] = []
        log_probs: list[float] = []
        no_answer = 0.0
        shown = text = ""
        with self._timed():
            for step in self.decoder.greedy(prefix, [prompt.ids], self.rules):
                no_answer = float(step.abstain[0]) if step.abstain is not None else no_answer
                if int(step.tokens[0]) in self.rules.stop:
                    break
                said.append(int(step.tokens[0]))
                log_probs.append(float(step.log_probs[0]))
                text = self.decode(said).split("\n")[0].lstrip()
                if not text.endswith("\ufffd"):  # the rest of a character is still to come
                    yield text[len(shown) :]
                    shown = text
        yield text[len(shown) :]
        yield self.finish(prompt, said, log_probs, no_answer)

    def unguarded(self) -> GenerativeReader:
        """The same model without `reader.neutralise`: to measure what that is worth, and for nothing else."""
        config = replace(self.config, neutralise=False)
        old = self.prompter
        prompter = Prompter(old.tokenizer, config, old.longest, old.examples)
        return GenerativeReader(config, self.decoder, prompter, self.rules, self.track)

    def _batch(self, prefix: list[int], prompts: list[Prompt]) -> list[Answer]:
        """Answers of B prompts."""
        said: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        no_answer = [0.0] * len(prompts)
        with self._timed():
            for step in self.decoder.greedy(prefix, [prompt.ids for prompt in prompts], self.rules):
                if step.abstain is not None:
                    no_answer = step.abstain.tolist()
                for row, (token, log_prob) in enumerate(zip(step.tokens.tolist(), step.log_probs.tolist())):
                    stopped[row] |= token in self.rules.stop
                    if not stopped[row]:
                        said[row].append(token)
                        log_probs[row].append(log_prob)
        return [self.finish(*each) for each in zip(prompts, said, log_probs, no_answer, strict=True)]

    def finish(self, prompt: Prompt, said: list[int], log_probs: list[float], no_answer: float) -> Answer:
        """The answer that some tokens are."""
        text, cited = parse(self.decode(said), len(prompt.passages))
        if self.config.cite == "match":
            cited = matching(text, prompt.passages)
        own = self.words(said)
        log_prob = sum(log_probs[own]) / max(1, len(log_probs[own]))
        return Answer(text, prompt.passages, cited, (1 - no_answer) * math.exp(log_prob), log_prob, no_answer)

    def words(self, said: list[int]) -> slice:
        """The tokens of an answer that belong to no citation: what its probability is about. (All, if there is nothing
        but citations.)
        """
        leading = LEADING.match(self.decode(said))
        start = 0
        while leading and start < len(said) and len(self.decode(said[:start])) < leading.end():
            start += 1
        if start == len(said):
            return slice(None)
        ends = (i for i in range(start + 1, len(said)) if "[" in self.decode(said[start : i + 1]))
        return slice(start, next(ends, None))

    def decode(self, ids: list[int]) -> str:
        """Text of tokens."""
        return str(self.prompter.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _timed(self) -> Taking:
        return Taking(self.decoder, self.seconds)


class Taking:
    """Adds to a table what a decoder has spent, by its own clock, while a block ran."""

    def __init__(self, decoder: Any, seconds: dict[str, float]) -> None:
        self.clock: dict[str, float] = decoder.seconds
        self.seconds = seconds

    def __enter__(self) -> None:
        self.before = dict(self.clock)

    def __exit__(self, *_: object) -> None:
        for name, value in self.clock.items():
            self.seconds[name] += value - self.before[name]


def matching(answer: str, passages: Sequence[Passage]) -> tuple[int, ...]:
    """The place of the first passage that has the answer's words in it, word for word after SQuAD's normalisation."""
    words = f" {normalise(answer)} "
    if not words.strip():
        return ()
    return next(((i,) for i, item in enumerate(passages) if words in f" {normalise(item.whole)} "), ())


def batches(lengths: Sequence[int], prefix: int, limit: int) -> list[list[int]]:
    """Rows of similar length together, so many that prefix and padded suffixes are at most `limit` tokens, though at
    least one; the longest first, so that a lack of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    for row in order:
        longest = lengths[found[-1][0]] + prefix if found else 0
        if found and longest * (len(found[-1]) + 1) <= limit:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def stop_rules(tokenizer: Any, config: ReaderConfig, lead: str, pad: int, ends: Iterable[int]) -> Rules:
    """Which tokens end an answer, and which one stands for none.

    Args:
        lead: what stands between prompt and answer.
        ends: numbers of the tokens that end a text.
    """
    vocabulary = len(tokenizer)
    spelled = tokenizer.batch_decode([[i] for i in range(vocabulary)], clean_up_tokenization_spaces=False)
    lines = [i for i, text in enumerate(spelled) if "\n" in text]
    brackets = [i for i, text in enumerate(spelled) if text.strip().startswith("[")]
    special = set(tokenizer.all_special_ids)
    word = tokenizer(lead + config.abstain, add_special_tokens=False)["input_ids"]
    # a tokenizer may put a mark of white space first, which any answer begins with
    first = next((i for i in word if spelled[i].strip()), None)
    abstain = [] if first is None else [first]
    if first == word[-1]:  # the whole word: with a capital, or without the space, it says the same
        abstain = [i for i, text in enumerate(spelled) if text.strip().lower() == config.abstain.lower()]
    stop = {*lines, *special, *ends}
    never_first = tuple(sorted(stop if config.cite == "first" else {*stop, *brackets}))
    return Rules(tuple(sorted(stop)), never_first, tuple(abstain), pad, config.answer_tokens)
