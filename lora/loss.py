"""Cross-entropy of a language model without all of its logits.

A logit for each token and each word of the vocabulary: for SmolLM2 that is 49,152 numbers a token, 85 times its state,
and the plain formula holds several such tensors at once: logits, their float32 copy, their gradient. Here only tokens
with a label get logits at all (a prompt's need none), and of those only some at a time.

Where the head is frozen the gradient of the states is known as soon as the logits are:

    loss = sum_n (logsumexp_v z_nv - z_n,label),   z = h W^T
    d loss / d h_n = (softmax(z_n) - onehot(label_n)) W

so it is computed on the way, and nothing of the vocabulary's size is kept or computed twice. Of a head that learns, the
chunks' logits are computed again in the backward pass.

Legend: N tokens with a label, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config import ConfigError
from lora.data.batches import Batch, visible
from lora.data.texts import ClassBatch
from lora.model.calls import class_logits, head_of, hidden_states, is_linear, token_logits

Method = Literal["chunked", "torch", "full"]


class _FrozenHead(torch.autograd.Function):
    """Summed loss of chunks, and the gradient of the states with it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int) -> Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        grads = torch.empty_like(states)
        for start in range(0, len(states), chunk):
            part = states[start : start + chunk].to(weight.dtype)  # (n, D)
            label = labels[start : start + chunk, None]  # (n, 1)
            logits = F.linear(part, weight, bias).float()  # (n, V); all that follows happens in its memory
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, label)  # (n, 1)
            error = logits.exp_()
            normaliser = error.sum(1, keepdim=True)  # (n, 1)
            total += (normaliser.log() - right).sum()
            error /= normaliser  # softmax
            error.scatter_add_(1, label, error.new_full(label.shape, -1.0))
            grads[start : start + chunk] = error.to(weight.dtype) @ weight
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grads,) = ctx.saved_tensors
        return (grads * outer[0]).to(grads.dtype), None, None, None, None


def chunked_cross_entropy(states: Tensor, head: Any, labels: Tensor, chunk: int) -> Tensor:
    """Sum of the cross-entropies in float32, a scalar.

    Args:
        states: (N, D).
        head: the last layer, from states to logits, of any kind.
        labels: (N,) int64.
        chunk: tokens whose logits exist at once.
    """
    plain = type(head) is nn.Linear
    if plain and not head.weight.requires_grad and not torch.is_autocast_enabled(states.device.type):
        total: Tensor = _FrozenHead.apply(states, head.weight, head.bias, labels, chunk)
        return total

    def part(some: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(head(some).float(), label, reduction="sum")

    total = states.new_zeros((), dtype=torch.float32)
    for some, label in zip(states.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(part, some, label, use_reentrant=False)
    return total


def torch_cross_entropy(states: Tensor, head: Any, labels: Tensor) -> Tensor:
    """The same by PyTorch's own chunked function. `ConfigError` where this PyTorch has none."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ConfigError("train.loss", "this PyTorch has no F.linear_cross_entropy: choose chunked")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states, head.weight, labels, linear_bias=head.bias, reduction="sum", options=options)


class TuningLoss(nn.Module):
    """A language model and its loss as one module, so that it can be compiled or spread over processes as one."""

    def __init__(self, model: nn.Module, method: Method = "chunked", chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.chunk = chunk

    def forward(self, batch: Batch) -> Tensor:
        """The summed cross-entropy of a batch's labels, a float32 scalar."""
        mask = None if batch.segments is None else visible(batch.segments)
        positions = None if batch.segments is None else batch.positions
        states = hidden_states(self.model, batch.tokens, positions, mask)  # (B, T, D)
        states = states.flatten(0, 1).index_select(0, batch.where)  # (N, D)
        if self.method == "full" or not is_linear(self.model):
            return F.cross_entropy(token_logits(self.model, states), batch.labels, reduction="sum")
        head = head_of(self.model)
        if self.method == "torch":
            return torch_cross_entropy(states, head, batch.labels)
        return chunked_cross_entropy(states, head, batch.labels, self.chunk)


class ClassLoss(nn.Module):
    """A classifier and its loss as one module."""

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, batch: ClassBatch) -> Tensor:
        """The summed cross-entropy of a batch's classes, a float32 scalar."""
        logits = class_logits(self.model, self.pooling, batch.tokens, batch.present)
        return F.cross_entropy(logits, batch.labels, reduction="sum")
