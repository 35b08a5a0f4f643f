"""Numbers, durations and names as a person reads them."""

from __future__ import annotations

import math
from typing import Any


def numeral(value: float, percent: bool = False) -> str:
    """A number for people: four digits that count, thousands separated; a fraction as a percentage if asked."""
    if not math.isfinite(value):
        return str(value)
    if percent:
        return f"{100 * value:.1f} %"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def plain(value: Any) -> str:
    """A value of a JSON file as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def duration(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: object) -> float | None:
    """`value` if it is a number (and not a truth value), else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def words(name: str) -> str:
    """`images_per_second` -> `Images per second`."""
    text = str(name).replace("_", " ").strip()
    return text[:1].upper() + text[1:]
