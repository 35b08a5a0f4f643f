"""Answers of a language model, token by token: the most probable, drawn, or by beam search.

Prompts of different lengths are filled up on the left, so that the newest token of every row stands in the last column.
Positions count from a prompt's own first token and nothing ever looks at what it is filled up with, so an answer does
not depend on what else is in the batch.

Legend: B prompts, K beams of each, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.runtime import mix_seed
from lora.config import GenerateConfig
from lora.model.calls import hidden_states, keep_rows, new_cache, token_logits

CROWDED = 0.75  # share of rows still being written below which the others are dropped from the cache
Watch = Callable[[int, int], None]
Follow = Callable[[Tensor], None]


class Reader:
    """A batch of prompts as the model has read it so far.

    Attributes:
        logits: of the next token of each row, float32 (B, V).
        follow: told which rows are gone on with.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], room: int, follow: Follow | None = None) -> None:
        self.follow = follow
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self.present = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.present[row, longest - len(prompt) :] = True
        self.present = self.present.to(device)
        self.model = model
        self.even = all(len(prompt) == longest for prompt in prompts)
        self.cache = new_cache(model, longest + room)
        self.next_position = self.present.sum(1)  # (B,)
        positions = (self.present.cumsum(1) - 1).clamp(min=0)
        mask = None
        if not self.even:
            earlier = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
            itself = torch.eye(longest, dtype=torch.bool, device=device)  # a row must see something, even a filler
            mask = (self.present[:, None, None, :] & earlier) | itself
        states = hidden_states(model, tokens.to(device), positions, mask, self.cache)
        self.logits = token_logits(model, states[:, -1])

    def read(self, tokens: Tensor) -> None:
        """One more token of each row. (B,)"""
        self.present = torch.cat([self.present, self.present.new_ones(len(tokens), 1)], dim=1)
        mask = None if self.even else self.present[:, None, None, :]
        states = hidden_states(self.model, tokens[:, None], self.next_position[:, None], mask, self.cache)
        self.next_position = self.next_position + 1
        self.logits = token_logits(self.model, states[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; a row may come several times."""
        keep_rows(self.cache, rows)
        self.present = self.present[rows]
        self.next_position = self.next_position[rows]
        self.logits = self.logits[rows]
        if self.follow is not None:
            self.follow(rows)


@torch.no_grad()
def write_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    ends: Collection[int],
    seed: int = 0,
    watch: Watch | None = None,
    follow: Follow | None = None,
) -> list[list[int]]:
    """An answer to each prompt, without the token that ends it.

    Args:
        prompts: of one batch, as tokens, each at least one.
        ends: tokens after which an answer is finished.
        seed: of what is drawn; an answer's draws depend on its own place in `prompts` only.
        watch: told (row, token) as soon as a token is known; not by beam search, which may change its mind.
        follow: told which rows of the batch are gone on with, in which order, whenever that changes: for what else
            is known by row.
    """
    if config.beams > 1:
        return beam_search(model, prompts, config, ends, follow)
    reader = Reader(model, prompts, config.max_tokens, follow)
    rngs = [torch.Generator().manual_seed(mix_seed(seed, row)) for row in range(len(prompts))]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the reader belongs to
    done = [False] * len(prompts)
    for step in range(config.max_tokens):
        tokens = choose(reader.logits, config, [rngs[row] for row in rows])  # (B,)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if done[row]:
                continue
            if token in ends:
                done[row] = True
                continue
            answers[row].append(token)
            if watch is not None:
                watch(row, token)
        alive = [place for place, row in enumerate(rows) if not done[row]]
        if not alive or step == config.max_tokens - 1:
            break
        if len(alive) <= CROWDED * len(rows):
            chosen = torch.tensor(alive, device=tokens.device)
            reader.keep(chosen)
            tokens = tokens[chosen]
            rows = [rows[place] for place in alive]
        reader.read(tokens)
    return answers


def choose(logits: Tensor, config: GenerateConfig, rngs: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row. (B, V) -> (B,)"""
    if config.temperature == 0:
        return logits.argmax(1)
    probabilities = narrow(logits / config.temperature, config.top_k, config.top_p).softmax(1).cpu()
    drawn = [torch.multinomial(row, 1, generator=rng) for row, rng in zip(probabilities, rngs, strict=True)]
    return torch.cat(drawn).to(logits.device)


def narrow(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Minus infinity for all but the `top_k` most probable, and of these all but the fewest with probability `top_p`
    together (Holtzman et al. 2020). (B, V)
    """
    if top_k and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # probability of all that are more probable
        logits = logits.masked_fill(torch.zeros_like(logits).bool().scatter(1, places, before >= top_p), -torch.inf)
    return logits


@dataclass
class Search:
    """Beam search for one prompt.

    Attributes:
        texts: the beginnings that are gone on with, each with a row in the reader.
        scores: their log-probabilities.
        finished: (score, tokens) of the best whole answers, best first.
    """

    config: GenerateConfig
    texts: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def advance(self, candidates: list[tuple[float, int, int]], ends: Collection[int]) -> list[tuple[int, int]]:
        """One token further.

        Args:
            candidates: (log-probability of the beginning with it, beginning, token), at least 2 K of the most probable.
        Returns:
            (beginning, token) of what is gone on with; empty once nothing can come any more that is among the best.
        """
        beams = self.config.beams
        length = len(self.texts[0]) + 1
        going: list[tuple[float, int, int]] = []
        for score, beam, token in sorted(candidates, reverse=True)[: 2 * beams]:  # at most K end: K go on
            if token in ends:
                self.finish(score, self.texts[beam], length)
            elif len(going) < beams:
                going.append((score, beam, token))
        if length == self.config.max_tokens and len(self.finished) < beams:  # cut off before an end came
            for score, beam, token in going:
                self.finish(score, [*self.texts[beam], token], length)
        if not going or length == self.config.max_tokens or self.is_over(going[0][0], length):
            return []
        self.texts = [[*self.texts[beam], token] for _, beam, token in going]
        self.scores = [score for score, _, _ in going]
        return [(beam, token) for _, beam, token in going]

    def finish(self, score: float, tokens: list[int], length: int) -> None:
        """A whole answer, kept if it is among the best."""
        answer = (score / length**self.config.length_penalty, tokens)
        self.finished = sorted([*self.finished, answer], key=lambda item: -item[0])[: self.config.beams]

    def is_over(self, best: float, length: int) -> bool:
        """Whether the most probable beginning, should nothing be lost on its way, comes too late."""
        longest = self.config.max_tokens if self.config.length_penalty > 0 else length
        full = len(self.finished) == self.config.beams
        return full and best / longest**self.config.length_penalty <= self.finished[-1][0]


def beam_search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    ends: Collection[int],
    follow: Follow | None = None,
) -> list[list[int]]:
    """For each prompt the answer with the highest log-probability over length^penalty among those that are found by
    going on, at each step, with the K most probable beginnings (Sutskever et al. 2014; length as in Wu et al. 2016,
    simplified).
    """
    reader = Reader(model, prompts, config.max_tokens, follow)
    searches = [Search(config) for _ in prompts]
    active = searches
    for _ in range(config.max_tokens):
        scores = torch.tensor([score for search in active for score in search.scores], device=reader.logits.device)
        totals = scores[:, None] + reader.logits.log_softmax(1)  # (rows, V)
        best = totals.topk(min(2 * config.beams, totals.shape[1]), dim=1)  # of each row: enough for its prompt
        values, tokens = best.values.tolist(), best.indices.tolist()
        kept: list[int] = []
        chosen: list[int] = []
        going = []
        row = 0
        for search in active:
            width = len(search.texts)
            candidates = [
                (value, beam, token)
                for beam in range(width)
                for value, token in zip(values[row + beam], tokens[row + beam], strict=True)
            ]
            steps = search.advance(candidates, ends)
            kept += [row + beam for beam, _ in steps]
            chosen += [token for _, token in steps]
            going += [search] if steps else []
            row += width
        if not going:
            break
        active = going
        reader.keep(torch.tensor(kept, device=reader.logits.device))
        reader.read(torch.tensor(chosen, device=reader.logits.device))
    return [search.finished[0][1] for search in searches]


class TextStream:
    """Text from tokens as they come; a letter of several tokens appears once it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        """What can be shown now and could not before."""
        self.tokens.append(token)
        text: str = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") or not text.startswith(self.shown):
            return ""
        new = text[len(self.shown) :]
        self.shown = text
        return new
