"""A trained run, ready to embed a person's images and texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from clip.config import Config
from clip.model import CLIP
from clip.model.images import Preprocess
from clip.model.tokenizer import Tokenizer, trim
from clip.model.towers import Towers, build_towers
from common.checkpoint import UNFIT, CheckpointError, load_chosen, weights_hash
from common.config import UNUSABLE, explain, resolve
from common.errors import ProjectError
from common.runtime import choose_device, choose_precision

CPU_BATCH = 32  # images at once; the feature maps of 256 do not fit into a CPU's cache, and take 1.4 times as long

Items = TypeVar("Items", Tensor, Sequence[str], "Sequence[Image.Image] | Tensor")


@dataclass(frozen=True)
class Loaded:
    """What a run has learned.

    Attributes:
        model: in evaluation mode, on its device; of a pretrained tower only what is above the cut.
        preprocess: a picture -> uint8 (3, S, S), and `normalise` for a batch of those.
        step: updates that the weights have seen.
        weights_hash: SHA-256 of all weights, the locked ones included: names what was computed with them.
    """

    config: Config
    model: CLIP
    tokenizer: Tokenizer
    preprocess: Preprocess
    image_base: nn.Module | None
    text_base: nn.Module | None
    device: torch.device
    step: int
    weights_hash: str

    @property
    def towers(self) -> Towers:
        """The same as training has it."""
        return Towers(self.model, self.image_base, self.text_base, self.tokenizer, self.preprocess)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Pictures of any size, or uint8 (N, 3, H, W) -> float32 (N, E) of length 1, on the CPU."""
        parts = [torch.empty(0, self.model.config.embed_dim)]
        size = self.config.eval.batch_size
        if self.device.type == "cpu":
            size = min(size, CPU_BATCH)
        for chunk in in_chunks(images, size):
            if isinstance(chunk, Tensor):
                pixels = self.preprocess.batch(chunk)
            else:
                pixels = torch.stack([self.preprocess(image) for image in chunk])
            with self._autocast():
                x = self.preprocess.normalise(pixels.to(self.device))
                x = x if self.image_base is None else self.image_base(x)
                parts.append(self.model.encode_image(x).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts of any length, cut to the context -> float32 (N, E) of length 1, on the CPU."""
        parts = [torch.empty(0, self.model.config.embed_dim)]
        for chunk in in_chunks(texts, self.config.eval.batch_size):
            ids = self.tokenizer(chunk)
            if self.model.config.text.pool != "last":
                ids = trim(ids, self.tokenizer.end_id)
            with self._autocast():
                y = ids.to(self.device)
                y = y if self.text_base is None else self.text_base(y)
                parts.append(self.model.encode_text(y).float().cpu())
        return torch.cat(parts)

    def _autocast(self) -> torch.autocast:
        kind = choose_precision(self.config.precision, self.device)
        return torch.autocast(self.device.type, kind or torch.bfloat16, enabled=kind is not None)


def in_chunks(items: Items, size: int) -> Iterator[Items]:
    """Parts of `size` items, in order."""
    for i in range(0, len(items), size):
        part: Any = items[i : i + size]
        yield part


def load_run(folder: Path, checkpoint: str = "", device: str = "auto") -> Loaded:
    """The newest whole checkpoint of a run folder, with its averaged weights where train.ema is above 0.

    Args:
        checkpoint: another one: a file name in its checkpoints/, or a path.
        device: auto, cpu, cuda, cuda:1, mps.
    Raises:
        ProjectError: no run, no whole checkpoint, or pretrained weights that are not those it was trained with.
        ConfigError: a device that is not there.
    """
    path = folder / "config.yaml"
    try:
        config = resolve(Config, path, [], str(folder))
    except UNUSABLE as error:
        raise ProjectError(f"{folder} is no run of clip: {explain(error, Config, path)}") from None
    return load_model(config, folder, checkpoint, choose_device(device))


def load_model(config: Config, folder: Path, checkpoint: str, device: torch.device) -> Loaded:
    """`load_run` for a config that has been read already, such as one with other settings for evaluation."""
    checkpoints = folder / "checkpoints"
    state = load_chosen(checkpoints, checkpoint)
    towers = build_towers(config, start=False)
    try:
        parts = state["parts"]
        towers.model.load_state_dict(parts["ema"])
        noted = {"sha256": str(parts["locked"]["sha256"])}
        step = int(state["step"])
    except UNFIT:
        raise CheckpointError(f"the checkpoint in {checkpoints} is of another model than the config's") from None
    locked = Locked(towers)
    locked.load_state_dict(noted)
    return Loaded(
        config,
        towers.model.to(device).eval().requires_grad_(False),
        towers.tokenizer,
        towers.preprocess,
        None if towers.image_base is None else towers.image_base.to(device),
        None if towers.text_base is None else towers.text_base.to(device),
        device,
        step,
        weights_hash({name: t.cpu() for name, t in towers.model.state_dict().items()}, {"locked": locked.hash}),
    )


class Locked:
    """The locked weights of a run, of which its checkpoints hold no more than the hash."""

    def __init__(self, towers: Towers) -> None:
        self.hash = towers.locked_hash

    def state_dict(self) -> dict[str, str]:
        return {"sha256": self.hash}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """`ProjectError` where the weights found here are not those that the run was trained with."""
        if state["sha256"] != self.hash:
            raise ProjectError(
                "the pretrained weights found here are not those that this run was trained with; see "
                "model.image.weights and model.text.name in its config.yaml"
            )
