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
    folder: str = ""  # folder and webdataset: where, in data_root or here, or absolute
    # folder and webdataset: share of the images kept for evaluation, half of it as val, half as test; in a folder, only
    # where no column `split` says which is which
    held_out: float = 0.1
    # clip: byte-level BPE of data_root/clip_tokenizer; words: one id a word of the scenes' captions; pretrained: that
    # of the text tower (model.text.kind=pretrained)
    tokenizer: Literal["words", "clip", "pretrained"] = "words"
    # captions of an image in a step, drawn anew each epoch, all of them positives; 5 = all that Flickr8k's have
    captions: int = 1
    crop: float = 1.0  # smallest share of the image's area that a random resized crop keeps; 1 = the centre square
    flip: bool = False  # mirror half of the images; wrong where captions say left and right, as those of scenes do
    # locked towers: versions of each training image whose features are cached: the image, its mirror image (data.flip),
    # then random crops (data.crop); a step takes one of them
    views: int = 1
    scenes: int = 1_000_000  # scenes: images in an epoch
    groups: int = 3  # scenes: most groups of equal objects in a scene
    # scenes: so many of a batch have the same colours, shapes and background and differ only in order, counts and in
    # what goes together: hard negatives (Yuksekgonul et al. 2023); 1 = scenes drawn apart
    family: int = 1
    max_images: int = 0  # train on only N images, drawn by seed; 0 = all
    workers: int = 2  # processes that draw or decode images

    def __post_init__(self) -> None:
        require(0 < self.crop <= 1, "data.crop", "must be in (0, 1]")
        for name in ("scenes", "captions", "views", "family"):
            require(getattr(self, name) >= 1, f"data.{name}", "must be at least 1")
        require(1 <= self.groups <= 3, "data.groups", "must be 1, 2 or 3")
        for name in ("workers", "max_images"):
            require(getattr(self, name) >= 0, f"data.{name}", "must not be negative")
        require(0 < self.held_out < 1, "data.held_out", "must be in (0, 1)")
        needs_folder = self.dataset in ("folder", "webdataset")
        require(not needs_folder or self.folder, "data.folder", f"must name a directory for {self.dataset}")
        require(self.family == 1 or self.dataset == "scenes", "data.family", "is for data.dataset=scenes")
        require(self.scenes % self.family == 0, "data.scenes", f"must be a multiple of data.family={self.family}")
        require(needs_folder or not self.folder, "data.folder", "is for data.dataset=folder or webdataset")
        if self.dataset == "scenes":
            require(self.max_images == 0, "data.max_images", "is for images on a disk; scenes have data.scenes")
            require(not self.flip, "data.flip", "would make the captions of scenes wrong: they say left and right")
            require(self.crop == 1, "data.crop", "would cut off objects that the captions of scenes speak of")
        require(
            self.dataset == "scenes" or self.tokenizer != "words",
            "data.tokenizer",
            "words knows only the captions of data.dataset=scenes; take clip, or pretrained",
        )


@dataclass(frozen=True)
class ImageConfig:
    """The image tower. The defaults are ViT-B/32 of Radford et al. 2021."""

    # Vision Transformer, or CLIP's ResNet with attention pooling; pretrained: any network of timm or torchvision
    kind: Literal["vit", "resnet", "pretrained"] = "vit"
    name: str = ""  # pretrained: timm/<model> or torchvision/<model>, such as torchvision/resnet50
    # pretrained: a weights file, or efficientnet-lite0, 1 or 2 from a pip package; empty = what the library downloads;
    # random = untrained, to compare
    weights: str = ""
    # pretrained: stages from the top that are trained, the others are locked; 0 = all locked (LiT), -1 = none locked
    unlock: int = 0
    grid: int = 0  # pretrained: the feature map is averaged to grid x grid positions before pooling; 0 = as it is
    image_size: int = 224  # pixels of the square images
    width: int = 768  # vit: numbers a token; resnet: channels after the stem, 64 for RN50
    heads: int = 12  # attention heads: of every vit layer, or of the resnet's pooling
    patch: int = 32  # vit: pixels of a square patch
    layers: int = 12  # vit: Transformer blocks
    stages: tuple[int, ...] = (3, 4, 6, 3)  # resnet: blocks a stage; each stage after the first halves the resolution
    mlp_ratio: float = 4.0  # vit: width of a block's hidden layer, times `width`
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"  # OpenAI's weights want quick_gelu, SigLIP's tanh
    # vit: the class token (Radford et al.), the mean of the patches, or a learned query (Zhai et al. 2023); pretrained:
    # mean, mean_max (both, side by side) or attention
    pool: Literal["class", "mean", "mean_max", "attention"] = "class"
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
        pretrained = self.kind == "pretrained"
        require(pretrained or not self.name, "model.image.name", "is for model.image.kind=pretrained")
        require(pretrained or not self.weights, "model.image.weights", "is for model.image.kind=pretrained")
        require(pretrained or not self.unlock, "model.image.unlock", "is for model.image.kind=pretrained")
        require(pretrained or not self.grid, "model.image.grid", "is for model.image.kind=pretrained")
        if pretrained:
            self._check_pretrained()
            return
        require(self.pool != "mean_max", "model.image.pool", "mean_max is for model.image.kind=pretrained")
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

    def _check_pretrained(self) -> None:
        library, _, model = self.name.partition("/")
        require(
            library in ("timm", "torchvision") and model,
            "model.image.name",
            "must be timm/<model> or torchvision/<model>, such as timm/tf_efficientnet_lite0",
        )
        require(self.unlock >= -1, "model.image.unlock", "must be -1 (all), 0 (none) or a number of stages")
        require(self.grid >= 0, "model.image.grid", "must not be negative")
        require(self.grid == 0 or self.unlock == 0, "model.image.grid", "is for locked towers: model.image.unlock=0")
        require(self.pool != "class", "model.image.pool", "must be mean, mean_max or attention for a pretrained tower")
        unused = self.patch_dropout > 0 or self.dropout > 0
        require(not unused, "model.image.dropout", "a pretrained tower keeps its own; use model.image_head.dropout")


@dataclass(frozen=True)
class TextConfig:
    """The text tower. The defaults are that of Radford et al. 2021 beside ViT-B/32."""

    kind: Literal["transformer", "pretrained"] = "transformer"  # pretrained: any text encoder of Hugging Face
    # pretrained: its Hub id, a folder, or a pip package that carries it
    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    random: bool = False  # pretrained: the architecture without its weights, to compare
    unlock: int = (
        0  # pretrained: layers from the top that are trained, the others are locked; 0 = all locked, -1 = none
    )
    vocab_size: int = 49_408  # ids of the tokenizer; the last one is the end of text
    context: int = 77  # most ids of a text, start and end included
    width: int = 512  # numbers a token
    heads: int = 8  # attention heads
    layers: int = 12  # Transformer blocks
    mlp_ratio: float = 4.0  # width of a block's hidden layer, times `width`
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"  # as model.image.activation
    causal: bool = True  # a token sees only those before it (Radford et al.); SigLIP's sees all
    # the token whose output stands for the text: the end of text, or the last of the context, padding or not (SigLIP);
    # pretrained: mean of the tokens, or attention (a learned query)
    pool: Literal["end", "last", "mean", "attention"] = "end"
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
        pretrained = self.kind == "pretrained"
        require(pretrained or not self.unlock, "model.text.unlock", "is for model.text.kind=pretrained")
        require(pretrained or not self.random, "model.text.random", "is for model.text.kind=pretrained")
        own = self.pool in ("end", "last")
        require(
            own != pretrained,
            "model.text.pool",
            "must be mean or attention for a pretrained tower" if pretrained else "must be end or last",
        )
        if pretrained:
            require(self.name, "model.text.name", "must name a text encoder, such as its Hub id")
            require(self.unlock >= -1, "model.text.unlock", "must be -1 (all), 0 (none) or a number of layers")
            require(self.dropout == 0, "model.text.dropout", "a pretrained tower keeps its own")
            return
        require(
            self.causal or self.pool == "last",
            "model.text.pool",
            "must be last when causal=false: otherwise the padding behind the end changes the text's embedding",
        )


@dataclass(frozen=True)
class HeadConfig:
    """From a tower's features to the embedding that is compared."""

    # mlp: two linear maps with a GELU between; residual: a linear map plus an mlp that starts at zero; none: the
    # features are the embedding
    kind: Literal["linear", "mlp", "residual", "none"] = "linear"
    bias: bool = False  # linear: whether it has one; mlp and residual always do
    # of the features before the map. layer: LayerNorm; standard: each minus its mean, over its standard deviation, both
    # measured once on training data before the first step
    norm: Literal["none", "layer", "standard"] = "none"
    hidden: int = 1024  # mlp, residual: width of the hidden layer
    dropout: float = 0.0  # mlp, residual: before each of the maps

    def check(self, key: str) -> None:
        """`ConfigError` for a value that cannot be; `key` is the name of this section."""
        require(self.hidden >= 1, f"{key}.hidden", "must be at least 1")
        require(0 <= self.dropout < 1, f"{key}.dropout", "must be in [0, 1)")
        has_hidden = self.kind in ("mlp", "residual")
        require(has_hidden or self.dropout == 0, f"{key}.dropout", "is for kind=mlp or residual")
        require(self.kind != "none" or self.norm == "none", f"{key}.norm", "has no map to stand before with kind=none")
        require(self.kind == "linear" or not self.bias, f"{key}.bias", "is for kind=linear; mlp and residual have one")


@dataclass(frozen=True)
class ModelConfig:
    """Two towers, and what compares them."""

    embed_dim: int = 512  # numbers of an embedding
    # info_nce: which caption of the batch belongs to this image (Radford et al. 2021); sigmoid: does this caption
    # belong to this image (Zhai et al. 2023)
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    temperature: float = 0.0  # at the start; 0 = the paper's, 0.07 for info_nce and 0.1 for sigmoid
    bias: float = -10.0  # sigmoid: b at the start; most pairs are no match, and this says so before anything is learned
    # start training from these weights of OpenAI, OpenCLIP or transformers (a file, a folder, a Hub id); `image` and
    # `text` must describe them
    start: str = ""
    # how the heads begin. classes: with what the image tower's own classifier knows, that of ImageNet; see
    # `heads.start_from_classes`
    start_heads: Literal["random", "classes"] = "random"
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
        if self.start_heads == "classes":
            self._check_classes()

    def _check_classes(self) -> None:
        key = "model.start_heads"
        for name in ("image", "text"):
            tower: ImageConfig | TextConfig = getattr(self, name)
            head: HeadConfig = getattr(self, f"{name}_head")
            require(tower.kind == "pretrained", key, f"classes needs model.{name}.kind=pretrained")
            require(
                head.kind in ("linear", "residual"), key, f"classes needs model.{name}_head.kind linear or residual"
            )
            require(head.norm == "standard", key, f"classes needs model.{name}_head.norm=standard")
        require(self.image.weights != "random", key, "classes needs a trained image tower")
        require(self.image.pool in ("mean", "mean_max"), key, "classes needs model.image.pool mean or mean_max")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 20_000  # updates
    batch_size: int = 256  # images, over all processes together; each is a negative example to the others' captions
    # images a forward pass on one device: the gradient cache (Gao et al. 2021) makes any batch fit, at the price of a
    # second forward pass; 0 = the whole share of the batch at once
    microbatch: int = 0
    lr: float = 5e-4  # learning rate of AdamW, after the warm-up
    tower_lr: float = 0.1  # learning rate of what is trained of a pretrained tower, times `lr`
    warmup: int = 1000  # steps; at most a tenth of train.steps is used
    decay: Literal["constant", "linear", "cosine"] = "cosine"  # shape after the warm-up; the last two end at zero
    weight_decay: float = 0.2  # of AdamW; never on gains, biases and the temperature
    betas: tuple[float, float] = (0.9, 0.98)  # decay rates of AdamW's two moments (Radford et al. 2021, table 19)
    eps: float = 1e-6  # of AdamW
    grad_clip: float = 1.0  # global norm; 0 = off
    label_smoothing: float = 0.0  # info_nce: share of the target that goes to all pairs of the batch alike
    ema: float = 0.0  # decay a step of the averaged weights, which evaluation then uses; 0 = off
    block: int = 0  # rows of the similarity matrix held at once, the others computed again; 0 = all of them
    log_every: int = 50  # steps
    save_every: int = 1000  # steps between checkpoints
    eval_every: int = 1000  # steps between measurements on validation data; 0 = never

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("microbatch", "warmup", "weight_decay", "grad_clip", "eval_every", "tower_lr", "block"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(self.batch_size >= 2, "train.batch_size", "must be at least 2: a pair alone has nothing to differ from")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(self.eps > 0, "train.eps", "must be positive")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", "must be in [0, 1)")
        require(0 <= self.ema < 1, "train.ema", "must be in [0, 1)")
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", "must be in [0, 1)")


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

    def __post_init__(self) -> None:
        require(
            (self.data.tokenizer == "pretrained") == (self.model.text.kind == "pretrained"),
            "data.tokenizer",
            "must be pretrained with model.text.kind=pretrained, and only then: a text tower knows its own ids",
        )
        require(
            self.train.batch_size % self.data.family == 0,
            "train.batch_size",
            f"must be a multiple of data.family={self.data.family}",
        )
        require(
            self.data.views == 1 or (self.model.image.kind == "pretrained" and self.model.image.unlock >= 0),
            "data.views",
            "are cached features of a locked tower; a trained tower sees a new crop each time (data.crop, data.flip)",
        )
        varied = 1 + self.data.flip + (self.data.crop < 1)
        require(
            self.model.image.kind != "pretrained" or self.model.image.unlock == -1 or self.data.views >= varied,
            "data.views",
            f"must be at least {varied} with a locked tower: the image, and one for each of data.flip and data.crop",
        )
        require(
            self.data.dataset != "scenes" or self.model.image.kind != "pretrained" or self.model.image.unlock == -1,
            "data.dataset",
            "scenes are drawn anew each time, so that features of a locked tower cannot be kept: take another dataset, "
            "or model.image.unlock=-1",
        )
        require(
            self.train.label_smoothing == 0 or self.model.loss == "info_nce",
            "train.label_smoothing",
            "is for model.loss=info_nce",
        )
