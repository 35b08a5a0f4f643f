"""Adapters as files, in the format of PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

What the field's tools read: peft itself, transformers, vLLM, llama.cpp's converter. Only what was trained goes in,
never the base; a PiSSA adapter is written as what it changed about the original base, so that nobody needs to know how
it started:

    s (B A - B0 A0) = s [B, -B0] [A; A0]       a plain adapter of twice the rank (Meng et al. 2024, appendix C)

Our files also carry a fingerprint of the base they were trained on, where other readers do not look.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from common.errors import ProjectError
from common.files import atomic_open, read_json, write_json
from lora.adapters.inject import adapters_of, inject_each
from lora.adapters.layers import EmbeddingLoRA, LinearLoRA, LoRALayer, Wrapper
from lora.adapters.targets import kind_of, within
from lora.settings import AdapterConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?")
# settings of peft that change what an adapter computes, and that we do not have
FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base as it is


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from a folder.

    Attributes:
        folder: where from.
        base: the base's name, as far as it was written.
        settings: of each layer, by name.
        tensors: by our parameter names: `<layer>.lora_A`, `.lora_B`, `.lora_magnitude`, and whole modules' own.
        head: modules that are replaced in full.
        fingerprint: of the base; empty if another program wrote the file.
    """

    folder: Path
    base: str
    settings: dict[str, AdapterConfig]
    tensors: dict[str, Tensor]
    head: tuple[str, ...]
    fingerprint: str


def fingerprint(model: nn.Module, head: tuple[str, ...] = ()) -> str:
    """A hash that tells pretrained bases apart, with adapters in them or without, in whatever precision: of all vectors
    (normalisation, biases), which no quantisation touches, rounded to bfloat16.

    Args:
        head: modules to leave out, for they learn.
    """
    layers = {f"{name}.base": name for name, module in model.named_modules() if isinstance(module, Wrapper)}
    vectors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) or within(name, head):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 1:
                vectors[f"{layers.get(name, name)}.{key}"] = parameter
    digest = hashlib.sha256()
    for name in sorted(vectors):
        digest.update(name.encode())
        digest.update(vectors[name].detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# -- out ---------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path, base: str, task: str | None = "CAUSAL_LM") -> None:
    """Write a model's adapters, and its head if it learns, to a folder.

    Args:
        base: the base model's name on the Hub, or its path.
        task: PEFT's word for it: CAUSAL_LM, SEQ_CLS, or None.
    """
    layers = adapters_of(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        kind = "lora_embedding_{}" if isinstance(layer, EmbeddingLoRA) else "lora_{}.weight"
        a, b = whole_update(layer)
        tensors[f"{name}.{kind.format('A')}"] = a
        tensors[f"{name}.{kind.format('B')}"] = b
        if layer.lora_magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = shaped_magnitude(layer, layer.lora_magnitude)
    head = [name for name, module in model.named_modules() if is_head(name, module, layers)]
    for name in head:
        for key, parameter in model.get_submodule(name).state_dict().items():
            tensors[f"{name}.{key}"] = parameter
    content = {PREFIX + key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    data = to_bytes(content, metadata={"format": "pt", "base_fingerprint": fingerprint(model, tuple(head))})
    with atomic_open(folder / TENSORS) as file:
        file.write(data)
    write_json(folder / CONFIG, peft_config(model, layers, head, base, task))


def whole_update(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """A and B of what the layer differs by from the original base."""
    if layer.initial_A is None:
        return layer.lora_A, layer.lora_B
    return torch.cat([layer.lora_A, layer.initial_A]), torch.cat([layer.lora_B, -layer.initial_B], dim=1)


def shaped_magnitude(layer: LoRALayer, magnitude: Tensor) -> Tensor:
    """(out,) as PEFT stores it: for convolutions (1, out, 1, 1)."""
    return magnitude if isinstance(layer, LinearLoRA | EmbeddingLoRA) else magnitude.view(1, -1, 1, 1)


def is_head(name: str, module: nn.Module, layers: dict[str, LoRALayer]) -> bool:
    """Whether a module's own parameters learn in full: the smallest modules, so that a head may be any part."""
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    return bool(own) and name not in layers


def peft_config(
    model: nn.Module, layers: dict[str, LoRALayer], head: list[str], base: str, task: str | None
) -> dict[str, Any]:
    """The content of `adapter_config.json`: what all layers share, and per layer what differs."""
    ranks = {name: whole_update(layer)[0].shape[0] for name, layer in layers.items()}
    settings = next(iter(layers.values())).config
    # s is written as alpha / r, unless it can be said in PEFT's way: alpha, and whether it is over sqrt(r)
    rslora = settings.rslora and settings.init != "pissa"
    alphas = {name: layer.scaling * (ranks[name] ** 0.5 if rslora else ranks[name]) for name, layer in layers.items()}
    alphas = {name: round(alpha, 6) for name, alpha in alphas.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": whole(alpha),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): whole(value) for name, value in alphas.items() if value != alpha},
        "target_modules": short_names(model, set(layers)),
        "modules_to_save": head or None,
        "lora_dropout": settings.dropout,
        "use_rslora": rslora,
        "use_dora": settings.dora,
        "init_lora_weights": True,
        "fan_in_fan_out": any(type(layer.base).__name__ == "Conv1D" for layer in layers.values()),
        "bias": "none",
    }


def whole(number: float) -> float:
    """16 rather than 16.0: other readers expect an integer where there is one."""
    return int(number) if number == int(number) else number


def short_names(model: nn.Module, adapted: set[str]) -> list[str]:
    """`q_proj`, where every layer of that name is adapted; whole names otherwise."""
    short = {name.rsplit(".")[-1] for name in adapted}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".")[-1] in short}
    return sorted(short if meant == adapted else adapted)


# -- in ----------------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter that we or peft wrote.

    Raises:
        ProjectError: no adapter there, a damaged file, or something that LoRA as we have it does not compute.
    """
    config = read_json(folder / CONFIG)
    if not config:
        raise ProjectError(f"{folder} holds no adapter: {CONFIG} is missing or damaged")
    check_config(folder, config)
    stored, mark = read_tensors(folder / TENSORS)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        match = PART.fullmatch(name)
        if match is None:
            rest[name] = tensor
            continue
        part = match["part"].replace("embedding_", "").replace("_vector", "")
        tensors[f"{match['layer']}.{part}"] = tensor.flatten() if part == "lora_magnitude" else tensor
        if part == "lora_A":
            ranks[match["layer"]] = tensor.shape[0]
    if not ranks or any(f"{name}.lora_B" not in tensors for name in ranks):
        raise ProjectError(f"{folder / TENSORS} holds no adapter: an A or its B is missing")
    saved = dict.fromkeys(config.get("modules_to_save") or [])  # peft lists a classifier twice
    head = tuple(name for name in saved if any(f".{name}." in f".{key}" for key in rest))
    return SavedAdapter(
        folder,
        str(config.get("base_model_name_or_path") or ""),
        {name: settings_of(name, rank, config) for name, rank in ranks.items()},
        tensors | rest,
        head,
        mark,
    )


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what would be read as something else."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ProjectError(f"{folder} holds an adapter of the kind {kind}; this program reads LORA")
    foreign = [key for key in FOREIGN if config.get(key)]
    if config.get("bias", "none") != "none":
        foreign.append("bias")
    if foreign:
        raise ProjectError(f"{folder} uses {', '.join(foreign)} of peft, which this program does not compute")
    start = config.get("init_lora_weights")
    if start not in (*PLAIN_STARTS, "pissa"):
        raise ProjectError(
            f"{folder} started from init_lora_weights={start}, which changed its base: save it in peft with "
            "path_initial_model_for_weight_conversion"
        )


def settings_of(name: str, rank: int, config: dict[str, Any]) -> AdapterConfig:
    """Of one layer. PEFT's patterns are regular expressions over the end of a name."""
    alpha = float(config.get("lora_alpha", 8))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = float(value)
            break
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        targets=(name,),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        init="pissa" if config.get("init_lora_weights") == "pissa" else "default",
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Every tensor of a safetensors file, and the base's fingerprint."""
    if not path.is_file():
        old = path.with_name("adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, which may hold any program: save it anew as safetensors" if old else ""
        raise ProjectError(f"{path} is missing{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            mark = (file.metadata() or {}).get("base_fingerprint", "")
    except (SafetensorError, OSError, ValueError) as error:
        raise ProjectError(f"{path} is damaged ({str(error).splitlines()[0]}): save or download it again") from error
    bad = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ProjectError(f"{path} is not of a sound training run: {bad[0]} holds values that are not finite")
    return tensors, mark


def load_adapter(model: nn.Module, folder: Path, check_base: bool = True) -> SavedAdapter:
    """Put an adapter that we or peft wrote into a base model, in place, ready to answer or to train on.

    Args:
        check_base: refuse a base that is not the one of training, which our own files know.
    """
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ProjectError("the model has adapters already: merge and unload them first, or load the base anew")
    saved = read_adapter(folder)
    check_fit(model, saved, check_base)
    inject_each(model, saved.settings, saved.head, seed=0)
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, tensor in saved.tensors.items():
            if name in own:
                own[name].copy_(tensor)
    return saved


def check_fit(model: nn.Module, saved: SavedAdapter, check_base: bool = True) -> None:
    """Raise `ProjectError` unless the adapter is for this base: names, shapes, and fingerprint where it has one."""
    made_for = f"{saved.folder} was made for another base ({saved.base or 'which it does not name'})"
    modules = dict(model.named_modules())
    for name, settings in saved.settings.items():
        base = modules.get(name)
        base = base.base if isinstance(base, Wrapper) else base
        kind = None if base is None else kind_of(base)
        if base is None or kind is None:
            raise ProjectError(f"{made_for}: it adapts {name}, which this model lacks or cannot adapt")
        meant = kind.shapes(base, settings.rank)
        for part, shape in zip(("lora_A", "lora_B"), meant, strict=True):
            found = tuple(saved.tensors[f"{name}.{part}"].shape)
            if found != shape:
                raise ProjectError(f"{made_for}: {name}.{part} has shape {found}, this model needs {shape}")
    own = dict(model.named_parameters(remove_duplicate=False))  # a tied head has two names
    for key, tensor in saved.tensors.items():
        if key.rpartition(".")[0] in saved.settings and ".lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")  # peft also writes the base of an adapted embedding
        if name not in own or own[name].shape != tensor.shape:
            raise ProjectError(f"{made_for}: {name} is missing here or has another shape")
        if name != key and not torch.equal(own[name].cpu().float(), tensor.float()):
            raise ProjectError(f"{made_for}: its {name} differs")
    if check_base and saved.fingerprint and saved.fingerprint != fingerprint(model, saved.head):
        raise ProjectError(
            f"{made_for}: normalisation weights and biases differ from those it was trained on (check_base)"
        )
