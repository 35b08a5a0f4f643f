"""Our U-Net against diffusers' UNet2DModel: one training step, same weights, same batch.:

    python -m bench.diffusion --size small

First the two networks must agree in float32, on outputs and on the gradient of every parameter; otherwise nothing is
timed. Then each round times ours, the peer, and ours again, in one process: forward, mean squared error, backward and
AdamW. The ratio of a round compares the peer with the mean of ours before and after it, so that a drift of the machine
cancels; the second ours over the first is the A/A control, whose spread says which differences are noise. ratio > 1:
ours has the higher throughput.

Ours is timed in the memory format our training script gives it, channels_last on a GPU and the default on a CPU, where
PyTorch's bf16 GroupNorm is several times slower in channels_last; or as --memory-format says. The peer is timed in
both, and the ratio is against whichever of them is faster.
Peak memory comes from one fresh process a side: the growth of the resident set on a CPU, the allocator's peak on a GPU.
The last line of stdout is one JSON object: ratio, aa_ratio, ours and peer (images/s), memory_ratio (ours / peer), and
the circumstances.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bench.rounds import circumstances, peak_memory, quartiles
from diffusion.config import ModelConfig
from diffusion.model import Attention, ResidualBlock, Stage, UNet

SIZES = {  # dropout off: the two would draw different masks
    "tiny": ModelConfig(channels=32, multipliers=(1, 2), blocks=1, groups=8, attention=(4,), dropout=0.0),
    "small": ModelConfig(channels=64, multipliers=(1, 2, 2), dropout=0.0),
    "cifar": ModelConfig(dropout=0.0),
}
IMAGE_SIZE = {"tiny": 8, "small": 32, "cifar": 32}
BATCH = {"tiny": 2, "small": 16, "cifar": 4}
# float32, relative to the largest entry; a wrong padding or split of weights is off by far more than rounding
TOLERANCE = 1e-4
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
PEERS = {"peer": torch.contiguous_format, "peer_channels_last": torch.channels_last}


def build_peer(config: ModelConfig, image_size: int) -> nn.Module:
    """The UNet2DModel with the same architecture as UNet(config, image_size); the settings of google/ddpm-cifar10-32
    where they apply.

    Raises ValueError for what the peer does not have: patches, and its own Fourier features differ from ours.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise SystemExit("bench.diffusion compares with diffusers: pip install diffusers") from None
    if config.patch != 1 or config.time_embedding != "sinusoidal":
        raise ValueError("UNet2DModel has no equal of model.patch > 1 or model.time_embedding=fourier")
    levels = len(config.multipliers)
    attention = [image_size // 2**level in config.attention for level in range(levels)]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=config.head_channels or None,
        dropout=config.dropout,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=config.num_classes + 1 if config.num_classes else None,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
    )


def in_peer_names(net: UNet, value: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    """`value` of each of our parameters (its data, its gradient) under the peer's names, our fused matrices split
    into the peer's.
    """
    named: dict[str, torch.Tensor] = {}

    def put(name: str, module: nn.Module, part: slice = slice(None)) -> None:
        named[f"{name}.weight"] = value(module.weight)[part]
        if module.bias is not None:
            named[f"{name}.bias"] = value(module.bias)[part]

    def put_stage(name: str, stage: Stage) -> None:
        nonlocal start
        for i, (block, attention) in enumerate(zip(stage.blocks, stage.attention, strict=True)):
            put_block(f"{name}.resnets.{i}", block, slice(start, start + block.modulation_width))
            start += block.modulation_width
            if isinstance(attention, Attention):
                put_attention(f"{name}.attentions.{i}", attention)

    def put_block(name: str, block: ResidualBlock, rows: slice) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{name}.{part}", getattr(block, part))
        put(f"{name}.time_emb_proj", net.modulation, rows)
        if isinstance(block.shortcut, nn.Conv2d):
            put(f"{name}.conv_shortcut", block.shortcut)

    def put_attention(name: str, attention: Attention) -> None:
        put(f"{name}.group_norm", attention.norm)
        C = attention.out.in_features
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            put(f"{name}.{part}", attention.qkv, slice(i * C, (i + 1) * C))
        put(f"{name}.to_out.0", attention.out)

    put("conv_in", net.conv_in)
    put("time_embedding.linear_1", net.time_mlp[0])
    put("time_embedding.linear_2", net.time_mlp[2])
    if net.class_embedding is not None:
        named["class_embedding.weight"] = value(net.class_embedding.weight)
    start = 0  # first row of the next block in the fused matrix of all blocks
    for i, stage in enumerate(net.down):
        put_stage(f"down_blocks.{i}", stage)
        if stage.resample is not None:
            put(f"down_blocks.{i}.downsamplers.0.conv", stage.resample.conv)
    put_stage("mid_block", net.middle)
    for i, stage in enumerate(net.up):
        put_stage(f"up_blocks.{i}", stage)
        if stage.resample is not None:
            put(f"up_blocks.{i}.upsamplers.0.conv", stage.resample.conv)
    put("conv_norm_out", net.norm_out)
    put("conv_out", net.conv_out)
    return named


def build_pair(config: ModelConfig, image_size: int, seed: int = 0) -> tuple[UNet, nn.Module]:
    """Ours and the peer with equal random weights, none of them zero: a zero layer would hide every gradient behind
    it.
    """
    torch.manual_seed(seed)
    ours, peer = UNet(config, image_size), build_peer(config, image_size)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    peer.load_state_dict(in_peer_names(ours, lambda p: p.detach()))
    return ours, peer


def make_batch(config: ModelConfig, image_size: int, batch: int) -> dict[str, torch.Tensor]:
    """Random images (B, C, S, S), times (B,) in 0..999 and noise to be predicted, like a training step's."""
    rng = torch.Generator().manual_seed(1)
    shape = (batch, config.image_channels, image_size, image_size)
    return {
        "x": torch.randn(shape, generator=rng),
        "time": torch.randint(1000, (batch,), generator=rng).float(),
        "target": torch.randn(shape, generator=rng),
    }


def predict(net: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = net(batch["x"], batch["time"])
    return out if isinstance(out, torch.Tensor) else out.sample


def largest_difference(ours: UNet, peer: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of the outputs, and of the gradients of any parameter, as a share of the largest entry of
    the peer's.
    """
    outputs = []
    for net in (ours, peer):
        net.zero_grad(set_to_none=True)
        outputs.append(predict(net, batch))
        F.mse_loss(outputs[-1], batch["target"]).backward()
    peer_grads = {name: p.grad for name, p in peer.named_parameters()}
    scale = max(g.abs().max() for g in peer_grads.values())
    worst = 0.0
    for name, grad in in_peer_names(ours, lambda p: p.grad).items():
        # The gradient of a key's bias is zero in theory (softmax ignores a constant), rounding in practice: hence the
        # second term.
        worst = max(worst, float((grad - peer_grads[name]).abs().max() / (peer_grads[name].abs().max() + 1e-4 * scale)))
    a, b = (out.detach() for out in outputs)
    return {"output": float((a - b).abs().max() / b.abs().max()), "gradient": worst}


class Side:
    """A network with its optimizer and memory format, and the training step that is timed."""

    def __init__(self, net: nn.Module, memory_format: torch.memory_format, args: argparse.Namespace):
        self.net = net.to(args.device, memory_format=memory_format).train()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)
        self.call = torch.compile(self.net) if args.compile else self.net
        self.args = args

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16"):
            out = predict(self.call, batch)
        F.mse_loss(out.float(), batch["target"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, batch: dict[str, torch.Tensor]) -> float:
        """Time of one step: wall time, or CPU time when it runs on one CPU thread, which other processes disturb
        less.
        """
        clock = time.process_time if self.args.device == "cpu" and self.args.threads == 1 else time.perf_counter
        synchronise(self.args.device)
        start = clock()
        self.step(batch)
        synchronise(self.args.device)
        return clock() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(sides: dict[str, Side], batch: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by side and round; `again` is ours a second time, at the end of the round."""
    for side in sides.values():
        for _ in range(2):  # warm-up: compilation, the optimizer's state, the choice of kernels
            side.step(batch)
    times: dict[str, list[float]] = {name: [] for name in (*sides, "again")}
    for index in range(rounds):
        for name, seconds in times.items():
            seconds.append(sides["ours" if name == "again" else name].seconds(batch))
        print(
            f"round {index + 1}/{rounds}  " + "  ".join(f"{name} {t[-1]:.3f} s" for name, t in times.items()),
            flush=True,
        )
    return times


def summarise(times: dict[str, list[float]], batch_size: int) -> dict[str, object]:
    """Median of the per-round ratios, with quartiles, against the peer's faster memory format; and the A/A control."""
    ours = [(a + b) / 2 for a, b in zip(times["ours"], times["again"], strict=True)]
    fastest = min(PEERS, key=lambda name: statistics.median(times[name]))
    ratios = [peer / own for peer, own in zip(times[fastest], ours, strict=True)]
    control = [again / first for again, first in zip(times["again"], times["ours"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratio_iqr": quartiles(ratios),
        "aa_ratio": round(statistics.median(control), 4),
        "aa_iqr": quartiles(control),
        "ours": round(batch_size / statistics.median(ours), 3),
        "peer": round(batch_size / statistics.median(times[fastest]), 3),
        "unit": "images/s",
        "peer_format": fastest,
        "all": {name: round(batch_size / statistics.median(values), 3) for name, values in times.items()},
    }


def memory_of(args: argparse.Namespace) -> float:
    """Peak memory in MiB of a few training steps of `args.memory_of`, alone in this process."""
    config, image_size = SIZES[args.size], IMAGE_SIZE[args.size]
    batch = {k: v.to(args.device) for k, v in make_batch(config, image_size, args.batch).items()}
    ours, peer = build_pair(config, image_size)
    net = ours if args.memory_of == "ours" else peer
    del ours, peer
    memory_format = FORMATS[args.memory_format] if args.memory_of == "ours" else PEERS[args.memory_of]
    before = current_rss()
    side = Side(net, memory_format, args)
    for _ in range(3):
        side.step(batch)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory() - before


def current_rss() -> float:
    """Resident memory of this process, MiB (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure_memory(name: str, argv: list[str]) -> float:
    command = [sys.executable, "-m", "bench.diffusion", *argv, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the memory measurement of {name} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training step of our U-Net against diffusers' UNet2DModel.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=0, help="images a step; 0 = the size's own")
    parser.add_argument(
        "--memory-format", choices=FORMATS, help="of ours; default: as common.run chooses for the device"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    # used by the program on itself
    parser.add_argument("--memory-of", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.batch = args.batch or BATCH[args.size]
    args.memory_format = args.memory_format or ("channels_last" if args.device == "cuda" else "contiguous")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of(args))
        return

    config, image_size = SIZES[args.size], IMAGE_SIZE[args.size]
    batch = make_batch(config, image_size, args.batch)
    ours, peer = build_pair(config, image_size)
    differences = largest_difference(ours, peer, batch)
    print(f"largest relative difference in float32: {differences}")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"ours and the peer differ by more than {TOLERANCE}: nothing was timed")

    load = os.getloadavg()[0]
    sides = {"ours": Side(ours, FORMATS[args.memory_format], args)}
    sides |= {name: Side(copy.deepcopy(peer), memory_format, args) for name, memory_format in PEERS.items()}
    result = summarise(interleave(sides, {k: v.to(args.device) for k, v in batch.items()}, args.rounds), args.batch)
    memory = {name: measure_memory(name, argv) for name in ("ours", result["peer_format"])}
    result["memory_ratio"] = round(memory["ours"] / memory[result["peer_format"]], 4)
    result["memory_mib"] = {name: round(mib) for name, mib in memory.items()}
    clock = "cpu time" if args.device == "cpu" and args.threads == 1 else "wall time"
    result |= {
        "size": args.size,
        "precision": args.precision,
        "compile": args.compile,
        "memory_format": args.memory_format,
        "batch": args.batch,
        "rounds": args.rounds,
        "threads": args.threads,
        "difference": differences,
        **circumstances(load, "torch", "diffusers", clock=clock),
    }
    if args.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
