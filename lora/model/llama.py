"""A transformer of LLaMA's architecture: LLaMA, Llama 2 and 3, Mistral, SmolLM, and others of the kind.

    h   = E[tokens]
    h  += Attention(RMSNorm(h))         grouped-query: some query heads share a key and a value head
    h  += W_down (silu(W_gate n) * W_up n),  n = RMSNorm(h)
    logits = W_head RMSNorm(h)

Submodules bear the names of Hugging Face's weights, so that published files load as they are and an adapter saved here
fits the model there.

Touvron et al. 2023    LLaMA                                           arXiv:2302.13971
Su et al. 2021         Rotary position embedding (RoFormer)            arXiv:2104.09864
Ainslie et al. 2023    Grouped-query attention                         arXiv:2305.13245
Zhang & Sennrich 2019  RMSNorm                                         arXiv:1910.07467
Shazeer 2020           GLU variants (SwiGLU)                           arXiv:2002.05202

Legend: B rows, T tokens of each, S keys that they may look at, D width, H query heads, G key-value heads, K width of a
head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.model.frugal import attention, rms_norm, swiglu


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches its positions to longer texts: slow rotations are slowed down further."""

    factor: float
    low_frequency: float
    high_frequency: float
    old_context: int


@dataclass(frozen=True)
class LlamaShape:
    """Everything that decides the computation beside the weights."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    context: int  # positions seen in training
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False


class Cache:
    """Keys and values of the tokens so far, so that each new token is computed alone.

    Args:
        capacity: most tokens that will be in it; the memory is taken when the first arrive.
    Attributes:
        length: tokens in it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: list[Tensor] = []  # of each layer, (B, G, capacity, K)
        self.values: list[Tensor] = []

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, G, T, K) of a layer; returns all of that layer so far, (B, G, S, K)."""
        if layer == len(self.keys):
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self.keys.append(key.new_empty(shape))
            self.values.append(value.new_empty(shape))
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may come twice."""
        self.keys = [tensor.index_select(0, rows) for tensor in self.keys]
        self.values = [tensor.index_select(0, rows) for tensor in self.values]


class RMSNorm(nn.Module):
    """A vector divided by its root mean square, with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: LlamaShape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = shape.head_width
        queries = shape.heads * shape.head_width
        keys = shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, queries, bias=shape.attention_bias)
        self.k_proj = nn.Linear(shape.width, keys, bias=shape.attention_bias)
        self.v_proj = nn.Linear(shape.width, keys, bias=shape.attention_bias)
        self.o_proj = nn.Linear(queries, shape.width, bias=shape.attention_bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        query = self.split(self.q_proj(x))  # (B, H, T, K)
        key = self.split(self.k_proj(x))  # (B, G, T, K)
        value = self.split(self.v_proj(x))
        query = rotate(query, *angles)
        key = rotate(key, *angles)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)  # (B, G, S, K)
        mixed = attention(query, key, value, mask)  # (B, H, T, K)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # -> (B, T, H K) -> (B, T, D)

    def split(self, x: Tensor) -> Tensor:
        """Heads apart. (B, T, heads K) -> (B, heads, T, K)"""
        return x.unflatten(2, (-1, self.head_width)).transpose(1, 2)


class MLP(nn.Module):
    """The gated layer, SwiGLU."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention, then the gated layer, each added to what passes by."""

    def __init__(self, shape: LlamaShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All but the head.

    Attributes:
        checkpointing: in training, keep only what enters each block and compute the rest a second time.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """See `Llama.hidden`."""
        past = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        x = self.embed_tokens(tokens)  # (B, T, D)
        angles = rotary(positions, self.shape, x.dtype)
        several = tokens.shape[1] > 1
        if mask is None and several and (past > 0 or (x.device.type == "cpu" and torch.is_grad_enabled())):
            mask = torch.ones(tokens.shape[1], past + tokens.shape[1], dtype=torch.bool, device=x.device).tril(past)
            mask = mask[None, None]
        if mask is not None and mask.dtype == torch.bool:  # once, not in each layer: 0 where seen, -inf where not
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, -math.inf)
        for block in self.layers:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, mask, None, use_reentrant=False)
            else:
                x = block(x, angles, mask, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)


class Llama(nn.Module):
    """The language model.

    Weights are PyTorch's default at first; `initialise` draws those of a model to be trained.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding again, where the two are one: loading or moving weights may part them."""
        if self.shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """What the head reads.

        Args:
            tokens: (B, T) int64.
            positions: (B, T) int64; None counts on from what is in the cache.
            mask: (B, 1, T, S), True where a token may look; None: at itself and all before it.
        Returns:
            (B, T, D)
        """
        states: Tensor = self.model(tokens, positions, mask, cache)
        return states

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of the next token, (B, T, V); arguments as of `hidden`."""
        logits: Tensor = self.lm_head(self.hidden(tokens, positions, mask, cache))
        return logits

    def get_output_embeddings(self) -> nn.Module:
        """The head, under the name that transformers' models give this question."""
        return self.lm_head


def rotary(positions: Tensor, shape: LlamaShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, computed in float32. (B, T) -> twice (B, 1, T, K)"""
    exponents = torch.arange(0, shape.head_width, 2, device=positions.device).float() / shape.head_width
    frequencies = 1.0 / shape.rope_theta**exponents  # radians a position, (K/2,)
    if shape.rope_scaling is not None:
        frequencies = stretch(frequencies, shape.rope_scaling)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, K/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: waves longer than the old context over `low_frequency` become `factor` times longer, those shorter
    than it over `high_frequency` stay, and between the two the change is gradual.
    """
    waves = scaling.old_context * frequencies / (2 * math.pi)  # of each frequency, how many fit into the old context
    keep = (waves - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + K/2}) by their angles (Su et al. 2021, eq. 34; in this pairing a rotation, too).
    (B, heads, T, K)
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def initialise(model: Llama, seed: int) -> None:
    """Weights to start a training from: normal with deviation 1 / sqrt(width), so that what a layer writes is about as
    large as what it reads, and what goes into the residual stream divided by sqrt(2 layers) (Radford et al. 2019,
    section 2.3). GPT-2's fixed .02 fits widths of a thousand or two; narrow models learn to look back late with it.
    """
    rng = torch.Generator().manual_seed(seed)
    deviation = model.shape.width**-0.5
    deep = deviation / math.sqrt(2 * model.shape.layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else deviation
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)
