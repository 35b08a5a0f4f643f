"""A model's folder as the Hugging Face Hub lays it out: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import ProjectError, first_line
from common.files import read_json
from lora.model.llama import LlamaShape, RopeScaling

FAMILIES = ("llama", "mistral")  # model_type of what lora/model/llama.py computes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
INDEX = "model.safetensors.index.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """A model's config.json. `ProjectError` where there is none, or none that can be read."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProjectError(f"{folder} is no model's folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ProjectError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise ProjectError(f"{path} holds no settings")
    return settings


def read_shape(settings: dict[str, Any], source: object = "the model") -> LlamaShape:
    """The shape of a model of LLaMA's kind, from its config.json; `ProjectError` for one that computes otherwise."""

    def refuse(what: str) -> ProjectError:
        return ProjectError(f"{source} {what}, which lora/model/llama.py does not compute: set model.code=transformers")

    if settings.get("model_type") not in FAMILIES:
        raise refuse(f"is of the kind {settings.get('model_type')}")
    if settings.get("hidden_act", "silu") != "silu":
        raise refuse(f"has the activation {settings['hidden_act']}")
    if settings.get("sliding_window"):
        raise refuse(f"sees only {settings['sliding_window']} tokens back")
    # newer files have all of it in rope_parameters, older ones have theta apart
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_frequency=rope["low_freq_factor"],
            high_frequency=rope["high_freq_factor"],
            old_context=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise refuse(f"has rotary positions of the kind {kind}")
    try:
        heads = settings["num_attention_heads"]
        return LlamaShape(
            vocab_size=settings["vocab_size"],
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_width=settings.get("head_dim") or settings["hidden_size"] // heads,
            mlp_width=settings["intermediate_size"],
            context=settings.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0),
            rope_scaling=scaling,
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            tied=bool(settings.get("tie_word_embeddings", False)),
            attention_bias=bool(settings.get("attention_bias", False)),
            mlp_bias=bool(settings.get("mlp_bias", False)),
        )
    except KeyError as error:
        raise ProjectError(f"{source}: its config.json lacks {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model. `ProjectError` where there are none."""
    parts = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values())) or ["model.safetensors"]
    files = [folder / part for part in parts]
    if not all(path.is_file() for path in files):
        raise ProjectError(f"{folder} has no safetensors: take model.code=transformers, which reads other files, too")
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model by name, one at a time. `ProjectError` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ProjectError(
                f"weights {path} cannot be read, the file is damaged ({first_line(error)}): download it again"
            ) from None
        except OSError as error:
            raise ProjectError(f"weights {path} cannot be read: {first_line(error)}") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. `ProjectError` where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ProjectError(f"{folder} has no tokenizer: put {TOKENIZER_FILES[0]} of the model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # readers of foreign formats raise whatever they come upon
        raise ProjectError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from None
    return tokenizer


def settings_of(shape: LlamaShape, tokenizer: Any = None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of one of our models, for transformers and others to read: the counterpart of `read_shape`."""
    rope: dict[str, Any] = {"rope_theta": shape.rope_theta, "rope_type": "default"}
    if shape.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_frequency,
            "high_freq_factor": shape.rope_scaling.high_frequency,
            "original_max_position_embeddings": shape.rope_scaling.old_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        "dtype": dtype,
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }
