"""Train many seeds side by side and say what they amount to:

    python -m ppo.sweep --config configs/ppo_cartpole.yaml --seeds 10 --jobs 2

Each seed is `python -m ppo.train` and `python -m ppo.eval` in a process of its own, in runs/<name>_seeds/<seed>. A seed
that is done is not repeated, one that was stopped goes on. Writes `sweep.json`, `seeds.csv` and `learning_curve.png`
into that folder; the last line of stdout is the content of `sweep.json`: for each metric the mean, the standard
deviation, the worst seed and the interquartile mean with its 95 % bootstrap interval (Agarwal et al. 2021, "Deep
reinforcement learning at the edge of the statistical precipice").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

from common.config import FREE_KEYS, FREE_SECTIONS, UNUSABLE, explain, flatten, resolve
from common.errors import ProjectError, exits_cleanly
from common.files import read_json, sha256, write_csv, write_json
from common.logging import read_metrics
from common.provenance import config_hash
from common.settings import explain_settings
from ppo.config import Config
from ppo.jobs import Job, locked, run_jobs


@exits_cleanly
def main() -> None:
    """The command line."""
    args = parse()
    try:
        config = resolve(Config, args.config, args.overrides)
    except UNUSABLE as error:
        print(f"error: {explain(error, Config, args.config)}", file=sys.stderr)
        sys.exit(2)
    folder = Path(args.folder or f"runs/{args.config.stem}_seeds")
    seeds = list(range(args.first, args.first + args.seeds))
    started = time.perf_counter()
    with locked(folder) as lock:
        jobs = [job_for(seed, folder / f"{seed:03d}", config, args) for seed in seeds]
        stopped_by = run_jobs([job for job in jobs if job.commands], args.jobs, lock)
        if stopped_by:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(128 + stopped_by)
        report(args, config, folder, seeds, started)


def report(args: argparse.Namespace, config: Config, folder: Path, seeds: list[int], started: float) -> None:
    """Write and print what the seeds amount to."""
    rows = [read_seed(folder / f"{seed:03d}", seed) for seed in seeds]
    write_csv(folder / "seeds.csv", rows)
    result = {
        "project": "ppo",
        "config": args.config.stem,
        "metrics": aggregate(rows),
        "seeds": seeds,
        "episodes": config.eval.episodes,
        "seconds": round(time.perf_counter() - started, 1),
        "command": "python -m ppo.sweep " + " ".join(sys.argv[1:]),
    }
    write_json(folder / "sweep.json", result)
    draw(folder, seeds, config)
    show(result["metrics"], f"{folder}, {len(seeds)} seeds")
    print(json.dumps(result), flush=True)


def parse() -> argparse.Namespace:
    """The arguments; a mistake ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m ppo.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    explain_settings(parser, Config)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (default: one a core)"
    )
    parser.add_argument("--folder", default="", help="default: runs/<config>_seeds")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    for word in args.overrides:
        if word.startswith(("seed=", "run_dir=")):
            parser.error(f"{word}: seeds come from --first and --seeds, folders from --folder")
    return args


def job_for(seed: int, folder: Path, config: Config, args: argparse.Namespace) -> Job:
    """What remains to be done for a seed: nothing where its evaluation is of this very config and of the weights that
    lie there. `ProjectError` where the folder holds a run of other settings.
    """
    training = ["--config", str(args.config), f"run_dir={folder}", f"seed={seed}", "--resume", *args.overrides]
    commands = [
        ("train", ["-m", "ppo.train", *training]),
        ("eval", ["-m", "ppo.eval", "--run", str(folder)]),
    ]
    if not (folder / "config.yaml").exists():
        return Job(seed, folder, commands)
    try:
        old = flatten(resolve(Config, folder / "config.yaml"))
    except UNUSABLE as error:
        raise ProjectError(explain(error, Config, folder / "config.yaml")) from error
    new = flatten(config) | {"seed": seed}
    changed = [key for key, value in new.items() if key not in FREE_KEYS and old[key] != value]
    trained_otherwise = [key for key in changed if key.split(".")[0] not in FREE_SECTIONS]
    if trained_otherwise:
        key = trained_otherwise[0]
        raise ProjectError(
            f"{folder} was trained with {key}={old[key]}, not {new[key]}: choose another --folder, or delete it"
        )
    of_seed = dataclasses.replace(config, seed=seed)
    return Job(seed, folder, [] if not changed and evaluated(folder, of_seed) else commands)


def evaluated(folder: Path, config: Config) -> bool:
    """Whether `eval.json` is there and speaks of this config and of the weights that lie beside it."""
    noted = read_json(folder / "eval.json")
    weights = folder / "last.safetensors"
    if noted.get("config_sha256") != config_hash(config) or not weights.exists():
        return False
    return bool(noted.get("weights_sha256") == sha256(weights))


def read_seed(folder: Path, seed: int) -> dict[str, float]:
    """The metrics of one seed."""
    return {"seed": seed, **json.loads((folder / "eval.json").read_text(encoding="utf-8"))["metrics"]}


def aggregate(rows: list[dict[str, float]]) -> dict[str, float]:
    """`<name>` the mean over the seeds, `_std`, `_min`, `_median`, `_iqm`, `_iqm_low`, `_iqm_high`; `_seeds` where
    some lack it.
    """
    from common.metrics import bootstrap_interval, interquartile_mean  # PyTorch; `--help` does without

    found: dict[str, float] = {}
    for name in sorted({key for row in rows for key in row} - {"seed"}):
        values = [row[name] for row in rows if name in row]
        found[name] = statistics.fmean(values)
        found |= {f"{name}_min": min(values), f"{name}_median": statistics.median(values)}
        if len(values) < len(rows):
            found[f"{name}_seeds"] = len(values)
        if len(values) > 1:
            low, high = bootstrap_interval(values, statistic=interquartile_mean, num_resamples=2000)
            found |= {
                f"{name}_std": statistics.stdev(values),
                f"{name}_iqm": float(interquartile_mean(values)),
                f"{name}_iqm_low": low,
                f"{name}_iqm_high": high,
            }
    return found


def draw(folder: Path, seeds: list[int], config: Config) -> None:
    """The learning curves of all seeds: median, and a band from the worst to the best."""
    from ppo.eval import threshold
    from ppo.playing.pictures import draw_curve

    runs = [
        [
            (line["env_steps"], line["return_mean"])
            for line in read_metrics(folder / f"{seed:03d}" / "metrics.jsonl")
            if line["return_mean"] == line["return_mean"]
        ]
        for seed in seeds
    ]
    if all(runs):
        name = config.env.id + (", continuous" if config.env.continuous else "")
        draw_curve(folder / "learning_curve.png", {name: runs}, threshold(config), f"{name}, {len(seeds)} seeds")


def show(metrics: dict[str, float], title: str) -> None:
    """Print the main metrics as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "mean", "std", "worst", "median", "interquartile mean", title=title, title_justify="left")
    for name, mean in metrics.items():
        if f"{name}_min" in metrics:
            interval = (
                f"{metrics[f'{name}_iqm']:,.1f} ({metrics[f'{name}_iqm_low']:,.1f} to "
                f"{metrics[f'{name}_iqm_high']:,.1f})"
                if f"{name}_iqm" in metrics
                else ""
            )
            table.add_row(
                name,
                f"{mean:,.1f}",
                f"{metrics.get(f'{name}_std', 0):,.1f}",
                f"{metrics[f'{name}_min']:,.1f}",
                f"{metrics[f'{name}_median']:,.1f}",
                interval,
            )
    Console().print(table)


if __name__ == "__main__":
    main()
