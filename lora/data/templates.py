"""From an example to tokens: how a prompt is worded, where it ends, and what is to be learnt.

Prompt and answer are tokenised apart, so that it is known where one ends and the other begins, in training as in
generation. The answer ends with the end-of-sequence token, which is learnt like any other: a model that is never
taught to stop goes on for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config import ConfigError
from common.errors import ProjectError
from lora.config import DataConfig
from lora.data.examples import Example

# the headings under which Alpaca's examples were trained and are expected (Taori et al. 2023)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n"
    "### Response:\n"
)


@dataclass(frozen=True)
class Tokens:
    """One example as tokens.

    Attributes:
        prompt: what is given; not learnt.
        answer: what is learnt, the end-of-sequence token last.
    """

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def prompt_text(example: Example, config: DataConfig, tokenizer: Any) -> str:
    """What the model reads before it answers, without the token that begins a text. `ConfigError` where
    data.template=chat and the model has no chat template.
    """
    if config.template == "alpaca":
        form = ALPACA_CONTEXT if example.context.strip() else ALPACA
        return form.format(prompt=example.prompt, context=example.context)
    words = words_of(example)
    if config.template == "plain":
        return f"{words}\n"
    return chat_text([{"role": "user", "content": words}], config.system, tokenizer)


def words_of(example: Example) -> str:
    """What is asked and what it is asked of, as a person would write it, without a template."""
    return f"{example.prompt}\n\n{example.context}" if example.context.strip() else example.prompt


def chat_text(messages: list[dict[str, str]], system: str, tokenizer: Any) -> str:
    """A conversation in the model's own template, up to where its answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("data.template", "this model has no chat template; choose plain or alpaca")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def encode_prompts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Prompts as tokens, with the token that begins a text exactly once where the model has one.

    A chat template may write that token itself, and a tokenizer may add it: together they would make two of it.
    """
    if not texts:
        return []
    begin = beginning(tokenizer)
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [row if begin is None or row[:1] == [begin] else [begin, *row] for row in rows]


def beginning(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before every text; None if it puts none."""
    begin: int | None = getattr(tokenizer, "bos_token_id", None)
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None


def end_of(tokenizer: Any) -> int:
    """The token that ends an answer. `ProjectError` for a tokenizer without one."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise ProjectError("the tokenizer has no end-of-sequence token, so the model cannot learn to stop")
    return end


def encode(examples: Sequence[Example], config: DataConfig, tokenizer: Any) -> list[Tokens]:
    """Examples as tokens, in their order."""
    if not examples:
        return []
    end = end_of(tokenizer)
    prompts = encode_prompts([prompt_text(example, config, tokenizer) for example in examples], tokenizer)
    answers = tokenizer([example.completion for example in examples], add_special_tokens=False)["input_ids"]
    return [Tokens(prompt, [*answer, end]) for prompt, answer in zip(prompts, answers, strict=True)]


def encode_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Texts to classify, with the special tokens of their encoder, cut to `max_length`."""
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return rows
