"""What the retriever learns from: among all passages of a batch, which one answers this question?

Legend: B questions, C candidates (all passages of the batch), D numbers a vector, W processes, N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rag.config import LossConfig
from rag.model.encoder import Tokens


class Contrast(NamedTuple):
    """The loss of a batch, and the share of questions whose passage came first."""

    loss: Tensor
    accuracy: Tensor


def contrastive_loss(
    questions: Tensor, candidates: Tensor, right: Tensor, allowed: Tensor, config: LossConfig
) -> Contrast:
    """Cross-entropy over cosines (van den Oord et al. 2018, eq. 4; in-batch negatives as Karpukhin et al. 2020):

        -log  exp(q_i . p_i / tau) / sum_c exp(q_i . p_c / tau)

    Args:
        questions: (B, D) and candidates (C, D), of length 1.
        right: int64 (B,), which candidate is each question's passage.
        allowed: bool (B, C), which candidates count as wrong ones; its own passage counts in any case.
    """
    cosines = questions @ candidates.T  # (B, C)
    own = torch.zeros_like(allowed).scatter_(1, right.unsqueeze(1), True)
    mine = cosines.gather(1, right.unsqueeze(1))  # (B, 1)
    kept = (allowed & (cosines <= mine + config.margin).detach()) | own
    logits = (cosines / config.temperature).masked_fill(~kept, float("-inf"))
    loss = nn.functional.cross_entropy(logits, right)
    if config.symmetric:  # each question's passage is asked which of the questions is its own
        back = logits[:, right].T  # (B, B): row i is question i's passage
        loss = (loss + nn.functional.cross_entropy(back, torch.arange(len(right), device=right.device))) / 2
    accuracy = (logits.argmax(1) == right).float().mean()
    return Contrast(loss, accuracy.detach())


def list_loss(scores: Tensor, group: int) -> Contrast:
    """The same for a cross-encoder: each question's own passage, the first of its group, against its hard negatives.

    Args: scores (B * group, 1), question by question.
    """
    logits = scores.view(-1, group)  # (B, group)
    right = torch.zeros(len(logits), dtype=torch.long, device=scores.device)
    loss = nn.functional.cross_entropy(logits, right)
    return Contrast(loss, (logits.argmax(1) == 0).float().mean().detach())


def wrong_candidates(gold: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
    """Which candidates do not answer which questions: bool (B, C), False for a false negative.

    In a batch two questions often have one passage, and a hard negative of one may be the passage of another.

    Args:
        gold: rows of the passages that answer each question.
        rows: of the candidates.
    """
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row, []).append(place)
    allowed = torch.ones(len(gold), len(rows), dtype=torch.bool)
    for i, relevant in enumerate(gold):
        for row in relevant:
            allowed[i, places.get(row, [])] = False
    return allowed


# -- large batches -----------------------------------------------------------------------------------------------------


def backward_in_chunks(
    net: nn.Module,
    chunks: list[Tokens],
    places: Tensor,
    loss_of: Callable[[Tensor], Contrast],
    scale: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
    at_once: bool,
) -> Contrast:
    """Gradients of a loss over a whole batch, with the memory of one chunk (gradient cache: Gao et al. 2021).

    The loss needs all vectors of the batch together, but no more of the network than these. So: all vectors without a
    graph; the loss, and its gradient for each vector; then chunk by chunk the vectors again, with a graph and with the
    same dropout, and that gradient sent through. The sum is the gradient of the whole, exactly. With several processes
    each has its part of the texts, and all of them see all vectors.

    Args:
        net: tokens to (n, D).
        places: int64 (N,), where among this process's texts, as the loss has them, each text of the chunks stands.
        loss_of: from the vectors of all texts of all processes (W, N, D) to the loss; equal in every process.
        scale: of a gradient scaler.
        at_once: keep the graph of the first pass instead of a second one: faster, where it fits into memory. For one
            process.
    """
    device = next(net.parameters()).device
    states = []
    parts = []
    for chunk in chunks:
        states.append(random_state(device))
        with torch.set_grad_enabled(at_once), autocast():
            parts.append(net(chunk))
    encoded = torch.cat(parts).detach()
    vectors = gather(torch.empty_like(encoded).index_copy_(0, places, encoded)).requires_grad_()  # (W, N, D), a leaf
    result = loss_of(vectors)
    scale(result.loss).backward()
    assert vectors.grad is not None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # DistributedDataParallel averages over processes, but each has only its own texts' part of the gradient
    gradients = (vectors.grad[rank][places] * world).split([len(part) for part in parts])
    if at_once:
        torch.autograd.backward(parts, list(gradients))
        return Contrast(result.loss.detach(), result.accuracy)
    after = random_state(device)
    for i, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
        set_random_state(device, state)
        is_last = i == len(chunks) - 1
        no_sync = getattr(net, "no_sync", nullcontext)
        with nullcontext() if is_last else no_sync():  # gradients are exchanged once
            with autocast():
                again = net(chunk)
            again.backward(gradient)
    set_random_state(device, after)
    return Contrast(result.loss.detach(), result.accuracy)


def gather(vectors: Tensor) -> Tensor:
    """The vectors of all processes: (N, D) -> (W, N, D)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors.unsqueeze(0)
    everyone = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, vectors.contiguous())
    return torch.stack(everyone)


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)


def set_random_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
