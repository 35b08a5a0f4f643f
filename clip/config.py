"""Every setting of the clip project, with its default and its unit. YAML files override these, `key=value` overrides
both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import BaseConfig, require

RESNET_STRIDE = 32  # CLIP's ResNet looks at the image on a grid of image_size / 32


@dataclass(frozen=True)
class DataConfig:
    """Which images and captions."""

    # scenes: drawn by this program, no download; flickr8k, flickr30k and coco in the Karpathy layout; folder: images
    # with a CSV or JSONL of captions; webdataset: tar shards, as Conceptual Captions is kept
    dataset: Literal["scenes", "flickr8k", "flickr30k", "coco", "folder", "webdataset"] = "scenes"
    folder: str = ""  # folder and webdataset: where, relative to data_root or absolute
    # clip: byte-level BPE of data_root/clip_tokenizer; words: one id a word of the scenes' captions
    tokenizer: Literal["words", "clip"] = "words"
    # a caption drawn anew each epoch, or all captions of an image together as positives
    captions: Literal["one", "all"] = "one"
    crop: float = 1.0  # smallest share of the image's area that a random resized crop keeps; 1 = whole images
    scenes: int = 1_000_000  # scenes: images in an epoch
    groups: int = 3  # scenes: most groups of equal objects in a scene
    workers: int = 2  # processes that draw or decode images

    def __post_init__(self) -> None:
        require(0 < self.crop <= 1, "data.crop", "must be in (0, 1]")
        require(self.scenes >= 1, "data.scenes", "must be at least 1")
        require(1 <= self.groups <= 3, "data.groups", "must be 1, 2 or 3")
        require(self.workers >= 0, "data.workers", "must not be negative")
        needs_folder = self.dataset in ("folder", "webdataset")
        require(not needs_folder or self.folder, "data.folder", f"must name a directory for {self.dataset}")
        require(
            self.dataset == "scenes" or self.tokenizer == "clip",
            "data.tokenizer",
            "words knows only the captions of data.dataset=scenes; take clip",
        )


@dataclass(frozen=True)
class ImageConfig:
    """The image tower. The defaults are ViT-B/32 of Radford et al. 2021."""

    kind: Literal["vit", "resnet"] = "vit"  # Vision Transformer, or CLIP's ResNet with attention pooling
    image_size: int = 224  # pixels of the square images
    width: int = 768  # vit: numbers a token; resnet: channels after the stem, 64 for RN50
    heads: int = 12  # attention heads: of every vit layer, or of the resnet's pooling
    patch: int = 32  # vit: pixels of a square patch
    layers: int = 12  # vit: Transformer blocks
    stages: tuple[int, ...] = (3, 4, 6, 3)  # resnet: blocks a stage; each stage after the first halves the resolution
    mlp_ratio: float = 4.0  # vit: width of a block's hidden layer, times `width`
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"  # OpenAI's weights want quick_gelu, SigLIP's tanh
    # vit: the class token (Radford et al.), the mean of the patches, or a learned query (Zhai et al. 2023)
    pool: Literal["class", "mean", "attention"] = "class"
    pre_norm: bool = True  # vit: LayerNorm before the first block (Radford et al.); without it the patches have a bias
    patch_dropout: float = 0.0  # vit: share of the patches left out in training (FLIP, Li et al. 2023)
    dropout: float = 0.0  # vit: after each attention and each MLP
    norm_eps: float = 1e-5  # of every LayerNorm

    def __post_init__(self) -> None:
        for name in ("image_size", "width", "heads", "patch", "layers"):
            require(getattr(self, name) >= 1, f"model.image.{name}", "must be at least 1")
        require(0 <= self.patch_dropout < 1, "model.image.patch_dropout", "must be in [0, 1)")
        require(0 <= self.dropout < 1, "model.image.dropout", "must be in [0, 1)")
        require(self.mlp_ratio > 0, "model.image.mlp_ratio", "must be positive")
        require(self.norm_eps > 0, "model.image.norm_eps", "must be positive")
        if self.kind == "vit":
            side = self.patch
            require(self.width % self.heads == 0, "model.image.width", f"must be a multiple of heads={self.heads}")
        else:
            side = RESNET_STRIDE
            require(
                len(self.stages) == 4 and min(self.stages) >= 1,
                "model.image.stages",
                "must be four numbers of blocks, at least 1 each",
            )
            require(self.width % 2 == 0, "model.image.width", "must be even: the stem begins with half of it")
            require(
                32 * self.width % self.heads == 0,
                "model.image.heads",
                f"must divide 32 * width = {32 * self.width}, the channels that are pooled",
            )
            unused = self.patch_dropout > 0 or self.dropout > 0
            require(not unused, "model.image.kind", "resnet has no dropout: set patch_dropout and dropout to 0")
        require(self.image_size % side == 0, "model.image.image_size", f"must be a multiple of {side} pixels")


@dataclass(frozen=True)
class TextConfig:
    """The text tower. The defaults are that of Radford et al. 2021 beside ViT-B/32."""

    vocab_size: int = 49_408  # ids of the tokenizer; the last one is the end of text
    context: int = 77  # most ids of a text, start and end included
    width: int = 512  # numbers a token
    heads: int = 8  # attention heads
    layers: int = 12  # Transformer blocks
    mlp_ratio: float = 4.0  # width of a block's hidden layer, times `width`
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"  # as model.image.activation
    causal: bool = True  # a token sees only those before it (Radford et al.); SigLIP's sees all
    # the token whose output stands for the text: the end of text, or the last of the context, padding or not (SigLIP)
    pool: Literal["end", "last"] = "end"
    dropout: float = 0.0  # after each attention and each MLP
    norm_eps: float = 1e-5  # of every LayerNorm

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "heads", "layers"):
            require(getattr(self, name) >= 1, f"model.text.{name}", "must be at least 1")
        require(self.context >= 2, "model.text.context", "must be at least 2: start and end of text")
        require(self.width % self.heads == 0, "model.text.width", f"must be a multiple of heads={self.heads}")
        require(0 <= self.dropout < 1, "model.text.dropout", "must be in [0, 1)")
        require(self.mlp_ratio > 0, "model.text.mlp_ratio", "must be positive")
        require(self.norm_eps > 0, "model.text.norm_eps", "must be positive")
        require(
            self.causal or self.pool == "last",
            "model.text.pool",
            "must be last when causal=false: otherwise the padding behind the end changes the text's embedding",
        )


@dataclass(frozen=True)
class HeadConfig:
    """From a tower's features to the embedding that is compared."""

    kind: Literal["linear", "mlp", "none"] = "linear"  # none: the features are the embedding
    bias: bool = False  # linear: whether it has one; an mlp always does
    hidden: int = 1024  # mlp: width of its hidden layer
    dropout: float = 0.0  # mlp: before each of its two maps

    def check(self, key: str) -> None:
        """`ConfigError` for a value that cannot be; `key` is the name of this section."""
        require(self.hidden >= 1, f"{key}.hidden", "must be at least 1")
        require(0 <= self.dropout < 1, f"{key}.dropout", "must be in [0, 1)")
        require(self.kind == "mlp" or self.dropout == 0, f"{key}.dropout", "only kind=mlp has it")
        require(self.kind == "linear" or not self.bias, f"{key}.bias", "is for kind=linear; an mlp always has one")


@dataclass(frozen=True)
class ModelConfig:
    """Two towers, and what compares them."""

    embed_dim: int = 512  # numbers of an embedding
    # info_nce: which caption of the batch belongs to this image (Radford et al. 2021); sigmoid: does this caption
    # belong to this image (Zhai et al. 2023)
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    temperature: float = 0.0  # at the start; 0 = the paper's, 0.07 for info_nce and 0.1 for sigmoid
    bias: float = -10.0  # sigmoid: b at the start; most pairs are no match, and this says so before anything is learned
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_head: HeadConfig = field(default_factory=HeadConfig)
    text_head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        require(self.embed_dim >= 1, "model.embed_dim", "must be at least 1")
        require(
            self.temperature == 0 or 0.01 <= self.temperature <= 1,
            "model.temperature",
            "must be 0, or from 0.01 to 1: the scale 1 / temperature is kept between 1 and 100",
        )
        require(math.isfinite(self.bias), "model.bias", "must be a finite number")
        self.image_head.check("model.image_head")
        self.text_head.check("model.text_head")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 20_000  # updates
    batch_size: int = 256  # images, over all processes together; each is a negative example to the others' captions
    # images a forward pass on one device: the gradient cache (Gao et al. 2021) makes any batch fit, at the price of a
    # second forward pass; 0 = the whole share of the batch at once
    microbatch: int = 0
    lr: float = 5e-4  # learning rate of AdamW, after the warm-up
    warmup: int = 1000  # steps; at most a tenth of train.steps is used
    decay: Literal["constant", "linear", "cosine"] = "cosine"  # shape after the warm-up; the last two end at zero
    weight_decay: float = 0.2  # of AdamW; never on gains, biases and the temperature
    betas: tuple[float, float] = (0.9, 0.98)  # decay rates of AdamW's two moments (Radford et al. 2021, table 19)
    eps: float = 1e-6  # of AdamW
    grad_clip: float = 1.0  # global norm; 0 = off
    log_every: int = 50  # steps
    save_every: int = 1000  # steps between checkpoints
    eval_every: int = 1000  # steps between measurements on validation data; 0 = never

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("microbatch", "warmup", "weight_decay", "grad_clip", "eval_every"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(self.batch_size >= 2, "train.batch_size", "must be at least 2: a pair alone has nothing to differ from")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(self.eps > 0, "train.eps", "must be positive")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", "must be in [0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    """What `clip.eval` measures."""

    split: Literal["val", "test"] = "test"  # choose on val, report test
    batch_size: int = 256  # images or captions embedded at once
    fold: int = 0  # images a gallery; the mean over the galleries is reported (COCO: 1000); 0 = all images in one
    block: int = 1024  # rows of the similarity matrix in memory at once
    gallery: int = 1000  # scenes: images in each gallery

    def __post_init__(self) -> None:
        for name in ("batch_size", "block", "gallery"):
            require(getattr(self, name) >= 1, f"eval.{name}", "must be at least 1")
        require(self.fold >= 0, "eval.fold", "must not be negative")


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
