"""Two towers that meet on a sphere: an image and a text that belong together get embeddings that point the same way.

Shapes:  N images   M texts   C_i, C_t widths of the towers' features   E = embed_dim

    images (N, 3, S, S) -> image tower -> (N, C_i) -> head -> (N, E) -> / length -> x --+
                                                                                         t x . y (+ b)   (N, M)
    ids    (M, T)       -> text tower  -> (M, C_t) -> head -> (M, E) -> / length -> y --+

t = exp(t') is the inverse temperature: cosines lie in [-1, 1], far too close together for a softmax to tell apart.

Radford et al. 2021   Learning transferable visual models (CLIP)               arXiv:2103.00020
Zhai et al. 2022      LiT: zero-shot transfer with locked-image text tuning    arXiv:2111.07991
Zhai et al. 2023      Sigmoid loss for language image pre-training (SigLIP)    arXiv:2303.15343
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from clip.config import ModelConfig
from clip.model.heads import build_head
from clip.model.image_encoder import build_image_encoder
from clip.model.text_encoder import TextEncoder

MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: larger scales made training unstable
PAPER_TEMPERATURE = {
    "info_nce": 0.07,
    "sigmoid": 0.1,
}  # Radford et al. 2021, section 2.5; Zhai et al. 2023: t' = log 10


class Output(NamedTuple):
    """What the losses need."""

    image: torch.Tensor  # x: float32 (N, E), of length 1
    text: torch.Tensor  # y: float32 (M, E), of length 1
    log_scale: torch.Tensor  # t': scalar
    bias: torch.Tensor | None  # b: scalar; None without


class CLIP(nn.Module):
    """Images and texts -> embeddings of length 1, the log scale t' and, for the sigmoid loss, the bias b.

    image_encoder, text_encoder: towers to use instead of those that `config` describes, such as pretrained ones; each
    has `width`, the size C of the features (B, C) that it returns. A head is a linear map without bias (Radford et al.
    2021, figure 3), or what `config` says.
    Raises ValueError where `head.kind=none` but the tower's width is not `embed_dim`.
    """

    def __init__(
        self,
        config: ModelConfig,
        image_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.config = config
        self.image_encoder = build_image_encoder(config.image) if image_encoder is None else image_encoder
        self.text_encoder = TextEncoder(config.text) if text_encoder is None else text_encoder
        self.image_head = build_head(config.image_head, width_of(self.image_encoder), config.embed_dim)
        self.text_head = build_head(config.text_head, width_of(self.text_encoder), config.embed_dim)
        temperature = config.temperature or PAPER_TEMPERATURE[config.loss]
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(config.bias)) if config.loss == "sigmoid" else None

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> Output:
        """Embed both. images: float (N, 3, S, S), normalised. ids: int64 (M, T). N and M may differ."""
        return Output(self.encode_image(images), self.encode_text(ids), self.log_scale, self.bias)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> float32 (N, E), each of length 1."""
        return normalise(self.image_head(self.image_encoder(images)))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """(M, T) -> float32 (M, E), each of length 1."""
        return normalise(self.text_head(self.text_encoder(ids)))

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep t' in [0, ln 100], so that t is in [1, 100]; call it after each step of the optimizer.

        In place: the parameter stays the tensor that the optimizer and DistributedDataParallel know.
        """
        self.log_scale.clamp_(0, MAX_LOG_SCALE)


def width_of(encoder: nn.Module) -> int:
    """The size of a tower's features."""
    width = encoder.width
    assert isinstance(width, int)
    return width


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Divide each vector by its length: (B, E) -> (B, E), in float32 (or float64) whatever came in.

    bf16 has 8 bits: cosines would be rounded to steps of 1/256, and times a scale of 100 that is a third of a nat.
    Autocast leaves this alone, and the losses multiply these float32 vectors outside of it.
    """
    return F.normalize(x.float() if x.dtype != torch.float64 else x, dim=-1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trained parameters in two groups for AdamW: with weight decay, and without it.

    Decay pulls towards zero. That makes sense for the weights of matrix products, and not for gains (whose neutral
    value is 1), biases and the temperature (Radford et al. 2021, section 2.5): everything with fewer than two
    dimensions. A class token or a query of one dimension is no such weight either. Locked parameters
    (requires_grad=False) are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
