"""A reader from its weights: a language model as it comes, or with the adapter that `rag.train_reader` has trained."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import ConfigError, resolve
from common.errors import ProjectError, first_line
from common.pretrained import find
from rag.config import Config
from rag.reader.decode import Causal, Decoder, Seq2Seq
from rag.reader.prompt import Example, Prompter
from rag.reader.reader import GenerativeReader, Reader, Track, stop_rules
from rag.settings import ReaderConfig

CALIBRATION = "calibration.json"  # of a run: the threshold of abstention that `rag.answer` has set
ADAPTER = "adapter"  # folder of a finetuned reader's run, in peft's format
MARKER = "reader.safetensors"  # file of a finetuned extractive reader
FOLDER = "reader"  # of a run, where its finetuned reader is
# settings that a finetuned reader was trained with and therefore is used with
TRAINED = ("kind", "model", "style", "abstain", "cite", "neutralise")
UNLIMITED = 4096  # tokens, for models that name no limit


def find_reader(config: Config) -> Path | None:
    """The run folder of the finetuned reader that reader.weights means; None for the model as it comes.
    `ConfigError` for a folder without one.
    """
    if config.reader.weights == "base":
        return None
    auto = config.reader.weights == "auto"
    folder = Path(config.run_dir) if auto else Path(config.reader.weights).expanduser()
    found = reader_in(folder)
    if found is None and not auto:
        raise ConfigError("reader.weights", f"{folder} holds no finetuned reader; run rag.train_reader, or use base")
    return found


def reader_in(folder: Path) -> Path | None:
    """Where in a run's folder, or a reader's, its finetuned reader is; None if there is none."""
    for path in (folder / FOLDER, folder):
        if (path / ADAPTER / "adapter_config.json").is_file() or (path / MARKER).is_file():
            return path
    return None


def adapter_of(name: str) -> Path:
    """The adapter's folder that reader_train.start means. `ConfigError` where there is none."""
    folder = reader_in(Path(name).expanduser())
    if folder is None or not (folder / ADAPTER).is_dir():
        raise ConfigError("reader_train.start", f"{name} holds no finetuned language model; run rag.train_reader")
    return folder / ADAPTER


def read_adapter(name: str) -> dict[str, Tensor]:
    """The low-rank matrices that reader_train.start means. `ConfigError` where there are none."""
    folder = adapter_of(name)
    with quiet_peft():
        from peft.utils import load_peft_weights
    try:
        with quiet_peft():
            matrices: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        raise ProjectError(f"the adapter in {folder} cannot be read: {first_line(error)}") from None
    return matrices


def as_trained(config: Config, folder: Path | None) -> Config:
    """The config with those settings of its reader that the one in the folder was trained with; and, for an extractive
    one, its encoder.
    """
    if folder is None:
        return config
    try:
        before = resolve(Config, folder / "config.yaml")
    except ConfigError as error:
        raise ProjectError(f"the config of the finetuned reader cannot be read: {error}") from None
    kept = {name: getattr(before.reader, name) for name in TRAINED}
    kept["cite"] = citing(before.reader, finetuned=True).cite
    config = replace(config, reader=replace(config.reader, examples=0, **kept))
    return replace(config, model=before.model) if before.reader.kind == "extractive" else config


def open_reader(
    config: Config, device: torch.device, dtype: torch.dtype, examples: Sequence[Example] = (), track: Track = iter
) -> tuple[Reader, str]:
    """The reader that a config means, and how to call it in a result.

    Args:
        dtype: of the weights.
        examples: worked ones; a finetuned reader gets none.
    """
    folder = find_reader(config)
    config = as_trained(config, folder)
    if config.reader.kind == "extractive":
        from rag.reader.extractive import load_extractive

        if folder is None:
            raise ProjectError("an extractive reader has to be trained first: python -m rag.train_reader")
        return load_extractive(config, folder, device, track), f"extractive, {config.model.name}"
    config = replace(config, reader=citing(config.reader, folder is not None))
    shown = list(examples[: config.reader.examples])
    if config.reader.backend == "llama.cpp":
        if folder is not None:
            raise ConfigError("reader.weights", "must be base: llama.cpp does not read the finetuned reader's adapter")
        from rag.reader.llama import open_llama

        return open_llama(config.reader, shown), f"{config.reader.model}, llama.cpp, {len(shown)} examples"
    model, tokenizer = load_base(config.reader.model, torch.float32 if folder else dtype)
    name = f"{config.reader.model}, {len(shown)} examples"
    if folder is not None:
        model = merge(model, folder / ADAPTER)
        name = f"{config.reader.model}, finetuned"
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return build_reader(config.reader, model, tokenizer, shown, track), name


def citing(config: ReaderConfig, finetuned: bool) -> ReaderConfig:
    """The config with reader.cite=auto decided: only a reader that was trained to cite is asked to."""
    return replace(config, cite="model" if finetuned else "match") if config.cite == "auto" else config


def build_reader(
    config: ReaderConfig, model: Any, tokenizer: Any, examples: Sequence[Example] = (), track: Track = iter
) -> GenerativeReader:
    """A reader around a model and its tokenizer."""
    prompter = Prompter(tokenizer, config, longest_of(model.config), examples)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    rules = stop_rules(tokenizer, config, prompter.lead, pad, ends)
    decoder: Decoder = Seq2Seq(model) if model.config.is_encoder_decoder else Causal(model)
    return GenerativeReader(config, decoder, prompter, rules, track)


def load_base(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A language model of transformers and its tokenizer. `ProjectError` for what is none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging as wordy

    folder = find(name)
    wordy.disable_progress_bar()
    try:
        shape = AutoConfig.from_pretrained(folder)
        kind = AutoModelForSeq2SeqLM if shape.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ProjectError(f"{name} cannot be read as a language model: {first_line(error)}") from None
    finally:
        wordy.enable_progress_bar()
    if not tokenizer.is_fast:
        raise ProjectError(f"{name} has no fast tokenizer (tokenizer.json), which is needed to cut passages by tokens")
    return model, tokenizer


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings that peft causes: by asking for an attribute that transformers has renamed, and by loading
    bitsandbytes, which misses a kernel for 4-bit weights that nothing here has.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def merge(model: Any, adapter: Path) -> Any:
    """The model with the adapter's low-rank updates added to its weights."""
    try:
        with quiet_peft():
            from peft import PeftModel

            return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ProjectError(f"the adapter in {adapter} does not fit the model: {first_line(error)}") from None


def longest_of(shape: Any) -> int:
    """Tokens that a model reads and writes together, as its configuration has it."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(getattr(shape, name, None), int):
            return min(int(getattr(shape, name)), 1_000_000)
    return UNLIMITED
