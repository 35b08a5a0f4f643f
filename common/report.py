"""One HTML page about any runs:  python -m common.report runs/demo/* --out runs/demo/report.html [--title "..."]

The page is a single file: curves and pictures are embedded, and it asks nothing of the network. Whatever is missing or
damaged in a run folder is named on the page instead of stopping it, so that a report can be made of a run that is still
going on, or has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from common.errors import ProjectError, exits_cleanly
from common.files import write_text
from common.logging import read_metrics
from common.pictures import Picture, draw_curves, embed, number, pictures_in, spread, words

# name in eval.json -> (words, which way is better); names that are not here show as they are
METRICS = {
    "fid": ("FID", "lower"),
    "fd_floor": ("Fréchet distance of held-out images", "floor"),
    "inception_score": ("Inception score", "higher"),
    "classifier_score": ("Classifier score", "higher"),
    "conditional_accuracy": ("Accuracy of the requested class", "higher"),
    "classifier_test_accuracy": ("Test accuracy of the judging classifier", ""),
    "precision": ("Precision", "higher"),
    "recall": ("Recall", "higher"),
    "density": ("Density", "higher"),
    "coverage": ("Coverage", "higher"),
    "nearest_train_rms": ("Distance to the nearest training image", ""),
    "test_accuracy": ("Test accuracy", "higher"),
    "val_accuracy": ("Validation accuracy", "higher"),
    "test_macro_f1": ("Test macro-F1", "higher"),
    "ari": ("Adjusted Rand index", "higher"),
    "conductance": ("Conductance", "lower"),
    "auc": ("AUC", "higher"),
    "ap": ("Average precision", "higher"),
    "mrr": ("Mean reciprocal rank", "higher"),
    "modularity": ("Modularity", "higher"),
    "nmi": ("Normalised mutual information", "higher"),
    "return_mean": ("Mean return", "higher"),
    "return_mean_stochastic": ("Mean return, sampled actions", "higher"),
    "episodes_to_solve": ("Episodes to solve", "lower"),
    "elbo": ("ELBO (nats)", "higher"),
    "log_likelihood": ("Log-likelihood (nats)", "higher"),
    "bits_per_dim": ("Bits per dimension", "lower"),
    "mig": ("Mutual information gap", "higher"),
    "dci": ("DCI disentanglement", "higher"),
    "zero_shot_top1": ("Zero-shot accuracy", "higher"),
    "r1_t2i": ("Recall@1, text to image", "higher"),
    "r1_i2t": ("Recall@1, image to text", "higher"),
    "mrr_at_10": ("MRR@10", "higher"),
    "ndcg_at_10": ("nDCG@10", "higher"),
    "em_closed_book": ("Exact match, closed book", "higher"),
    "em_retrieved": ("Exact match, retrieved passages", "higher"),
    "em_gold": ("Exact match, gold passages", "higher"),
    "accuracy": ("Accuracy", "higher"),
    "matthews": ("Matthews correlation", "higher"),
    "bleu": ("BLEU", "higher"),
    "perplexity": ("Perplexity", "lower"),
    "nearest_train_rms_test_images": ("The same distance for held-out images", ""),
}
# the first two of these that a run has lead; a name with _ at its end is a prefix
HEADLINES = (
    "fid",
    "fd_",
    "conditional_accuracy",
    "test_accuracy",
    "auc",
    "return_mean",
    "elbo",
    "bits_per_dim",
    "zero_shot_top1",
    "r1_t2i",
    "recall_at_",
    "em_retrieved",
    "accuracy",
    "matthews",
    "bleu",
    "perplexity",
)


@dataclass
class Metric:
    """One row of the metrics table, as text."""

    label: str
    value: str
    better: str


@dataclass
class RunView:
    """What the page shows of one run."""

    name: str
    project: str = ""
    config: str = ""
    done: int = 0
    total: int = 0
    metrics: list[Metric] = field(default_factory=list)
    headlines: list[Metric] = field(default_factory=list)
    evaluation: list[tuple[str, str]] = field(default_factory=list)
    curves: list[tuple[str, str, str]] = field(default_factory=list)  # title, light picture, dark picture
    samples: list[Picture] = field(default_factory=list)  # oldest first
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


@exits_cleanly
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m common.report", description="One self-contained HTML page about runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; files among them are passed over")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/report.html"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--title", default="Training report")
    args = parser.parse_args()
    folders = [path for path in args.runs if not path.is_file()]
    if not any(path.is_dir() for path in folders):
        raise ProjectError(f"no run folder among {' '.join(map(str, args.runs))}")
    print(build(folders, args.out, args.title))


def build(folders: list[Path], out: Path, title: str = "Training report") -> Path:
    """Write one page about the runs in `folders` to `out`; returns `out`."""
    runs = [read_run(folder) for folder in folders]
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "thousands": lambda n: f"{n:,}"}
    page = environment.get_template("report.html.j2").render(
        title=title, runs=runs, written=time.strftime("%Y-%m-%d %H:%M")
    )
    write_text(out, page)
    return out


# -- reading a run folder ----------------------------------------------------------------------------------------------


def read_run(folder: Path) -> RunView:
    """Everything the page shows of the run in `folder`; what is not there is listed in `missing`."""
    view = RunView(folder.name)
    if not folder.is_dir():
        view.missing.append("the run folder: nothing was written")
    evaluation, env = read_json(folder / "eval.json", view), read_json(folder / "env.json", view)
    view.project, view.config = identify(folder, evaluation, env)
    view.settings = read(folder / "config.yaml", lambda path: path.read_text(encoding="utf-8"), "", view)
    lines = read(folder / "metrics.jsonl", read_metrics, [], view)
    rows = [row for row in lines if isinstance(row, dict) and isinstance(row.get("step"), int)]
    view.total, view.done = (
        int(env.get("total_steps") or total_steps(view.settings)),
        max((row["step"] for row in rows), default=0),
    )
    view.curves = draw_curves(rows)
    if rows and not view.curves:
        view.missing.append("metrics.jsonl holds no numbers to draw")
    values = evaluation.get("metrics")
    view.metrics, view.headlines = metric_rows(values if isinstance(values, dict) else {})
    view.evaluation = [
        (words(key), plain(value)) for key, value in evaluation.items() if key not in ("project", "config", "metrics")
    ]
    view.samples = embed_all(spread(pictures_in(folder / "samples"), 7), view)
    view.figures = embed_all(pictures_in(folder / "figures"), view)
    if not view.samples and not view.figures:
        view.missing.append("pictures in samples/ and figures/")
    view.environment, view.device = environment_rows(env), str(env.get("device_name") or env.get("device") or "")
    view.times, view.failure = read_stages(folder, evaluation)
    return view


def read(path: Path, reader: Callable[[Path], Any], default: Any, view: RunView) -> Any:
    """What `reader` makes of a file; `default`, and a note on the page, where it is missing or damaged."""
    try:
        if path.is_file():
            return reader(path)
        view.missing.append(path.name)
    except (OSError, ValueError) as error:
        view.missing.append(f"{path.name}, which is damaged ({str(error).splitlines()[0][:100]})")
    return default


def embed_all(paths: list[Path], view: RunView) -> list[Picture]:
    """Picture files for the page; a note there for each one that cannot be shown."""
    pictures = []
    for path in paths:
        try:
            pictures.append(embed(path))
        except ValueError as error:
            view.missing.append(f"{path.parent.name}/{path.name}, which cannot be shown ({str(error)[:100]})")
    return pictures


def read_json(path: Path, view: RunView) -> dict[str, Any]:
    """A JSON object, or an empty one where it is missing or damaged."""

    def parse(path: Path) -> dict[str, Any]:
        value = json.loads(path.read_text(encoding="utf-8"))
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
        return int(yaml.safe_load(settings)["train"]["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def read_stages(folder: Path, evaluation: dict[str, Any]) -> tuple[list[tuple[str, float]], dict[str, Any] | None]:
    """Seconds by stage and the failed stage, as `common.demo` noted them beside the run; else from the run folder's
    own files.
    """
    noted = read_json(folder.parent / "demo.json", RunView("")).get(folder.name)
    if isinstance(noted, list) and all(isinstance(stage, dict) for stage in noted):
        times = [(str(stage.get("stage")), float(number(stage.get("seconds")) or 0)) for stage in noted]
        return times, next((stage for stage in noted if stage.get("status") != 0), None)
    times = []
    with contextlib.suppress(OSError):
        times.append(("train", (folder / "metrics.jsonl").stat().st_mtime - (folder / "env.json").stat().st_mtime))
    times.append(("eval", number(evaluation.get("seconds")) or 0.0))
    return [(stage, seconds) for stage, seconds in times if seconds > 0], None


def environment_rows(env: dict[str, Any]) -> list[tuple[str, str]]:
    """env.json as rows of text; the versions of packages become one row each."""
    versions = env.get("versions") if isinstance(env.get("versions"), dict) else {}
    return [(words(key), plain(value)) for key, value in env.items() if key != "versions" and value is not None] + [
        (str(key), plain(value)) for key, value in versions.items()
    ]


# -- numbers and words -------------------------------------------------------------------------------------------------


def metric_rows(metrics: dict[str, Any]) -> tuple[list[Metric], list[Metric]]:
    """All metrics as rows, each beside its own `_std`; and the two that lead."""
    rows = {}
    for name, value in metrics.items():
        if number(value) is None or (name.endswith("_std") and name.removesuffix("_std") in metrics):
            continue
        label, better = describe(name)
        percent = "accuracy" in name
        spread_of = number(metrics.get(f"{name}_std"))
        text = numeral(value, percent) + (f" ± {numeral(spread_of, percent)}" if spread_of is not None else "")
        rows[name] = Metric(label, text, better)
    leading = [
        name
        for key in HEADLINES
        for name in rows
        if name == key or (key.endswith("_") and name.startswith(key) and name != "fd_floor")
    ]
    return list(rows.values()), [rows[name] for name in (leading or list(rows))[:2]]


def describe(name: str) -> tuple[str, str]:
    """Words for a metric's name, and which way is better: "lower", "higher", "floor" (what nothing can beat) or
    nothing.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, text, better in (
        (r"fd_(\w+)", "Fréchet distance, {}", "lower"),
        (r"recall_at_(\d+)", "Recall@{}", "higher"),
        (r"r(\d+_\w2\w)", "Recall@{}", "higher"),
        (r"f1_(\w+)", "F1, {}", "higher"),
    ):
        if match := re.fullmatch(pattern, name):
            return text.format(match.group(1).replace("_", " ")), better
    return words(name), ""


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


if __name__ == "__main__":
    main()
