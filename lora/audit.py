"""What merging costs: an adapted model compared with itself after its adapters went into the weights.

An adapter was trained beside one base. Merging rounds the sum to the type of the weights, and merging into another base
than the one of training (QLoRA's adapters into the original weights instead of the dequantised NF4 ones, or the other
way round) leaves an error that training had compensated, or never seen. Each variant isolates one cause:

    unmerged          the model as it is: what its own precision costs
    merged_bf16       into the base of training, rounded to bfloat16
    merged_nf4        into the dequantised NF4 base, float32
    merged_original   into the original base, float32

The reference is the model of training, unmerged, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ProjectError
from lora.adapters.inject import adapters_of, merge, unload
from lora.adapters.layers import LinearLoRA
from lora.adapters.quantize import QuantizedLinear, dequantize, inner_layers, quantize


@dataclass(frozen=True)
class Gap:
    """How far a variant is from the reference."""

    variant: str
    largest: float  # of any logit
    kl: float  # mean over positions of KL(reference || variant), nats


def audit(
    model: nn.Module, logits: Callable[[nn.Module], Tensor], originals: Mapping[str, Tensor] | None = None
) -> list[Gap]:
    """Compare the ways of merging. The model itself stays as it is; two copies of it are made, one of them float32.

    Args:
        logits: runs a model on the texts that count. -> (N, V), without the positions of padding
        originals: weights of the base before it was quantised, by the base's own parameter names; needed if it was.

    Raises:
        ProjectError: the base is quantised and an original weight is missing.
    """
    adapters_of(model)
    if any(layer.merged for layer in adapters_of(model).values()):
        raise ProjectError("merged adapters cannot be audited any more: unmerge first")
    reference = answers(copy.deepcopy(model).float(), logits)
    gaps = [compare("unmerged", reference, answers(model, logits))]
    for variant, base, dtype in (
        ("merged_bf16", "own", torch.bfloat16),
        ("merged_nf4", "nf4", torch.float32),
        ("merged_original", "original", torch.float32),
    ):
        other = copy.deepcopy(model).float()
        for name in inner_layers(other, lambda module: type(module) in (nn.Linear, QuantizedLinear)):
            replace_base(other, name, base, originals)
        merge(other, keep=False, untie=True)
        unload(other)
        gaps.append(compare(variant, reference, answers(other.to(dtype), logits)))
    return gaps


@torch.no_grad()
def answers(model: nn.Module, logits: Callable[[nn.Module], Tensor]) -> Tensor:
    """Logits in float32, without dropout."""
    training = model.training
    result = logits(model.eval()).float()
    model.train(training)
    return result


def compare(variant: str, reference: Tensor, logits: Tensor) -> Gap:
    """Largest and mean gap of logits (N, V); in double precision, for a divergence is the small rest of large terms."""
    total = 0.0
    for p, q in zip(reference.split(64), logits.split(64), strict=True):  # a vocabulary is long
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return Gap(variant, float((logits - reference).abs().max()), total / len(reference))


@torch.no_grad()
def replace_base(model: nn.Module, name: str, base: str, originals: Mapping[str, Tensor] | None) -> None:
    """Give one linear layer, adapted or not, an ordinary float32 weight: its own, the same in NF4, or the original."""
    layer: Any = model.get_submodule(name)
    adapter: Any = None
    if name.endswith(".base") and isinstance(model.get_submodule(name.removesuffix(".base")), LinearLoRA):
        adapter = model.get_submodule(name.removesuffix(".base"))
    if not isinstance(layer, QuantizedLinear):
        weight = layer.weight
        if base == "nf4":
            weight = dequantize(quantize(weight), tuple(weight.shape), torch.float32)
    elif base == "original":
        key = f"{name.removesuffix('.base') if adapter else name}.weight"
        if originals is None or key not in originals:
            raise ProjectError(f"the base is quantised: the audit needs its original weights, and {key} is missing")
        weight = originals[key].float()
        if adapter is not None and adapter.initial_A is not None:  # what PiSSA left of it
            weight = weight - adapter.delta(adapter.initial_A, adapter.initial_B)
    else:
        weight = layer.dequantize(torch.float32)
    plain = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    model.set_submodule(name, plain)
