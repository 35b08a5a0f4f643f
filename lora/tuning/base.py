"""A model as a config describes it, ready to train, or as a run has left it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import CheckpointError, load_chosen, weights_hash
from common.config import Options
from common.pretrained import find
from common.run import Run
from lora.adapters.inject import adapter_state, inject, load_adapter_state
from lora.config import PRETRAINED_HERE, Config
from lora.data import load_labelled, read_classes
from lora.model import load_classifier, load_language_model, load_tokenizer
from lora.model.load import DTYPES, find_head
from lora.settings import AdapterConfig

BASE = "base"  # folder of model.name=pretrain, in the run's
Say = Callable[[str], None]


@dataclass
class Base:
    """A frozen model and its tokenizer.

    Attributes:
        folder: of its files.
        dtype: of its weights.
        mark: a hash of what a run has learned; empty for the base as it comes.
        classes: names of what a classifier tells apart.
    """

    model: Any
    tokenizer: Any
    folder: Path
    dtype: torch.dtype
    mark: str = ""
    classes: Sequence[str] = ()


class Learned(nn.Module):
    """What of a model learns, as one part of a checkpoint; the frozen base is not written again and again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = [model]  # in a list: as a module of its own it would count as a part of this one

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that learn."""
        for name, parameter in self.whole[0].named_parameters(*args, **kwargs):
            if parameter.requires_grad:
                yield name, parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Their values by name."""
        return adapter_state(self.whole[0])

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Take such values over. `ProjectError` for other names or shapes."""
        load_adapter_state(self.whole[0], state_dict)


def weight_type(config: Config, amp: torch.dtype | None) -> torch.dtype:
    """The type of the base's weights: that of the computation where they are frozen, else float32."""
    if config.train.method == "full":
        return torch.get_default_dtype()
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    return amp or torch.get_default_dtype()


def base_folder(config: Config, say: Say) -> Path:
    """Where the base's files are."""
    if config.model.name == PRETRAINED_HERE:
        return Path(config.run_dir) / BASE
    return find(config.model.name, say)


def load_base(config: Config, run: Run, classes: Sequence[str] = ()) -> Base:
    """The base as it comes, frozen, on the run's device. `ProjectError` where it is missing or damaged.

    Args:
        classes: names of what a classifier's new head tells apart.
    """
    folder = base_folder(config, run.display.say)
    dtype = weight_type(config, run.machine.amp_dtype)
    # a model that is to be spread over devices need not fit one of them
    device = torch.device("cpu") if config.train.sharding == "fsdp" else run.device
    tokenizer = load_tokenizer(folder)
    if config.classifies:
        model = load_classifier(config.model, folder, classes, dtype, device, config.seed)
    else:
        model = load_language_model(config.model, folder, dtype, device)
    return Base(model, tokenizer, folder, dtype, classes=classes)


def prepare(base: Base, config: Config) -> AdapterConfig:
    """Say what learns: adapters, everything, or the head alone. Returns the adapters' settings as they are used."""
    settings = config.adapter
    if config.classifies and not settings.head:
        settings = with_head(settings, find_head(base.model))
    if config.train.method == "lora":
        inject(base.model, settings, config.seed)
        if config.classifies:
            base.model.get_submodule(settings.head[0]).float()
    elif config.train.method == "full":
        base.model.requires_grad_(True)
    else:
        base.model.get_submodule(settings.head[0]).requires_grad_(True)
    return settings


def with_head(settings: AdapterConfig, head: str) -> AdapterConfig:
    """A classifier's new last layer learns in full whatever else does."""
    return replace(settings, head=(head,))


def classes_of(config: Config, run: Run) -> tuple[str, ...]:
    """The classes of a classifier's run, from its folder; of an older run, from its training data."""
    if not config.classifies:
        return ()
    return read_classes(run.folder) or load_labelled(config.data, config.data_root, "train", run.display.say).classes


def load_tuned(config: Config, options: Options, run: Run) -> tuple[Base, int]:
    """The model of a run's newest whole checkpoint (or of `--checkpoint`), and the number of updates it has seen."""
    folder = run.folder / "checkpoints"
    state = load_chosen(folder, options.checkpoint)
    base = load_base(config, run, classes_of(config, run))
    prepare(base, config)
    learned = Learned(base.model)
    try:
        learned.load_state_dict(state["parts"]["learned"])
        step = int(state["step"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"the checkpoint in {folder} is not of this project") from None
    base.mark = weights_hash({name: value.cpu() for name, value in learned.state_dict().items()})
    base.model.eval().requires_grad_(False)
    return base, step
