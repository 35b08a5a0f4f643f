"""The tables of `bench.lora_table` as one picture: a measure against how many numbers learn.

    python -m bench.lora_picture [--results docs/results/lora]

A panel a table: plain LoRA by rank as a line, other kinds as points, full finetuning and the frozen model as levels;
means over the seeds, bars of one standard deviation where there are several. Writes ranks.png beside the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.lora_table import RESULTS, TABLES
from common.files import write_figure

LEVELS = ("full", "frozen, new head")


class Point(NamedTuple):
    """A row of a table."""

    numbers: int  # that learn
    mean: float  # percent
    deviation: float  # 0 of a single seed


def read_points(path: Path, metric: str) -> dict[str, Point]:
    """The rows of a table's JSON, in its order."""
    values: dict[str, list[float]] = {}
    numbers: dict[str, int] = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        values.setdefault(record["row"], []).append(100 * record[metric])
        numbers[record["row"]] = record["learned_numbers"]
    return {
        row: Point(numbers[row], statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0)
        for row, each in values.items()
    }


def draw_panel(axes: Any, points: dict[str, Point], heading: str) -> None:
    """One table."""
    ranks = {row: point for row, point in points.items() if row.startswith("rank ")}
    others = {row: point for row, point in points.items() if row not in ranks and row not in LEVELS}
    for row, style in zip(LEVELS, ("-", ":"), strict=True):
        if row in points:
            level = points[row]
            axes.axhline(level.mean, color="0.4", linestyle=style, linewidth=1, label=row)
            axes.axhspan(level.mean - level.deviation, level.mean + level.deviation, color="0.4", alpha=0.12)
    if ranks:
        x, y, deviation = (list(part) for part in zip(*ranks.values(), strict=True))
        axes.errorbar(x, y, deviation, marker="o", capsize=3, label=f"LoRA, rank {', '.join(row[5:] for row in ranks)}")
    for (row, point), marker in zip(others.items(), "sD^vP*Xh<>", strict=False):
        axes.errorbar(*point, marker=marker, linestyle="none", capsize=3, label=row)
    learning = [point.numbers for point in (ranks | others).values()] or [1]
    # at least two powers of ten, so that both are named on the axis
    decades = (10 ** math.floor(math.log10(min(learning))) / 1.5, 10 ** math.ceil(math.log10(max(learning))) * 1.5)
    axes.set(xscale="log", xlim=decades, xlabel="numbers that learn", title=heading)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def draw(results: Path) -> Path:
    """ranks.png of the tables that are there. SystemExit if there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    there = [name for name in TABLES if (results / f"{name}.json").is_file()]
    if not there:
        raise SystemExit(f"{results} has no table: python -m bench.lora_table sst2")
    figure, panels = plt.subplots(
        1, len(there), figsize=(5 * len(there), 4.2), dpi=100, layout="constrained", squeeze=False
    )
    for name, axes in zip(there, panels[0], strict=True):
        metric, heading = next(iter(TABLES[name].columns.items()))
        draw_panel(axes, read_points(results / f"{name}.json", metric), f"{name}: {heading}")
    path = results / "ranks.png"
    write_figure(path, figure)
    plt.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora_picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(draw(parser.parse_args(argv).results))


if __name__ == "__main__":
    main()
