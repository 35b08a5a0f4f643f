"""Averaged weights as a few small files, and back: the parts `pack` and `unpack` of bench.gpu.diffusion.

For machines that hand back only a few files of limited size. Weights only: the training state of
configs/edm_cifar_cond.yaml (weights, average, two moments in float32) is 0.6 GB, more than eight such files hold;
training goes on where its checkpoints are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load, save

from bench.gpu.campaign import read_json
from common.checkpoint import CheckpointError, Checkpoints
from common.config import resolve
from common.errors import ProjectError
from common.files import atomic_open, sha256, write_json, write_text
from diffusion.config import Config
from diffusion.model import UNet

SHARD_BYTES, FILES = 15 * 2**20, 8  # of a file at most, and files at most, the manifest among them
MANIFEST = "manifest.json"


def pack(run: Path, folder: Path, dtype: str = "bf16", shard_bytes: int = SHARD_BYTES) -> bool:
    """Write the averaged weights of a run's newest checkpoint to `folder`: weights-1-of-N.bin, ... and manifest.json,
    last.

    The shards are one safetensors file, cut. In "bf16" tensors of one dimension (norms, biases) stay float32: they are
    small, and rounding them would cost most. `ProjectError` where there is no checkpoint, or it does not fit into eight
    files.
    """
    state = Checkpoints(run / "checkpoints").load_newest()
    if state is None:
        raise CheckpointError(f"no whole checkpoint in {run}/checkpoints")
    weights = {
        name: value.to(torch.bfloat16 if dtype == "bf16" and value.ndim > 1 else torch.float32).contiguous()
        for name, value in state["parts"]["ema"].items()
    }
    data = save(weights)
    pieces = [data[start : start + shard_bytes] for start in range(0, len(data), shard_bytes)]
    if len(pieces) > FILES - 1:
        raise ProjectError(
            f"{dtype} weights are {len(data) / 2**20:.0f} MiB, more than {FILES - 1} files of "
            f"{shard_bytes / 2**20:.0f} MiB" + ("; use --dtype bf16" if dtype == "fp32" else "")
        )
    if folder.is_dir():
        for old in (folder / MANIFEST, *folder.glob("weights-*-of-*.bin")):
            old.unlink(missing_ok=True)
    shards = []
    for number, piece in enumerate(pieces, 1):
        path = folder / f"weights-{number}-of-{len(pieces)}.bin"
        with atomic_open(path) as file:
            file.write(piece)
        shards.append({"file": path.name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})
    write_json(
        folder / MANIFEST,
        {
            "step": state["step"],
            "weights": "ema",
            "dtype": dtype,
            "measured": state["parts"]["measured"],
            "config": state["config"],
            "shards": shards,
        },
    )
    print(f"{folder}: {len(pieces)} shards, {len(data) / 2**20:.1f} MiB, step {state['step']}")
    return True


def unpack(run: Path, folder: Path) -> bool:
    """Make a run folder of what `pack` wrote: one checkpoint that diffusion.eval and diffusion.sample read, and
    training does not.

    `ProjectError` where a shard is missing or damaged, or the run folder holds a run already.
    """
    manifest = read_json(folder / MANIFEST)
    if not manifest:
        raise ProjectError(f"no {MANIFEST} in {folder}")
    checkpoints = Checkpoints(run / "checkpoints")
    if checkpoints.list():
        raise ProjectError(f"{run} holds a run already; give another --work, or move it")
    for shard in manifest["shards"]:
        path = folder / Path(shard["file"]).name
        if not path.is_file() or sha256(path) != shard["sha256"]:
            raise ProjectError(f"{path} is missing or damaged: copy it again")
    weights = load(b"".join((folder / Path(shard["file"]).name).read_bytes() for shard in manifest["shards"]))
    weights = {name: value.float() for name, value in weights.items()}
    write_text(run / "config.yaml", manifest["config"])
    config = resolve(Config, run / "config.yaml")
    UNet(config.model, config.data.image_size).load_state_dict(weights)  # of this config's model, or it raises
    checkpoints.save(
        manifest["step"],
        {
            "step": manifest["step"],
            "config": manifest["config"],
            "parts": {"ema": weights, "measured": manifest["measured"]},
        },
    )
    print(f"{run}: step {manifest['step']}, {manifest['dtype']} weights, for evaluation only")
    return True
