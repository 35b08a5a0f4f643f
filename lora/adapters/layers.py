"""One frozen layer with a low-rank update.

    y = W x + s B A x        A (r, in), B (out, r), s = alpha / r       Hu et al. 2021, eq. 3
    s = alpha / sqrt(r)      rsLoRA                                     Kalajdzievski 2023, theorem 3.2
    W' = m (W + s B A) / |W + s B A|    DoRA, | | the length of each row    Liu et al. 2024, eq. 5
    W = U S V^T:  B A s = U_r S_r V_r^T, the rest stays frozen     PiSSA    Meng et al. 2024, eqs. 2-4

Every kind of layer is seen as a matrix (out, in): an embedding maps one-hot vectors, so its matrix is the transposed
table; a convolution maps patches, so its matrix is its kernel with all but the first axis flattened.

A and B are float32 whatever the base's type is: an optimizer's small steps would be lost in bfloat16. They are rounded
to the type of the activations where they are multiplied, as autocast would do.

Legend: in, out: features of the layer; r: rank.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError
from common.errors import ProjectError
from lora.adapters.quantize import QuantizedLinear
from lora.settings import AdapterConfig


class Wrapper(nn.Module):
    """A module in the place of a frozen layer, which it holds as `base`."""

    base: Any

    @property
    def weight(self) -> Tensor:
        """The base's: code around a model may ask a layer for its device or type."""
        return self.base.weight


class LoRALayer(Wrapper):
    """A frozen layer and its update; what differs between kinds of layer is in the subclasses.

    Attributes:
        lora_A: (r, in); convolutions (r, in, k, k).
        lora_B: (out, r); convolutions (out, r, 1, 1). Zero at first (an embedding: A instead), so step 0 is the base.
        lora_magnitude: m (out,), of DoRA; else None.
        enabled: False shows the base as it was before adapters came.
    """

    def __init__(self, base: Any, config: AdapterConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config = config
        self.scaling = config.scaling
        self.dropout: nn.Module = nn.Dropout(config.dropout)
        self.enabled = True
        self.merged = False
        self.kept: list[Any] = []  # the base before it was merged; in a list, for a module here would be a layer, too
        weight = base.codes if isinstance(base, QuantizedLinear) else base.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, b = self.initial_factors(config.rank, rng)
        self.lora_A = nn.Parameter(a.to(weight.device, dtype))
        self.lora_B = nn.Parameter(b.to(weight.device, dtype))
        # PiSSA's first A and B, which left the base: its original is base + s B0 A0
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        if config.init == "pissa":
            self.move_principal_part(config.pissa_iterations)
        self.lora_magnitude = nn.Parameter(self.row_norm()) if config.dora else None

    # -- what a kind of layer defines ----------------------------------------------------------------------------------

    @staticmethod
    def shapes(base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B."""
        raise NotImplementedError

    def initial_factors(self, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B at step 0: A uniform, as `nn.Linear` starts, and drawn on the CPU, whatever the device; B zero."""
        a, b = self.shapes(self.base, rank)
        bound = 1 / math.sqrt(math.prod(a[1:]))
        return (2 * torch.rand(a, generator=rng) - 1) * bound, torch.zeros(b)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """s B A x, in the type of x."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The base's weight as (out, in), in the type of A."""
        raise NotImplementedError

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(out, in) in the base's own layout."""
        raise NotImplementedError

    def along_output(self, vector: Tensor) -> Tensor:
        """(out,) shaped so that it multiplies the layer's output."""
        return vector

    # -- what all have in common ---------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        if not self.enabled:
            return y if self.initial_A is None else y + self.update(x, self.initial_A, self.initial_B)
        update = self.update(self.dropout(x), self.lora_A, self.lora_B)
        if self.lora_magnitude is None:
            return y + update
        gain = self.along_output(self.gain())
        change = (gain - 1).to(y.dtype)  # after the subtraction: near 1, bfloat16 knows steps of 1/128 only
        bias = getattr(self.base, "bias", None)
        frozen = y if bias is None else y - self.along_output(bias)
        return y + change * frozen + gain.to(y.dtype) * update  # at step 0 `change` is 0 to the last bit: y stays as is

    def gain(self) -> Tensor:
        """DoRA's m / |W + s B A|, (out,). Section 4.3 of the paper: the length is a constant to the gradient."""
        assert self.lora_magnitude is not None
        return self.lora_magnitude / self.row_norm()

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """|W + s B A| of each row, (out,), without building that sum:

            |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b A A^T b^T

        with w a row of W and b one of B: r products a row instead of a second matrix of W's size.
        """
        a, b = self.lora_A.flatten(1), self.lora_B.flatten(1)  # (r, in), (out, r)
        with no_autocast(a.device):
            matrix = self.matrix()  # (out, in)
            cross = ((matrix @ a.T) * b).sum(1)  # (out, r) -> (out,)
            square = ((b @ (a @ a.T)) * b).sum(1)
            total = matrix.norm(dim=1) ** 2 + 2 * self.scaling * cross + self.scaling**2 * square
            return total.clamp_min(torch.finfo(a.dtype).tiny).sqrt()

    @torch.no_grad()
    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """s B A, (out, in)."""
        with no_autocast(a.device):
            return self.scaling * (b.flatten(1) @ a.flatten(1))

    @torch.no_grad()
    def merged_matrix(self) -> Tensor:
        """The weight of the one layer that computes the same as base and update, (out, in)."""
        matrix = self.matrix() + self.delta(self.lora_A, self.lora_B)
        return matrix if self.lora_magnitude is None else self.gain()[:, None] * matrix

    @torch.no_grad()
    def move_principal_part(self, iterations: int) -> None:
        """PiSSA: the r largest singular directions move from the base to A and B, sqrt(S) to each."""
        if type(self) is EmbeddingLoRA or type(self) is Conv2dLoRA or isinstance(self.base, QuantizedLinear):
            kind = type(self.base).__name__
            raise ConfigError(
                "adapter.init",
                f"pissa needs linear layers in full precision, not {kind}: adapt first, then quantise what is left",
            )
        matrix = self.matrix()
        rank = self.config.rank
        if rank > min(matrix.shape):
            raise ConfigError("adapter.rank", f"pissa splits {tuple(matrix.shape)}: at most {min(matrix.shape)}")
        if iterations:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(0)
                u, s, v = torch.svd_lowrank(matrix, rank, niter=iterations)
        else:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            v = vh.T
        root = (s[:rank] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * v.T[:rank])
        self.lora_B.copy_(u[:, :rank] * root)
        self.initial_A, self.initial_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        rest = matrix - self.delta(self.lora_A, self.lora_B)
        self.base.weight = nn.Parameter(self.as_weight(rest).to(self.base.weight), requires_grad=False)

    def merge(self, keep: bool = True) -> None:
        """Put the update into the base, which becomes a plain layer of its own type (of bfloat16 if it was 4-bit).

        Args:
            keep: also keep the base as it was, for `unmerge`: exact, where subtracting would leave rounding errors.

        Raises:
            ProjectError: it is merged already.
        """
        if self.merged:
            raise ProjectError("the adapter is merged already: twice would add its update twice; unmerge first")
        weight = self.as_weight(self.merged_matrix())
        base = self.base
        if isinstance(base, QuantizedLinear):
            self.base = base.to_linear(weight)
        else:
            self.base = copy_with(base, weight.to(base.weight))
        self.kept = [base] if keep else []
        self.merged = True

    def unmerge(self) -> None:
        """Undo `merge`, exactly. `ProjectError` if there is nothing to undo, or the base was not kept."""
        if not self.merged or not self.kept:
            raise ProjectError("nothing to unmerge: the adapter is not merged, or it was merged with keep=False")
        self.base = self.kept.pop()
        self.merged = False


def no_autocast(device: torch.device) -> Any:
    """Norms and merged weights are computed in the type of A, also where autocast is on."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def copy_with(layer: Any, weight: Tensor) -> nn.Module:
    """The same layer with another weight; everything else is shared."""
    other = layer.__class__.__new__(layer.__class__)
    other.__dict__.update(layer.__dict__)
    other._parameters = dict(layer._parameters)
    other.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return other


class LinearLoRA(LoRALayer):
    """Of `nn.Linear`, or of `QuantizedLinear`. (..., in) -> (..., out)"""

    @staticmethod
    def shapes(base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, base.in_features), (base.out_features, rank)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, a.to(x.dtype))  # (..., r)
        return F.linear(self.scaling * hidden, b.to(x.dtype))

    def matrix(self) -> Tensor:
        if isinstance(self.base, QuantizedLinear):
            return self.base.dequantize(self.lora_A.dtype)
        return self.base.weight.detach().to(self.lora_A.dtype)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix


class Conv1DLoRA(LinearLoRA):
    """Of transformers' `Conv1D` (GPT-2), a linear layer whose weight is (in, out)."""

    @staticmethod
    def shapes(base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = base.weight.shape
        return (rank, inputs), (outputs, rank)

    def matrix(self) -> Tensor:
        return self.base.weight.detach().to(self.lora_A.dtype).T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T


class EmbeddingLoRA(LoRALayer):
    """Of `nn.Embedding`, as a map from one-hot vectors. (...) of int64 -> (..., dim)

    A is looked up, not multiplied, and has no dropout. It is the one that starts at zero, as in the authors' code: a
    token that never occurs in training keeps its vector, where a random A would move it as soon as B is not zero.
    """

    def __init__(self, base: Any, config: AdapterConfig, rng: torch.Generator) -> None:
        super().__init__(base, config, rng)
        self.dropout = nn.Identity()

    @staticmethod
    def shapes(base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, width = base.weight.shape
        return (rank, rows), (width, rank)

    def initial_factors(self, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        a, b = self.shapes(self.base, rank)
        return torch.zeros(a), torch.randn(b, generator=rng)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dtype = self.base.weight.dtype
        hidden = F.embedding(x, a.T, padding_idx=self.base.padding_idx).to(dtype)  # (..., r)
        return F.linear(self.scaling * hidden, b.to(dtype))

    def matrix(self) -> Tensor:
        return self.base.weight.detach().to(self.lora_A.dtype).T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T


class Conv2dLoRA(LoRALayer):
    """Of `nn.Conv2d`: A convolves to r channels as the base does, B mixes these. (N, C, H, W) -> (N, D, H', W')"""

    @staticmethod
    def shapes(base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        outputs, *patch = base.weight.shape
        return (rank, *patch), (outputs, rank, 1, 1)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = self.base._conv_forward(x, a.to(x.dtype), None)  # its stride, padding, dilation
        return F.conv2d(self.scaling * hidden, b.to(x.dtype))

    def matrix(self) -> Tensor:
        return self.base.weight.detach().to(self.lora_A.dtype).flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base.weight.shape)

    def along_output(self, vector: Tensor) -> Tensor:
        return vector.view(-1, 1, 1)
