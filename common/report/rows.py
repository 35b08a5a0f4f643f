"""The metrics of a run as rows of a table, in the words of its project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.projects import Metric, find_metric, metrics_of
from common.report.text import number, numeral, words

MOST_HEADLINES = 2


@dataclass
class Row:
    """One metric, as text."""

    label: str
    value: str
    better: str


def metric_rows(values: dict[str, Any], project: str) -> tuple[list[Row], list[Row]]:
    """All metrics as rows, each beside its own `_std`; and the few that lead: the first ones where none is meant to."""
    metrics = metrics_of(project)
    order = list(metrics)
    rows = {}
    leading = []
    for name, value in values.items():
        if number(value) is None or (name.endswith("_std") and name.removesuffix("_std") in values):
            continue
        key, metric = find_metric(metrics, name) or ("", Metric(words(name)))
        percent = metric.format == "percent"
        text = numeral(value, percent)
        deviation = number(values.get(f"{name}_std"))
        if deviation is not None:
            text += f" ± {numeral(deviation, percent)}"
        rows[name] = Row(metric.label, text, metric.better)
        if metric.leads:
            leading.append((order.index(key), name))
    names = [name for _, name in sorted(leading, key=lambda item: item[0])] or list(rows)
    return list(rows.values()), [rows[name] for name in names[:MOST_HEADLINES]]
