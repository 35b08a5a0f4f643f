"""Measure trained networks:  python -m gnn.eval --run runs/gcn_cora [eval.figures=false ...]

Every trained seed (or fold) is tested; what is reported is their mean and standard deviation. Writes `eval.json`, the
per-seed table `seeds.csv`, what the first seed's network says of each node, pair or graph (`predictions.csv`,
`communities.csv`, `embeddings.npz`), and pictures into the run folder; the last line of stdout is the content of
`eval.json`, which names the hashes of config, weights and files. Nothing here chooses anything.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from gnn.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "gnn", "eval")

import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common.checkpoint import UNFIT, CheckpointError, read_weights
from common.errors import ProjectError, exits_cleanly
from common.files import sha256, visible, write_csv, write_json
from common.logging import read_metrics
from common.provenance import discard, made_by, output_hashes
from common.run import Run
from common.runtime import use_threads
from gnn.task import Task
from gnn.tasks import build_task
from gnn.train import Settings, start_trial

OUTPUTS = ("seeds.csv", "predictions.csv", "communities.csv", "embeddings.npz")


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate every seed of one run."""
    started = time.perf_counter()
    with Run(config, options) as run:
        paths = trained_here(config, options, run)
        use_threads(config.train.threads)
        task = build_task(config, run.device)
        rows = [test_trial(task, path) for path in run.track(paths)]
        if len(paths) < task.num_trials:
            run.display.say(f"note: {len(paths)} of {task.num_trials} seeds are trained")
        for line in [*task.notes(), *task.remarks]:
            run.display.say(f"note: {line}")
        metrics = summarise(rows)
        model, _ = load_trial(task, paths[0])
        with torch.no_grad():
            if config.eval.tables:
                metrics |= task.tables(model)
        discard(run.folder, (*OUTPUTS, "figures/*.png"))
        write_csv(run.folder / "seeds.csv", rows)
        with torch.no_grad():
            if config.eval.outputs:
                task.write_outputs(model, run.folder)
        result = {
            "project": "gnn",
            "config": run.folder.name,
            "checkpoint_step": max(int(row["step"]) for row in rows),
            "total_steps": config.train.steps,
            "metrics": metrics,
            "n": {"trials": len(rows), "trials_planned": task.num_trials},
            "seeds": [int(row["seed"]) for row in rows],
            "seconds": round(time.perf_counter() - started, 1),
            **made_by(config, [sha256(path) for path in paths]),
            "outputs": output_hashes(run.folder, OUTPUTS),
        }
        write_json(run.folder / "eval.json", result)
        with torch.no_grad():
            if config.eval.figures:
                draw(task, model, run)
        show(metrics, run.folder.name, len(rows))
        print(json.dumps(result), flush=True)


def trained_here(config: Config, options: Options, run: Run) -> list[Path]:
    """The weights of each seed that was trained with these settings. One that an earlier config has left is not taken
    for a seed of this one: left out with a note. `ProjectError` where none remains.
    """
    if options.checkpoint:
        raise ProjectError("gnn.eval tests the kept weights of every seed, in models/, and takes no --checkpoint")
    paths = visible(run.folder / "models", "*.safetensors")
    if not paths:
        raise ProjectError(
            f"no trained weights in {run.folder / 'models'}; train first (or --resume), or give another --run"
        )
    fitting = []
    problem = ""
    for path in paths:
        _, facts = read_trial(path)
        problem = Settings.difference(facts.get("config", ""), config)
        if problem:
            run.display.say(f"note: {path.name} was {problem}: left out")
        else:
            fitting.append(path)
    if not fitting:
        raise ProjectError(f"{run.folder / 'models'}: not the weights of this config's model, but {problem}")
    return fitting


def read_trial(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights of one trial and what is noted beside them. `ProjectError` for a damaged file and for others."""
    try:
        weights, facts = read_weights(path)
    except CheckpointError as error:
        raise ProjectError(f"{path}: {error}") from None
    if not all(re.fullmatch(r"-?\d+", text) for text in (path.stem, facts.get("seed", ""), facts.get("step", ""))):
        raise ProjectError(f"{path} does not say of which seed and step it is, as the files of gnn.train do")
    return weights, facts


def load_trial(task: Task, path: Path) -> tuple[torch.nn.Module, dict[str, str]]:
    """The network of one trial in evaluation mode, and what is noted beside its weights. `ProjectError` where they
    do not fit.
    """
    model = start_trial(task, int(path.stem))
    weights, facts = read_trial(path)
    try:
        model.load_state_dict(weights)
    except UNFIT as error:
        raise ProjectError(f"{path}: not the weights of this config's model ({str(error).splitlines()[0]})") from None
    return model.eval(), facts


def test_trial(task: Task, path: Path) -> dict[str, float]:
    """Seed, best step and test figures of one trial."""
    model, facts = load_trial(task, path)
    with torch.no_grad():
        return {"seed": int(facts["seed"]), "step": int(facts["step"]), **task.test(model)}


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the trials, and with two or more its standard deviation (n - 1) as `<name>_std`."""
    metrics = {}
    for name in rows[0]:
        if name in ("seed", "step"):
            continue
        values = [row[name] for row in rows]
        metrics[name] = statistics.fmean(values)
        if len(values) > 1:
            metrics[f"{name}_std"] = statistics.stdev(values)
    return metrics


def draw(task: Task, model: torch.nn.Module, run: Run) -> None:
    """Pictures; the results stand already, so one that cannot be drawn costs a line."""
    try:
        task.figures(model, run.folder / "figures")
        draw_curves(run.folder, task)
    except (ProjectError, ValueError, RuntimeError, ImportError, np.linalg.LinAlgError) as error:
        run.display.say(f"note: not all pictures could be drawn ({str(error).splitlines()[0]})")


def draw_curves(folder: Path, task: Task) -> None:
    """What was logged, as mean and range over the seeds."""
    from gnn.core.pictures import draw_bands

    steps = task.config.train.steps
    series: dict[str, dict[int, list[float]]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        epoch = (line["step"] - 1) % steps + 1
        for name, value in line.items():
            if name in ("loss", "val_loss", "val_accuracy", "val_auc", "val_modularity"):
                series.setdefault(name, {}).setdefault(epoch, []).append(value)
    if series:
        draw_bands(folder / "figures/curves.png", series)


def show(metrics: dict[str, float], name: str, count: int) -> None:
    """Print the metrics as a table."""
    table = Table("metric", title=f"{name}, {count} trial{'s' * (count > 1)}", title_justify="left")
    table.add_column("mean", justify="right")
    table.add_column("± std", justify="right")
    for metric, value in metrics.items():
        if metric.endswith("_std") and metric.removesuffix("_std") in metrics:
            continue
        spread = metrics.get(f"{metric}_std", math.nan)
        table.add_row(metric, f"{value:.4f}", "" if math.isnan(spread) else f"{spread:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
