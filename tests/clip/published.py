"""A small CLIP in the format in which OpenCLIP publishes weights, random, with a vocabulary of random merges beside it:
everything that `--weights` reads, without a download.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from clip.model.tokenizer import NUM_MERGES, byte_letters

VOCABULARY = 49_408
VIT = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 1}


def publish(folder: Path, quick_gelu: bool = False) -> dict[str, Tensor]:
    """Write weights, config and vocabulary; returns the weights under their published names."""
    import open_clip

    torch.manual_seed(0)
    state = open_clip.model.CLIP(16, VIT, TEXT, quick_gelu=quick_gelu).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": quick_gelu}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_vocabulary(folder / "merges.txt")
    return state


def write_vocabulary(path: Path) -> None:
    """As many merges as CLIP's, of two letters each."""
    pairs = itertools.islice(itertools.product(byte_letters(), repeat=2), NUM_MERGES)
    path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")
