"""Pictures inside a page: image files and training curves as `data:` URIs, so that one HTML file holds everything."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import visible
from common.report.text import number, words

# shown after everything else
COLUMNS = {"lr": "Learning rate", "grad_norm": "Gradient norm", "mfu": "Model FLOPs utilisation"}
PICTURES = {
    ".png": "image/png",
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
MAX_PICTURE = 12 * 2**20  # bytes; a larger file would make the page slow to open
THEMES = {"light": ("#2563eb", "#475569", "#e2e8f0"), "dark": ("#7dabff", "#a8b3c7", "#2a3446")}  # line, text, grid
MAX_POINTS = 600  # of a curve; a screen shows no more


@dataclass
class Picture:
    """An embedded image."""

    source: str  # data: URI
    caption: str
    width: int
    height: int
    chart: bool  # a plot on a white ground rather than an image made of pixels


def pictures_in(folder: Path) -> list[Path]:
    """Picture files of a folder, by the numbers in their names."""

    def natural(path: Path) -> list[Any]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((path for path in visible(folder, "*") if path.suffix.lower() in PICTURES), key=natural)


def spread(items: list[Path], count: int) -> list[Path]:
    """At most `count` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def embed(path: Path) -> Picture:
    """A picture file as it is. `ValueError` for one that is damaged or very large."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_PICTURE:
            raise ValueError(f"{len(data) / 2**20:.0f} MB is too large to embed")
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            chart = str(image.info.get("Software", "")).startswith("Matplotlib")
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    caption = f"Step {int(path.stem):,}" if path.stem.isdigit() else words(path.stem)
    return Picture(data_uri(data, PICTURES[path.suffix.lower()]), caption, width, height, chart)


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a `data:` URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def draw_curves(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """One small SVG for each numeric column, in a light and a dark version: losses first, then results, then how the
    training went.
    """
    columns: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and number(value) is not None and math.isfinite(value):
                columns.setdefault(name, []).append((row["step"], float(value)))

    def order(name: str) -> int:
        if name == "loss":
            return 0
        if "loss" in name:
            return 1
        if name in COLUMNS:
            return 3
        return 4 if name.endswith("_per_second") else 2

    curves = []
    for name in sorted(columns, key=order):
        light, dark = (draw(columns[name], THEMES[theme], noisy=name != "lr") for theme in ("light", "dark"))
        curves.append((COLUMNS.get(name, words(name)), light, dark))
    return curves


def draw(points: list[tuple[int, float]], theme: tuple[str, str, str], noisy: bool) -> str:
    """A curve as an SVG data URI: raw values faint, their moving average strong; a log axis where values span
    decades.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    line, text, grid = theme
    steps, values = zip(*points[:: math.ceil(len(points) / MAX_POINTS)], strict=True)
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "report",
            "font.size": 9,
            "text.color": text,
            "axes.edgecolor": grid,
            "xtick.color": text,
            "ytick.color": text,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
        }
    ):
        figure = Figure(figsize=(3.6, 2.1), layout="constrained")
        axes = figure.subplots()
        smooth = moving_average(values) if noisy and len(values) >= 8 else None
        marker = "." if len(values) < 3 else None
        axes.plot(steps, values, color=line, alpha=0.25 if smooth else 1, linewidth=1 if smooth else 1.8, marker=marker)
        if smooth:
            axes.plot(steps, smooth, color=line, linewidth=1.8)
        ordered = sorted(values)
        if (
            noisy
            and ordered[0] > 0
            and ordered[int(0.98 * (len(ordered) - 1))] > 20 * ordered[int(0.02 * len(ordered))]
        ):
            axes.set_yscale("log")
        axes.grid(color=grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")


def moving_average(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve, without the bias of its start (Kingma & Ba
    2015, section 3).
    """
    decay = 1 - 1 / max(3.0, len(values) / 20)
    total = 0.0
    weight = 0.0
    smooth = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth
