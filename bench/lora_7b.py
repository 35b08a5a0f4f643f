"""A model of LLaMA-2 7B's shape with random weights on this machine: quantised layer by layer, then one QLoRA step.

    python -m bench.lora_7b [--threads 2] [--steps 1] [--tiny] [key=value ...]
    python -m bench.lora_7b --steps 20 device=cuda [train.optimizer=paged_adamw8bit]          # on a GPU

The settings are those of `configs/qlora_llama7b_alpaca.yaml` but for the optimizer, which is AdamW in 32 bits: 8-bit
moments need a GPU and bitsandbytes. Each weight is drawn in bfloat16 as it is asked for, quantised, and forgotten, as
if it were read from a disk; then `train.batch_size` rows of `data.max_length` tokens go forward and back, and the
adapters take a step, `--steps` times.

`memory_loaded` and `memory_step` are the most until then, in GiB: on a CPU resident memory, the libraries themselves
included (`memory_before`: before anything was loaded); on a GPU what PyTorch has allocated, and `memory_reserved` what
it holds. `planned` is what `lora.plan` says of the same config. `tokens_per_second` is over all steps but the first,
which warms up, unless it is the only one. The last line of stdout is one JSON object.
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
HERE = ["train.optimizer=adamw", "device=cpu", "train.batch_size=1", "train.microbatch=1"]
TINY_SHAPE = LlamaShape(512, 128, 3, 4, 2, 32, 256, 512)
DEVIATION = 0.02  # of the random weights


def parameters(shape: LlamaShape) -> list[tuple[str, Tensor]]:
    """Names and parameters without memory."""
    with torch.device("meta"):
        return list(Llama(shape).named_parameters())


def random_weights(shape: LlamaShape, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, each drawn when it is asked for."""
    rng = torch.Generator(device).manual_seed(0)
    for name, parameter in parameters(shape):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.ndim == 1:
            yield name, weight.fill_(1.0)  # of a norm
        else:
            yield name, weight.normal_(0, DEVIATION, generator=rng)


def memory(device: torch.device) -> float:
    """The most so far, GiB: resident memory of this process, or what PyTorch has allocated on a GPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / GIB, 3)
    return round(peak_memory() / 1024, 3)


def measure(config: Config, shape: LlamaShape, steps: int) -> dict[str, Any]:
    """Load, adapt, some steps."""
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device) or torch.float32
    found: dict[str, Any] = {"memory_before": memory(device)}
    start = time.perf_counter()
    weights = random_weights(shape, device)
    model: Any = load_quantized(lambda: Llama(shape), weights, dtype, device, config.model.double_quant)
    found |= {"seconds_load": round(time.perf_counter() - start, 1), "memory_loaded": memory(device)}
    print(f"quantised: {found}", flush=True)

    inject(model, config.adapter, config.seed)
    if config.train.checkpointing:
        set_checkpointing(model)
    objective = TuningLoss(model.train(), config.train.loss, config.train.loss_chunk)
    optimizer = build_optimizer(parameter_groups(model, config.train.lr, config.adapter, 0.0), config.train)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocab_size, (config.train.batch_size, config.data.max_length), generator=rng).tolist()
    # every token but a row's first is a label, as the plan assumes
    rows = [collate([[Tokens(row[:1], row[1:])]]).to(device) for row in tokens]
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for row in rows:
            part = objective(row) / (len(row.labels) * len(rows))
            part.backward()
            loss += part.item()  # waits for the device
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    timed = seconds[1:] or seconds
    found |= {
        "seconds_step": round(sum(timed) / len(timed), 4),
        "tokens_per_second": round(config.train.batch_size * config.data.max_length * len(timed) / sum(timed), 1),
        "memory_step": memory(device),
        "loss": round(loss, 3),
    }
    if device.type == "cuda":
        found["memory_reserved"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
        found["gpu"] = torch.cuda.get_device_name(device)
    found["parameters"] = sum(parameter.numel() for _, parameter in parameters(shape))
    found["dtype"] = str(dtype).removeprefix("torch.")
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora_7b", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="training steps")
    parser.add_argument("--tiny", action="store_true", help="a small shape: does everything run?")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the config")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    use_threads(args.threads)
    load = os.getloadavg()[0]
    config = resolve(Config, Path(CONFIG), [*HERE, *args.overrides])
    shape = TINY_SHAPE if args.tiny else read_shape(base_settings(config), config.model.name)
    size = f"{config.train.batch_size} x {config.data.max_length} tokens a step"
    result = {
        "bench": f"QLoRA, rank {config.adapter.rank}, {size}",
        **measure(config, shape, args.steps),
        "planned": None if args.tiny else round(make_plan(config).peak / GIB, 3),
        "threads": args.threads,
        **circumstances(load, "torch", clock="wall time"),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
