"""How fast a GPU trains the network of configs/edm_cifar_cond.yaml, by setting: the part `speed` of
bench.gpu.diffusion.

A step here is that of diffusion/train.py, built from the same functions: images as uint8 on the GPU, flips, noise,
loss, backward, clipping, AdamW, average.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu import campaign
from common.config import Options
from common.ema import EMA
from common.run import Run
from common.runtime import peak_flops
from diffusion.config import Config
from diffusion.data import load_images
from diffusion.images import Images, to_float
from diffusion.model import UNet
from diffusion.objectives import build_objective
from diffusion.train import drop_labels, random_flip, training_flops

# precision, channels_last, compiled, batch; the likely best first, in case the time is over
SETTINGS = (
    ("bf16", True, True, 512),
    ("bf16", True, False, 512),
    ("bf16", True, True, 1024),
    ("bf16", True, True, 256),
    ("bf16", False, True, 512),
    ("fp32", True, False, 512),
)  # fp32 on a GPU: matrix products in TF32
TINY_SETTINGS = (("bf16", False, False, 4), ("fp32", True, False, 8))
COMPILATION = 150.0  # seconds that a setting may need beside its steady steps
START = 25.0  # seconds of each command that train no image: imports, data, first step, last checkpoint
SHARE = 0.95  # of the rest that does, between checkpoints and sample grids
CHUNK = 10  # steps between two readings of the clock


def speed(args: argparse.Namespace, config: Config, budget: campaign.Budget, facts: dict[str, Any]) -> bool:
    """Measure the settings not measured yet, and say how many images fit into `--train-seconds`. False if the budget
    is over before.
    """
    kept, started = args.work / "speed.json", time.monotonic()
    wanted = (TINY_SETTINGS if args.tiny else SETTINGS)[: args.first]
    earlier = campaign.read_json(kept)
    same = earlier.get("facts", {}).get("machine") == facts["machine"]
    rows = [row for row in earlier["rows"] if "error" not in row] if same else []  # what failed is tried again
    known = {(row["precision"], row["channels_last"], row["compile"], row["batch"]) for row in rows}
    settings = [setting for setting in wanted if setting not in known]
    images = load_images(config.data, config.data_root) if settings else None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for setting in settings:
        if budget.over(args.seconds + (COMPILATION if setting[2] else 0 if args.tiny else 20)):
            break
        row, run = measure(setting, config, images, args.seconds)
        if run.signals.received:
            raise SystemExit(run.signals.exit_code)
        rows.append(row)
        campaign.write_result(kept, content(rows, config, args), facts, 0.0)  # kept at once; the seconds follow below
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if rows:
        seconds = campaign.spend(args.work, "speed", time.monotonic() - started if settings else 0.0)
        campaign.write_result(kept, content(rows, config, args), facts, seconds)
        campaign.write_result(args.out / "speed.json", content(rows, config, args), facts, seconds)
        campaign.print_table("training step", rows)
        print(content(rows, config, args)["advice"])
    return len(rows) >= len(wanted)


def measure(
    setting: tuple[str, bool, bool, int], config: Config, images: Images, seconds: float
) -> tuple[dict[str, Any], Run]:
    """One row: images a second over `seconds` of steady steps, and what they cost. A setting that fails is a row
    with its error.
    """
    precision, channels_last, compiled, batch = setting
    train = dataclasses.replace(config.train, batch_size=batch, microbatch=0)
    config = dataclasses.replace(config, precision=precision, compile=compiled, train=train)
    run = Run(config, Options("train"))
    run.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    row: dict[str, Any] = {"precision": precision, "channels_last": channels_last, "compile": compiled, "batch": batch}
    torch.compiler.reset()  # otherwise a second batch size would be compiled as a variable one
    gc.collect()  # the network before
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    try:
        row |= timed(training_step(config, images, run), run, seconds, batch)
    except Exception as error:  # a compiler or a kernel fails in its own way, and the other settings still count
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}, run
    peak = peak_flops(run.device)
    # of the bf16 peak, in fp32 too
    row["mfu"] = row["images_per_second"] * training_flops(config) / peak if peak else None
    row["memory_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30 if run.device.type == "cuda" else None
    return row, run


def training_step(config: Config, images: Images, run: Run) -> Callable[[int], torch.Tensor]:
    """A new network and its optimizer; the result makes step 1, 2, ... and returns its loss, on the device."""
    objective = build_objective(config.objective, images.draw(0).pixel_std())
    model = UNet(config.model, config.data.image_size).to(run.device, memory_format=run.memory_format)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.train.lr,
        betas=config.train.betas,
        weight_decay=config.train.weight_decay,
        fused=run.device.type != "mps",
    )
    ema, net = EMA(model, config.train.ema), run.prepare(model)
    batches = images.batches(1, config.train.batch_size, config.seed, run.device)

    def step(number: int) -> torch.Tensor:
        run.step, rng = number, run.generator(number)
        pixels, labels = next(batches)  # uint8 (B, C, H, W), int64 (B,), on the device
        x0 = random_flip(to_float(pixels), rng) if config.data.flip else to_float(pixels)
        noise = torch.randn(x0.shape, generator=rng, device=run.device)
        u = torch.rand(len(x0), generator=rng, device=run.device)
        labels = drop_labels(labels, config, rng)
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = objective.loss(net, x0.contiguous(memory_format=run.memory_format), labels, noise, u).mean()
        run.scaler.scale(loss).backward()
        run.check_gradients(optimizer, loss, config.train.grad_clip)
        run.scaler.step(optimizer)
        run.scaler.update()
        ema.update(model, number)
        return loss.detach()

    return step


def timed(step: Callable[[int], torch.Tensor], run: Run, seconds: float, batch: int) -> dict[str, float]:
    """Images a second of `step`. The first three steps, with the compilation, are apart; ends early after a stop
    signal.
    """
    start = time.perf_counter()
    for number in (1, 2, 3):
        loss = step(number)
    synchronise(run.device)
    first, number = time.perf_counter() - start, 3
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds and not run.signals.received:
        for _ in range(CHUNK):
            number += 1
            loss = step(number)
        synchronise(run.device)
    if not math.isfinite(float(loss)):
        raise ArithmeticError(f"the loss is {float(loss)} after {number} steps")
    return {"images_per_second": (number - 3) * batch / elapsed, "steps": number - 3, "first_steps_seconds": first}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def content(rows: list[dict[str, Any]], config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """The rows, the faster of the settings that `train` can take (compiled or not), and how many images it would
    train in a given time.
    """
    usable = [
        row
        for row in rows
        if "error" not in row
        and (args.tiny or (row["precision"], row["channels_last"]) == ("bf16", True))
        and (args.tiny or row["batch"] == config.train.batch_size)
    ]
    result: dict[str, Any] = {"rows": rows, "mfu_is": "of the dense bf16 peak, whatever the precision"}
    if not usable:
        return result | {"advice": "no setting that train can take was measured"}
    best = max(usable, key=lambda row: row["images_per_second"])
    commands = math.ceil(args.train_seconds / (60 * args.minutes))
    useful = SHARE * (args.train_seconds - commands * (START + best["first_steps_seconds"]))
    fits = max(0, int(useful * best["images_per_second"] / 1000)) * 1000
    advice = (
        f"in {args.train_seconds:g} s, {commands} command(s) of {args.minutes:g} minutes, about {fits:,} images "
        f"({best['images_per_second']:,.0f} a second, compile={str(best['compile']).lower()})"
    )
    return result | {
        "train": {"compile": best["compile"], "images_per_second": best["images_per_second"]},
        "fits": {"seconds": args.train_seconds, "images": fits},
        "advice": advice,
    }
