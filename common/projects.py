"""What each project says about itself: its metrics, and how it is shown at its smallest. Found without knowing a name.

A project is a package beside this one that can be trained. Its `__init__.py` may export `METRICS`, a dict of metric
name to `Metric`, and `DEMO`, a `Demo`; it imports nothing heavy.
"""

from __future__ import annotations

import fnmatch
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Metric:
    """How a number of `eval.json` is shown.

    A name with a `*`, such as `recall_at_*`, describes every metric that fits and is not described by its own name; in
    its label `{}` is the part that the star stands for. Metrics that lead do so in the order of the project's dict.
    """

    label: str
    better: Literal["higher", "lower", "floor", ""] = ""  # floor: what nothing can beat
    format: Literal["number", "percent"] = "number"  # percent: for fractions
    leads: bool = False  # may stand at the top of a run, where there is room for two


@dataclass(frozen=True)
class Demo:
    """One project's part of `python -m common.demo`."""

    project: str
    config: str
    seconds: int  # about how long it takes on two CPU cores
    overrides: tuple[str, ...] = ()


def find_projects() -> list[str]:
    """Names of the packages beside this one that have a training program, sorted."""
    return sorted(
        path.parent.name
        for path in ROOT.glob("*/train.py")
        if path.parent.name[0] != "." and (path.parent / "__init__.py").is_file()
    )


def find_demos() -> tuple[Demo, ...]:
    """The demo of every project that has one."""
    found = [getattr(importlib.import_module(name), "DEMO", None) for name in find_projects()]
    return tuple(demo for demo in found if demo is not None)


def metrics_of(project: str) -> dict[str, Metric]:
    """What a project says of its metrics; nothing for a name that is no project of ours, whatever a file claims."""
    if project not in find_projects():
        return {}
    return getattr(importlib.import_module(project), "METRICS", {})


def find_metric(metrics: dict[str, Metric], name: str) -> tuple[str, Metric] | None:
    """The key of `metrics` that describes `name`, and its `Metric` with the label filled in; None without one."""
    if name in metrics:
        return name, metrics[name]
    for pattern, metric in metrics.items():
        if "*" in pattern and fnmatch.fnmatchcase(name, pattern):
            before, after = pattern.split("*", 1)
            part = name.removeprefix(before).removesuffix(after).replace("_", " ")
            return pattern, Metric(metric.label.format(part), metric.better, metric.format, metric.leads)
    return None
