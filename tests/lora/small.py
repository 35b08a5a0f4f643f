"""A small LLaMA in the Hub's layout, in a folder, and runs on it; nothing is downloaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from common.config import Options, load, resolve
from lora.config import Config
from lora.data.slots import pretraining_text
from lora.model import Llama, LlamaShape, initialise, write_folder
from lora.pretrain import train_tokenizer
from tests.helpers import status

SHAPE = LlamaShape(
    vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48, context=256, tied=True
)
SETTINGS = [
    "data.dataset=slots",
    "data.max_length=128",
    "adapter.rank=4",
    "train.steps=4",
    "train.batch_size=4",
    "train.log_every=1",
    "train.save_every=100",
    "train.validate_every=0",
    "train.validate_examples=8",
    "generate.max_tokens=8",
    "eval.num_examples=6",
    "eval.resamples=50",
    "precision=fp32",
    "device=cpu",
]


def write_base(folder: Path, shape: LlamaShape = SHAPE, seed: int = 0) -> Path:
    """A model with random weights, larger than those it would start a training with, and its tokenizer."""
    tokenizer = train_tokenizer(pretraining_text(40, 0), shape.vocab_size)
    model = Llama(shape)
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms that differ from layer to layer
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            else:
                parameter *= 1.5
    write_folder(folder, model, tokenizer, torch.float32)
    return folder


def config_of(base: Path, run_dir: Path, *overrides: str) -> Config:
    """A run on that base."""
    return resolve(Config, None, [*SETTINGS, f"model.name={base}", f"run_dir={run_dir}", *overrides])


def train(base: Path, run_dir: Path, *overrides: str, **options: Any) -> int:
    """Train in this process; the exit status."""
    program = importlib.import_module("lora.train").train
    return status(program, config_of(base, run_dir, *overrides), Options("train", **options))


def call(program: str, run_dir: Path, *words: str, **kinds: Any) -> int:
    """Run another program of the project on a run's folder in this process; the exit status."""
    module = importlib.import_module(f"lora.{program}")
    config, options = load(Config, "lora", program, ["--run", str(run_dir), *words], **kinds)
    return status(module.main, config, options)
