"""Bases from their files, frozen: our LLaMA or a model of transformers, whole or in 4 bits; and back into files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import export_weights
from common.config import ConfigError, require
from common.errors import ProjectError, first_line
from common.files import write_text
from lora.adapters.quantize import load_quantized, quantize_model
from lora.config import ModelConfig
from lora.model.files import read_settings, read_shape, read_tensors, settings_of
from lora.model.llama import Llama

SKIPPED = ("rotary_emb.inv_freq",)  # computed here, though older files hold it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_language_model(config: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model, frozen, in evaluation mode.

    Args:
        dtype: of the weights; those of `quantize=nf4` are computed with in it.
    Raises:
        ProjectError: missing or damaged files, another architecture.
    """
    if config.code == "ours":
        model: Any = load_llama(folder, dtype, device, config.quantize == "nf4", config.double_quant)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        if config.quantize == "nf4":
            settings = AutoConfig.from_pretrained(folder)
            model = load_quantized(
                lambda: AutoModelForCausalLM.from_config(settings),
                read_tensors(folder),
                dtype,
                device,
                config.double_quant,
            )
        else:
            model = from_transformers(AutoModelForCausalLM, folder, dtype).to(device)
    return model.eval().requires_grad_(False)


def load_llama(
    folder: Path, dtype: torch.dtype, device: torch.device, quantize: bool = False, double_quant: bool = True
) -> Llama:
    """Our LLaMA with the weights of a folder, read one tensor at a time: of the full-precision model no more than one
    layer's weight is in memory besides what is kept.
    """
    shape = read_shape(read_settings(folder), folder)
    if quantize:
        quantized: Any = load_quantized(lambda: Llama(shape), read_tensors(folder), dtype, device, double_quant)
        return quantized
    with torch.device("meta"):  # no memory yet
        model = Llama(shape)
    expected = {name for name, _ in model.named_parameters()}
    for name, tensor in read_tensors(folder):
        if name in expected:
            place(model, name, tensor, dtype, device)
            expected.remove(name)
        elif not (name.endswith(SKIPPED) or (shape.tied and name == "lm_head.weight")):
            raise ProjectError(f"{folder} holds {name}, which a LLaMA has no place for: set model.code=transformers")
    model.tie()
    if expected:
        raise ProjectError(f"{folder} is incomplete: {sorted(expected)[0]} is missing, and {len(expected) - 1} more")
    return model


def place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Put one tensor where it belongs."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(device, dtype)
    here = getattr(module, leaf)
    if here.shape != tensor.shape:
        raise ProjectError(
            f"{name} has the shape {tuple(tensor.shape)}, where config.json says {tuple(here.shape)}: another model's?"
        )
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def load_classifier(
    config: ModelConfig, folder: Path, classes: Sequence[str], dtype: torch.dtype, device: torch.device, seed: int
) -> Any:
    """An encoder with a new last layer for these classes, frozen, in evaluation mode.

    The new layer is float32 and drawn by `seed`. `ConfigError` for pooling=mean where the head is no linear layer.
    """
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):  # transformers draws the new layer from the global generator
        torch.manual_seed(seed)
        model = from_transformers(
            AutoModelForSequenceClassification, folder, dtype, num_labels=len(classes), **attention_for(device)
        )
    if config.dropout >= 0:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: i for i, name in enumerate(classes)}
    head = find_head(model)
    plain = isinstance(getattr(model, "classifier", None), nn.Linear)
    require(
        config.pooling == "model" or plain,
        "model.pooling",
        f"mean needs a linear layer `classifier`, which {type(model).__name__} has not: set it to model",
    )
    if config.quantize == "nf4":
        quantize_model(model, config.double_quant)
    model.get_submodule(head).float()
    return model.to(device).eval().requires_grad_(False)


def attention_for(device: torch.device) -> dict[str, str]:
    """How transformers shall compute attention: by plain products on a CPU. There the backward pass of PyTorch's own
    function takes half of a step in bfloat16 (MiniLM, 32 texts: 0.93 s with it, 0.45 s without; PyTorch 2.11).
    """
    return {"attn_implementation": "eager"} if device.type == "cpu" else {}


def find_head(model: Any) -> str:
    """The name of a classifier's last layer."""
    for name in ("classifier", "score"):
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    there = ", ".join(name for name, _ in model.named_children())
    raise ConfigError("model.name", f"{type(model).__name__} has no `classifier` and no `score`, only {there}")


def from_transformers(kind: Any, folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """`from_pretrained`, quiet, from files only. `ProjectError` in one line for whatever goes wrong."""
    from transformers.utils import logging as wordy

    before = wordy.get_verbosity()
    wordy.set_verbosity_error()  # that a new head is new we know
    wordy.disable_progress_bar()
    try:
        return kind.from_pretrained(folder, dtype=dtype, local_files_only=True, **settings)
    except Exception as error:  # readers of foreign formats raise whatever they come upon
        raise ProjectError(f"{folder} cannot be loaded as {kind.__name__}: {first_line(error)}") from None
    finally:
        wordy.set_verbosity(before)
        wordy.enable_progress_bar()


def write_folder(folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """A model and its tokenizer as a folder of the Hub's layout, for transformers, vLLM and llama.cpp's converter.

    Of two layers that share a weight it is written once, as these programs expect. Weights come last: a folder without
    them is plainly not whole.
    """
    tokenizer.save_pretrained(folder)
    name = str(dtype).removeprefix("torch.")
    if isinstance(model, Llama):
        settings = settings_of(model.shape, tokenizer, name)
    else:
        settings = {**model.config.to_dict(), "dtype": name, "architectures": [type(model).__name__]}
        for key in ("quantization_config", "_name_or_path"):
            settings.pop(key, None)
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    weights: dict[str, Tensor] = {}
    places = set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() not in places:
            places.add(tensor.data_ptr())
            weights[key] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    export_weights(folder / "model.safetensors", weights, {"format": "pt"})
