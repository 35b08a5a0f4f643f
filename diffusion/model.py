"""The U-Net that looks at a noisy image and its noise level: Ho et al. 2020, appendix B, with later options.

Shapes:  B batch   C channels (they change from level to level)   H, W height and width   L = H * W positions
         E = 4 * config.channels, width of the time embedding   K attention heads   D channels of one head

    x (B, image_channels, S, S)                                                  (B, image_channels, S, S)
        |  conv_in                                                           norm, SiLU, conv_out |
    [ block  block ] ---------------------- skips, concatenated ----------------- [ block  block  block ]     grid S
        |  downsample                                                                    upsample |
    [ block  block ] ------------------------------------------------------------ [ block  block  block ]     grid S / 2
        +------------------------ block, attention, block (the middle) --------------------------+

Ho et al. 2020      Denoising diffusion probabilistic models             arXiv:2006.11239
Dhariwal & Nichol   Diffusion models beat GANs on image synthesis        arXiv:2105.05233
Song et al. 2021    Score-based generative modeling through SDEs         arXiv:2011.13456
Vaswani et al.      Attention is all you need                            arXiv:1706.03762
Odena et al. 2016   Deconvolution and checkerboard artifacts             distill.pub/2016/deconv-checkerboard
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from diffusion.config import ModelConfig

NORM_EPS = 1e-6  # Ho et al. 2020, as trained
FOURIER_SCALE = 16.0  # standard deviation of the Fourier frequencies (Song et al. 2021, section C.2)


class TimeEmbedding(nn.Module):
    """Time (B,) float -> features (B, width) float32: sines and cosines at `width / 2` frequencies.

    A scalar alone would have to pass through steep functions before the network could tell t=3 from t=4; at many
    frequencies at once, near and far times are both easy to tell apart. Time is in thousandths: all objectives pass
    values of order 0 to 1000.

    sinusoidal: a geometric series of wavelengths from 2 pi to 20,000 pi (Vaswani et al., section 3.5).
    fourier:    Gaussian random frequencies (Song et al. 2021, section C.2), drawn once from a fixed seed and kept
                in the state dict.
    """

    def __init__(self, width: int, kind: str):
        super().__init__()
        half = width // 2
        if kind == "sinusoidal":
            frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        else:
            normal = torch.randn(half, generator=torch.Generator().manual_seed(0))
            frequencies = 2 * math.pi * FOURIER_SCALE * normal / 1000
        self.register_buffer("frequencies", frequencies, persistent=kind == "fourier")

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        angles = time.float()[:, None] * self.frequencies  # (B, width / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, width)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection, told the time between them: (B, C_in, H, W) -> (B, C_out, H, W).

    `modulation` is this block's share of the embedded time and class: (B, C_out), added to every pixel (Ho et al.
    2020), or with scale_shift (B, 2 C_out), the scale and the shift of the second normalisation (Dhariwal & Nichol
    2021, section 3.1, "AdaGN").
    """

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig):
        super().__init__()
        self.scale_shift = config.scale_shift
        self.modulation_width = out_channels * (2 if config.scale_shift else 1)
        self.norm1 = nn.GroupNorm(config.groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, out_channels, NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        modulation = modulation[:, :, None, None]  # (B, C_out or 2 C_out, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)  # (B, C_out, 1, 1) each
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + modulation)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + self.shortcut(x)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v as Vaswani et al., eq. 1 have it: three times (B, K, L, D) -> the same shape.

    What PyTorch's fused kernel computes too, which never holds the L x L weights and so can do without much memory at a
    large L. With few positions on a CPU it is the fused one's backward pass that is slow.
    """
    similarity = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, K, L, L): row i, how well each key fits query i
    return similarity.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Every pixel looks at every other (Vaswani et al., eq. 1), around a skip connection: (B, C, H, W) -> the same
    shape.
    """

    def __init__(self, channels: int, config: ModelConfig):
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else 1
        self.kernel = config.attention_kernel
        self.norm = nn.GroupNorm(config.groups, channels, NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)  # query, key and value in one matrix product
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        # (B, L, C): no copy in channels_last, where C already varies fastest
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(B, H * W, 3, self.heads, C // self.heads)  # (B, L, 3, K, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, K, L, D) each
        attend = F.scaled_dot_product_attention if self.kernel == "fused" else softmax_attention
        mixed = attend(q, k, v)  # (B, K, L, D)
        mixed = self.out(mixed.transpose(1, 2).reshape(B, H * W, C)).transpose(1, 2).view(B, C, H, W)
        return x + mixed


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # An even side needs one row of padding, not two; TensorFlow's "SAME" puts it last, and Ho et al. trained with
        # that.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution, nearest neighbour, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2 H, 2 W) (Odena et al.
    2016).

    Each output pixel sees only 2x2 different inputs, since the copies that nearest-neighbour makes are equal: their
    weights can be summed first. That leaves a 4x4 transposed convolution of stride 2, with 16 products for 4 outputs
    instead of 36.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        # In one dimension the kernel (a, b, c) becomes (c, b + c, a + b, a), backwards because a transposed convolution
        # writes where a convolution reads; in two dimensions rows and columns do so independently, hence the Kronecker
        # product.
        spread = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
        self.register_buffer("spread", torch.kron(spread, spread), persistent=False)  # (9, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        C = x.shape[1]
        # (C_out, C_in, 3, 3) -> (C_out, C_in, 4, 4)
        kernel = (self.conv.weight.reshape(C, C, 9) @ self.spread).view(C, C, 4, 4)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Stage(nn.Module):
    """The blocks of one resolution on one way of the U, each followed by attention or nothing, and the change of
    resolution after them.
    """

    def __init__(self, blocks: list[ResidualBlock], attention: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleList(attention)
        self.resample = resample

    def __iter__(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        return iter(zip(self.blocks, self.attention, strict=True))


class UNet(nn.Module):
    """The network of Ho et al. 2020; the default ModelConfig at 32 pixels is their CIFAR-10 model with 35,746,307
    parameters.

    image_size: pixels of the square images given to forward (before `config.patch` folds them).
    Raises ValueError when the image size cannot be halved once a level.
    """

    def __init__(self, config: ModelConfig, image_size: int):
        super().__init__()
        levels = len(config.multipliers)
        if image_size % (config.patch * 2 ** (levels - 1)):
            raise ValueError(
                f"image size {image_size} cannot be folded by {config.patch} and halved {levels - 1} times; "
                "choose another data.image_size, a smaller model.patch or fewer model.multipliers"
            )
        self.config = config
        self.image_size = image_size
        self.null_label = config.num_classes
        E = 4 * config.channels
        image_channels = config.image_channels * config.patch**2

        self.time_embedding = TimeEmbedding(config.channels, config.time_embedding)
        self.time_mlp = nn.Sequential(nn.Linear(config.channels, E), nn.SiLU(), nn.Linear(E, E))
        self.class_embedding = nn.Embedding(config.num_classes + 1, E) if config.num_classes else None
        self.conv_in = nn.Conv2d(image_channels, config.channels, 3, padding=1)
        self._build_stages(image_size // config.patch)
        self.norm_out = nn.GroupNorm(config.groups, config.channels * config.multipliers[0], NORM_EPS)
        self.conv_out = nn.Conv2d(config.channels * config.multipliers[0], image_channels, 3, padding=1)

        # Each block needs its own linear map of the embedding; one matrix product makes them all, and forward splits
        # the result.
        self.modulation_widths = [m.modulation_width for m in self.modules() if isinstance(m, ResidualBlock)]
        self.modulation = nn.Linear(E, sum(self.modulation_widths))
        self._initialise()

    def _build_stages(self, grid: int) -> None:
        config = self.config
        widths = [config.channels * m for m in config.multipliers]

        def attend(channels: int, grid: int) -> nn.Module:
            return Attention(channels, config) if grid in config.attention else nn.Identity()

        # The way down, remembering the width of every tensor that the way up will receive as a skip.
        C = config.channels
        skips = [config.channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            blocks = [ResidualBlock(C if i == 0 else width, width, config) for i in range(config.blocks)]
            self.down.append(Stage(blocks, [attend(width, grid) for _ in blocks], None if last else Downsample(width)))
            C = width
            skips += [width] * (config.blocks + (not last))
            grid = grid if last else grid // 2

        self.middle = Stage(
            [ResidualBlock(C, C, config), ResidualBlock(C, C, config)], [Attention(C, config), nn.Identity()], None
        )

        # The way up has one block more a level: one skip for each block, and one for the input of the level.
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(config.blocks + 1):
                blocks.append(ResidualBlock(C + skips.pop(), width, config))
                C = width
            self.up.append(Stage(blocks, [attend(width, grid) for _ in blocks], Upsample(width) if level else None))
            grid = grid * 2

    def _initialise(self) -> None:
        """Xavier-uniform weights and zero biases, as Ho et al. 2020; zero weights where a branch meets its skip, and at
        the end.

        With the last layer of every branch at zero, each block and attention starts as the identity (or its shortcut),
        so the signal and its gradient keep their size at any depth, and the network's first output is 0: the best
        constant guess of noise.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A fused matrix is several independent maps: its scale must come from the size of each map, not of their stack.
        for weight in self.modulation.weight.split(self.modulation_widths):
            nn.init.xavier_uniform_(weight)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                for weight in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(weight)
                nn.init.zeros_(module.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the network's output for noisy images, shape and meaning as `x`; the objective decides what it stands
        for.

        x: float (B, image_channels, image_size, image_size). time: float (B,), of order 0 to 1000.
        labels: int64 (B,) in 0..num_classes, where num_classes (`null_label`) means "no label"; None means that for
        all. Under autocast the output is in the lower precision. Raises ValueError on another image size, or on labels
        without classes.
        """
        self._check(x, labels)
        modulations = iter(self._modulations(time, labels))

        h = self.conv_in(F.pixel_unshuffle(x, self.config.patch))  # (B, channels, S / patch, S / patch)
        skips = [h]
        for stage in self.down:
            for block, attend in stage:
                h = attend(block(h, next(modulations)))
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h)
                skips.append(h)
        for block, attend in self.middle:
            h = attend(block(h, next(modulations)))
        for stage in self.up:
            for block, attend in stage:
                # (B, C + C_skip, H, W) -> (B, C, H, W)
                h = attend(block(torch.cat([h, skips.pop()], dim=1), next(modulations)))
            if stage.resample is not None:
                h = stage.resample(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.config.patch)  # (B, image_channels, S, S)

    def _modulations(self, time: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The embedded time and class, mapped for each residual block: (B, C_out) or (B, 2 C_out) each, in the order
        of use.
        """
        embedding = self.time_mlp(self.time_embedding(time))  # (B, E)
        if self.class_embedding is not None:
            if labels is None:
                labels = torch.full_like(time, self.null_label, dtype=torch.int64)
            embedding = embedding + self.class_embedding(labels)
        return self.modulation(F.silu(embedding)).split(self.modulation_widths, dim=1)

    def _check(self, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        expected = (self.config.image_channels, self.image_size, self.image_size)
        if x.shape[1:] != expected:
            raise ValueError(
                f"the network was built for images {expected}, not {tuple(x.shape[1:])}; "
                "set data.image_size and model.image_channels to those of the images"
            )
        if labels is not None and self.class_embedding is None:
            raise ValueError(
                "labels were given to an unconditional network; set model.num_classes, or pass labels=None"
            )
