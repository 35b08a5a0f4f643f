"""What a page shows of a run, read from its folder.

Whatever is missing or damaged there is named on the page instead of stopping it.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.files import visible
from common.logging import read_metrics
from common.report.pictures import Picture, draw_curves, embed, pictures_in, spread
from common.report.rows import Row, metric_rows
from common.report.text import amount, number, plain, words

MOST_EXAMPLES = 12
OWN = ("eval.json", "env.json")  # have a place of their own on the page
MAX_TEXT = 2**18  # bytes of a settings or results file
# what readers and the steps after them raise on damaged or absurd content
DAMAGED = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


@dataclass
class Table:
    """A few rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class RunView:
    """What the page shows of one run."""

    name: str
    project: str = ""
    config: str = ""
    done: int = 0
    total: int = 0
    metrics: list[Row] = field(default_factory=list)
    headlines: list[Row] = field(default_factory=list)
    evaluation: list[tuple[str, str]] = field(default_factory=list)
    further: list[tuple[str, list[Row]]] = field(default_factory=list)  # what other programs measured: file, metrics
    curves: list[tuple[str, str, str]] = field(default_factory=list)  # title, light picture, dark picture
    samples: list[Picture] = field(default_factory=list)  # oldest first
    examples: list[Table] = field(default_factory=list)  # texts: what a model was given and what it made of it
    figures: list[Picture] = field(default_factory=list)
    times: list[tuple[str, float]] = field(default_factory=list)  # stage, seconds
    failure: dict[str, Any] | None = None  # what `common.demo` noted of a stage that failed
    settings: str = ""
    environment: list[tuple[str, str]] = field(default_factory=list)
    device: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.times)

    @property
    def status(self) -> str:
        """failed, complete, stopped or not started."""
        if self.failure:
            return "failed" if not self.failure.get("stopped") else "stopped"
        if not self.done:
            return "not started"
        return "stopped" if self.done < self.total else "complete"


def read_run(folder: Path) -> RunView:
    """Everything the page shows of the run in `folder`; what is not there is listed in `missing`."""
    view = RunView(folder.name)
    if not folder.is_dir():
        view.missing.append("the run folder: nothing was written")
    evaluation, env = read_json(folder / "eval.json", view), read_json(folder / "env.json", view)
    view.project, view.config = identify(folder, evaluation, env)
    view.settings = read(folder / "config.yaml", read_text, "", view)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        rows = read(folder / "metrics.jsonl", read_metrics, [], view)
    view.missing += [f"metrics.jsonl, which is damaged ({str(note.message).rsplit(': ', 1)[-1]})" for note in noted]
    rows = [row for row in rows if number(row["step"]) is not None]
    view.total = int(amount(env.get("total_steps"))) or total_steps(view.settings)
    view.done = max((row["step"] for row in rows), default=0)
    view.curves = attempt("curves", lambda: draw_curves(rows), [], view)
    if rows and not view.curves:
        view.missing.append("metrics.jsonl holds no numbers to draw")
    values = evaluation.get("metrics")
    view.metrics, view.headlines = metric_rows(values if isinstance(values, dict) else {}, view.project)
    others = {key: value for key, value in evaluation.items() if key not in ("project", "config", "metrics")}
    view.evaluation = attempt("eval.json", lambda: text_rows(others), [], view)
    view.further = further_results(folder, view)
    view.samples = embed_all(spread(pictures_in(folder / "samples"), 7), view)
    view.figures = embed_all(pictures_in(folder / "figures"), view)
    view.examples = read_examples(folder / "samples", view)
    if not view.samples and not view.figures and not view.examples:
        view.missing.append("pictures or examples in samples/ and figures/")
    view.environment = attempt("env.json", lambda: environment_rows(env), [], view)
    view.device = str(env.get("device_name") or env.get("device") or "")
    view.times, view.failure = read_stages(folder, evaluation)
    return view


def read(path: Path, reader: Callable[[Path], Any], default: Any, view: RunView) -> Any:
    """What `reader` makes of a file; `default`, and a note on the page, where it is missing or damaged, or a link that
    leads out of its folder: a page that is passed on must not hold somebody's other files.
    """
    if not path.is_file():
        view.missing.append(path.name)
    elif leads_out(path, path.parent):
        view.missing.append(f"{path.name}, which is a link out of the run folder")
    else:
        return attempt(path.name, lambda: reader(path), default, view)
    return default


def attempt(what: str, make: Callable[[], Any], default: Any, view: RunView) -> Any:
    """What `make` returns; `default`, and a note on the page, where it cannot."""
    try:
        return make()
    except DAMAGED as error:
        reason = str(error).splitlines() or [type(error).__name__]
        view.missing.append(f"{what}, which is damaged ({reason[0][:100]})")
        return default


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a link, of the file itself or on the way from the folder to it, ends outside the folder."""
    return not path.resolve().is_relative_to(folder.resolve())


def read_text(path: Path) -> str:
    """The text of a file. `ValueError` for one far longer than those that a run writes."""
    if path.stat().st_size > MAX_TEXT:
        raise ValueError(f"{path.stat().st_size:,} bytes")
    return path.read_text(encoding="utf-8")


def parse_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(read_text(path))


def embed_all(paths: list[Path], view: RunView) -> list[Picture]:
    """Picture files for the page; a note there for each one that cannot be shown."""
    pictures = []
    for path in paths:
        if leads_out(path, path.parent.parent):
            view.missing.append(f"{path.parent.name}/{path.name}, which is a link out of the run folder")
            continue
        try:
            pictures.append(embed(path))
        except ValueError as error:
            view.missing.append(f"{path.parent.name}/{path.name}, which cannot be shown ({str(error)[:100]})")
    return pictures


def read_json(path: Path, view: RunView) -> dict[str, Any]:
    """A JSON object, or an empty one where it is missing or damaged."""

    def parse(path: Path) -> dict[str, Any]:
        value = parse_json(path)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value

    return read(path, parse, {}, view)


def identify(folder: Path, evaluation: dict[str, Any], env: dict[str, Any]) -> tuple[str, str]:
    """Project and config of a run, from the command that trained it."""
    command = str(env.get("command", ""))
    module, file = re.search(r"-m (\w+)\.train\b", command), re.search(r"--config[ =](\S+)", command)
    project = evaluation.get("project") or (module.group(1) if module else folder.name)
    config = Path(file.group(1)).stem if file else evaluation.get("config") or folder.name
    return str(project), str(config)


def total_steps(settings: str) -> int:
    """`train.steps` of a config, 0 where it says nothing: for a run whose env.json does not tell."""
    try:
        return int(amount(yaml.safe_load(settings)["train"]["steps"]))
    except (yaml.YAMLError, *DAMAGED):
        return 0


def read_stages(folder: Path, evaluation: dict[str, Any]) -> tuple[list[tuple[str, float]], dict[str, Any] | None]:
    """Seconds by stage and the failed stage, as `common.demo` noted them beside the run; else from the run folder's
    own files.
    """
    noted = read_json(folder.parent / "demo.json", RunView("")).get(folder.name)
    if isinstance(noted, list) and all(isinstance(stage, dict) for stage in noted):
        times = [(str(stage.get("stage")), amount(stage.get("seconds"))) for stage in noted]
        return times, next((stage for stage in noted if stage.get("status") != 0), None)
    times = []
    with contextlib.suppress(OSError):
        times.append(("train", (folder / "metrics.jsonl").stat().st_mtime - (folder / "env.json").stat().st_mtime))
    times.append(("eval", amount(evaluation.get("seconds"))))
    return [(stage, seconds) for stage, seconds in times if seconds > 0], None


def further_results(folder: Path, view: RunView) -> list[tuple[str, list[Row]]]:
    """File name and metrics of every other result in a run folder: `metrics`, as eval writes them. Other JSON files are
    nobody's concern here.
    """
    found = []
    for path in visible(folder, "*.json"):
        if path.name in OWN or path.stat().st_size > MAX_TEXT:
            continue
        content = read(path, parse_json, None, view)
        values = content.get("metrics") if isinstance(content, dict) else None
        rows = metric_rows(values, view.project)[0] if isinstance(values, dict) else []
        if rows:
            found.append((path.name, rows))
    return found


def read_examples(folder: Path, view: RunView) -> list[Table]:
    """Every list of objects among the JSON files of samples/, as a table."""

    def parse(path: Path) -> Table:
        items = parse_json(path)[:MOST_EXAMPLES]
        columns = list(items[0])
        rows = [[plain(item.get(column, "")) for column in columns] for item in items]
        return Table(words(path.stem), [words(column) for column in columns], rows)

    found = [read(path, parse, None, view) for path in visible(folder, "*.json")]
    return [table for table in found if table is not None]


def environment_rows(env: dict[str, Any]) -> list[tuple[str, str]]:
    """env.json as rows of text; the versions of packages become one row each."""
    versions = env.get("versions")
    rows = text_rows({key: value for key, value in env.items() if key != "versions" and value is not None})
    if isinstance(versions, dict):
        rows += [(str(key), plain(value)) for key, value in versions.items()]
    return rows


def text_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """A JSON object as rows of text."""
    return [(words(key), plain(value)) for key, value in values.items()]
