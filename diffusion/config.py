"""Every setting of the diffusion project, with its default and its unit. YAML files override these, `key=value`
overrides both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import BaseConfig, require

EXTRACTORS = ("inception", "inception768", "inception_spatial", "resnet20", "classifier")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and at what size."""

    # digits: scikit-learn's, which need no download; fashion_mnist, kmnist and qmnist are read as mnist is
    # latents: codes of images, in a file
    dataset: Literal[
        "cifar10", "mnist", "fashion_mnist", "kmnist", "qmnist", "celeba", "digits", "folder", "latents"
    ] = "cifar10"
    # dataset=folder: any directory tree of images, in data_root or here, or absolute; its sub-folders are the classes
    folder: str = ""
    held_out: float = 0.05  # folder: share of the images kept for evaluation, where there is no folder val or test
    grey: bool = False  # folder: read images as one grey channel (model.image_channels=1)
    image_size: int = 32  # pixels; celeba and folder images are centre-cropped and resized to it
    flip: bool = True  # random horizontal flips (Ho et al. 2020 use them on CIFAR-10; wrong for digits)
    workers: int = 2  # processes that decode celeba and folder images; the others are held in memory
    patience: int = 300  # seconds to wait for them before the run ends, as when a network disk is gone; 0 = for ever
    max_images: int = 0  # train on only N images, drawn by seed; 0 = all
    latents: str = ""  # dataset=latents: file of training codes, as `python -m vae.encode` writes it
    held_out_latents: str = ""  # latents: of held-out images, to measure what decoding alone costs; "" = not measured
    decoder: str = ""  # latents: file of the decoder that turns codes into images, written beside them
    # latents: the mean of q(z | x), or a draw from it each time (Rombach et al. 2022)
    posterior: Literal["mean", "sample"] = "mean"

    def __post_init__(self) -> None:
        is_latents = self.dataset == "latents"
        require(is_latents or self.image_size >= 4, "data.image_size", "must be at least 4 pixels")
        require(not is_latents or self.image_size == 1, "data.image_size", "must be 1 for data.dataset=latents")
        require(not is_latents or not self.flip, "data.flip", "must be false for data.dataset=latents")
        for name in ("latents", "decoder"):
            require(not is_latents or getattr(self, name), f"data.{name}", "must name a file when data.dataset=latents")
        for name in ("latents", "decoder", "held_out_latents"):
            require(is_latents or not getattr(self, name), f"data.{name}", "is for data.dataset=latents")
        require(is_latents or self.posterior == "mean", "data.posterior", "is for data.dataset=latents")
        require(self.workers >= 0, "data.workers", "must not be negative")
        require(self.patience >= 0, "data.patience", "must not be negative")
        require(self.max_images >= 0, "data.max_images", "must not be negative")
        require(0 <= self.held_out < 1, "data.held_out", "must be in [0, 1)")
        require(
            self.dataset != "folder" or self.folder, "data.folder", "must name a directory when data.dataset=folder"
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the CIFAR-10 U-Net of Ho et al. 2020 (35.7M parameters)."""

    # mlp: for data.dataset=latents; of what follows it knows image_channels, channels (its width), blocks (how many),
    # dropout, num_classes and time_embedding
    network: Literal["unet", "mlp"] = "unet"
    image_channels: int = 3  # 3 for colour, 1 for grey; of latents: numbers in a code
    channels: int = 128  # width at the highest resolution
    # width of each level, times `channels`; each level halves the resolution
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2  # residual blocks a level (the way up has one more)
    attention: tuple[int, ...] = (16,)  # resolutions, in pixels of the network's own grid, with self-attention
    head_channels: int = 0  # channels an attention head; 0 = one head
    # fused: PyTorch's own, the fastest on a GPU; written: the formula as it is printed, faster in training on a CPU
    attention_kernel: Literal["fused", "written"] = "fused"
    # inside each residual block; each process and each microbatch draws its own masks, so that N processes equal one,
    # and microbatches the whole batch, without dropout only
    dropout: float = 0.1
    groups: int = 32  # GroupNorm groups
    # space-to-depth factor of the input: 2 turns (1, 28, 28) into (4, 14, 14), a 4 times cheaper network
    patch: int = 1
    num_classes: int = 0  # 0 = unconditional; otherwise one more "no label" class is added for guidance
    # of the noise level: sinusoidal (Ho et al. 2020) or random Fourier features (Song et al. 2021)
    time_embedding: Literal["sinusoidal", "fourier"] = "sinusoidal"
    # time and class modulate the second GroupNorm (Dhariwal & Nichol 2021) instead of being added
    scale_shift: bool = False

    def __post_init__(self) -> None:
        require(self.image_channels >= 1, "model.image_channels", "must be at least 1")
        require(all(size >= 1 for size in self.attention), "model.attention", "must be resolutions in pixels")
        require(
            self.channels > 0 and self.groups > 0 and self.channels % self.groups == 0,
            "model.channels",
            f"must be a positive multiple of model.groups={self.groups}",
        )
        require(
            len(self.multipliers) > 0 and min(self.multipliers) > 0, "model.multipliers", "must be positive integers"
        )
        require(self.blocks > 0, "model.blocks", "must be at least 1")
        require(0 <= self.dropout < 1, "model.dropout", "must be in [0, 1)")
        require(self.patch in (1, 2, 4), "model.patch", "must be 1, 2 or 4")
        require(self.num_classes >= 0, "model.num_classes", "must not be negative")
        widths = [self.channels * m for m in self.multipliers]
        require(
            self.head_channels >= 0 and (self.head_channels == 0 or all(w % self.head_channels == 0 for w in widths)),
            "model.head_channels",
            f"must divide every level's width {widths}",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network is trained to predict, and at which noise levels."""

    # ddpm (Ho et al. 2020), edm (Karras et al. 2022) or flow matching (Lipman et al. 2023)
    kind: Literal["ddpm", "edm", "flow"] = "ddpm"
    # ddpm: discrete time, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
    schedule: Literal["linear", "cosine"] = "linear"
    timesteps: int = 1000  # ddpm: number of noise levels T
    zero_terminal_snr: bool = False  # rescale so that x_T is pure noise (Lin et al. 2023); only with prediction=v
    # ddpm: the noise, the image, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    prediction: Literal["eps", "x0", "v"] = "eps"
    # ddpm: of the noise levels; min_snr: min(SNR, gamma) (Hang et al. 2023)
    weighting: Literal["simple", "min_snr"] = "simple"
    min_snr_gamma: float = 5.0  # gamma of min_snr
    # edm: log sigma ~ Normal(p_mean, p_std) (Karras et al. 2022, table 1)
    p_mean: float = -1.2
    p_std: float = 1.2  # edm: see objective.p_mean
    sigma_data: float = 0.0  # standard deviation of the training pixels in [-1, 1]; 0 = measure it
    # flow: t uniform on [0, 1], or the logistic of a standard normal (Esser et al. 2024)
    flow_time: Literal["uniform", "logit_normal"] = "uniform"
    label_dropout: float = 0.1  # share of labels replaced by "no label" in training, for classifier-free guidance

    def __post_init__(self) -> None:
        require(self.timesteps >= 2, "objective.timesteps", "must be at least 2")
        require(
            not self.zero_terminal_snr or self.prediction == "v",
            "objective.zero_terminal_snr",
            "needs objective.prediction=v: at zero signal, eps says nothing about x_0",
        )
        require(self.min_snr_gamma > 0, "objective.min_snr_gamma", "must be positive")
        require(self.p_std > 0, "objective.p_std", "must be positive")
        require(self.sigma_data >= 0, "objective.sigma_data", "must not be negative")
        require(0 <= self.label_dropout < 1, "objective.label_dropout", "must be in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 800_000  # updates
    batch_size: int = 128  # over all processes together
    microbatch: int = 0  # images a forward pass on one device; 0 = the whole share of the batch at once
    lr: float = 2e-4  # learning rate of AdamW, after the warm-up
    warmup: int = 5000  # steps; at most a tenth of train.steps is used, so that a short run still reaches its full rate
    # shape after the warm-up; linear and cosine end at zero
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0  # of AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of AdamW's two moments
    grad_clip: float = 1.0  # global norm; 0 = off
    ema: float = 0.9999  # decay a step of the averaged weights; warmed up as min(ema, (1 + step) / (10 + step))
    log_every: int = 50  # steps
    save_every: int = 5000  # steps between checkpoints
    sample_every: int = 5000  # 0 = never

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("microbatch", "warmup", "weight_decay", "grad_clip", "sample_every"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", "must be in [0, 1)")
        require(0 <= self.ema < 1, "train.ema", "must be in [0, 1)")


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn: in training, by `diffusion.sample` and by `diffusion.eval`."""

    # auto: ddim, heun or euler for ddpm, edm or flow
    sampler: Literal["auto", "ddpm", "ddim", "dpmpp", "euler", "heun"] = "auto"
    steps: int = 50  # heun makes 2 * steps - 1 network evaluations, the others one a step
    eta: float = 0.0  # ddim: 0 = deterministic, 1 = ancestral
    # ddpm: beta tilde or beta as the variance of a step (Ho et al. 2020, section 3.2)
    variance: Literal["small", "large"] = "small"
    guidance: float = 1.0  # w in u + w (c - u): 1 = plain conditional, 0 = unconditional
    weights: Literal["ema", "raw"] = "ema"  # raw: the weights of the last step, to see what averaging is worth
    clip: bool = True  # clip each x_0 prediction to [-1, 1] (ddpm and ddim only)
    sigma_min: float = 0.002  # edm
    sigma_max: float = 80.0  # edm
    rho: float = 7.0  # edm: spacing of the noise levels (Karras et al. 2022, eq. 5)
    count: int = 64  # images in a grid, or in the folder `out`
    batch_size: int = 256  # images drawn at once; more need more memory
    out: str = ""  # diffusion.sample writes each image into this folder, instead of the pictures of a run
    format: Literal["png", "npz"] = "png"  # of `out`: a file an image and labels.csv; or images and labels of a batch

    def __post_init__(self) -> None:
        require(self.steps >= 1, "sample.steps", "must be at least 1")
        require(0 <= self.eta <= 1, "sample.eta", "must be in [0, 1]")
        require(0 < self.sigma_min < self.sigma_max, "sample.sigma_min", "must be positive and below sample.sigma_max")
        require(self.rho > 0, "sample.rho", "must be positive")
        require(math.isfinite(self.guidance), "sample.guidance", "must be a finite number")
        require(self.count >= 1, "sample.count", "must be at least 1")
        require(self.batch_size >= 1, "sample.batch_size", "must be at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """What `diffusion.eval` measures."""

    num_samples: int = 50_000  # generated images; 50,000 is the convention for FID on CIFAR-10
    num_reference: int = 0  # training images to compare with; 0 = all
    # auto: FID if its weights can be had, else a classifier. inception768 (reported as fd_inception768) and
    # inception_spatial (sfid) need the Inception network only up to mixed_7, and are no FID
    features: Literal["auto", "inception", "inception768", "inception_spatial", "resnet20", "classifier"] = "auto"
    more_features: tuple[str, ...] = ()  # further extractors: each one's Fréchet distance, and its floor, beside it
    # file or folder for inception768 and inception_spatial; default data_root/inception_fid_2015, else the FID's file
    inception_weights: str = ""
    feature_precision: Literal["fp32", "bf16"] = "fp32"  # of the Inception network; bf16 is 3 times as fast on a CPU
    # features=resnet20: path of the checkpoint, default data_root/pretrained_resnet_cifar10/
    classifier_weights: str = ""
    manifold_samples: int = 5000  # images a side for precision, recall, density, coverage
    neighbours: int = 8  # generated images whose nearest training images are drawn
    nfe_table: tuple[int, ...] = (1, 2, 5, 10, 20, 50)  # network evaluations in the sampler table
    nfe_samples: int = 0  # images a cell of that table; 0 = no table
    guidance_table: tuple[float, ...] = ()  # guidance scales to compare, with nfe_samples images each

    def __post_init__(self) -> None:
        require(self.num_samples >= 2, "eval.num_samples", "must be at least 2: a covariance needs two images")
        require(self.nfe_samples == 0 or self.nfe_samples >= 2, "eval.nfe_samples", "must be 0 or at least 2")
        for name in self.more_features:
            require(name in EXTRACTORS, "eval.more_features", f"{name} is not one of {', '.join(EXTRACTORS)}")
        require(
            all(math.isfinite(w) for w in self.guidance_table), "eval.guidance_table", "must hold finite numbers only"
        )
        for name in ("manifold_samples", "num_reference", "neighbours"):
            require(getattr(self, name) >= 0, f"eval.{name}", "must not be negative")
        require(
            all(n >= 1 for n in self.nfe_table), "eval.nfe_table", "must be numbers of network evaluations, at least 1"
        )


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(
            self.sample.sampler != "ddpm" or self.objective.kind == "ddpm",
            "sample.sampler",
            "ddpm needs objective.kind=ddpm",
        )
        require(
            self.objective.kind != "ddpm" or self.sample.steps <= self.objective.timesteps,
            "sample.steps",
            f"must be at most objective.timesteps={self.objective.timesteps}",
        )
        require(
            self.data.dataset != "latents" or self.model.network == "mlp",
            "model.network",
            "must be mlp for data.dataset=latents: a code has no neighbouring pixels",
        )
        require(
            self.data.dataset != "latents" or self.objective.kind != "ddpm" or not self.sample.clip,
            "sample.clip",
            "must be false for data.dataset=latents: codes are not limited to [-1, 1]",
        )
        if self.model.network == "unet":
            self._check_grids()
        require(
            self.sample.guidance == 1 or self.model.num_classes > 0,
            "sample.guidance",
            "must be 1 without classes (model.num_classes=0): there is no label to be guided by",
        )

    def _check_grids(self) -> None:
        require(
            self.data.image_size % (self.model.patch * 2 ** (len(self.model.multipliers) - 1)) == 0,
            "data.image_size",
            "must be divisible by model.patch * 2 ** (levels - 1)",
        )
        grids = [self.data.image_size // self.model.patch // 2**level for level in range(len(self.model.multipliers))]
        unused = [size for size in self.model.attention if size not in grids]
        require(not unused, "model.attention", f"{unused} is no resolution of this network, whose levels have {grids}")
