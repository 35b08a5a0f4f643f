"""The model that a command line names: a run of one's own, or published weights with CLIP's tokenizer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from clip.config import Config, DataConfig
from clip.load import Loaded, load_run
from clip.model.images import Preprocess
from clip.model.pretrained import IMAGE_MEAN, IMAGE_STD, Activation, find_weights, from_pretrained
from clip.model.tokenizer import ClipTokenizer
from clip.model.towers import TOKENIZER_FILE
from common.checkpoint import weights_hash
from common.errors import ProjectError
from common.runtime import choose_device

# OpenAI's own names of its models -> where the Hub has them in a format that is read without running code
OPENAI = {
    "openai/RN50": "timm/resnet50_clip.openai",
    "openai/RN101": "timm/resnet101_clip.openai",
    "openai/RN50x4": "timm/resnet50x4_clip.openai",
    "openai/RN50x16": "timm/resnet50x16_clip.openai",
    "openai/RN50x64": "timm/resnet50x64_clip.openai",
    "openai/ViT-B-32": "timm/vit_base_patch32_clip_224.openai",
    "openai/ViT-B-16": "timm/vit_base_patch16_clip_224.openai",
    "openai/ViT-L-14": "timm/vit_large_patch14_clip_224.openai",
    "openai/ViT-L-14-336": "timm/vit_large_patch14_clip_336.openai",
}
VOCABULARIES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt")  # the same list of merges


def data_root(args: argparse.Namespace) -> Path:
    """Where datasets are looked for."""
    return Path(args.data_root or os.environ.get("DATA_ROOT") or "data")


def load_chosen(args: argparse.Namespace) -> Loaded:
    """The model that `arguments.model_parser` was told of. Raises as `load_run` and `load_published`."""
    if args.run is not None:
        return load_run(Path(args.run), args.checkpoint, args.device)
    return load_published(args.weights, args.activation, args.vocabulary, data_root(args), args.device)


def name_of(args: argparse.Namespace) -> str:
    """What to call the model: the run's folder, or the weights'."""
    return Path(args.run).resolve().name if args.run is not None else str(args.weights)


def home_of(args: argparse.Namespace) -> Path:
    """The folder for what is computed with a model: the run's, or one below runs/ named after the weights."""
    if args.run is not None:
        return Path(args.run)
    path = Path(args.weights).expanduser()
    name = path.resolve().stem if path.exists() else args.weights
    return Path("runs") / str(name).replace("/", "_")


def load_published(
    name: str,
    activation: Activation | None = None,
    vocabulary: str | None = None,
    root: Path = Path("data"),
    device: str = "auto",
) -> Loaded:
    """Published weights, ready to embed images and texts as they were trained to.

    Args:
        name: one of `OPENAI`, or what `from_pretrained` takes.
        activation: None reads it from the config beside the weights.
        vocabulary: the file of merges; None looks beside the weights, then below `root`.
    Raises:
        ProjectError: weights or vocabulary are missing, or do not fit each other.
    """
    name = OPENAI.get(name, name)
    model = from_pretrained(name, activation)
    config = Config(model=model.config, data=DataConfig(tokenizer="clip"), device=device)
    path = Path(vocabulary).expanduser() if vocabulary else _find_vocabulary(name, root)
    tokenizer = ClipTokenizer(path, model.config.text.context)
    if tokenizer.vocab_size != model.config.text.vocab_size:
        raise ProjectError(
            f"{name} was trained with {model.config.text.vocab_size} ids, CLIP's tokenizer has {tokenizer.vocab_size}: "
            "only models with CLIP's own vocabulary are known here"
        )
    where = choose_device(device)
    return Loaded(
        config=config,
        model=model.to(where).eval().requires_grad_(False),
        tokenizer=tokenizer,
        preprocess=Preprocess(model.config.image.image_size, IMAGE_MEAN, IMAGE_STD),
        image_base=None,
        text_base=None,
        device=where,
        step=0,
        weights_hash=weights_hash({key: tensor.cpu() for key, tensor in model.state_dict().items()}),
    )


def _find_vocabulary(name: str, root: Path) -> Path:
    """The merges beside the weights, or else where those of `root` are or should be."""
    weights, _ = find_weights(name)
    beside = [weights.parent / file for file in VOCABULARIES]
    below = [(root / TOKENIZER_FILE).parent / file for file in VOCABULARIES]
    return next((path for path in [*beside, *below] if path.is_file()), root / TOKENIZER_FILE)
