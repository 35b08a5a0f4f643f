"""Every setting of the lora project, with its default and its unit. YAML files override these, `key=value` overrides
both.

This module imports nothing heavy, so that a mistake in a config is reported before PyTorch has loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from common.config import BaseConfig, require
from lora.settings import AdapterConfig

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PRETRAINED_HERE = "pretrain"  # model.name: a small base of this run's own, trained by lora.pretrain
FILES = ("json", "csv")  # datasets that need data.path
CLASSIFICATION = ("sst2", "cola", "csv")


@dataclass(frozen=True)
class DataConfig:
    """Which examples, and how they become tokens."""

    # text to text: e2e, webnlg, gsm8k, squad, alpaca, dolly, slots (made here, needs no download), json; text to label:
    # sst2, cola, csv
    dataset: Literal["e2e", "webnlg", "gsm8k", "squad", "alpaca", "dolly", "slots", "json", "sst2", "cola", "csv"] = (
        "e2e"
    )
    # dataset=json: a JSON or JSONL file, or a dataset's id on the Hub; csv: a file. In data_root or here, or absolute
    path: str = ""
    prompt_column: str = "instruction"  # json: what is asked
    input_column: str = "input"  # json: what it is asked of; may be missing or empty
    completion_column: str = "output"  # json: the answer to learn
    text_column: str = "text"  # csv: what is classified
    label_column: str = "label"  # csv: its class
    # plain: prompt, newline, answer; alpaca: the headings of Stanford Alpaca; chat: the model's own chat template
    template: Literal["plain", "alpaca", "chat"] = "plain"
    system: str = ""  # template=chat: the system message; empty leaves what the template has by itself
    max_length: int = 256  # tokens of a row; longer examples are left out and counted
    pack: bool = True  # several examples a row, none of which sees the others
    validation: float = 0.05  # share kept for choosing, where the dataset has no such part of its own
    test: float = 0.05  # share kept for reporting, where the dataset has no such part of its own
    max_examples: int = 0  # train on only N examples, drawn by seed; 0 = all

    def __post_init__(self) -> None:
        require(self.dataset not in FILES or self.path, "data.path", f"is needed for data.dataset={self.dataset}")
        require(self.max_length >= 8, "data.max_length", "must be at least 8 tokens")
        require(self.max_examples >= 0, "data.max_examples", "must not be negative")
        for name in ("validation", "test"):
            require(0 < getattr(self, name) < 0.5, f"data.{name}", "must be above 0 and below 0.5")
        require(not self.system or self.template == "chat", "data.system", "does nothing without data.template=chat")


@dataclass(frozen=True)
class ModelConfig:
    """The base."""

    # a Hub id, a folder, a GGUF file; or `pretrain`, a small one trained first, in the run's own folder
    name: str = SMOLLM
    # ours: lora/model/llama.py, for LLaMA's architecture; transformers: any architecture that it knows
    code: Literal["ours", "transformers"] = "ours"
    # the type of the frozen weights; auto: bfloat16 or float16 where the run computes in it, else float32
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Literal["none", "nf4"] = "none"  # nf4: 4-bit linear layers (QLoRA), quantised one by one as they load
    double_quant: bool = True  # nf4: quantise the scales, too: 4.13 bits a number instead of 4.5
    # classification: mean of the last layer over the text's tokens, or whatever head transformers gives the model
    pooling: Literal["mean", "model"] = "mean"
    # classification: share of the encoder's numbers that are dropped while it learns; -1: as its own config says
    dropout: float = -1.0

    def __post_init__(self) -> None:
        require(self.name, "model.name", "must name a model")
        require(self.dropout == -1 or 0 <= self.dropout < 1, "model.dropout", "must be in [0, 1), or -1")
        require(
            self.name != PRETRAINED_HERE or self.quantize == "none",
            "model.quantize",
            "a model of a few thousand weights a layer gains nothing by it: leave it none for model.name=pretrain",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    # lora: adapters on a frozen base; full: every weight; head: of a classifier only the new last layer
    method: Literal["lora", "full", "head"] = "lora"
    steps: int = 1000  # updates
    batch_size: int = 16  # rows a step over all processes together
    microbatch: int = 0  # rows at once; less memory, the same sum of gradients; 0 = all of the step's
    lr: float = 2e-4  # learning rate of AdamW, after the warm-up
    warmup: int = 50  # steps; at most a tenth of train.steps is used
    decay: Literal["constant", "linear", "cosine"] = "linear"  # shape after the warm-up; linear and cosine end at zero
    weight_decay: float = 0.0  # of AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of AdamW's two moments
    grad_clip: float = 1.0  # global norm; 0 = off
    # adamw8bit, paged_adamw8bit: moments in 8 bits, the latter swapped out of a full GPU (pip install bitsandbytes)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    # chunked: logits of a few tokens at a time; torch: F.linear_cross_entropy; full: all logits at once
    loss: Literal["chunked", "torch", "full"] = "chunked"
    loss_chunk: int = 1024  # loss=chunked: tokens whose logits exist at once
    checkpointing: bool = False  # keep only what enters each layer, compute the rest again: slower, far less memory
    # several processes: each holds the whole model (none), or a part of each layer (fsdp)
    sharding: Literal["none", "fsdp"] = "none"
    log_every: int = 10  # steps
    save_every: int = 500  # steps between checkpoints
    validate_every: int = 250  # steps between readings of the validation loss; 0 = never
    validate_examples: int = 200  # drawn by seed from the validation part

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "loss_chunk", "log_every", "save_every", "validate_examples"):
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("microbatch", "warmup", "weight_decay", "grad_clip", "validate_every"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        require(0 < self.lr < math.inf, "train.lr", "must be positive and finite")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", "must be in [0, 1)")
        require(self.microbatch <= self.batch_size, "train.microbatch", "must be at most train.batch_size")


@dataclass(frozen=True)
class PretrainConfig:
    """The small base of model.name=pretrain, and what `lora.pretrain` trains."""

    # a text file, in data_root or here, or absolute; `generated`: sentences made here
    text: str = "generated"
    sentences: int = 6_000  # text=generated: how many
    vocab_size: int = 512  # of the byte-pair tokenizer, trained on the same text
    width: int = 96  # of the residual stream
    layers: int = 2  # each with attention and a gated layer
    heads: int = 4  # query heads
    kv_heads: int = 2  # key and value heads, each shared by heads / kv_heads query heads
    mlp_width: int = 192  # of the gated layer
    context: int = 64  # tokens a row
    steps: int = 800  # updates
    batch_size: int = 12  # rows a step
    lr: float = 5e-3  # peak learning rate of AdamW
    out: str = ""  # folder to write to (--out); default base/ in the run folder

    def __post_init__(self) -> None:
        for name in ("sentences", "width", "layers", "heads", "kv_heads", "mlp_width", "steps", "batch_size"):
            require(getattr(self, name) >= 1, f"pretrain.{name}", "must be at least 1")
        require(self.vocab_size >= 260, "pretrain.vocab_size", "must be at least 260: 256 bytes and the special tokens")
        require(self.context >= 16, "pretrain.context", "must be at least 16 tokens")
        require(self.width % (2 * self.heads) == 0, "pretrain.width", "must be an even number of times pretrain.heads")
        require(self.heads % self.kv_heads == 0, "pretrain.kv_heads", "must divide pretrain.heads")
        require(0 < self.lr < math.inf, "pretrain.lr", "must be positive and finite")


@dataclass(frozen=True)
class GenerateConfig:
    """How answers are written, by `lora.generate` and `lora.eval`."""

    max_tokens: int = 128  # at most so many new ones
    beams: int = 1  # candidates kept by beam search; 1 = greedy, or sampling
    length_penalty: float = 1.0  # beams: log-probability is divided by length to this power; above 1: longer answers
    temperature: float = 0.0  # 0 = the most probable token each time
    top_p: float = 1.0  # sample from the most probable tokens that have this much probability together
    top_k: int = 0  # sample from so many most probable tokens; 0 = all
    batch_size: int = 32  # prompts at once
    # lora.generate: an adapter in PEFT's format, a folder or Hub id, instead of the run's own; `none` = the base
    adapter: str = ""
    out: str = ""  # lora.generate: also write prompts and answers to this file, JSON lines (--out)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beams", "batch_size"):
            require(getattr(self, name) >= 1, f"generate.{name}", "must be at least 1")
        require(0 <= self.temperature < math.inf, "generate.temperature", "must not be negative")
        require(0 < self.top_p <= 1, "generate.top_p", "must be in (0, 1]")
        require(self.top_k >= 0, "generate.top_k", "must not be negative")
        require(math.isfinite(self.length_penalty), "generate.length_penalty", "must be finite")
        require(self.beams == 1 or self.temperature == 0, "generate.beams", "beam search draws nothing: temperature=0")


@dataclass(frozen=True)
class EvalConfig:
    """What `lora.eval` measures."""

    split: Literal["test", "validation"] = "test"  # validation: to choose; test: to report, once
    num_examples: int = 0  # of the split, drawn by seed; 0 = all
    base: bool = True  # also measure the base, without adapters
    shots: int = 0  # worked training examples in the base's prompts; it has never seen the task otherwise
    generate: bool = True  # also write answers and score them (text to text); else only the loss
    # perplexity before and after of text that has nothing to do with the task: what was forgotten. A file, in
    # data_root or here, or absolute; empty = do not measure
    general_text: str = ""
    general_tokens: int = 20_000  # tokens of it, from its beginning
    resamples: int = 1000  # of the bootstrap
    batch_size: int = 16  # rows at once for losses and classes

    def __post_init__(self) -> None:
        for name in ("num_examples", "shots"):
            require(getattr(self, name) >= 0, f"eval.{name}", "must not be negative")
        for name in ("general_tokens", "resamples", "batch_size"):
            require(getattr(self, name) >= 1, f"eval.{name}", "must be at least 1")


@dataclass(frozen=True)
class ClassifyConfig:
    """What `lora.classify` reads and writes."""

    file: str = ""  # a CSV with a column data.text_column, found as data.path is (--file)
    out: str = ""  # also write every text with its class and probability to this CSV (--out)


@dataclass(frozen=True)
class MergeConfig:
    """What `lora.merge` writes."""

    out: str = ""  # folder to write to (--out); default merged/ in the run folder
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the written weights
    untie: bool = False  # write embedding and head apart where the adapter changes only one of the two


@dataclass(frozen=True)
class ManyConfig:
    """How `lora.many` picks the adapter for a prompt."""

    runs: tuple[str, ...] = ()  # folders of other runs on the same base, beside that of --run
    encoder: str = MINILM  # embeds prompts: a Hub id or a folder of a sentence encoder, whose states are averaged
    prompts: int = 200  # training prompts of each run that its centre is the mean of
    held_out: int = 100  # validation prompts of each run that say how far from it a prompt may be
    keep: float = 0.98  # share of a run's own prompts that are to count as known; the rest is answered by the base
    # measure instead of answering: route so many test prompts of each run, drawn by seed (--measure)
    measure: int = 0
    unknown: str = ""  # measure: also route the lines of this text, found as data.path is; they are the base's

    def __post_init__(self) -> None:
        require(self.encoder, "many.encoder", "must name a model")
        require(all(self.runs), "many.runs", "must not hold an empty name")
        for name in ("prompts", "held_out"):
            require(getattr(self, name) >= 1, f"many.{name}", "must be at least 1")
        require(self.measure >= 0, "many.measure", "must not be negative")
        require(0 < self.keep <= 1, "many.keep", "must be in (0, 1]")
        require(not self.unknown or self.measure, "many.unknown", "does nothing without many.measure")


@dataclass(frozen=True)
class PlanConfig:
    """What `lora.plan` answers."""

    device_memory: float = 0.0  # GiB of the device (--device-memory); 0 = do not compare

    def __post_init__(self) -> None:
        require(0 <= self.device_memory < math.inf, "plan.device_memory", "must not be negative")


@dataclass(frozen=True)
class Config(BaseConfig):
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    many: ManyConfig = field(default_factory=ManyConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def classifies(self) -> bool:
        """Whether examples have a class, and not an answer."""
        return self.data.dataset in CLASSIFICATION

    def __post_init__(self) -> None:
        full = self.train.method == "full"
        require(self.model.dropout == -1 or self.classifies, "model.dropout", "is of encoders that classify")
        require(self.train.method != "head" or self.classifies, "train.method", "head is for classification")
        require(
            not full or self.model.quantize == "none", "model.quantize", "4-bit weights cannot be trained themselves"
        )
        require(
            not self.classifies or self.model.name != PRETRAINED_HERE,
            "model.name",
            f"pretrain makes a language model; a classifier needs an encoder: {MINILM}",
        )
        require(
            not full or self.model.dtype != "bf16",
            "model.dtype",
            "full finetuning needs fp32 weights: the steps of the optimizer are lost in bf16",
        )
        require(
            self.train.sharding == "none" or self.model.quantize == "none",
            "train.sharding",
            "fsdp shards weights, and 4-bit codes are none: every process would hold them all; leave it none",
        )
        require(
            self.train.sharding == "none" or self.train.optimizer == "adamw",
            "train.optimizer",
            "8-bit moments do not know sharded weights: leave it adamw for train.sharding=fsdp",
        )
        require(
            self.train.sharding == "none" or self.train.method == "lora",
            "train.method",
            "fsdp is there for adapters on a large frozen base: leave it lora for train.sharding=fsdp",
        )
        require(
            self.train.sharding == "none" or not self.adapter.dora,
            "adapter.dora",
            "needs whole rows of the weights: leave it off for train.sharding=fsdp",
        )
        require(
            self.train.sharding == "none" or not self.compile,
            "compile",
            "is not done for train.sharding=fsdp: leave one of the two off",
        )
        if self.classifies:
            require(not self.eval.shots, "eval.shots", "does nothing for classification")
            require(not self.eval.general_text, "eval.general_text", "a classifier has no perplexity; leave it empty")
