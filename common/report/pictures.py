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
MAX_PICTURE = 2**20  # bytes; of a larger file a smaller copy is shown, of a film nothing
WIDEST = 1240  # pixels a side of such a copy; a page shows half of them
THEMES = {"light": ("#2563eb", "#475569", "#e2e8f0"), "dark": ("#7dabff", "#a8b3c7", "#2a3446")}  # line, text, grid
MAX_POINTS = 300  # of a curve; so small, a screen shows no more
MAX_CURVES = 24  # of a run


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
    """A picture file as it is, or a smaller copy of a large one. `ValueError` for one that is damaged, or a large
    film.
    """
    kind = PICTURES[path.suffix.lower()]
    try:
        if path.stat().st_size > 64 * MAX_PICTURE:
            raise ValueError(f"{path.stat().st_size / 2**20:.0f} MB")
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            chart = str(image.info.get("Software", "")).startswith("Matplotlib")
            image.load()
            if len(data) > MAX_PICTURE:
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"a film of {len(data) / 2**20:.0f} MB")
                data = smaller(image)
                kind = "image/webp"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    caption = f"Step {int(path.stem):,}" if path.stem.isdigit() else words(path.stem)
    return Picture(data_uri(data, kind), caption, width, height, chart)


def smaller(image: Image.Image) -> bytes:
    """A copy of at most `WIDEST` pixels a side, as WebP."""
    copy = image.convert("RGBA" if image.has_transparency_data else "RGB")
    copy.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    copy.save(file, "WEBP", quality=80)
    return file.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as a `data:` URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def draw_curves(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """One small SVG for each numeric column, in a light and a dark version: losses first, then results, then how the
    training went. What was logged once is no curve, and is left out beside others that are.
    """
    columns: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and number(value) is not None and math.isfinite(value):
                columns.setdefault(name, []).append((row["step"], float(value)))
    columns = {name: points for name, points in columns.items() if len(points) > 1} or columns

    def order(name: str) -> int:
        if name == "loss":
            return 0
        if "loss" in name:
            return 1
        if name in COLUMNS:
            return 3
        return 4 if name.endswith("_per_second") else 2

    curves = []
    for name in sorted(columns, key=order)[:MAX_CURVES]:
        light = dark = draw(columns[name], THEMES["light"], noisy=name != "lr")
        for colour, other in zip(THEMES["light"], THEMES["dark"], strict=True):
            dark = dark.replace(colour, other)
        light, dark = (data_uri(text.encode(), "image/svg+xml") for text in (light, dark))
        curves.append((COLUMNS.get(name, words(name)), light, dark))
    return curves


def draw(points: list[tuple[int, float]], theme: tuple[str, str, str], noisy: bool) -> str:
    """A curve as SVG: raw values faint, their moving average strong; a log axis where values span decades."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    line, text, grid = theme
    steps, values = zip(*points[:: math.ceil(len(points) / MAX_POINTS)], strict=True)
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "report",
            "svg.fonttype": "none",  # the reader's own font: outlines of letters would be most of the file
            "font.family": "sans-serif",
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
    return re.sub(r"(\d\.\d\d)\d+", r"\1", file.getvalue().decode())  # hundredths of a point are enough


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
