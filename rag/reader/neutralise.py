"""Retrieved text is data. What a passage could use to pass for anything else is made harmless here.

A language model reads one row of tokens, in which instructions, passages and the question differ by nothing but
delimiters. A passage that brings delimiters of its own (a chat template's tokens, a line `Question:`, a citation `[3]`)
can end its place early and speak as somebody else; one that hides text in characters nobody sees says things to the
model that a person checking the source does not find. Both are taken away. What is left is what a passage says in plain
words, and a model may still believe or obey that: injection is reduced here, not solved.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# control, format (zero-width, bidirectional, tags), surrogate, private and unassigned characters
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")
SELECTORS = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF), (0x180B, 0x180F))  # variation selectors: marks that carry bytes
# delimiters of widespread chat templates, whatever model reads here: ChatML, Llama 2 and 3, Gemma, Phi, Mistral
CHAT = re.compile(
    r"<\|[^<>]{0,64}\|>"
    r"|</?(?:s|pad|unk|bos|eos|start_of_turn|end_of_turn|begin_of_text|end_of_text|think|tool_call|tool_response)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\]"
    r"|<</?SYS>>"
    r"|<｜[^<>]{0,64}｜>",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"\b(passages?|sources?|documents?|context|questions?|answers?|instructions?|system|user|assistant|human)\s*[:：]",
    re.IGNORECASE,
)
CITATION = re.compile(r"[\[［【]\s*(\d{1,3})\s*[\]］】]")
RULES = re.compile(r"(?:#{2,}|={3,}|-{3,}|`{3,}|\*{3,}|~{3,}|_{3,})")  # headings, rules and fences


def neutralise(text: str, tokens: Iterable[str] = ()) -> str:
    """The text of a passage or title on one line, without anything that could pass for the prompt's own structure.

    Args:
        tokens: special tokens of the model that reads it, spelled out.
    """
    text = one_line(strip_unseen(text))
    # of a tokenizer's added tokens those that look like delimiters; a few have ordinary words among them
    own = [re.escape(token) for token in tokens if len(token) > 1 and not token[0].isalnum() and not token.isspace()]
    special = re.compile("|".join([CHAT.pattern, *own]), re.IGNORECASE)
    before = ""
    while before != text:  # <|im_<|im_end|>start|> holds another one when the inner has gone
        before = text
        text = special.sub(spell_out, text)
    text = LABEL.sub(r"\1 -", text)
    text = CITATION.sub(r"(\1)", text)
    return one_line(RULES.sub(" ", text))


def strip_unseen(text: str) -> str:
    """The text without characters that print nothing; every kind of white space becomes a plain space."""
    kept = []
    for letter in text:
        if letter.isspace():
            kept.append(" ")
        elif unicodedata.category(letter) not in UNSEEN and not is_selector(letter):
            kept.append(letter)
    return "".join(kept)


def is_selector(letter: str) -> bool:
    """Whether a character only selects a variant of the one before it."""
    return any(low <= ord(letter) <= high for low, high in SELECTORS)


def one_line(text: str) -> str:
    """The words with single spaces between them."""
    return " ".join(text.split())


def spell_out(match: re.Match[str]) -> str:
    """The letters of a delimiter, in round brackets: a person still sees that it was there."""
    return f"({re.sub(r'[^A-Za-z0-9_ ]+', '', match.group())})"
