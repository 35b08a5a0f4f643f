"""The same questions to our LLaMA and to transformers' models: states, logits, caches.

Plain functions and no wrapper, so that modules keep the names that adapters are saved under.

Legend: B rows, T tokens of each, S keys, D width, V vocabulary, C classes.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ProjectError
from lora.model.llama import Cache, Llama

# settings of models that do more to a state than multiply it by the head's weight
BENT_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


def decoder_of(model: Any) -> nn.Module:
    """All of a language model, or of a classifier, but its head."""
    return model.model if isinstance(model, Llama) else model.base_model


def head_of(model: Any) -> nn.Module:
    """The last layer of a language model, from states to logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ProjectError(f"{type(model).__name__} has no output layer: it is no language model")
    return head


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of what may be seen as what is added to attention's scores: 0, or minus infinity."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def hidden_states(
    model: Any, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Any = None
) -> Tensor:
    """What the head reads, (B, T, D).

    Args:
        tokens: (B, T) int64.
        positions: (B, T) int64; None counts from 0, or on from what is in the cache.
        mask: (B, 1, T, S), True where a token may look; each must see at least itself. None: at all before it.
        cache: of `new_cache`, for generation.
    """
    if isinstance(model, Llama):
        return model.hidden(tokens, positions, mask, cache)
    dtype = next(decoder_of(model).parameters()).dtype
    decoder = decoder_of(model)
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    answer = decoder(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=None if mask is None else additive(mask, dtype),
        use_cache=cache is not None,
        **{name: cache},  # transformers gave this argument another name in version 5
    )
    states: Tensor = answer.last_hidden_state
    return states


def token_logits(model: Any, states: Tensor) -> Tensor:
    """Logits in float32 of the token that follows each state. (..., D) -> (..., V)"""
    logits: Tensor = head_of(model)(states)
    return bend(model, logits.float())


def bend(model: Any, logits: Tensor) -> Tensor:
    """What some architectures do to logits after the head: Gemma 2 caps them, Cohere and Granite scale them."""
    settings = getattr(model, "config", None)
    if is_linear(model):
        return logits
    if cap := getattr(settings, "final_logit_softcapping", None):
        return cap * torch.tanh(logits / cap)
    if scale := getattr(settings, "logit_scale", None):
        return logits * scale
    if scale := getattr(settings, "logits_scaling", None):
        return logits / scale
    raise ProjectError(f"{type(model).__name__} changes its logits in a way that is not known here")


def is_linear(model: Any) -> bool:
    """Whether logits are the head's product and nothing else."""
    settings = getattr(model, "config", None)
    return not any(getattr(settings, name, None) not in (None, 1, 1.0) for name in BENT_LOGITS)


def new_cache(model: Any, capacity: int) -> Any:
    """An empty cache of keys and values for up to so many tokens a row."""
    if isinstance(model, Llama):
        return Cache(capacity)
    from transformers import DynamicCache

    return DynamicCache()


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keep these rows of a cache, in this order; a row may come twice, as in beam search."""
    if isinstance(cache, Cache):
        cache.select(rows)
    else:
        cache.batch_select_indices(rows)


def set_checkpointing(model: Any) -> None:
    """Keep only what enters each layer and compute the rest again in the backward pass (Chen et al. 2016)."""
    if isinstance(model, Llama):
        model.model.checkpointing = True
    elif getattr(model, "supports_gradient_checkpointing", False):
        # not the re-entrant kind, which loses the gradients of adapters where a layer's input needs none itself
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        raise ProjectError(f"{type(model).__name__} cannot recompute its layers: leave train.checkpointing off")


def class_logits(model: Any, pooling: str, tokens: Tensor, present: Tensor) -> Tensor:
    """Logits of the classes, float32 (B, C).

    Args:
        pooling: `mean` of the last layer over the tokens that are present, then the head; `model`: as the model does.
        tokens: (B, T) int64.
        present: (B, T) bool, False where a row is filled up.
    """
    attention_mask = present.long()
    if pooling == "model":
        answer: Tensor = model(input_ids=tokens, attention_mask=attention_mask).logits
        return answer.float()
    states = model.base_model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state  # (B, T, D)
    weights = present[..., None].to(states.dtype)
    pooled = (states * weights).sum(1) / weights.sum(1)  # (B, D)
    head = model.classifier
    logits: Tensor = head(pooled.to(head.weight.dtype))
    return logits.float()
