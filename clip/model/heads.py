"""From a tower's features to the embedding that is compared: (B, width) -> (B, embed_dim).

Legend: B images or texts, E numbers of an embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from clip.config import HeadConfig

LEAST_DEVIATION = 1e-3  # of a number that is hardly ever anything but zero, such as a channel that has died


class Standard(nn.Module):
    """Every feature minus its mean, over its standard deviation: (B, width) -> (B, width).

    `measure` finds both once, before training, on features of training data; until then nothing is changed. A LayerNorm
    treats an image's features alike; here rare ones, as most of a convolutional network's last are, come to the same
    scale as the common ones.
    """

    mean: torch.Tensor  # (width,)
    deviation: torch.Tensor  # (width,)

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation

    @torch.no_grad()
    def measure(self, features: torch.Tensor) -> None:
        """Features of training data, (n, width) with n of at least 2. With several processes each gives its share, all
        of the same n.
        """
        x = features.double()
        moments = torch.stack([x.mean(dim=0), x.square().mean(dim=0)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(moments)
            moments /= torch.distributed.get_world_size()
        self.mean.copy_(moments[0])
        self.deviation.copy_((moments[1] - moments[0].square()).clamp(min=0).sqrt() + LEAST_DEVIATION)


def standards(head: nn.Module) -> list[Standard]:
    """Those among the parts of a head."""
    return [part for part in head.modules() if isinstance(part, Standard)]


def build_head(config: HeadConfig, width: int, embed_dim: int) -> nn.Module:
    """The map from a tower's features (B, width) to (B, embed_dim), before normalisation."""
    if config.kind == "none":
        if width != embed_dim:
            raise ValueError(f"without a head, model.embed_dim must be the tower's width {width}, not {embed_dim}")
        return nn.Identity()
    head: nn.Module
    if config.kind == "mlp":
        head = build_mlp(config, width, embed_dim)
    elif config.kind == "residual":
        head = ResidualHead(config, width, embed_dim)
    else:
        head = nn.Linear(width, embed_dim, bias=config.bias)
        nn.init.normal_(head.weight, std=width**-0.5)
        if config.bias:
            nn.init.zeros_(head.bias)
    norms: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "standard": Standard}
    return nn.Sequential(norms[config.norm](width), head) if config.norm != "none" else head


def build_mlp(config: HeadConfig, width: int, embed_dim: int) -> nn.Sequential:
    """Two linear maps with a GELU between and dropout before each: (B, width) -> (B, embed_dim)."""
    return nn.Sequential(
        nn.Dropout(config.dropout),
        nn.Linear(width, config.hidden),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, embed_dim),
    )


class ResidualHead(nn.Module):
    """A linear map plus an MLP that is zero at first: (B, width) -> (B, embed_dim).

    A tower that was trained to compare texts has vectors whose cosines mean something already. A linear map keeps most
    of that, an MLP with random weights begins by losing it; here the MLP only adds what the linear map lacks.
    """

    def __init__(self, config: HeadConfig, width: int, embed_dim: int):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(width, embed_dim)
        self.mlp = build_mlp(config, width, embed_dim)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(x)) + self.mlp(x)
