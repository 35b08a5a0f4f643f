"""Every setting of the vae project, with its default and its unit. YAML files override these, `key=value` overrides
both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import BaseConfig, require

BINARY = ("dsprites",)  # datasets whose pixels are black or white as they are


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how their grey values become what the likelihood is a distribution of."""

    # digits (scikit-learn's) and dsprites (drawn here) need no download; fashion_mnist, kmnist and qmnist are read as
    # mnist is
    dataset: Literal[
        "mnist", "fashion_mnist", "kmnist", "qmnist", "cifar10", "celeba", "digits", "dsprites", "folder"
    ] = "mnist"
    # dataset=folder: any directory tree of images, in data_root or here, or absolute; its sub-folders are the classes
    folder: str = ""
    held_out: float = 0.05  # folder: share of the images kept for evaluation, where there is no folder val or test
    grey: bool = False  # folder: read images as one grey channel (model.image_channels=1)
    image_size: int = 28  # pixels; celeba and folder images are centre-cropped and resized to it
    flip: bool = False  # random horizontal flips; wrong for digits
    workers: int = 2  # processes that decode celeba and folder images; the others are held in memory
    patience: int = 300  # seconds to wait for them before the run ends, as when a network disk is gone; 0 = for ever
    max_images: int = 0  # train on only N images, drawn by seed; 0 = all
    # dynamic: a pixel is white with a probability equal to its grey value, drawn anew each time (Burda et al. 2016);
    # static: drawn once for the whole dataset; none: the grey values themselves, for a likelihood of grey values
    # (black and white ones, dsprites, stay as they are)
    binarize: Literal["none", "dynamic", "static"] = "dynamic"
    validation: int = 0  # training images set apart, by seed, to choose on; 0 = none

    def __post_init__(self) -> None:
        require(self.image_size >= 4, "data.image_size", "must be at least 4 pixels")
        require(self.workers >= 0, "data.workers", "must not be negative")
        require(self.patience >= 0, "data.patience", "must not be negative")
        require(self.max_images >= 0, "data.max_images", "must not be negative")
        require(self.validation >= 0, "data.validation", "must not be negative")
        require(0 <= self.held_out < 1, "data.held_out", "must be in [0, 1)")
        require(
            self.dataset != "folder" or self.folder, "data.folder", "must name a directory when data.dataset=folder"
        )
        require(
            self.dataset != "dsprites" or self.image_size in (32, 64),
            "data.image_size",
            "must be 32 or 64 for data.dataset=dsprites",
        )
        require(not self.flip or self.dataset != "dsprites", "data.flip", "would change a factor of dsprites")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, latents and decoder."""

    # mlp and conv: one layer of latents; ladder: a hierarchy of them, inferred from the top down
    kind: Literal["mlp", "conv", "ladder"] = "mlp"
    image_channels: int = 1  # 3 for colour, 1 for grey
    latents: int = 50  # numbers in the code (mlp and conv)
    hidden: tuple[int, ...] = (512, 512)  # mlp: widths, from the image to the code; the decoder mirrors them
    channels: int = 32  # conv and ladder: width at half resolution
    # conv and ladder: width of each level, times `channels`; each level halves the resolution
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1  # conv and ladder: residual blocks a level
    width: int = 256  # conv: the layer between the smallest grid and the code; ladder: of the states between latents
    # ladder: latents of each layer, from the top (the first to be drawn) down
    ladder: tuple[int, ...] = (10, 10, 10, 10, 10)
    # ladder: how the image is read and drawn, by a stack of linear layers (`hidden`) or of convolutions
    network: Literal["mlp", "conv"] = "mlp"
    activation: Literal["relu", "tanh", "silu", "gelu"] = "silu"  # between the layers
    dropout: float = 0.0  # of the encoder's and decoder's hidden layers
    # how weights start: lecun: every latent says something, a layer's output varies as much as its input; near_prior:
    # none does, and few will be taken up, which likelihoods suffer from and disentanglement gains by
    init: Literal["lecun", "near_prior"] = "lecun"

    def __post_init__(self) -> None:
        require(self.image_channels >= 1, "model.image_channels", "must be at least 1")
        require(self.latents >= 1, "model.latents", "must be at least 1")
        require(self.width >= 1, "model.width", "must be at least 1")
        require(self.channels >= 1, "model.channels", "must be at least 1")
        require(self.blocks >= 0, "model.blocks", "must not be negative")
        require(0 <= self.dropout < 1, "model.dropout", "must be in [0, 1)")
        for name in ("hidden", "multipliers", "ladder"):
            sizes = getattr(self, name)
            require(len(sizes) > 0 and min(sizes) >= 1, f"model.{name}", "must be positive integers, at least one")


@dataclass(frozen=True)
class LikelihoodConfig:
    """p(x | z): what the decoder's output is a distribution of. Every log-likelihood is in nats, summed over pixels."""

    # bernoulli: of black and white pixels; gaussian: of grey values with uniform noise added, a density;
    # logistic_mixture: of the 256 grey values (Salimans et al. 2017)
    kind: Literal["bernoulli", "gaussian", "logistic_mixture"] = "bernoulli"
    # gaussian: one fixed number (`sigma`), one learned number, the best one for each batch in closed form (sigma-VAE,
    # Rybkin et al. 2021), or one for every pixel from the decoder
    sigma_from: Literal["fixed", "learned", "optimal", "decoder"] = "optimal"
    # gaussian, sigma_from=fixed: standard deviation of a pixel whose grey values span [0, 1]
    sigma: float = 0.1
    mixtures: int = 5  # logistic_mixture: components

    def __post_init__(self) -> None:
        require(0 < self.sigma < math.inf, "likelihood.sigma", "must be positive and finite")
        require(self.mixtures >= 1, "likelihood.mixtures", "must be at least 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training maximises. Everything is in nats an image, so beta = 1 is the evidence lower bound."""

    # elbo (with beta: beta-VAE, Higgins et al. 2017), capacity (Burgess et al. 2018), tcvae (Chen et al. 2018),
    # factor (Kim & Mnih 2018), iwae (Burda et al. 2016)
    kind: Literal["elbo", "capacity", "tcvae", "factor", "iwae"] = "elbo"
    beta: float = 1.0  # weight of the KL divergence (elbo), or of the total correlation (tcvae, factor: gamma there)
    samples: int = 1  # draws of z an image; iwae: K
    warmup: int = 0  # steps over which the weight of the KL divergence rises from 0 to beta
    # KL divergence that costs nothing: nats a latent variable (mlp, conv) or a layer (ladder), mean over the batch
    free_bits: float = 0.0
    capacity: float = 25.0  # capacity: KL divergence in nats that is aimed at, in the end
    capacity_steps: int = 100_000  # capacity: steps over which the aim rises from 0 to `capacity`
    capacity_gamma: float = 100.0  # capacity: weight of |KL - aim|
    # tcvae: how q(z) is estimated from a batch: minibatch-stratified (right), minibatch-weighted, or stratified as the
    # authors published it, which fills the wrong entries; to compare
    estimator: Literal["stratified", "weighted", "published"] = "stratified"
    critic_width: int = 256  # factor: width of the discriminator's hidden layers (1000 in the paper)
    critic_layers: int = 3  # factor: hidden layers of the discriminator (6 in the paper)
    critic_lr: float = 1e-4  # factor: learning rate of the discriminator

    def __post_init__(self) -> None:
        require(0 <= self.beta < math.inf, "objective.beta", "must not be negative")
        require(self.samples >= 1, "objective.samples", "must be at least 1")
        for name in ("warmup", "free_bits", "capacity", "capacity_gamma"):
            require(getattr(self, name) >= 0, f"objective.{name}", "must not be negative")
        require(self.capacity_steps >= 1, "objective.capacity_steps", "must be at least 1")
        require(self.critic_width >= 1, "objective.critic_width", "must be at least 1")
        require(self.critic_layers >= 1, "objective.critic_layers", "must be at least 1")
        require(0 < self.critic_lr < math.inf, "objective.critic_lr", "must be positive and finite")
        require(
            self.kind in ("elbo", "iwae") or self.samples == 1,
            "objective.samples",
            f"must be 1 for objective.kind={self.kind}",
        )
        require(
            self.kind != "iwae" or (self.beta == 1 and not self.free_bits and not self.warmup),
            "objective.kind",
            "iwae is a bound of its own: leave objective.beta=1, free_bits=0, warmup=0",
        )
        require(
            self.free_bits == 0 or self.kind == "elbo", "objective.free_bits", "does something for objective.kind=elbo"
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 100_000  # updates
    batch_size: int = 128  # images over all processes together
    lr: float = 1e-3  # learning rate of AdamW, after the warm-up
    warmup: int = 500  # steps; at most a tenth of train.steps is used
    decay: Literal["constant", "linear", "cosine"] = "cosine"  # shape after the warm-up; linear and cosine end at zero
    weight_decay: float = 0.0  # of AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of AdamW's two moments
    grad_clip: float = 0.0  # global norm, for losses in nats an image; 0 = off
    ema: float = 0.0  # decay a step of the averaged weights, which evaluation then uses; 0 = off
    log_every: int = 100  # steps
    save_every: int = 5000  # steps between checkpoints
    sample_every: int = 10_000  # steps between sheets of reconstructions and samples; 0 = never
    validate_every: int = 2000  # steps between readings of the validation images' ELBO; 0 = never

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("warmup", "weight_decay", "grad_clip", "sample_every", "validate_every"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", "must be in [0, 1)")
        require(0 <= self.ema < 1, "train.ema", "must be in [0, 1)")


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn from the prior, by `vae.sample`."""

    temperature: float = 1.0  # the prior's standard deviation is multiplied by it; below 1: cleaner, less varied
    # mean: the decoder's expectation of each pixel; draw: a draw from p(x | z), which has the pixel noise in it
    pixels: Literal["mean", "draw"] = "mean"
    count: int = 64  # images
    out: str = ""  # folder to write them to (--out); default generated/ in the run folder
    batch_size: int = 500  # images decoded at once; more need more memory
    shard: int = (
        10_000  # images a file of format=npz; with either format, what an interruption may cost is at most that
    )
    format: Literal["png", "npz"] = "png"  # one file an image, or `shard` images a file

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, "sample.temperature", "must not be negative")
        for name in ("count", "batch_size", "shard"):
            require(getattr(self, name) >= 1, f"sample.{name}", "must be at least 1")


@dataclass(frozen=True)
class EncodeConfig:
    """What `vae.encode` writes down as numbers."""

    # of the run's own data; all: train, test and, where data.validation is above 0, validation, each in a file
    split: Literal["all", "train", "validation", "test"] = "all"
    folder: str = ""  # these images instead: any directory tree, in data_root or here, or absolute
    out: str = ""  # folder to write to (--out); default latents/ in the run folder
    batch_size: int = 500  # images encoded at once; more need more memory

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "encode.batch_size", "must be at least 1")


@dataclass(frozen=True)
class DecodeConfig:
    """What `vae.decode` draws."""

    latents: str = ""  # file of codes, as vae.encode writes them (--latents)
    out: str = ""  # folder to write to (--out); default decoded/ in the run folder
    format: Literal["png", "npz"] = "png"  # one file an image, under its own name; or all of them in images.npz
    batch_size: int = 500  # images decoded at once; more need more memory

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "decode.batch_size", "must be at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """What `vae.eval` measures."""

    split: Literal["test", "validation"] = "test"  # validation: to choose; test: to report, once
    num_images: int = 0  # images of the split, drawn by seed; 0 = all
    importance_samples: int = 5000  # K of the log-likelihood; 0 = only the ELBO
    chunk: int = 20_000  # decodings at once: bounds the memory
    num_samples: int = 10_000  # generated images for the Fréchet distance; 0 = none
    features: Literal["classifier", "resnet20", "none"] = "none"  # what judges them; see diffusion's README
    disentanglement: bool = False  # MIG, DCI, SAP and the FactorVAE score; for data with known factors (dsprites)
    bins: int = 20  # of the mutual information gap
    traversal: float = 2.5  # latent traversals go from -this to this, in standard deviations of the prior

    def __post_init__(self) -> None:
        for name in ("num_images", "importance_samples", "num_samples"):
            require(getattr(self, name) >= 0, f"eval.{name}", "must not be negative")
        require(self.chunk >= 1, "eval.chunk", "must be at least 1")
        require(self.bins >= 2, "eval.bins", "must be at least 2")
        require(0 < self.traversal < math.inf, "eval.traversal", "must be positive")


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        binary = self.data.binarize != "none" or self.data.dataset in BINARY
        require(
            self.likelihood.kind != "bernoulli" or binary,
            "likelihood.kind",
            "bernoulli is a distribution of black and white pixels: set data.binarize, or take gaussian or "
            "logistic_mixture for grey ones (the cross-entropy of grey values is no log-likelihood)",
        )
        require(
            self.likelihood.kind == "bernoulli" or not binary,
            "likelihood.kind",
            f"{self.likelihood.kind} is a distribution of grey values; black and white pixels take bernoulli",
        )
        require(
            self.objective.kind not in ("tcvae", "factor") or self.model.kind != "ladder",
            "objective.kind",
            f"{self.objective.kind} needs one layer of latents: model.kind=mlp or conv",
        )
        require(
            self.objective.kind not in ("tcvae", "factor") or self.train.batch_size >= 2,
            "train.batch_size",
            "must be at least 2: the total correlation is estimated from other images",
        )
        require(
            not self.eval.disentanglement or self.data.dataset == "dsprites",
            "eval.disentanglement",
            "needs data.dataset=dsprites, whose factors are known",
        )
        require(
            not self.eval.disentanglement or self.model.kind != "ladder",
            "eval.disentanglement",
            "needs one layer of latents: model.kind=mlp or conv",
        )
        require(
            self.eval.split != "validation" or self.data.validation,
            "eval.split",
            "validation needs data.validation above 0",
        )
