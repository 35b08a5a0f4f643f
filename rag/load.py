"""A model as a config describes it, or as a run has left it.

A run folder holds `encoder/`: the encoder's shape and tokenizer from the first moment on, and its weights once training
has ended, as transformers and sentence-transformers read them (`model.name=runs/rag_squad/encoder`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.checkpoint import CheckpointError, load_chosen, read_weights
from common.config import Options, resolve
from common.errors import ProjectError, first_line
from common.files import TEMPORARY
from common.run import Run
from rag.config import Config, ModelConfig
from rag.model.encoder import CrossEncoder, Encoder, Tokenizer, build_model, build_tokenizer, load_tokenizer
from rag.search.embed import Reranker

ENCODER = "encoder"


def open_tokenizer(config: Config, texts: Callable[[], list[str]], run: Run) -> Tokenizer:
    """The tokenizer of a training: that of the run folder where there is one, so that a resumed run has the same; else
    a new one, which the main process writes there.

    Args:
        texts: what model.name=scratch learns its word pieces from; asked only where it must.
    """
    folder = run.folder / ENCODER
    if run.is_main and not (folder / "tokenizer.json").is_file():
        learned = build_tokenizer(config.model, texts() if config.model.name == "scratch" else None)
        write_folder(folder, learned.save)
    if run.world > 1:
        torch.distributed.barrier(group=run.machine.control)
    return load_tokenizer(folder, config.model)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """A folder that is there whole or not at all; an earlier one is replaced."""
    temporary = folder.parent / f"{TEMPORARY}{os.getpid()}-{folder.name}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except OSError as error:
        raise ProjectError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_trained(config: Config, options: Options, run: Run) -> tuple[Encoder | CrossEncoder, Tokenizer, int]:
    """The model of a run's newest whole checkpoint (or of `--checkpoint`), its tokenizer, and the number of updates.
    Where training is not finished, a person is told.
    """
    folder = run.folder / "checkpoints"
    state = load_chosen(folder, options.checkpoint)
    tokenizer = load_tokenizer(run.folder / ENCODER, config.model)
    model = build_model(config.model, len(tokenizer.inner), weights=False)
    fill(model, state["parts"]["model"], folder)
    step = int(state["step"])
    if step < config.train.steps:
        run.display.say(f"note: the weights are of step {step} of {config.train.steps}: no finished training")
    return model.to(run.device).eval().requires_grad_(False), tokenizer, step


def fill(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load weights; `CheckpointError` where they are of another model."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError):
        raise CheckpointError(f"the weights in {source} are of another model than the config's model section") from None


def load_untrained(config: ModelConfig, device: torch.device) -> tuple[Encoder, Tokenizer]:
    """The bi-encoder that a training starts from."""
    config = replace(config, kind="bi_encoder")
    tokenizer = build_tokenizer(config)
    model = build_model(config, len(tokenizer.inner))
    assert isinstance(model, Encoder)
    return model.to(device).eval().requires_grad_(False), tokenizer


def read_run(folder: Path, device: torch.device) -> tuple[Encoder | CrossEncoder, Tokenizer, Config]:
    """The finished model of another run's folder, from its `model.safetensors`."""
    config = resolve(Config, folder / "config.yaml", [], str(folder))
    if not (folder / "model.safetensors").is_file():
        raise ProjectError(f"{folder} has no model.safetensors: its training is not finished")
    weights, _ = read_weights(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder / ENCODER, config.model)
    model = build_model(config.model, len(tokenizer.inner), weights=False)
    fill(model, weights, folder)
    return model.to(device).eval().requires_grad_(False), tokenizer, config


class Classifier(nn.Module):
    """A cross-encoder of the Hub, such as cross-encoder/ms-marco-MiniLM-L6-v2: a classifier with one class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T) -> (B, 1)."""
        logits: torch.Tensor = self.network(**tokens).logits
        return logits[:, :1].float()


def load_reranker(config: Config, run: Run) -> Reranker | None:
    """The cross-encoder that `rerank.model` names: a run folder of ours, or one of the Hub; None where it is empty."""
    name = config.rerank.model
    if not name:
        return None
    folder = Path(name).expanduser()
    model: nn.Module
    if (folder / "config.yaml").is_file():
        model, tokenizer, trained = read_run(folder, run.device)
        if trained.model.kind != "cross_encoder":
            raise ProjectError(f"rerank.model={name} is a bi-encoder; train one with model.kind=cross_encoder")
    else:
        from transformers import AutoModelForSequenceClassification

        from common.pretrained import find

        where = find(name)
        try:
            network = AutoModelForSequenceClassification.from_pretrained(where, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ProjectError(f"rerank.model={name} cannot be read: {first_line(error)}") from None
        if network.config.num_labels != 1:
            raise ProjectError(f"rerank.model={name} has {network.config.num_labels} classes and not one score")
        model = Classifier(network).to(run.device).eval().requires_grad_(False)
        tokenizer = load_tokenizer(where, config.model)
    return Reranker(model, tokenizer, run.autocast, config.rerank.batch_size, run.track)
