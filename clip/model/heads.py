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


@torch.no_grad()
def start_from_classes(
    image_head: nn.Module, text_head: nn.Module, classifier: torch.Tensor, names: torch.Tensor
) -> None:
    """Let two heads begin with what the image tower's classifier knows, so that images of a class are near its name
    before the first step, whether or not any caption of the training data speaks of it.

    The classifier gives an image with the features f the scores W f. If n_c are the features of the name of class c, a
    text that fits the image should have features near the sum over c of (W f)_c n_c, both without their means. That is
    a linear map of f, and where the image head begins; the text head begins by changing nothing. With probabilities in
    the place of scores: Norouzi et al. 2014, "Zero-shot learning by convex combination of semantic embeddings",
    arXiv:1312.5650.

    Args:
        image_head, text_head: `Standard`, measured, and then a linear or residual head.
        classifier: W, (classes, width), for the first `width` of the image's features, which are their means.
        names: n, (classes, text width), as they come out of the text tower.
    """
    image_norm, image_linear = _parts(image_head)
    text_norm, text_linear = _parts(text_head)
    num_classes, width = classifier.shape
    text_width = names.shape[1]
    assert len(names) == num_classes
    assert text_width <= text_linear.out_features
    to_text = (names - names.mean(dim=0)).T @ (classifier - classifier.mean(dim=0))  # (text width, width)
    begin = torch.zeros_like(image_linear.weight)  # (embed_dim, image width)
    begin[:text_width, :width] = to_text * image_norm.deviation[:width]  # which Standard has divided by
    unchanged = torch.zeros_like(text_linear.weight)  # (embed_dim, text width)
    unchanged[:text_width] = torch.diag(text_norm.deviation)
    for linear, weight in ((image_linear, begin), (text_linear, unchanged)):
        linear.weight.copy_(weight * (linear.weight.norm() / weight.norm()))  # as large as random ones were
        if linear.bias is not None:
            linear.bias.zero_()


def _parts(head: nn.Module) -> tuple[Standard, nn.Linear]:
    """The norm and the linear map of a head, which the config has checked."""
    assert isinstance(head, nn.Sequential)
    norm, rest = head
    linear = rest.linear if isinstance(rest, ResidualHead) else rest
    assert isinstance(norm, Standard)
    assert isinstance(linear, nn.Linear)
    return norm, linear


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
