"""Pretrained text towers: any text encoder of Hugging Face, cut into layers that are locked and layers to train.

    ids (B, T) -> embeddings -> layer 1 -> ... -> layer n -> tokens (B, T, C) -> pooling -> (B, C)
                                             ^ cut: unlock layers are above it

Texts have different lengths. Features are kept with one number more, (B, T, C + 1), whose last says whether there is a
token (1) or padding (0): one tensor is all that a model needs, and padding can be cut off or added freely.

Legend: B texts, T tokens of the longest, C width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip.config import TextConfig
from clip.model.image_tower import repeatable
from clip.model.pooling import Given, Pooling
from clip.model.tokenizer import Tokenizer
from common.config import ConfigError, require
from common.errors import ProjectError, first_line
from common.pretrained import find

TOKENIZER = "tokenizer.json"


class TextBase(nn.Module):
    """Embeddings and the layers below the cut: ids int64 (B, T) -> (B, T, C + 1).

    model: of transformers, with only those layers. end_id: behind the first one is padding.
    """

    def __init__(self, model: nn.Module, end_id: int):
        super().__init__()
        self.model = model
        self.end_id = end_id

    def forward(self, ids: Tensor) -> Tensor:
        real = before_end(ids, self.end_id)  # (B, T)
        tokens = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state  # (B, T, C)
        return torch.cat([tokens, real[:, :, None].to(tokens.dtype)], dim=2)


class TextTop(nn.Module):
    """The layers above the cut, then pooling: (B, T, C + 1) -> (B, width)."""

    def __init__(self, layers: nn.ModuleList, pooling: Pooling):
        super().__init__()
        self.layers = layers
        self.pooling = pooling
        self.width = pooling.width

    def forward(self, features: Tensor) -> Tensor:
        real = features[:, :, -1] > 0  # (B, T)
        tokens = features[:, :, :-1]
        # minus infinity where nobody may look; the axes stand for heads and for the token that looks
        hidden = torch.zeros_like(features[:, None, None, :, -1]).masked_fill(~real[:, None, None, :], -torch.inf)
        for layer in self.layers:
            tokens = layer(tokens, attention_mask=hidden)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return self.pooling(tokens, real)


class Both(nn.Module):
    """Base and top as one tower, trained as a whole, or locked with its pooling: ids -> (B, width)."""

    def __init__(self, base: TextBase, top: TextTop):
        super().__init__()
        self.base = base
        self.top = top
        self.width = top.width

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.base(ids))


def before_end(ids: Tensor, end_id: int) -> Tensor:
    """Which ids stand before the first end of text, or are it: bool (B, T)."""
    ends = (ids == end_id).int()
    return (ends.cumsum(dim=1) - ends) == 0


class HubTokenizer(Tokenizer):
    """The tokenizer of a pretrained text tower, from its tokenizer.json. Ids are its own; 0 pads."""

    def __init__(self, path: Path, context: int):
        try:
            import tokenizers
        except ImportError:
            raise ProjectError("pretrained text towers need the library tokenizers: pip install tokenizers") from None
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ProjectError(f"{path} cannot be read as a tokenizer: {first_line(error)}") from None
        self.inner.no_padding()
        self.inner.no_truncation()
        super().__init__(self.inner.get_vocab_size(), context)
        around = self.inner.encode("").ids  # the start and end that stand around every text
        if len(around) != 2:
            raise ProjectError(f"{path}: this tokenizer puts {len(around)} ids around a text, not a start and an end")
        self.start_id = around[0]
        self.end_id = around[1]

    def words(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without start and end."""
        encoded = self.inner.encode_batch(texts, add_special_tokens=False)
        # the end written in a text is no end
        return [[i for i in item.ids if i != self.end_id] for item in encoded]


def build_text_tower(config: TextConfig, start: bool = True) -> tuple[nn.Module, nn.Module | None, Tokenizer]:
    """What is trained, what is locked below it (None: nothing), and the tokenizer.

    start: see `towers.build_towers`.
    Raises:
        ConfigError: more layers to unlock than there are, or a context that is too long. ProjectError: no such model.
    """
    folder = find(config.name)
    if not (folder / TOKENIZER).is_file():
        raise ProjectError(f"{folder} has no {TOKENIZER}: this text encoder has no fast tokenizer")
    tokenizer = HubTokenizer(folder / TOKENIZER, config.context)
    model = load_encoder(folder, config.name, config.random or not (start or config.unlock != -1))
    longest = getattr(model.config, "max_position_embeddings", config.context)
    require(config.context <= longest, "model.text.context", f"must be at most {longest} for {config.name}")
    width = int(model.config.hidden_size)
    pooling = Pooling("attention" if config.pool == "attention" else "mean", width)
    if config.unlock == -1:
        return Both(TextBase(model, tokenizer.end_id), TextTop(nn.ModuleList(), pooling)), None, tokenizer
    upper = cut_layers(model, config.unlock, config.name)
    base = TextBase(model, tokenizer.end_id)
    top = TextTop(upper, pooling)
    if config.unlock == 0 and config.pool == "mean":  # nothing above to train: its pooled output is the feature
        return Given(width), Both(base, top), tokenizer
    return top, base, tokenizer


def cut_layers(model: nn.Module, count: int, name: str) -> nn.ModuleList:
    """Take the last `count` layers off a model and return them."""
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    if count == 0:
        return nn.ModuleList()
    require(
        isinstance(layers, nn.ModuleList),
        "model.text.unlock",
        f"{name} is no stack of layers as BERT is; 0 locks it and -1 trains all of it",
    )
    assert isinstance(layers, nn.ModuleList)
    require(count < len(layers), "model.text.unlock", f"{name} has {len(layers)} layers; -1 unlocks all")
    upper = layers[-count:]
    del layers[-count:]
    assert isinstance(upper, nn.ModuleList)
    return upper


def load_encoder(folder: Path, name: str, random: bool) -> Any:
    """The network of transformers, in float32 and evaluation mode."""
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging
    except ImportError:
        raise ProjectError("pretrained text towers need transformers: pip install transformers") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    words = {"add_pooling_layer": False}
    try:
        if random:
            with repeatable():
                model = AutoModel.from_config(AutoConfig.from_pretrained(folder), **words)
        else:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, **words)
    except TypeError:  # not every kind has a pooling layer to leave out
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ProjectError(f"{name} cannot be read as a text encoder: {first_line(error)}") from None
    if not hasattr(model.config, "hidden_size"):
        raise ConfigError("model.text.name", f"{name} is no text encoder")
    return model.eval()
