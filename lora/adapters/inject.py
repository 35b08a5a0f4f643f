"""Adapters of a whole model: put in, trained, merged and taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ProjectError
from lora.adapters.layers import LoRALayer
from lora.adapters.targets import find_module, find_targets, kind_of
from lora.settings import AdapterConfig


def inject(model: nn.Module, config: AdapterConfig, seed: int = 0) -> list[str]:
    """Freeze a model and give the layers that `config.targets` names an adapter each, in place.

    Args:
        seed: of the first A.

    Returns:
        The names of the adapted layers.

    Raises:
        ConfigError: a target or a head that names nothing, or a layer that cannot be adapted.
        ProjectError: the model has adapters already.
    """
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ProjectError("the model has adapters already: merge and unload them first, or load the base anew")
    names = find_targets(model, config)
    return inject_each(model, {name: config for name in names}, config.head, seed)


def inject_each(model: nn.Module, settings: dict[str, AdapterConfig], head: tuple[str, ...], seed: int) -> list[str]:
    """`inject` with settings for each layer by its name: adapters that others made may differ in rank from layer to
    layer.
    """
    heads = [find_module(model, name) for name in head]
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, config in settings.items():
        base = model.get_submodule(name)
        kind = kind_of(base)
        assert kind is not None
        model.set_submodule(name, kind(base, config, rng))
    for module in heads:
        for part in module.modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:  # a copy: a head often shares its weight with the embedding, which is frozen
                    part._parameters[key] = nn.Parameter(parameter.detach().clone())
    return list(settings)


def adapters_of(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by name. `ProjectError` if there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not found:
        raise ProjectError("the model has no adapters: inject or load some first")
    return found


def parameter_groups(
    model: nn.Module, lr: float, config: AdapterConfig, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What to give an optimizer: all that learns, B at `lora_plus` times the rate of the rest.

    LoRA+ (Hayou et al. 2024): in wide layers A must move much slower than B for both to learn features efficiently.
    """
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    second = [parameter for name, parameter in learning.items() if name.endswith(".lora_B")]
    first = [parameter for name, parameter in learning.items() if not name.endswith(".lora_B")]
    return [
        {"params": first, "lr": lr, "weight_decay": weight_decay},
        {"params": second, "lr": lr * config.lora_plus, "weight_decay": weight_decay},
    ]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as the base does."""
    layers = adapters_of(model).values()
    if any(layer.merged for layer in layers):
        raise ProjectError("merged adapters cannot be switched off: unmerge first")
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merge(model: nn.Module, keep: bool = True, untie: bool = False) -> None:
    """Put every adapter into its base layer (`LoRALayer.merge`); all of them or, if one cannot, none.

    Args:
        untie: where a layer shares its weight with another that is not adapted (the embedding and the head of many
            models), that other keeps a copy of the old weight. Otherwise such a layer is refused, for the other would
            change with it, or a saved file would hold only one of the two.
    """
    layers = adapters_of(model)
    if any(layer.merged for layer in layers.values()):
        raise ProjectError("the adapters are merged already: twice would add their update twice; unmerge first")
    tied = [name for name, layer in layers.items() if is_tied(model, layer)]
    if tied and not untie:
        raise ProjectError(
            f"{', '.join(tied)} shares its weight with another layer: merge with untie=True, or adapt others"
        )
    for layer in layers.values():
        layer.merge(keep)
    config: Any = getattr(model, "config", None)
    if tied and config is not None:
        config.tie_word_embeddings = False  # a loader would tie them again


def is_tied(model: nn.Module, layer: LoRALayer) -> bool:
    """Whether a layer outside this one holds the same weight."""
    weight = getattr(layer.base, "weight", None)
    owners = [module for module in model.modules() if any(own is weight for own in module._parameters.values())]
    return weight is not None and len(owners) > 1


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, exactly."""
    for layer in adapters_of(model).values():
        layer.unmerge()


def unload(model: nn.Module) -> None:
    """Take the adapters out; what stays are the base layers, merged if they were merged."""
    for name, layer in adapters_of(model).items():
        if not layer.merged and layer.initial_A is not None:
            raise ProjectError("the principal part of the weights is in the PiSSA adapters: merge before unloading")
        model.set_submodule(name, layer.base)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """All that learns, by parameter name: what a checkpoint needs beside the base it can load again."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The counterpart of `adapter_state`. `ProjectError` for other names or shapes."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in [*own, *state]:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise ProjectError(
                f"the adapter does not fit this model: {name} is missing on one side or has another shape"
            )
    for name, parameter in own.items():
        parameter.copy_(state[name])
