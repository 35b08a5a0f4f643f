"""A network for data without neighbours, such as the codes of an autoencoder: a residual MLP that is told noise level
and class by modulation of its normalised features (adaLN-Zero, Peebles & Xie 2023, section 3.2).

Shapes:  B batch   Z = C * H * W numbers of one example   W width of the features

    x (B, C, H, W) -> (B, Z) -- linear --> (B, W) -- [ block ] ... [ block ] -- normalise, modulate, linear --> (B, Z)
                                             time, class -- MLP --> (B, W), a linear map of it for each block

    block(h) = h + gate * linear(SiLU(linear(norm(h) * (1 + scale) + shift)))

Peebles & Xie 2023   Scalable diffusion models with transformers                     arXiv:2212.09748
Li et al. 2024       Autoregressive image generation without vector quantization    arXiv:2406.11838 (such an MLP)
Rombach et al. 2022  High-resolution image synthesis with latent diffusion models   arXiv:2112.10752
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion.config import ModelConfig
from diffusion.model import NORM_EPS, TimeEmbedding, UNet

EXPANSION = 2  # width of a block's hidden layer, in widths of the features


class Block(nn.Module):
    """A residual block: (B, W), modulation (B, 3 W) -> (B, W). The identity where the modulation is zero."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.layers = nn.Sequential(
            nn.Linear(width, EXPANSION * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(EXPANSION * width, width)
        )

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        scale, shift, gate = modulation.chunk(3, dim=1)  # (B, W) each
        return h + gate * self.layers(self.norm(h) * (1 + scale) + shift)


class MLP(nn.Module):
    """`config.blocks` residual blocks of width `config.channels`; called as the U-Net is.

    Args:
        config: the model section. Of `image_channels` numbers consists a code, whose image_size is 1.
        image_size: H = W.

    Attributes:
        scale: what codes are multiplied by before they are noised, 1 / their standard deviation; a buffer, so that it
            stays with the weights (as in the code of Rombach et al. 2022). 1 for images.
    """

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.shape = (config.image_channels, image_size, image_size)
        self.null_label = config.num_classes
        numbers = math.prod(self.shape)
        width = config.channels
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.time_embedding = TimeEmbedding(width, config.time_embedding)
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.first = nn.Linear(numbers, width)
        self.blocks = nn.ModuleList(Block(width, config.dropout) for _ in range(config.blocks))
        self.act = nn.SiLU()
        # of all blocks, and a scale and a shift at the end, in one matrix product
        self.modulation = nn.Linear(width, (3 * config.blocks + 2) * width)
        self.norm = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.last = nn.Linear(width, numbers)
        # The gates start at zero, so every block starts as the identity; the last layer at zero, so that the first
        # output is 0, the best constant guess of noise.
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output, shape and meaning as `x`; the objective decides what it stands for.

        x: float (B, C, H, W). time: float (B,), of order 0 to 1000. labels: int64 (B,) in 0..num_classes, where
        num_classes (`null_label`) means "no label"; None means that for all. Raises ValueError on another shape, or on
        labels without classes.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"the network was built for {self.shape}, not {tuple(x.shape[1:])}")
        width = self.first.out_features
        parts = self.modulation(self.act(self._embed(time, labels))).split(3 * width, dim=1)
        h = self.first(x.flatten(1))  # (B, C, H, W) -> (B, Z) -> (B, W)
        for block, modulation in zip(self.blocks, parts, strict=False):
            h = block(h, modulation)
        scale, shift = parts[-1].chunk(2, dim=1)
        return self.last(self.norm(h) * (1 + scale) + shift).view(x.shape)  # (B, Z) -> (B, C, H, W)

    def _embed(self, time: Tensor, labels: Tensor | None) -> Tensor:
        """Time and class as features (B, W)."""
        embedding = self.time_mlp(self.time_embedding(time).to(self.first.weight.dtype))
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("labels were given to an unconditional network; set model.num_classes")
            return embedding
        if labels is None:
            labels = torch.full_like(time, self.null_label, dtype=torch.int64)
        return embedding + self.class_embedding(labels)


def build_network(config: ModelConfig, image_size: int) -> UNet | MLP:
    """The network that `model.network` names."""
    return MLP(config, image_size) if config.network == "mlp" else UNet(config, image_size)
