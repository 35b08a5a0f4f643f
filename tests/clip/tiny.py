"""Runs of the clip project that take a second, and small datasets in every format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from clip.config import Config
from common.config import Options, resolve
from common.run import Run
from tests.helpers import ROOT, status

TINY = [
    "data.scenes=64",
    "data.family=4",
    "data.workers=0",
    "model.embed_dim=16",
    "model.image.width=16",
    "model.image.heads=2",
    "model.image.patch=16",
    "model.image.layers=1",
    "model.image.dropout=0.1",
    "model.text.width=16",
    "model.text.heads=2",
    "model.text.layers=1",
    "train.batch_size=16",
    "train.steps=6",
    "train.log_every=1",
    "train.save_every=100",
    "train.eval_every=3",
    "train.ema=0.9",
    "eval.gallery=40",
    "precision=fp32",
    "device=cpu",
]


def tiny(run_dir: Path, *overrides: str) -> Config:
    """The demo's config, shrunk."""
    return resolve(Config, ROOT / "configs/clip_scenes_tiny.yaml", [*TINY, f"run_dir={run_dir}", *overrides])


def train(config: Config, **options: bool) -> int:
    """Run the training program in this process; its exit status."""
    from clip.train import train as program

    return status(program, config, Options("train", **options))


def evaluate(config: Config) -> int:
    """The same for the evaluation."""
    from clip.eval import main

    return status(main, config, Options("eval"))


def open_run(config: Config) -> Run:
    """A run that only computes."""
    return Run(config, Options("eval"))


def picture(number: int, side: int = 24) -> Image.Image:
    """A picture like no other."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8))


def write_karpathy(root: Path, count: int = 24, captions: int = 2, name: str = "flickr8k") -> Path:
    """A dataset in Karpathy's layout, a sixth of it val and a sixth test; returns its folder."""
    folder = root / name
    (folder / "images").mkdir(parents=True)
    images = []
    for i in range(count):
        picture(i).save(folder / f"images/{i:03d}.png")
        split = "val" if i % 6 == 4 else "test" if i % 6 == 5 else "train"
        sentences = [{"raw": f"picture {i} seen {k} times"} for k in range(captions)]
        images.append({"filename": f"{i:03d}.png", "split": split, "sentences": sentences})
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": images, "dataset": name}))
    return folder
