"""Networks that read text: one vector for a text (bi-encoder), or one score for a question with a passage
(cross-encoder). Both are an encoder by name, from transformers, with little on top.

Legend: B texts, T tokens of the longest of them, D numbers a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import weights_hash
from common.config import ConfigError
from common.errors import ProjectError, first_line
from rag.config import SCRATCH, ModelConfig

TOKENIZER = "tokenizer.json"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout")

Tokens = dict[str, Tensor]  # input_ids, attention_mask and, for pairs, token_type_ids, each int64 (B, T)


class Encoder(nn.Module):
    """Text to a vector of length 1. The cosine of two such vectors is their product.

    Args:
        network: from transformers; its last hidden states are (B, T, D).
        pooling: `mean` over the tokens of the text, padding not among them, or `cls`, the first token's state.
    """

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.network.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, T) -> float32 (B, D)."""
        states = self.network(**tokens).last_hidden_state.float()  # (B, T, D)
        pooled = mean_pool(states, tokens["attention_mask"]) if self.pooling == "mean" else states[:, 0]
        return nn.functional.normalize(pooled, dim=1)


class CrossEncoder(nn.Module):
    """Question and passage, read together, to one score: how well the second answers the first."""

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.head = nn.Linear(int(network.config.hidden_size), 1)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, T) -> float32 (B, 1)."""
        states = self.network(**tokens).last_hidden_state.float()  # (B, T, D)
        pooled = mean_pool(states, tokens["attention_mask"]) if self.pooling == "mean" else states[:, 0]
        score: Tensor = self.head(pooled.to(self.head.weight.dtype))
        return score.float()


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each text (Reimers & Gurevych 2019); what is padding does not count.

    Args: states (B, T, D), mask (B, T), 1 for tokens and 0 for padding. Returns (B, D).
    """
    weight = mask.unsqueeze(2).to(states.dtype)  # (B, T, 1)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


class Tokenizer:
    """Text to numbers, as an encoder wants them.

    Args:
        inner: a fast tokenizer of transformers.
    """

    def __init__(self, inner: Any, config: ModelConfig) -> None:
        self.inner = inner
        self.config = config

    def questions(self, texts: Sequence[str]) -> Tokens:
        """The tokens of questions, cut at model.query_length, padded to the longest."""
        return self._encode([self.config.query_prefix + text for text in texts], self.config.query_length)

    def passages(self, texts: Sequence[str]) -> Tokens:
        """The tokens of passages, cut at model.passage_length."""
        return self._encode([self.config.passage_prefix + text for text in texts], self.config.passage_length)

    def pairs(self, questions: Sequence[str], passages: Sequence[str]) -> Tokens:
        """Each question with its passage. Only the passage is cut where both are too long, and a question that alone
        is too long at model.query_length: there is always room for the passage.
        """
        asked = self.inner(list(questions), truncation=True, max_length=self.config.query_length, verbose=False)
        short = self.inner.batch_decode(asked["input_ids"], skip_special_tokens=True)
        is_long = [len(ids) >= self.config.query_length for ids in asked["input_ids"]]
        first = [cut if long else text for text, cut, long in zip(questions, short, is_long, strict=True)]
        tokens = self.inner(
            first,
            list(passages),
            truncation="only_second",
            max_length=self.config.query_length + self.config.passage_length,
            padding=True,
            return_tensors="pt",
        )
        return dict(tokens)

    def _encode(self, texts: list[str], length: int) -> Tokens:
        tokens = self.inner(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def save(self, folder: Path) -> None:
        """Write it as transformers does."""
        self.inner.save_pretrained(folder)


def build_tokenizer(config: ModelConfig, texts: Sequence[str] | None = None) -> Tokenizer:
    """The tokenizer of the encoder that the config names.

    Args:
        texts: what model.name=scratch learns its word pieces from.
    """
    if config.name == SCRATCH:
        assert texts is not None
        return Tokenizer(learn_word_pieces(texts, config.vocabulary), config)
    from common.pretrained import find

    return load_tokenizer(find(config.name), config)


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """A tokenizer from a folder. `ProjectError` where there is none, or a slow one."""
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ProjectError(f"{folder} has no tokenizer that can be read: {first_line(error)}") from None
    if inner.pad_token is None:
        raise ProjectError(f"{folder}: its tokenizer has no padding, so it is of no encoder; name another model.name")
    longest = min(int(inner.model_max_length), 1_000_000)
    wanted = max(config.query_length, config.passage_length)
    if wanted > longest:
        raise ConfigError(
            "model.passage_length", f"{wanted} tokens are more than the {longest} that {config.name} reads"
        )
    return Tokenizer(inner, config)


def learn_word_pieces(texts: Sequence[str], size: int):  # type: ignore[no-untyped-def]  # a class of transformers
    """Byte-pair merges (Sennrich et al. 2016) of the texts' bytes, lower case, framed as BERT frames its input.

    Over bytes, because the library's WordPiece, which BERT has, is another one each time it learns: equal counts are
    ordered by chance there.
    """
    from tokenizers import Tokenizer as Plain
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Plain(models.BPE())
    plain.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(texts, trainer)
    ids = [(token, plain.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=512, model_input_names=inputs, **names)


def build_model(config: ModelConfig, vocabulary: int, weights: bool = True) -> Encoder | CrossEncoder:
    """A bi-encoder or a cross-encoder on the encoder that the config names.

    Args:
        vocabulary: number of word pieces, for model.name=scratch.
        weights: False for its shape alone, where other weights follow.
    """
    network = scratch_network(config, vocabulary) if config.name == SCRATCH else named_network(config, weights)
    if getattr(network, "pooler", None) is not None:
        network.register_module("pooler", None)  # of next-sentence prediction; of no use here
    kind = Encoder if config.kind == "bi_encoder" else CrossEncoder
    return kind(network, config.pooling)


def scratch_network(config: ModelConfig, vocabulary: int) -> nn.Module:
    """A small BERT (Devlin et al. 2019) with random weights."""
    from transformers import BertConfig, BertModel

    shape = BertConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=config.query_length + config.passage_length + 8,
        pad_token_id=0,
        **attention_for(config),
    )
    set_dropout(shape, config.dropout)
    return BertModel(shape, add_pooling_layer=False)


def named_network(config: ModelConfig, weights: bool) -> nn.Module:
    """A network from the Hub, a package or a folder. `ProjectError` for one that is no encoder."""
    from transformers import AutoConfig, AutoModel

    from common.pretrained import find

    folder = find(config.name)
    quiet()
    try:
        shape = AutoConfig.from_pretrained(folder)
        if getattr(shape, "is_encoder_decoder", False) or not hasattr(shape, "hidden_size"):
            raise ProjectError(
                f"{config.name} is a {shape.model_type}, no encoder; name one such as {ModelConfig.name}"
            )
        set_dropout(shape, config.dropout)
        if not weights:
            return AutoModel.from_config(shape, **attention_for(config))
        return AutoModel.from_pretrained(folder, config=shape, dtype=torch.float32, **attention_for(config))
    except (OSError, ValueError, KeyError) as error:
        raise ProjectError(f"{config.name} cannot be read as an encoder: {first_line(error)}") from None


def attention_for(config: ModelConfig) -> dict[str, Any]:
    """How transformers shall compute attention; left to itself, by PyTorch's fused kernel where the encoder has it."""
    return {"attn_implementation": "eager"} if config.attention_kernel == "written" else {}


def quiet() -> None:
    """No progress bars of transformers for what takes a moment."""
    from transformers.utils import logging as wordy

    wordy.disable_progress_bar()


def set_dropout(shape: Any, rate: float) -> None:
    """Put the rate into a configuration of transformers, under whichever names it has; below 0 leaves it alone."""
    for name in DROPOUTS:
        if rate >= 0 and hasattr(shape, name):
            setattr(shape, name, rate)


def fingerprint(model: nn.Module, config: ModelConfig) -> str:
    """Of the weights and of how text goes in: vectors of one fingerprint can be compared, others cannot."""
    used = {
        name: value
        for name, value in asdict(config).items()
        if name in ("pooling", "query_length", "passage_length", "query_prefix", "passage_prefix")
    }
    digest = weights_hash({name: value.cpu() for name, value in model.state_dict().items()})
    return hashlib.sha256(f"{digest} {json.dumps(used, sort_keys=True)}".encode()).hexdigest()[:16]
