"""What the reader is shown: an instruction, worked examples, numbered passages, the question; as tokens.

    prefix  Answer with a few words from the passages, ...      the same for every question: read once, and kept
            Passages: [1] ... Question: ... Answer: Paris [1]    worked examples
    suffix  Passages:
            [1] Denver Broncos. The ...
            [2] ...
            Question: Who won?
            Answer:

The prompt's own special tokens are put in as numbers. Text, whosever it is, is tokenised apart and with special tokens
switched off, so that no spelling in a passage, a title or a question becomes one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config import ConfigError
from common.errors import ProjectError
from rag.data.corpus import Passage
from rag.reader.neutralise import neutralise
from rag.settings import ReaderConfig

WITH_PASSAGES = "Answer each question with a few words taken from the passages."
WITH_SOURCES = "Answer each question with a few words taken from the passages, and name the passage, such as [1]."
WITH_SOURCES_FIRST = "Name the passage with the answer to each question, such as [1], and a few words taken from it."
CLOSED_BOOK = "Answer each question with a few words."
CITED = re.compile(r"\s*\[(\d{1,3})\]")
HOLE = "\ue000{}\ue001"  # stands for text in a chat template while that is rendered; never reaches a model


@dataclass(frozen=True)
class Example:
    """A worked example: a question with passages and its answer.

    Attributes:
        sources: places of the right passages among `passages`, from 0.
    """

    question: str
    passages: tuple[Passage, ...]
    answer: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A question ready to be read.

    Attributes:
        ids: its tokens behind the shared prefix.
        passages: those that are in it; citation [n] means the n-th, counted from 1.
    """

    ids: list[int]
    passages: tuple[Passage, ...]


class Prompter:
    """Writes prompts for one model.

    Args:
        tokenizer: of transformers, a fast one.
        longest: tokens that the model can read and write together.
        examples: worked ones, in the order in which they are shown.
    """

    def __init__(self, tokenizer: Any, config: ReaderConfig, longest: int, examples: Sequence[Example] = ()) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.longest = longest
        self.examples = list(examples)
        self.forbidden = set(tokenizer.added_tokens_decoder)
        self.special = [token.content for token in tokenizer.added_tokens_decoder.values()]
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.first: list[int] = whole[:at]  # what this model's texts begin and end with
        self.last: list[int] = whole[at + len(plain) :]
        if config.style == "chat" and not tokenizer.chat_template:
            raise ConfigError("reader.style", f"{config.model} has no chat template; use completion")
        self.prefix = self._prefix(self.examples, closed=False)
        self.closed_prefix = self._prefix(self.examples, closed=True)

    # -- text to tokens ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Tokens of text as data: no special token comes of it, however it is spelled. (With reader.neutralise=false
        it is tokenised as a program without that care does.)
        """
        careful = self.config.neutralise
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=careful, verbose=False)["input_ids"]
        return [i for i in ids if i not in self.forbidden] if careful else ids

    def clean(self, text: str) -> str:
        """Text of a passage, a title or a question, made harmless."""
        return neutralise(text, self.special) if self.config.neutralise else text

    def cut(self, text: str, count: int) -> tuple[str, int]:
        """The beginning of a text that is at most so many tokens, and how many it is."""
        found = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ends = found["offset_mapping"]
        if len(ends) <= count:
            return text, len(ends)
        return text[: ends[count - 1][1]] if count else "", count

    # -- prompts -------------------------------------------------------------------------------------------------------

    def build(self, question: str, passages: Sequence[Passage] | None) -> Prompt:
        """The prompt of a question: with passages, best first, or from memory where there are to be none.

        Passages are cut, and the last ones left out, where they are too long together; the question never is.
        `ProjectError` where that alone is too long.
        """
        question = self.clean(question)
        closed = passages is None
        bare = len(self._suffix(block(question, None if closed else [""]), closed))
        room = self.longest - len(self.closed_prefix if closed else self.prefix) - bare - self.config.answer_tokens
        if room < 0:
            raise ProjectError(
                f"a question of {len(question)} characters leaves no room in the {self.longest} tokens that "
                f"{self.config.model} reads; shorten it, or set reader.examples=0"
            )
        shown, texts = self.fit(list(passages or []), min(room, self.config.context_tokens))
        if self.config.order == "best_last":
            shown.reverse()
            texts.reverse()
        ids = self._suffix(block(question, None if closed else texts), closed)
        return Prompt(ids, tuple(shown))

    def fit(self, passages: list[Passage], room: int) -> tuple[list[Passage], list[str]]:
        """The passages that so many tokens have room for, and their texts as they are shown."""
        shown: list[Passage] = []
        texts: list[str] = []
        for passage in passages[: self.config.passages]:
            text, size = self.cut(self.clean(passage.whole), self.config.passage_tokens)
            label = 6  # tokens of `[12]` and the line's end, at most
            if size + label > room and shown:
                break
            if size + label > room:
                text, size = self.cut(text, max(0, room - label))
            shown.append(passage)
            texts.append(text)
            room -= size + label
        return shown, texts

    def answer_ids(self, answer: str, sources: Sequence[int]) -> list[int]:
        """The tokens that a reader is trained to say: the answer, its citations, the end of the line."""
        return self.encode(self.lead + self._said(answer, sources) + "\n")

    def instruction(self, closed: bool) -> str:
        """What a prompt begins with."""
        if closed:
            return CLOSED_BOOK
        return {"model": WITH_SOURCES, "first": WITH_SOURCES_FIRST}.get(self.config.cite, WITH_PASSAGES)

    @property
    def lead(self) -> str:
        """What stands between the prompt and the first word of an answer."""
        return "" if self.config.style == "chat" else " "

    def _said(self, answer: str, sources: Sequence[int]) -> str:
        said = self.clean(answer)
        if self.config.cite == "first":  # in the order in which they are read: the last has the answer
            return "".join(f"[{place + 1}] " for place in sources) + said
        if self.config.cite == "model":
            return said + "".join(f" [{place + 1}]" for place in sorted(sources))
        return said

    def _prefix(self, examples: list[Example], closed: bool) -> list[int]:
        """Tokens of what is the same for every question."""
        if self.config.style == "chat":
            return self._chat(examples, "", closed)[0]
        parts = [self.instruction(closed)]
        for example in examples:
            texts = None if closed else self.fit(list(example.passages), self.config.context_tokens)[1]
            said = self._said(example.answer, () if closed else example.sources)
            parts.append(f"{block(self.clean(example.question), texts)}\nAnswer: {said}")
        return self.first + self.encode("\n\n".join(parts))

    def _suffix(self, text: str, closed: bool) -> list[int]:
        """Tokens of what is new with a question."""
        if self.config.style == "chat":
            return self._chat([], text, closed)[1]
        return self.encode(f"\n\n{text}\nAnswer:") + self.last

    def _chat(self, examples: list[Example], text: str, closed: bool) -> tuple[list[int], list[int]]:
        """The model's own chat template around examples and a question: tokens before the last thing a user says, and
        from there on.
        """
        instruction = self.instruction(closed)
        said = []
        for example in examples:
            texts = None if closed else self.fit(list(example.passages), self.config.context_tokens)[1]
            said.append(f"{instruction}\n\n{block(self.clean(example.question), texts)}")
            said.append(self._said(example.answer, () if closed else example.sources))
        said.append(f"{instruction}\n\n{text}")
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": HOLE.format(i)} for i in range(len(said))]
        form = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before: list[int] = []
        for i, content in enumerate(said):
            frame, form = form.split(HOLE.format(i))
            before += self.tokenizer(frame, add_special_tokens=False)["input_ids"]
            if i < len(said) - 1:
                before += self.encode(content)
        behind = self.tokenizer(form, add_special_tokens=False)["input_ids"]
        return before, self.encode(said[-1]) + behind


def block(question: str, texts: Sequence[str] | None) -> str:
    """Numbered passages, one a line, and the question on a line of its own."""
    lines = [] if texts is None else ["Passages:", *(f"[{i}] {text}" for i, text in enumerate(texts, start=1))]
    return "\n".join([*lines, f"Question: {question}"])


def parse(said: str, count: int) -> tuple[str, tuple[int, ...]]:
    """What a reader wrote as its answer and the places (from 0) of the passages it cites; numbers that no passage of
    the prompt has are dropped.

    Args:
        count: passages in the prompt.
    """
    line = said.partition("\n")[0]
    numbers = dict.fromkeys(int(number) for number in CITED.findall(line))
    return CITED.sub("", line).strip(), tuple(n - 1 for n in numbers if 1 <= n <= count)
