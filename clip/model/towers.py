"""The towers of a config, own and pretrained, put together: what is locked, what is trained, and how inputs get there.

A pretrained tower is a pile of stages. It is cut once: below the cut everything is locked, above it everything is
trained (`unlock` counts the stages above).

    images (B, 3, S, S) -> locked stages -> features -> trained stages -> pooling -> (B, width) -> head
                           `image_base`     cached      `model.image_encoder`

With `unlock=0` all of it is locked: locked-image tuning, LiT (Zhai et al. 2022, arXiv:2111.07991). Because what is
locked never changes, features are computed once; where nothing is left to train before the head, pooled ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from clip.config import Config, ModelConfig
from clip.data import scene_words
from clip.model import CLIP
from clip.model.dual_encoder import width_of
from clip.model.image_tower import build_image_tower, load_classifier
from clip.model.images import Preprocess
from clip.model.pretrained import IMAGE_MEAN, IMAGE_STD, from_pretrained
from clip.model.text_tower import build_text_tower
from clip.model.tokenizer import ClipTokenizer, Tokenizer, WordTokenizer
from common.checkpoint import weights_hash
from common.config import ConfigError, flatten, require

TOKENIZER_FILE = "clip_tokenizer/bpe_simple_vocab_16e6.txt"


class Towers(NamedTuple):
    """Everything between a person's images and texts and their embeddings."""

    model: CLIP  # what is trained, and saved
    image_base: nn.Module | None  # locked: images -> features, the input of `model`; None: it takes images
    text_base: nn.Module | None  # locked: ids -> features; None: the model takes ids
    tokenizer: Tokenizer
    preprocess: Preprocess
    # with model.start_heads=classes, before training: the image tower's classifier, and what its classes are called
    classifier: tuple[Tensor, list[str]] | None = None

    @property
    def locked_hash(self) -> str:
        """SHA-256 of all locked weights, which no checkpoint holds; empty without any."""
        bases = {"image": self.image_base, "text": self.text_base}
        state = {f"{k}.{n}": t for k, base in bases.items() if base is not None for n, t in base.state_dict().items()}
        return weights_hash(state) if state else ""


def build_towers(config: Config, start: bool = True) -> Towers:
    """The towers that a config describes, on the CPU.

    Args:
        start: with the weights that training starts from. Without, those above the cut are left as they fall, for a
            checkpoint to be loaded into.
    Raises:
        ConfigError: settings that do not fit together. ProjectError: weights or a vocabulary that are not there.
    """
    image_encoder = image_base = text_encoder = text_base = None
    preprocess = Preprocess(config.model.image.image_size, IMAGE_MEAN, IMAGE_STD)
    if config.model.image.kind == "pretrained":
        image_encoder, image_base, preprocess = build_image_tower(config.model.image, start)
    if config.model.text.kind == "pretrained":
        text_encoder, text_base, tokenizer = build_text_tower(config.model.text, start)
    else:
        tokenizer = build_tokenizer(config)
    try:
        model = CLIP(config.model, image_encoder, text_encoder)
    except ValueError as error:
        raise ConfigError("model.embed_dim", str(error)) from None
    if config.model.start and start:
        _start_from(config.model, model)
    classifier = None
    if config.model.start_heads == "classes" and start:
        classifier = _classifier_for(config.model, model)
    for base in (image_base, text_base):
        if base is not None:
            base.eval().requires_grad_(False)
    return Towers(model, image_base, text_base, tokenizer, preprocess, classifier)


def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of an own text tower. `ConfigError` where the tower was not made for its ids."""
    context = config.model.text.context
    tokenizer: Tokenizer
    if config.data.tokenizer == "words":
        tokenizer = WordTokenizer(scene_words.vocabulary(), context)
    else:
        tokenizer = ClipTokenizer(Path(config.data_root) / TOKENIZER_FILE, context)
    require(
        config.model.text.vocab_size == tokenizer.vocab_size,
        "model.text.vocab_size",
        f"must be {tokenizer.vocab_size} for data.tokenizer={config.data.tokenizer}",
    )
    return tokenizer


def _classifier_for(config: ModelConfig, model: CLIP) -> tuple[Tensor, list[str]]:
    """What the heads will begin with. `ConfigError` here, before any features are computed, where they cannot."""
    width = width_of(model.text_encoder)
    require(
        config.embed_dim >= width,
        "model.embed_dim",
        f"must be at least the text tower's width {width} for model.start_heads=classes",
    )
    pooled = width_of(model.image_encoder)
    return load_classifier(config.image, pooled // 2 if config.image.pool == "mean_max" else pooled)


def _start_from(config: ModelConfig, model: CLIP) -> None:
    """Copy published weights into a new model. `ConfigError` where the config describes another architecture."""
    own = config.image.kind != "pretrained" and config.text.kind != "pretrained"
    require(own, "model.start", "is for own towers: model.image.kind=vit or resnet, model.text.kind=transformer")
    published = from_pretrained(config.start, config.image.activation)
    for section in ("image", "text"):
        theirs = flatten(getattr(published.config, section), f"model.{section}.")
        ours = flatten(getattr(config, section), f"model.{section}.")
        for key, value in theirs.items():
            trained = key.rsplit(".")[-1] in ("dropout", "patch_dropout")
            require(trained or ours[key] == value, key, f"must be {value} for model.start={config.start}")
    require(config.embed_dim == published.config.embed_dim, "model.embed_dim", f"must be {published.config.embed_dim}")
    weights = published.state_dict()
    if model.bias is not None and "bias" not in weights:
        weights["bias"] = model.bias.detach()
    if model.bias is None:
        weights.pop("bias", None)
    model.load_state_dict(weights)
