"""A model of LLaMA-2 7B's shape with random weights on this machine: quantised layer by layer, then one QLoRA step.

    python -m bench.lora_7b [--threads 2] [--tiny] [key=value ...]

The settings are those of `configs/qlora_llama7b_alpaca.yaml` but for the optimizer, which is AdamW in 32 bits: 8-bit
moments need a GPU. Each weight is drawn in bfloat16 as it is asked for, quantised, and forgotten, as if it were read
from a disk; then a row of `data.max_length` tokens goes forward and back, and the adapters take a step.

`memory_loaded` and `memory_step` are the largest resident memory of the process until then, in GiB, the libraries
themselves included (`memory_before`: before anything was loaded); `planned` is what `lora.plan` says of the same
config. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.rounds import circumstances, peak_memory, report
from common.config import resolve
from common.runtime import choose_device, choose_precision, use_threads
from lora.adapters.inject import inject, parameter_groups
from lora.adapters.quantize import load_quantized
from lora.config import Config
from lora.data import collate
from lora.data.templates import Tokens
from lora.loss import TuningLoss
from lora.model import Llama, LlamaShape, read_shape, set_checkpointing
from lora.plan import GIB, base_settings, make_plan
from lora.tuning import build_optimizer

CONFIG = "configs/qlora_llama7b_alpaca.yaml"
HERE = ["train.optimizer=adamw", "device=cpu", "train.batch_size=1", "train.microbatch=0"]
TINY_SHAPE = LlamaShape(512, 128, 3, 4, 2, 32, 256, 512)
DEVIATION = 0.02  # of the random weights


def parameters(shape: LlamaShape) -> list[tuple[str, Tensor]]:
    """Names and parameters without memory."""
    with torch.device("meta"):
        return list(Llama(shape).named_parameters())


def random_weights(shape: LlamaShape) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, each drawn when it is asked for."""
    rng = torch.Generator().manual_seed(0)
    for name, parameter in parameters(shape):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim == 1:
            yield name, weight.fill_(1.0)  # of a norm
        else:
            yield name, weight.normal_(0, DEVIATION, generator=rng)


def memory() -> float:
    """Largest resident memory of this process so far, GiB."""
    return round(peak_memory() / 1024, 3)


def measure(config: Config, shape: LlamaShape) -> dict[str, Any]:
    """Load, adapt, one step."""
    dtype = choose_precision(config.precision, choose_device(config.device)) or torch.float32
    found: dict[str, Any] = {"memory_before": memory()}
    start = time.perf_counter()
    model: Any = load_quantized(lambda: Llama(shape), random_weights(shape), dtype, "cpu", config.model.double_quant)
    found |= {"seconds_load": round(time.perf_counter() - start, 1), "memory_loaded": memory()}
    print(f"quantised: {found}", flush=True)

    inject(model, config.adapter, config.seed)
    if config.train.checkpointing:
        set_checkpointing(model)
    objective = TuningLoss(model.train(), config.train.loss, config.train.loss_chunk)
    optimizer = build_optimizer(parameter_groups(model, config.train.lr, config.adapter, 0.0), config.train)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocab_size, (config.data.max_length,), generator=rng).tolist()
    batch = collate([[Tokens(tokens[:1], tokens[1:])]])  # every token but the first is a label, as the plan assumes
    start = time.perf_counter()
    loss = objective(batch) / len(batch.labels)
    loss.backward()
    optimizer.step()
    found |= {
        "seconds_step": round(time.perf_counter() - start, 1),
        "memory_step": memory(),
        "loss": round(loss.item(), 3),
    }
    found["parameters"] = sum(parameter.numel() for _, parameter in parameters(shape))
    found["dtype"] = str(dtype).removeprefix("torch.")
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora_7b", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small shape: does everything run?")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the config")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    use_threads(args.threads)
    load = os.getloadavg()[0]
    config = resolve(Config, Path(CONFIG), [*HERE, *args.overrides])
    shape = TINY_SHAPE if args.tiny else read_shape(base_settings(config), config.model.name)
    result = {
        "bench": f"QLoRA, rank {config.adapter.rank}, a row of {config.data.max_length} tokens",
        **measure(config, shape),
        "planned": None if args.tiny else round(make_plan(config).peak / GIB, 3),
        "threads": args.threads,
        **circumstances(load, "torch", clock="wall time"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
