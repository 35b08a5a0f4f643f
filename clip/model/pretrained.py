"""OpenAI's and OpenCLIP's weights in our modules, name by name.

    OpenAI, OpenCLIP                        Hugging Face transformers                  ours
    visual.transformer.resblocks.0.ln_1     vision_model.encoder.layers.0.layer_norm1  image_encoder.blocks.0.norm1
    visual.proj                             visual_projection.weight                   image_head.weight
    ...

The shapes tell the architecture: widths, layers, patches, context. What they do not tell is the activation: OpenAI's
weights were trained with QuickGELU, most of OpenCLIP's were not, and with the wrong one a model works a few points
worse without a word. It is read from the config beside the weights, or must be said.

Radford et al. 2021   Learning transferable visual models (CLIP)     arXiv:2103.00020
Cherti et al. 2023    Reproducible scaling laws (OpenCLIP)           arXiv:2212.07143
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clip.config import RESNET_STRIDE, HeadConfig, ImageConfig, ModelConfig, TextConfig
from clip.model import CLIP
from common.checkpoint import read_weights
from common.errors import ProjectError

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of each colour in [0, 1], as all of these models were trained
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
WEIGHT_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
CONFIG_FILES = ("open_clip_config.json", "config.json")
HEAD_WIDTH = 64  # CLIP's models have width / 64 attention heads

# Each rule renames a part of a name; the first group of rules is OpenAI's, the second that of transformers.
RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^text\.(?=transformer|token_emb|positional|ln_final|text_proj)", ""),  # OpenCLIP with its own text module
    (r"^visual\.class_embedding$", "image_encoder.class_token"),
    (r"^visual\.positional_embedding$", "image_encoder.positions"),
    (r"^visual\.ln_pre\.", "image_encoder.norm_in."),
    (r"^visual\.ln_post\.", "image_encoder.norm_out."),
    (r"^visual\.transformer\.resblocks\.", "image_encoder.blocks."),
    (r"^visual\.proj$", "image_head.weight.T"),
    (r"^visual\.attnpool\.c_proj\.", "image_head."),
    (r"^visual\.attnpool\.positional_embedding$", "image_encoder.pool.positions"),
    (r"^visual\.attnpool\.([qkv])_proj\.", r"image_encoder.pool.\1."),
    (r"^visual\.(conv\d\.)", r"image_encoder.\1"),
    (r"^visual\.bn(\d)\.", r"image_encoder.norm\1."),
    (r"^visual\.layer(\d)\.", lambda match: f"image_encoder.stages.{int(match[1]) - 1}."),
    (r"(stages\.\d+\.\d+)\.bn(\d)\.", r"\1.norm\2."),
    (r"\.downsample\.0\.", ".shortcut.1."),  # 0 is the average pooling, without weights
    (r"\.downsample\.1\.", ".shortcut.2."),
    (r"^transformer\.resblocks\.", "text_encoder.blocks."),
    (r"^token_embedding\.", "text_encoder.embedding."),
    (r"^positional_embedding$", "text_encoder.positions"),
    (r"^ln_final\.", "text_encoder.norm_out."),
    (r"^text_projection$", "text_head.weight.T"),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attention.qkv."),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.mlp\.c_fc\.", ".mlp.0."),
    (r"\.mlp\.c_proj\.", ".mlp.2."),
    (r"^logit_scale$", "log_scale"),
    (r"^logit_bias$", "bias"),
    # transformers
    (r"^vision_model\.embeddings\.class_embedding$", "image_encoder.class_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "image_encoder.patches."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "image_encoder.positions"),
    (r"^vision_model\.pre_layrnorm\.", "image_encoder.norm_in."),
    (r"^vision_model\.post_layernorm\.", "image_encoder.norm_out."),
    (r"^vision_model\.encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_model\.head\.probe$", "image_encoder.pool.query"),
    (r"^vision_model\.head\.attention\.in_proj_", "image_encoder.pool.qkv."),
    (r"^vision_model\.head\.attention\.out_proj\.", "image_encoder.pool.out."),
    (r"^vision_model\.head\.layernorm\.", "image_encoder.pool.norm."),
    (r"^vision_model\.head\.mlp\.", "image_encoder.pool.mlp."),
    (r"^text_model\.embeddings\.token_embedding\.", "text_encoder.embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text_encoder.positions"),
    (r"^text_model\.encoder\.layers\.", "text_encoder.blocks."),
    (r"^text_model\.final_layer_norm\.", "text_encoder.norm_out."),
    (r"^text_model\.head\.", "text_head."),
    (r"^visual_projection\.", "image_head."),
    (r"^text_projection\.", "text_head."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attention.\1."),
    (r"\.self_attn\.out_proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
]
# sizes and masks that are no weights
IGNORED = re.compile(r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$")


def from_pretrained(name: str, activation: Activation | None = None) -> CLIP:
    """A model with published weights, in evaluation mode, float32.

    name: a file, a folder, or an id on the Hugging Face Hub such as `openai/clip-vit-base-patch32`,
        `laion/CLIP-ViT-B-32-laion2B-s34B-b79K` or `timm/resnet50_clip.openai`.
    activation: None reads it from the config beside the weights.
    Raises ProjectError where weights are missing, damaged or of another architecture, or the activation is not known.
    """
    path, config_path = find_weights(name)
    state, is_openai = read_state(path)
    activation = activation or read_activation(config_path, is_openai, path)
    return build(state, activation, str(path))


def build(state: dict[str, Tensor], activation: Activation, source: str = "the weights") -> CLIP:
    """A model in evaluation mode from a state dict of OpenAI's, OpenCLIP's or transformers' CLIP. `source` is named in
    errors.
    """
    weights = translate(state)
    try:
        model = CLIP(infer_config(weights, activation))
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ProjectError(f"{source} do not hold a CLIP that is known here: {str(error).splitlines()[0]}") from None
    return model.eval()


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, float32, under our names. A name that no rule knows keeps its own, and `load_state_dict` will
    complain of it.
    """
    is_vit = not any(".attnpool." in name for name in state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if IGNORED.search(name):
            continue
        ours = "image_encoder.patches.weight" if is_vit and name == "visual.conv1.weight" else _rename(name)
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        renamed[ours] = tensor
    return dict(_reshaped(renamed))


def _rename(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _reshaped(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Query, key and value together; projections transposed to be linear maps; scalars without dimensions."""
    for name, tensor in state.items():
        if name.endswith(".T"):
            yield name.removesuffix(".T"), tensor.T.contiguous()
        elif name in ("log_scale", "bias"):
            yield name, tensor.reshape(())
        elif name.endswith("pool.query"):
            yield name, tensor.reshape(-1)
        elif ".pool.qkv." in name:
            q, kv = tensor.split([len(tensor) // 3, 2 * len(tensor) // 3])
            yield name.replace("qkv", "q"), q
            yield name.replace("qkv", "kv"), kv
        elif match := re.search(r"\.attention\.([qkv])\.", name):
            if match[1] == "q":
                parts = [state[name.replace(".attention.q.", f".attention.{part}.")] for part in "qkv"]
                yield name.replace(".attention.q.", ".attention.qkv."), torch.cat(parts)
        else:
            yield name, tensor


def infer_config(weights: dict[str, Tensor], activation: Activation) -> ModelConfig:
    """The architecture, from the shapes of weights under our names. Raises KeyError or ValueError for another one."""
    image = _vit_config(weights, activation)
    if "image_encoder.patches.weight" not in weights:
        image = _resnet_config(weights)
    embedding = weights["text_encoder.embedding.weight"]
    vocab_size, width = embedding.shape
    text = TextConfig(
        vocab_size=vocab_size,
        context=len(weights["text_encoder.positions"]),
        width=width,
        heads=width // HEAD_WIDTH,
        layers=_count(weights, "text_encoder.blocks"),
        mlp_ratio=len(weights["text_encoder.blocks.0.mlp.0.weight"]) / width,
        activation=activation,
    )
    return ModelConfig(
        embed_dim=len(weights["text_head.weight"]),
        loss="sigmoid" if "bias" in weights else "info_nce",
        image=image,
        text=text,
        image_head=HeadConfig(bias="image_head.bias" in weights),
        text_head=HeadConfig(bias="text_head.bias" in weights),
    )


def _vit_config(weights: dict[str, Tensor], activation: Activation) -> ImageConfig:
    patches = weights.get("image_encoder.patches.weight")
    if patches is None:
        return ImageConfig()
    width, patch = patches.shape[0], patches.shape[-1]
    num_patches = len(weights["image_encoder.positions"]) - 1  # the first position is that of the class token
    return ImageConfig(
        image_size=patch * math.isqrt(num_patches),
        width=width,
        heads=width // HEAD_WIDTH,
        patch=patch,
        layers=_count(weights, "image_encoder.blocks"),
        mlp_ratio=len(weights["image_encoder.blocks.0.mlp.0.weight"]) / width,
        activation=activation,
    )


def _resnet_config(weights: dict[str, Tensor]) -> ImageConfig:
    num_positions, pooled = weights["image_encoder.pool.positions"].shape
    return ImageConfig(
        kind="resnet",
        image_size=RESNET_STRIDE * math.isqrt(num_positions - 1),
        width=len(weights["image_encoder.conv3.weight"]),
        heads=pooled // HEAD_WIDTH,
        stages=tuple(_count(weights, f"image_encoder.stages.{i}") for i in range(4)),
    )


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are below a name."""
    return len({name.removeprefix(prefix).split(".")[1] for name in weights if name.startswith(prefix + ".")})


# -- files -------------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, and whether it is a TorchScript archive, as only OpenAI's own files are.

    safetensors; a state dict or a training checkpoint of OpenCLIP, read without running anything that is in it; or
    OpenAI's archives, of which only PyTorch's own reader knows the way to the tensors. `ProjectError` for another file.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)[0], False
    is_archive = _is_torchscript(path)
    try:
        if is_archive:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is out of fashion, and these files are what they are
                return torch.jit.load(path, map_location="cpu").state_dict(), True
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise ProjectError(f"weights {path} cannot be read: {str(error).splitlines()[0]}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, False


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def read_activation(config: Path | None, is_openai: bool, weights: Path) -> Activation:
    """The activation that the weights were trained with. `ProjectError` where nothing says it."""
    if is_openai:
        return "quick_gelu"
    facts: dict[str, Any] = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    if "model_cfg" not in facts and "vision_config" not in facts:  # timm's own config.json says nothing of it either
        raise ProjectError(
            f"nothing beside {weights} says whether it was trained with QuickGELU; put its {CONFIG_FILES[0]} or "
            f"{CONFIG_FILES[1]} there, or say activation=quick_gelu (OpenAI's weights) or gelu (most of OpenCLIP's)"
        )
    if "model_cfg" in facts:  # OpenCLIP
        return "quick_gelu" if facts["model_cfg"].get("quick_gelu", False) else "gelu"
    name = (facts.get("vision_config") or {}).get("hidden_act", "quick_gelu")  # the default of transformers' CLIPConfig
    known: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise ProjectError(f"{config}: the activation {name} is not known here, only {', '.join(known)}")
    return known[name]


def find_weights(name: str) -> tuple[Path, Path | None]:
    """The weights and the config that a file, a folder or a Hub id stands for. `ProjectError` where there are none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path, _first(path.parent, CONFIG_FILES)
    if path.is_dir():
        weights = _first(path, WEIGHT_FILES)
        if weights is None:
            raise ProjectError(f"{path} holds none of {', '.join(WEIGHT_FILES)}")
        return weights, _first(path, CONFIG_FILES)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        weights = _from_hub(name, WEIGHT_FILES)
        if weights is not None:
            return weights, _from_hub(name, CONFIG_FILES)
        raise ProjectError(
            f"no weights {name}: neither a file or folder here, nor to be had from the Hugging Face Hub; download "
            f"https://huggingface.co/{name} to a folder and name that"
        )
    raise ProjectError(f"no weights {name}: neither a file nor a folder, and no id on the Hugging Face Hub")


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _from_hub(repository: str, names: tuple[str, ...]) -> Path | None:
    """The first of these files that the Hub or its cache has."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise ProjectError(f"{repository} is on the Hugging Face Hub: pip install huggingface_hub") from None
    offline = False
    for name in names:
        for local in (True, False):  # what is in the cache needs no network
            if offline and not local:
                continue
            try:
                return Path(hf_hub_download(repository, name, local_files_only=local))
            except LocalEntryNotFoundError:
                offline = offline or not local  # the Hub does not answer: do not wait for it again
            except (OSError, ValueError):  # no such file, no such repository, not a name of one
                continue
    return None
