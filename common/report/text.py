"""Numbers, durations and names as a person reads them."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**63  # of the integers that are shown
LONGEST = 2000  # characters of one value


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
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)[:LONGEST]


def duration(seconds: float) -> str:
    """`75.2` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: object) -> float | None:
    """`value` if it is a number (no truth value, and none beyond what a float holds), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, float) or abs(value) < LARGEST else None


def amount(value: object) -> float:
    """`value` if it is a finite number above zero, such as a duration or a count can be, else 0."""
    found = number(value)
    return found if found is not None and math.isfinite(found) and found > 0 else 0


def words(name: str) -> str:
    """`images_per_second` -> `Images per second`."""
    text = str(name).replace("_", " ").strip()
    return text[:1].upper() + text[1:]
