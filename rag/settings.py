"""What a reader is, and how it is finetuned.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.config import require


@dataclass(frozen=True)
class ReaderConfig:
    """What reads passages and answers."""

    # generative: a language model writes the answer; extractive: an encoder marks where it stands (the model section)
    kind: Literal["generative", "extractive"] = "generative"
    # generative: a causal or seq2seq model of the Hugging Face Hub, a folder with one, or a .gguf file
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    backend: Literal["transformers", "llama.cpp"] = "transformers"  # llama.cpp: reads model as a .gguf file
    # auto: the run's own finetuned reader where there is one, else the model as it comes; base: as it comes; or the
    # folder of a finetuned one
    weights: str = "auto"
    style: Literal["completion", "chat"] = "completion"  # a text to go on with, or the model's own chat template
    examples: int = 3  # worked examples before the question, from training questions; a finetuned reader gets none
    passages: int = 3  # given to the reader, of those that were found
    order: Literal["best_first", "best_last"] = "best_first"  # best_last: nearest to the question
    passage_tokens: int = 256  # of one passage; the rest is left out
    context_tokens: int = 1500  # of all passages; the last that do not fit are left out
    answer_tokens: int = 32  # of an answer, with its citation; extractive: of a marked span
    abstain: str = "unknown"  # what a finetuned reader answers where the passages do not say
    # where an answer's source comes from. model: the reader writes [2] behind it; first: before it, so that it chooses
    # where to read and then reads; match: the first passage that has the answer's words; auto: model for a finetuned
    # reader, match for one that has not learned to cite
    cite: Literal["auto", "model", "first", "match"] = "auto"
    # control characters, chat tokens and delimiters inside passages are made harmless; off only to measure its worth
    neutralise: bool = True
    batch_tokens: int = 8192  # read at once, padding included
    threshold: float = -1.0  # answers of less confidence are withheld; below 0: as `rag.answer` has calibrated it

    def __post_init__(self) -> None:
        require(self.model, "reader.model", "must name a model")
        require(self.weights, "reader.weights", "must be auto, base or a folder")
        require(self.examples >= 0, "reader.examples", "must not be negative")
        for name in ("passages", "answer_tokens", "batch_tokens"):
            require(getattr(self, name) >= 1, f"reader.{name}", "must be at least 1")
        require(self.passages <= 99, "reader.passages", "must be at most 99")
        require(self.passage_tokens >= 16, "reader.passage_tokens", "must be at least 16")
        require(self.context_tokens >= 16, "reader.context_tokens", "must be at least 16")
        require(self.abstain.isalpha(), "reader.abstain", "must be one word")
        require(self.threshold <= 1, "reader.threshold", "must be at most 1: it is a probability")
        require(
            self.backend == "transformers" or self.kind == "generative", "reader.backend", "llama.cpp has no encoders"
        )


@dataclass(frozen=True)
class ReaderTrainConfig:
    """How `rag.train_reader` finetunes the reader."""

    # generative: a run with a finetuned reader, or that reader's folder, whose low-rank matrices training begins with,
    # such as one that has read many people's questions; empty: from the model as it comes
    start: str = ""
    steps: int = 600  # updates
    batch_size: int = 8  # contexts a step, each with several questions about the same passages
    questions: int = 4  # most questions of a context about its right passages
    further: int = 0  # most others, half of them about its other passages, half about such as are not shown
    fewest: int = 1  # least passages of a context
    passages: int = 2  # most of them: the right one and others that look alike
    # what finds the others. words: BM25, they are drawn from its best; search: the run's own trained search, its best,
    # as they will be shown to the reader
    others: Literal["words", "search"] = "words"
    depth: int = 20  # how many best ones
    unanswerable: float = 0.25  # share of contexts without the right passage, where the answer is reader.abstain
    window: int = 100  # words kept of a longer passage, drawn by seed around the answer; 0 = all
    lr: float = 3e-4  # learning rate of AdamW, after the warm-up
    warmup: int = 30  # steps; at most a tenth of the run is used
    decay: Literal["constant", "linear", "cosine"] = "linear"  # shape after the warm-up
    weight_decay: float = 0.0  # of the adapters' matrices
    grad_clip: float = 1.0  # global norm; 0 = off
    rank: int = 16  # generative: of the LoRA matrices (Hu et al. 2022), on every linear layer but the output
    alpha: float = 32.0  # generative: their product is scaled by alpha / rank
    dropout: float = 0.0  # generative: before them
    log_every: int = 10  # steps
    save_every: int = 100  # steps between checkpoints
    validate_every: int = 0  # steps between readings of validation EM and F1; 0 = never
    validation_questions: int = 64  # of a reading, drawn by seed

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "questions",
            "fewest",
            "passages",
            "depth",
            "rank",
            "log_every",
            "save_every",
        )
        for name in positive:
            require(getattr(self, name) >= 1, f"reader_train.{name}", "must be at least 1")
        for name in ("further", "warmup", "weight_decay", "grad_clip", "validate_every", "window"):
            require(getattr(self, name) >= 0, f"reader_train.{name}", "must not be negative")
        require(self.fewest <= self.passages, "reader_train.fewest", "must be at most reader_train.passages")
        require(0 < self.lr < math.inf, "reader_train.lr", "must be positive and finite")
        require(0 < self.alpha < math.inf, "reader_train.alpha", "must be positive and finite")
        require(0 <= self.dropout < 1, "reader_train.dropout", "must be in [0, 1)")
        require(0 <= self.unanswerable < 1, "reader_train.unanswerable", "must be in [0, 1)")
        require(self.window == 0 or self.window >= 20, "reader_train.window", "must be 0 or at least 20 words")
        require(self.validation_questions >= 1, "reader_train.validation_questions", "must be at least 1")
