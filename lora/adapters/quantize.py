"""4-bit weights: NF4 with double quantisation (Dettmers et al. 2023, QLoRA), in plain PyTorch.

Section 3 of the paper. A weight is cut into blocks of 64 numbers, each block divided by its largest absolute value c,
and each quotient replaced by the nearest of 16 levels, which are quantiles of a normal distribution: a trained weight
looks like one, so every level is used about equally often. Four bits a number, and 32 a block for c: half a bit a
number. Double quantisation stores c in 8 bits, too, in blocks of 256 with one float32 each, after subtracting the mean
of all c: 8/64 + 32/(64 x 256) = 0.127 bits a number. 4.127 in all, where bfloat16 has 16.

Two levels lie in a byte, the first in its upper half. Everything here agrees with bitsandbytes to the last bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ProjectError

BLOCK = 64  # numbers that share one scale
SCALES = 256  # scales that share one scale of their own
CHUNK = 4096 * BLOCK  # numbers worked on at a time: they fit a processor's cache, and nothing large is held twice
HEADS = ("lm_head", "embed_out", "classifier", "score")  # names of last layers, which stay as they are

# Quantiles of N(0, 1) at 8 equidistant probabilities above the median and 7 below it, up to 0.9677083, then zero, all
# over the largest (appendix E of the paper); rounded to float32 as published, so that codes agree everywhere.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@cache
def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels, rising. (16,)"""
    return torch.tensor(NF4, device=device)


@cache
def byte_levels(device: torch.device) -> Tensor:
    """The two levels that each byte stands for. (256, 2)"""
    levels = nf4_levels(device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)


def dynamic_code() -> tuple[float, ...]:
    """The 256 levels of the 8-bit code of scales, rising: dynamic tree quantisation (Dettmers 2016, section 2.1).

    A sign; then a decimal exponent, of which small numbers use up more bits; what is left of the 7 bits divides
    [0.1, 1] evenly. So numbers near 1 have 64 levels a decade and those near 1e-6 have one.
    """
    positive = []
    for exponent in range(-6, 1):  # powers of ten
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6) + 1)
        positive += (10.0**exponent * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return tuple(sorted([-level for level in positive] + positive + [0.0, 1.0]))


DYNAMIC = dynamic_code()


@cache
def dynamic_levels(device: torch.device) -> Tensor:
    """`DYNAMIC`. (256,)"""
    return torch.tensor(DYNAMIC, device=device)


def scale_blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks divided by their largest absolute value, and those. (n,) -> (n,), (blocks,), both float32"""
    blocks = F.pad(values.flatten().float(), (0, -values.numel() % size)).view(-1, size)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    return scaled.flatten()[: values.numel()], largest


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest level of each value; in the middle between two, the lower. (n,) -> (n,) uint8"""
    middles = (levels[:-1] + levels[1:]) / 2
    if len(levels) > 16:
        return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)
    index = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for middle in middles:  # 15 comparisons of whole vectors take half the time of a search for every number
        index += values > middle
    return index


class Quantized(NamedTuple):
    """A weight of n numbers in m blocks."""

    codes: Tensor  # (n / 2,) uint8: two levels each
    scales: Tensor  # (m,): uint8 codes of the blocks' scales; or, without double quantisation, these in float32
    outer: Tensor  # (m / 256,) float32: scales of the scales
    offset: Tensor  # () float32: the mean of the blocks' scales


def quantize(weight: Tensor, double_quant: bool = True) -> Quantized:
    """NF4 codes of a weight of any shape and floating type.

    Args:
        double_quant: also quantise the scales.
    """
    flat = weight.detach().flatten()
    levels = nf4_levels(weight.device)
    codes, largest = [], []
    for part in flat.split(CHUNK):
        scaled, scale = scale_blocks(part, BLOCK)
        code = F.pad(nearest(scaled, levels), (0, part.numel() % 2), value=NF4.index(0.0))
        codes.append(code[::2] << 4 | code[1::2])
        largest.append(scale)
    scales = torch.cat(largest)
    if not double_quant:
        return Quantized(torch.cat(codes), scales, scales.new_empty(0), scales.new_zeros(()))
    offset = scales.mean()
    scaled, outer = scale_blocks(scales - offset, SCALES)
    return Quantized(torch.cat(codes), nearest(scaled, dynamic_levels(weight.device)), outer, offset)


def dequantize(weight: Quantized, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What the codes stand for, in the shape they came from: level x scale, rounded to `dtype` once."""
    codes, scales, outer, offset = weight
    if scales.dtype == torch.uint8:
        each = dynamic_levels(codes.device)[scales.int()]  # (m,)
        scales = each * outer.repeat_interleave(SCALES)[: len(each)] + offset
    levels = byte_levels(codes.device)
    result = torch.empty(2 * len(codes), dtype=dtype, device=codes.device)
    for start in range(0, len(result), CHUNK):
        part = F.embedding(codes[start // 2 : (start + CHUNK) // 2].int(), levels).flatten()  # (bytes, 2) -> (numbers,)
        scale = scales[start // BLOCK : (start + CHUNK) // BLOCK]
        if len(part) % BLOCK:
            part *= scale.repeat_interleave(BLOCK)[: len(part)]
        else:
            part.view(-1, BLOCK).mul_(scale[:, None])
        result[start : start + CHUNK] = part
    return result[: math.prod(shape)].view(shape)


class FrozenMatmul(torch.autograd.Function):
    """x W^T through a quantised W, which gets no gradient of its own.

    W is dequantised for the product and dropped, and dequantised again on the way back (grad x = grad y W): nothing of
    its full size is kept between the two, and x is not kept at all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.shape = shape
        return F.linear(x, dequantize(Quantized(*weight), shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = Quantized(*ctx.saved_tensors)
        weight = dequantize(saved, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, *(None for _ in saved)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is NF4. (..., in) -> (..., out)

    Attributes:
        dtype: of the weight before it was quantised, and again when something is merged into it.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, double_quant: bool = True, device: Any = None
    ) -> None:
        super().__init__()
        self.in_features = inputs
        self.out_features = outputs
        self.dtype = dtype
        self.double_quant = double_quant
        numbers = inputs * outputs
        blocks = -(numbers // -BLOCK)
        scale_type = torch.uint8 if double_quant else torch.float32
        self.register_buffer("codes", torch.empty(-(numbers // -2), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(blocks, dtype=scale_type, device=device))
        self.register_buffer("outer", torch.empty(-(blocks // -SCALES) if double_quant else 0, device=device))
        self.register_buffer("offset", torch.empty((), device=device))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, double_quant: bool = True) -> QuantizedLinear:
        """A linear layer, quantised."""
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features, linear.out_features, bias is not None, weight.dtype, double_quant, weight.device
        )
        layer.quantize_(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def quantize_(self, weight: Tensor) -> None:
        """Take over a weight (out, in). `ProjectError` for another shape."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise ProjectError(
                f"a weight has shape {tuple(weight.shape)}, the model expects {expected}: another model's?"
            )
        self.codes, self.scales, self.outer, self.offset = quantize(weight, self.double_quant)

    @property
    def parts(self) -> Quantized:
        """The weight as it is stored."""
        return Quantized(self.codes, self.scales, self.outer, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that this layer multiplies with."""
        return dequantize(self.parts, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return FrozenMatmul.apply(x, bias, (self.out_features, self.in_features), *self.parts)

    def to_linear(self, weight: Tensor | None = None) -> nn.Linear:
        """An ordinary layer with the dequantised weight, or with another (out, in), in `dtype`."""
        weight = self.dequantize(self.dtype) if weight is None else weight.to(self.dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """`model.to(torch.bfloat16)` must not round the scales."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, NF4 of {self.dtype}"


# -- whole models ------------------------------------------------------------------------------------------------------


def inner_layers(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> list[str]:
    """Names of the chosen layers without the head, which is known by its name or to transformers as such."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = []
    for name, module in model.named_modules():
        is_head = module is output or not set(name.split(".")).isdisjoint(HEADS)
        if chosen(module) and not is_head:
            names.append(name)
    return names


def linear_names(model: nn.Module) -> list[str]:
    """Names of the layers to quantise. `ProjectError` if there are none."""
    names = inner_layers(model, lambda module: type(module) is nn.Linear)
    if not names:
        kind = type(model).__name__
        raise ProjectError(
            f"{kind} has no linear layers beside its head (GPT-2's are of another kind): nothing to quantise"
        )
    return names


def quantize_model(model: nn.Module, double_quant: bool = True) -> list[str]:
    """Quantise the linear layers of a model in place, one after the other; the head stays as it is.

    It also takes the base inside an adapter: QPiSSA (Meng et al. 2024) adapts first and quantises what is left.

    Returns:
        The names of the quantised layers.
    """
    names = linear_names(model)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, QuantizedLinear.of(layer, double_quant))
    return names


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters of a shape and a type but no memory, and whole buffers: a model's size does
    not matter, and its tables (rotary frequencies) are computed as usual.
    """
    register = nn.Module.register_parameter

    def register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_quantized(
    build: Callable[[], nn.Module],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    double_quant: bool = True,
) -> nn.Module:
    """A frozen model whose linear layers, but the head, are quantised one by one as their weights come in, so that no
    more than one of them is in memory in full precision.

    Args:
        build: makes the model; its parameters never get memory.
        tensors: name and value of each parameter, in any order, as `lora.model.files.read_tensors` reads them.
        dtype: of everything that is not quantised, and of what is computed.

    Raises:
        ProjectError: a tensor of another shape, or one that is missing.
    """
    with parameters_on_meta():
        model = build()
    shared: dict[int, list[tuple[nn.Module, str]]] = {}  # where a parameter stands; tied ones stand in several places
    for module in model.modules():
        for key, parameter in module._parameters.items():
            shared.setdefault(id(parameter), []).append((module, key))
    places = {place: group for group in shared.values() for place in group}
    for name in linear_names(model):
        linear: Any = model.get_submodule(name)
        layer = QuantizedLinear(linear.in_features, linear.out_features, False, dtype, double_quant, device="meta")
        if linear.bias is not None:
            layer.bias = linear.bias
            places[layer, "bias"] = [(layer, "bias")]
        model.set_submodule(name, layer)
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # some checkpoints leave it out, and some models do
    for name, tensor in tensors:
        parent, _, key = name.rpartition(".")
        found = [modules[path] for path in (parent, prefix + parent, parent.removeprefix(prefix)) if path in modules]
        owner = found[0] if found else None
        if isinstance(owner, QuantizedLinear) and key == "weight":
            owner.quantize_(tensor.to(device))
        elif owner is not None and owner._parameters.get(key) is not None:
            fill(places[owner, key], name, tensor.to(device, dtype))
        elif owner is not None and owner._buffers.get(key) is not None:
            owner._buffers[key] = tensor.to(device)
        del tensor  # before the next one is read
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.codes.is_meta:
            missing.append(f"{name}.weight")
    if missing:
        raise ProjectError(f"the checkpoint lacks {len(missing)} tensors of this model, such as {missing[0]}")
    return model.to(device).eval()


def fill(places: list[tuple[nn.Module, str]], name: str, value: Tensor) -> None:
    """Put a value where a parameter without memory stands, in every module that shares it."""
    shape = places[0][0]._parameters[places[0][1]].shape  # type: ignore[union-attr]
    if value.shape != shape:
        raise ProjectError(f"{name} has shape {tuple(value.shape)}, the model expects {tuple(shape)}: another model's?")
    parameter = nn.Parameter(value, requires_grad=False)
    for module, key in places:
        module._parameters[key] = parameter
