"""Where and how a run computes: device, precision, processes, randomness."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import threadpoolctl
import torch
import torch.distributed as dist

from common.config import BaseConfig, ConfigError
from common.processes import JOINED
from common.signals import end_with_parent

PEAK_BF16_FLOPS = {  # dense bf16 tensor-core peak, FLOP/s, from NVIDIA's data sheets (SXM variants)
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Runtime:
    """The machine as one process of a run sees it.

    Attributes:
        device: where tensors live.
        amp_dtype: what autocast computes in; None = everything in float32.
        rank, world: this process among those that torchrun started; 0 and 1 without it.
        control: a gloo group for flags that must not touch the GPU's stream; None with one process.
    """

    device: torch.device
    amp_dtype: torch.dtype | None
    rank: int
    world: int
    control: Any

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the forward pass, or nothing at all in fp32."""
        return torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype else contextlib.nullcontext()

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process; all of them must call this."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def leave_group(self, together: bool) -> None:
        """The end of what the processes do in common.

        Args:
            together: wait for the others, so that none closes a connection that another still reads from. One that
                fails must not: they may be waiting for it elsewhere, and its end is what frees them.
        """
        if self.world == 1 or not dist.is_initialized():
            return
        if together:
            with contextlib.suppress(RuntimeError):  # another one has failed, and says so itself
                dist.barrier(group=self.control)
        dist.destroy_process_group()


def start(config: BaseConfig) -> Runtime:
    """Join the process group if torchrun started this process, choose device and precision, seed everything."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    control = None
    if world > 1:
        JOINED.set()
        end_with_parent()  # torchrun's agent
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64 if config.precision == "fp64" else torch.float32)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)  # equal initial weights in every process
    return Runtime(device, choose_precision(config.precision, device), rank, world, control)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is this process's GPU, else Apple's, else the CPU. `ConfigError` for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", f"{name!r} is not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False) or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError("device", f"{name} is not present on this machine")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype: bf16 where the hardware multiplies in it, fp16 on older GPUs, None (fp32) elsewhere."""
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise ConfigError("precision", "fp16 needs a GPU; use bf16, fp32 or auto on a CPU")
        return {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else None


def cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 dot products (AVX512-BF16 or AMX), so that bf16 is faster and not merely
    emulated.
    """
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def check_machine(config: BaseConfig) -> None:
    """`ConfigError` where this machine lacks the config's device or precision; for --dry-run, which starts no run."""
    choose_precision(config.precision, choose_device(config.device))


def use_threads(count: int) -> None:
    """Compute with so many CPU threads; 0 leaves PyTorch's own choice."""
    if count:
        torch.set_num_threads(count)
        threadpoolctl.threadpool_limits(count)  # NumPy's matrix products


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trained numbers in a model."""
    return sum(p.numel() for p in model.parameters())


def mix_seed(*numbers: int) -> int:
    """Mix integers such as (seed, step, rank) into one 63-bit seed; near inputs give unrelated seeds, and tuples of
    different lengths different ones. (A number of more than 32 bits counts as two, as NumPy's `SeedSequence` has it.)
    """
    words = [n & 0xFFFFFFFFFFFFFFFF for n in numbers]
    mixed = _mix(words)
    if len(words) == 1 or (len(words) > 2 and words[-1] == 0):
        # to `SeedSequence` zeros at the end are nothing: (2, 1, 0) would be (2, 1)
        return _mix([mixed, len(words)])
    return mixed


def indexed_seed(*numbers: int) -> int:
    """`mix_seed` for parts of one stream that are counted from 0, such as (seed, stream, part): part 0 has the seed of
    the stream itself, which nothing else may use. (Results were recorded with these seeds.)
    """
    return mix_seed(*numbers) if numbers[-1] else mix_seed(*numbers[:-1])


def _mix(words: list[int]) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_generators(device: torch.device, *numbers: int) -> None:
    """Seed PyTorch's global generators of the CPU and of `device` from these integers.

    `torch.manual_seed` gives the CPU the same stream, but notes a stack trace for each GPU library that is not in use
    yet: half a millisecond, more than a training step of a small graph network.
    """
    seed = mix_seed(*numbers)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global generator, in types that need no pickle."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def environment(runtime: Runtime) -> dict[str, Any]:
    """What produced a run, for `env.json`: versions, device, commit, command."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in (
        "torch",
        "torchvision",
        "numpy",
        "omegaconf",
        "torchmetrics",
        "torch-fidelity",
        "torch-geometric",
        "numba",
        "gymnasium",
        "ale-py",
        "envpool",
    ):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else cpu_name()
    return {
        "command": " ".join([sys.orig_argv[0].rsplit("/", 1)[-1], *sys.orig_argv[1:]]),
        "commit": _commit(),
        "device": str(runtime.device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "processes": runtime.world,
        "precision": str(runtime.amp_dtype or torch.get_default_dtype()).removeprefix("torch."),
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda if runtime.device.type == "cuda" else None,
    }


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s where known, for model FLOPs utilisation."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def cpu_name() -> str:
    """The processor's name, where Linux tells it, and how many cores it has."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    def git(*words: str) -> str:
        # no lock on the index: somebody may be committing
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # not a git checkout
