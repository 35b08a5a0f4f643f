"""Losses of examples and texts, and classes of texts, without gradients.

Legend: B rows, T tokens of each, N tokens with a label, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run import Run
from lora.config import Config
from lora.data.batches import collate
from lora.data.templates import Tokens, encode_prompts, encode_texts
from lora.data.texts import collate_texts
from lora.model.calls import class_logits, hidden_states, token_logits

CHUNK = 1024  # tokens whose logits exist at once
WINDOW = 512  # tokens of a text that are scored with what stands before them in it
MIN_PROMPT = 1


@contextlib.contextmanager
def judging(model: Any, run: Run) -> Iterator[None]:
    """Without gradients and without dropout, in the run's precision; the model's mode is put back afterwards."""
    was = model.training
    model.eval()
    typed = next(model.parameters()).dtype != torch.float32
    try:
        with torch.no_grad(), contextlib.nullcontext() if typed else run.autocast():
            yield
    finally:
        model.train(was)


def example_losses(model: Any, examples: Sequence[Tokens], batch_size: int, run: Run) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats of each example's answer, and its number of tokens. Twice (examples,), float64."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    counts = torch.zeros(len(examples), dtype=torch.float64)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))  # rows of like length: little filling up
    with judging(model, run):
        for start in run.track(range(0, len(order), batch_size)):
            chosen = order[start : start + batch_size]
            batch = collate([[examples[i]] for i in chosen]).to(run.device)
            states = hidden_states(model, batch.tokens)  # (B, T, D)
            row = batch.where // batch.tokens.shape[1]  # of each label
            states = states.flatten(0, 1).index_select(0, batch.where)  # (N, D)
            losses = token_losses(model, states, batch.labels).cpu().double()
            place = torch.tensor(chosen)[row.cpu()]
            sums.index_add_(0, place, losses)
            counts.index_add_(0, place, torch.ones_like(losses))
    return sums, counts


def token_losses(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label, some logits at a time. (N, D), (N,) -> (N,)"""
    parts = zip(states.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(token_logits(model, some), label, reduction="none") for some, label in parts])


def mean_loss(model: Any, examples: Sequence[Tokens], batch_size: int, run: Run) -> float:
    """Mean cross-entropy in nats over all labels of some examples."""
    sums, counts = example_losses(model, examples, batch_size, run)
    return float(sums.sum() / counts.sum())


def text_losses(
    model: Any, tokenizer: Any, text: str, num_tokens: int, batch_size: int, run: Run
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats of each window of a running text, and its number of tokens.

    The text is cut into windows that do not overlap, so its perplexity comes out a little higher than with a sliding
    one; before and after training it is the same tokens in the same windows.
    """
    ids = encode_prompts([text], tokenizer)[0][: num_tokens + 1]
    windows = [ids[start : start + WINDOW + 1] for start in range(0, len(ids) - 1, WINDOW)]
    pieces = [Tokens(window[:MIN_PROMPT], window[MIN_PROMPT:]) for window in windows if len(window) > MIN_PROMPT]
    return example_losses(model, pieces, max(1, batch_size // 4), run)


def class_scores(
    model: Any, texts: Sequence[str], labels: Sequence[int], tokenizer: Any, config: Config, run: Run
) -> tuple[float, list[int]]:
    """Mean cross-entropy in nats of the right classes, and the most probable class of each text."""
    log_probs = class_log_probs(model, texts, tokenizer, config, run)
    loss = F.nll_loss(log_probs, torch.tensor(labels, dtype=torch.int64))
    return float(loss), log_probs.argmax(1).tolist()


def class_log_probs(model: Any, texts: Sequence[str], tokenizer: Any, config: Config, run: Run) -> Tensor:
    """Log-probability of every class. float32 on the CPU (N texts, C classes)"""
    rows = encode_texts(texts, tokenizer, config.data.max_length)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size = config.eval.batch_size
    parts = []
    with judging(model, run):
        for start in run.track(range(0, len(order), size)):
            chosen = order[start : start + size]
            batch = collate_texts([rows[i] for i in chosen], [0] * len(chosen)).to(run.device)
            logits = class_logits(model, config.model.pooling, batch.tokens, batch.present)
            parts.append(logits.float().log_softmax(1).cpu())
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]  # in the order of the texts again
