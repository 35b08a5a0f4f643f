"""Which layers of a model are adapted, and by which kind of adapter."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter

from torch import nn

from common.config import ConfigError
from lora.adapters.layers import Conv1DLoRA, Conv2dLoRA, EmbeddingLoRA, LinearLoRA, LoRALayer
from lora.adapters.quantize import QuantizedLinear, inner_layers
from lora.settings import ALL_LINEAR, AdapterConfig


def kind_of(module: nn.Module) -> type[LoRALayer] | None:
    """The adapter that fits a layer, or None. A subclass may compute something else, so none fits it."""
    if type(module) in (nn.Linear, QuantizedLinear):
        return LinearLoRA
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return Conv1DLoRA
    if type(module) is nn.Embedding and module.max_norm is None:
        return EmbeddingLoRA
    if type(module) is nn.Conv2d and module.groups == 1:
        return Conv2dLoRA
    return None


def find_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the layers to adapt, in the model's order. `ConfigError` for a target that fits none, or only others."""
    modules = {name: module for name, module in model.named_modules() if name}
    able = [name for name, module in modules.items() if kind_of(module) and not within(name, config.head)]
    inner = set(inner_layers(model, lambda module: issubclass(kind_of(module) or nn.Module, LinearLoRA)))
    chosen: set[str] = set()
    for target in config.targets:
        if target == ALL_LINEAR:
            found = [name for name in able if name in inner]
        else:
            found = [name for name in able if fits(name, target)]
        if not found:
            raise ConfigError("adapter.targets", explain(target, modules, able))
        chosen.update(found)
    return [name for name in able if name in chosen]


def fits(name: str, target: str) -> bool:
    """Whether a target means a layer: by its whole name, the last parts of it, or a pattern with * and ?."""
    if any(letter in target for letter in "*?["):
        return fnmatch.fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def within(name: str, parents: tuple[str, ...]) -> bool:
    """Whether a module is one of `parents` or inside one."""
    return any(fits(name, parent) or f".{parent}." in f".{name}." for parent in parents)


def explain(target: str, modules: dict[str, nn.Module], able: list[str]) -> str:
    """Why a target fits nothing, and what there is instead."""
    last = Counter(f"{name.rsplit('.')[-1]} ({type(modules[name]).__name__})" for name in able)
    there = ", ".join(f"{count} x {kind}" for kind, count in last.most_common(12)) or "no layer that can be adapted"
    near = difflib.get_close_matches(target, {name.rsplit(".")[-1] for name in able}, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    others = {type(module).__name__ for name, module in modules.items() if fits(name, target)}
    what = f"names only {', '.join(sorted(others))}" if others else "fits no layer"
    return f"{target!r} {what}{hint} There are: {there}" if hint else f"{target!r} {what}; there are: {there}"


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module that a head's name means. `ConfigError` if none or several do."""
    found = [(full, module) for full, module in model.named_modules() if fits(full, name)]
    if len(found) != 1:
        there = ", ".join(child for child, _ in model.named_children())
        raise ConfigError(
            "adapter.head", f"{name!r} names {len(found)} modules, not one; at the top there are: {there}"
        )
    return found[0][1]
