"""Sides timed in turns in one process, and what is said about the times: shared by benchmarks of training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

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
