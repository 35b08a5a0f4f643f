"""Sides timed in turns in one process, and what is said about the times: shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.runtime import cpu_name

WARM_UP = 3  # steps: the optimizer's state, the choice of kernels


def interleave(sides: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU-seconds of each block of steps, by side and round; `again` is ours a second time, at the end of the round."""
    for step in sides.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in (*sides, "again")}
    for index in range(rounds):
        for name, seconds in times.items():
            step = sides["ours" if name == "again" else name]
            start = time.process_time()
            for _ in range(steps):
                step()
            seconds.append(time.process_time() - start)
        shown = "  ".join(f"{name} {1000 * values[-1] / steps:.2f}" for name, values in times.items())
        print(f"round {index + 1}/{rounds}, CPU-ms a step: {shown}", flush=True)
    return times


def ours_of(times: dict[str, list[float]]) -> list[float]:
    """Our time in each round: the mean of its first and its last block, so that a drift of the machine cancels."""
    return [(first + again) / 2 for first, again in zip(times["ours"], times["again"], strict=True)]


def ratio(name: str, above: list[float], below: list[float]) -> dict[str, float | list[float]]:
    """Median of the per-round ratios of two sides, and its quartiles."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {name: round(statistics.median(ratios), 4), f"{name}_iqr": quartiles(ratios)}


def quartiles(values: list[float]) -> list[float]:
    """First and third; of one value, none."""
    return [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")[::2]] if len(values) > 1 else []


def peak_memory() -> float:
    """Largest resident memory of this process so far, MiB.

    From /proc where that is: `getrusage` of a program that has just been started begins with the memory of the one that
    started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def circumstances(load: float, *packages: str, clock: str = "cpu time") -> dict[str, Any]:
    """What a figure depends on beside the code: how busy the machine was, the clock, the processor, versions.

    Args:
        load: `os.getloadavg()[0]` from before anything was timed; that of now is put beside it.
        packages: whose versions count, by the names they are installed by.
    """
    versions = {name: version(name) for name in packages}
    return {
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "clock": clock,
        "device": cpu_name(),
        "versions": {**versions, "python": platform.python_version()},
    }


def report(result: dict[str, Any], out: Path | None) -> None:
    """The last line of stdout, and the file that was asked for."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
