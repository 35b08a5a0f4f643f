"""Greedy decoding of many prompts at once, whose common beginning is read only once.

A row of a batch is [prefix | padding | suffix]: the keys and values of the prefix come from the cache, the padding
between is masked, and positions count as if it were not there. Rows therefore mean what they mean alone.

Legend: B prompts, P tokens of the prefix, S of the longest suffix, V tokens in the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One more token for each prompt.

    Attributes:
        tokens: (B,) int64.
        log_probs: (B,) float32, of these tokens.
        abstain: (B,) probability that the first token is one of the word for no answer; at the first step only.
    """

    tokens: Tensor
    log_probs: Tensor
    abstain: Tensor | None = None


@dataclass(frozen=True)
class Rules:
    """What decoding knows of the tokens.

    Attributes:
        stop: tokens that end an answer: the end of a line or of the text.
        never_first: tokens that no answer begins with: those that stop, and brackets, with which a citation begins,
            unless sources are named first.
        abstain: tokens with which the word for no answer begins, written this way or that; none where there is no such
            word. Their probability is reported; they are never chosen, so that there is an answer to measure in any
            case.
        pad: what stands where nothing is read.
        longest: tokens of an answer.
    """

    stop: tuple[int, ...]
    never_first: tuple[int, ...]
    abstain: tuple[int, ...]
    pad: int
    longest: int


class Decoder(Protocol):
    """A model that reads prompts and goes on."""

    def greedy(self, prefix: Sequence[int], suffixes: list[list[int]], rules: Rules) -> Iterator[Step]:
        """The likeliest next token of each prompt, again and again, until all have stopped."""
        ...


class Causal:
    """Decoding with a decoder-only model of transformers.

    Attributes:
        seconds: time spent reading prompts and writing answers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.takes = inspect.signature(model.forward).parameters
        self.cache = cache_name(model)
        self.seconds = {"read": 0.0, "write": 0.0}
        self._kept: dict[tuple[int, ...], Any] = {}  # prefix -> its keys and values

    @torch.inference_mode()
    def greedy(self, prefix: Sequence[int], suffixes: list[list[int]], rules: Rules) -> Iterator[Step]:
        """See `Decoder`."""
        started = time.perf_counter()
        P = len(prefix)
        ids, alive = pad_left(suffixes, rules.pad, self.device)  # (B, S) both
        mask = torch.cat([alive.new_ones(len(ids), P), alive], 1)  # (B, P + S)
        positions = P + (alive.cumsum(1) - 1).clamp(min=0)  # (B, S)
        cache = self.prefix_cache(prefix, len(ids))
        logits = self._forward(ids, mask, positions, cache)  # (B, V)
        step, stopped = first_token(logits, rules)
        self.seconds["read"] += time.perf_counter() - started
        yield step
        for _ in range(rules.longest - 1):
            started = time.perf_counter()
            if bool(stopped.all()):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions[:, -1:] + 1
            logits = self._forward(step.tokens.unsqueeze(1), mask, positions, cache)
            step, stopped = next_token(logits, stopped, rules)
            self.seconds["write"] += time.perf_counter() - started
            yield step

    def prefix_cache(self, prefix: Sequence[int], rows: int) -> Any:
        """Keys and values of the prefix for so many rows: computed at the first call, copied from then on."""
        from transformers import DynamicCache

        key = tuple(prefix)
        if not key:
            return DynamicCache(config=self.model.config)
        if key not in self._kept:
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([key], device=self.device)
            positions = torch.arange(len(key), device=self.device).unsqueeze(0)
            self._forward(ids, torch.ones_like(ids), positions, cache)
            self._kept[key] = cache
        cache = copy.deepcopy(self._kept[key])
        cache.batch_repeat_interleave(rows)
        return cache

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits of the last token of each row, float32 (B, V); the cache grows by what was read."""
        more: dict[str, Any] = {self.cache: cache}
        if "position_ids" in self.takes:
            more["position_ids"] = positions
        if "logits_to_keep" in self.takes:
            more["logits_to_keep"] = 1
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        logits: Tensor = out.logits[:, -1].float()
        return logits


class Seq2Seq:
    """Decoding with an encoder-decoder: it reads prefix and suffix as one text, and writes into another."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.cache = cache_name(model)
        self.seconds = {"read": 0.0, "write": 0.0}

    @torch.inference_mode()
    def greedy(self, prefix: Sequence[int], suffixes: list[list[int]], rules: Rules) -> Iterator[Step]:
        """See `Decoder`."""
        started = time.perf_counter()
        rows = [[*prefix, *suffix] for suffix in suffixes]
        size = max(len(row) for row in rows)
        ids = torch.tensor([row + [rules.pad] * (size - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows], device=self.device)
        read = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        start = self.model.config.decoder_start_token_id
        tokens = torch.full((len(rows),), start if start is not None else rules.pad, device=self.device)
        cache = None
        step = None
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        for _ in range(rules.longest):
            out = self.model(
                encoder_outputs=read,
                attention_mask=mask,
                decoder_input_ids=tokens.unsqueeze(1),
                use_cache=True,
                **{self.cache: cache},
            )
            cache = out[self.cache]
            logits = out.logits[:, -1].float()
            first = step is None
            step, stopped = first_token(logits, rules) if first else next_token(logits, stopped, rules)
            self.seconds["read" if first else "write"] += time.perf_counter() - started
            yield step
            started = time.perf_counter()
            tokens = step.tokens
            if bool(stopped.all()):
                break


def cache_name(model: Any) -> str:
    """What transformers calls the keys and values of earlier tokens: `past_key_values`, or `cache` in newer ones."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of one length with padding before them, and where they are not padding; both int64 (B, S)."""
    size = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (size - len(row)) + row for row in rows], device=device)
    alive = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, alive


def first_token(logits: Tensor, rules: Rules) -> tuple[Step, Tensor]:
    """The first token of each answer: no end, no citation and not the word for no answer, whose probability is noted.

    The log-probability is that among what may be chosen: how sure the reader is of its answer, given that it gives one.
    """
    abstain = logits.softmax(1)[:, list(rules.abstain)].sum(1)
    allowed = logits.clone()
    allowed[:, [*rules.abstain, *rules.never_first]] = -torch.inf
    log_probs, tokens = allowed.log_softmax(1).max(1)
    return Step(tokens, log_probs, abstain), torch.zeros_like(tokens, dtype=torch.bool)


def next_token(logits: Tensor, stopped: Tensor, rules: Rules) -> tuple[Step, Tensor]:
    """The next one; rows that have stopped go on with padding, and what they would say is nobody's concern."""
    log_probs, tokens = logits.log_softmax(1).max(1)
    tokens = torch.where(stopped, rules.pad, tokens)
    return Step(tokens, log_probs), stopped | torch.isin(tokens, torch.tensor(rules.stop, device=tokens.device))
