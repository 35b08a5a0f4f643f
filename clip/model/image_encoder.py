"""The image tower: a Vision Transformer, or CLIP's modified ResNet. Images in, one vector an image out.

Shapes:  B batch   S pixels of a side   P pixels of a patch's side   L = (S / P)^2 patches   T tokens
         C width of a token, or channels of a feature map   K attention heads   D = C / K width of a head

    Vision Transformer                                    ResNet
    images (B, 3, S, S)                                   images (B, 3, S, S)
      | one linear map of each patch, + position            | stem: 3 convolutions, average pooling
    tokens (B, T, C)                                      features (B, width, S / 4, S / 4)
      | layers x Block                                      | 4 stages of bottleneck blocks
    tokens (B, T, C)                                      features (B, 32 width, S / 32, S / 32)
      | pool: class token, mean or attention                | attention pooling
    vector (B, C)                                         vector (B, 32 width)

Dosovitskiy et al. 2021   An image is worth 16x16 words (ViT)                arXiv:2010.11929
Radford et al. 2021       Learning transferable visual models (CLIP)         arXiv:2103.00020
He et al. 2016            Deep residual learning; 2019, "ResNet-D" stems     arXiv:1512.03385, 1812.01187
Zhang 2019                Making convolutional networks shift-invariant      arXiv:1904.11486
Li et al. 2023            Scaling language-image pre-training by masking     arXiv:2212.00794 (FLIP)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from clip.config import RESNET_STRIDE, ImageConfig
from clip.model.transformer import AttentionPool, Block, attend, initialise

EXPANSION = 4  # a bottleneck's output has this many times the channels of its middle


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) float -> features (B, C): Dosovitskiy et al. 2021 with CLIP's LayerNorm before the blocks.

    `width` is C. In training, `patch_dropout` of the patches are left out of each image, drawn from PyTorch's global
    generator. Raises ValueError for images of another size.
    """

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        self.width = config.width
        hidden = int(config.width * config.mlp_ratio)
        has_class = config.pool == "class"
        num_tokens = (config.image_size // config.patch) ** 2 + has_class

        # a convolution whose stride is its kernel: one linear map of each patch
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=not config.pre_norm)
        self.class_token = nn.Parameter(torch.empty(config.width)) if has_class else None
        self.positions = nn.Parameter(torch.empty(num_tokens, config.width))
        self.norm_in = nn.LayerNorm(config.width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, hidden, config.activation, config.dropout, config.norm_eps)
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width, config.norm_eps)
        self.pool = (
            AttentionPool(config.width, config.heads, hidden, config.activation, config.norm_eps)
            if config.pool == "attention"
            else None
        )
        initialise(self.blocks)
        nn.init.normal_(self.positions, std=config.width**-0.5)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=config.width**-0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        check_size(images, self.config)
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (B, C, S / P, S / P) -> (B, L, C)
        # A patch gets its position before any is dropped: those that stay still say where they were.
        tokens = tokens + self.positions[-tokens.shape[1] :]  # (B, L, C)
        if self.training and self.config.patch_dropout > 0:
            tokens = drop_patches(tokens, self.config.patch_dropout)
        if self.class_token is not None:
            first = (self.class_token + self.positions[0]).to(tokens.dtype)  # (C,)
            tokens = torch.cat([first.expand(len(tokens), 1, -1), tokens], dim=1)  # (B, 1 + L, C)
        tokens = self.norm_in(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        if self.config.pool == "class":
            return self.norm_out(tokens[:, 0])  # (B, C)
        tokens = self.norm_out(tokens)
        return tokens.mean(dim=1) if self.pool is None else self.pool(tokens)  # (B, C)


def drop_patches(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Keep a random subset of each image's patches: (B, L, C) -> (B, max(1, int(L (1 - share))), C) (Li et al. 2023).

    Half of the patches make a step nearly twice as fast. What an epoch loses in detail, more images in the same time
    outweigh; and each epoch sees other patches.
    """
    B, L, C = tokens.shape
    keep = max(1, int(L * (1 - share)))
    # ranks of random numbers: each subset is equally likely
    chosen = torch.rand(B, L, device=tokens.device).topk(keep, dim=1).indices  # (B, keep)
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, C))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a skip connection: (B, C_in, H, W) -> (B, 4 C, H / stride, W / stride).

    All convolutions have stride 1. Where the resolution falls, an average pooling does it, on both ways: a strided
    convolution would look at every second pixel only and alias (Zhang 2019).
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shrink = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        h = self.norm3(self.conv3(self.shrink(h)))
        return F.relu(h + self.shortcut(x))


class QueryPool(nn.Module):
    """The mean of a feature map asks all its positions, and itself: (B, C, H, W) -> (B, C) (Radford et al. 2021,
    section 2.4). The linear map after the heads belongs to the projection that follows the tower.
    """

    def __init__(self, num_positions: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(1 + num_positions, width))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        nn.init.normal_(self.positions, std=width**-0.5)
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C = x.shape[:2]
        tokens = x.flatten(2).transpose(1, 2)  # (B, L, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positions  # (B, 1 + L, C)

        def by_head(t: torch.Tensor) -> torch.Tensor:
            return t.view(B, -1, self.heads, C // self.heads).transpose(1, 2)  # (B, T, C) -> (B, K, T, D)

        q = by_head(self.q(tokens[:, :1]))  # (B, K, 1, D): only the mean asks
        mixed = attend(q, by_head(self.k(tokens)), by_head(self.v(tokens)))  # (B, K, 1, D)
        return mixed.reshape(B, C)


class ResNet(nn.Module):
    """Images (B, 3, S, S) float -> features (B, 32 width): CLIP's ResNet (Radford et al. 2021, section 2.4).

    Against He et al. 2016: a stem of three convolutions ("ResNet-D"), average pooling wherever the resolution falls,
    and attention instead of a global average at the end. Raises ValueError for images of another size.
    """

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        self.width = 8 * EXPANSION * config.width
        half = config.width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, config.width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(config.width)

        self.stages = nn.ModuleList()
        C = config.width
        for level, num_blocks in enumerate(config.stages):
            channels = config.width * 2**level
            blocks = []
            for i in range(num_blocks):
                first = i == 0
                blocks.append(Bottleneck(C, channels, stride=2 if first and level > 0 else 1))
                C = EXPANSION * channels
            self.stages.append(nn.Sequential(*blocks))
        self.pool = QueryPool((config.image_size // RESNET_STRIDE) ** 2, C, config.heads)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)  # each block starts as its shortcut

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        check_size(images, self.config)
        h = F.relu(self.norm1(self.conv1(images)))  # (B, width / 2, S / 2, S / 2)
        h = F.relu(self.norm2(self.conv2(h)))
        h = F.relu(self.norm3(self.conv3(h)))  # (B, width, S / 2, S / 2)
        h = F.avg_pool2d(h, 2)  # (B, width, S / 4, S / 4)
        for stage in self.stages:
            h = stage(h)
        return self.pool(h)  # (B, 32 width)


def check_size(images: torch.Tensor, config: ImageConfig) -> None:
    """`ValueError` for images that the tower was not built for."""
    expected = (3, config.image_size, config.image_size)
    if images.shape[1:] != expected:
        raise ValueError(
            f"the image tower was built for images {expected}, not {tuple(images.shape[1:])}; "
            "set model.image.image_size to that of the images"
        )


def build_image_encoder(config: ImageConfig) -> VisionTransformer | ResNet:
    """The tower that `config.kind` names."""
    return VisionTransformer(config) if config.kind == "vit" else ResNet(config)
