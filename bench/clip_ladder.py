"""What each choice in locked-image tuning is worth, on validation images:

    python -m bench.clip_ladder [--seeds 1] [--only "linear heads"] [--tiny] [key=value ...]

Every rung is `configs/lit_flickr8k.yaml` with the keys shown, trained from the start for 20 epochs, a third of the
config's own ("60 epochs"); what is measured is recall on the validation images after the last step. Test images are
never read: this is where choices are made. Seeds count from 1000. A rung that is finished is kept under --runs as long
as its config is the same. Features of locked towers are computed where they are not cached yet, which for another tower
or more views takes some minutes.

Writes ladder.json (a record a rung and seed) and ladder.md into --results after every rung.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from bench.cells import command, name_of
from clip.config import Config
from common.config import resolve
from common.files import read_json, write_json, write_text
from common.logging import read_metrics
from common.provenance import config_hash

CONFIG = "configs/lit_flickr8k.yaml"
RUNS = Path("runs/clip_ladder")
RESULTS = Path("docs/results/clip")
FIRST_SEED = 1000
EPOCHS = 20
IMAGES = 6000
BASE = "20 epochs"

LINEAR = [f"model.{tower}_head.{key}" for tower in ("image", "text") for key in ("kind=linear", "dropout=0")]
RANDOM = ["model.start_heads=random"]
MLP = ["model.image_head.kind=mlp", *RANDOM]
MIRROR = ["data.views=2", "data.crop=1"]


def batch(size: int, epochs: int = EPOCHS) -> list[str]:
    """Batches of another size, for a number of epochs."""
    steps = epochs * IMAGES // size
    return [f"train.batch_size={size}", f"train.steps={steps}", f"train.warmup={max(5, steps // 7)}"]


def tower(name: str, weights: str, size: int) -> list[str]:
    """Another locked image tower, with the two views that are quickly computed."""
    return [
        *MIRROR,
        f"model.image.name={name}",
        f"model.image.weights={weights}",
        f"model.image.image_size={size}",
    ]


CHANGES: dict[str, list[str]] = {
    BASE: [],
    "60 epochs": batch(1000, 60),
    "heads begin at random": RANDOM,
    "linear heads": LINEAR,
    "linear heads, begun at random": [*LINEAR, *RANDOM],
    "MLP heads": [*MLP, "model.text_head.kind=mlp"],
    "MLP head for images alone": MLP,
    "no augmentation": ["data.views=1", "data.crop=1", "data.flip=false"],
    "mirror images": MIRROR,
    "one caption a step": ["data.captions=1"],
    "sigmoid loss": ["model.loss=sigmoid"],
    "label smoothing 0.1": ["train.label_smoothing=0.1"],
    "batch 64": batch(64),
    "batch 250": batch(250),
    "batch 3,000": batch(3000),
    "batch 6,000": batch(6000),
    "dropout 0.3 for images": ["model.image_head.dropout=0.3"],
    "dropout 0.7 for images": ["model.image_head.dropout=0.7"],
    "random image tower": tower("timm/tf_efficientnet_lite0", "random", 224) + RANDOM,
    "random text tower": [*MIRROR, *RANDOM, "model.text.random=true"],
    "SqueezeNet": tower("torchvision/squeezenet1_0", "", 224) + RANDOM,
    "EfficientNet-Lite0": tower("timm/tf_efficientnet_lite0", "efficientnet-lite0", 224),
    "one caption a step, text layers unlocked": ["model.text.unlock=2", "data.captions=1"],
    "one caption a step, stages and layers unlocked": [
        "model.image.unlock=1",
        "model.text.unlock=2",
        "data.captions=1",
    ],
}
RUNGS = {name: [*batch(1000), *changes] for name, changes in CHANGES.items()}
TINY = ["train.batch_size=4", "train.steps=2", "train.warmup=1", "train.eval_every=1", "device=cpu"]
COLUMNS = ("r1_t2i", "r5_t2i", "r10_t2i", "r1_i2t", "r5_i2t", "r10_i2t")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    for name in args.only or RUNGS:
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            extra = [*args.overrides, *(TINY if args.tiny else [])]
            record = run_rung(name, seed, args.runs, extra)
            print(f"{name}, seed {seed}: mean R@10 {record['r10_mean']:.3f}", flush=True)
            write(args.runs, args.results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.clip_ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(RUNGS), metavar="RUNG", help="may be repeated")
    parser.add_argument("--runs", type=Path, help=f"run folders (default: {RUNS})")
    parser.add_argument("--results", type=Path, help=f"the table (default: {RESULTS}, with --tiny the run folders)")
    parser.add_argument("--tiny", action="store_true", help="two steps: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every rung")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    args.runs = args.runs or (Path("runs/clip_ladder_tiny") if args.tiny else RUNS)
    args.results = args.results or (args.runs if args.tiny else RESULTS)
    return args


def run_rung(name: str, seed: int, runs: Path, extra: list[str]) -> dict[str, object]:
    """Train, unless that was done with the same config; what was measured after the last step."""
    folder = runs / name_of(name) / f"seed{seed}"
    kept = folder.with_suffix(".json")
    settings = [f"seed={seed}", *RUNGS[name], *extra]
    config = resolve(Config, Path(CONFIG), [f"run_dir={folder}", *settings])
    # measured at the last step, whatever interval the config has
    settings.append(f"train.eval_every={config.train.steps}")
    config = resolve(Config, Path(CONFIG), [f"run_dir={folder}", *settings])
    digest = config_hash(config)
    record = read_json(kept)
    if record.get("config_sha256") == digest:
        return record
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    command(["-m", "clip.train", "--config", CONFIG, f"run_dir={folder}", *settings])
    last = read_metrics(folder / "metrics.jsonl")[-1]
    measured = {key.removeprefix("val_"): value for key, value in last.items() if key.startswith("val_")}
    record = {
        "rung": name,
        "seed": seed,
        "r10_mean": (measured["r10_t2i"] + measured["r10_i2t"]) / 2,
        **measured,
        "loss": last["loss"],
        "steps": config.train.steps,
        "seconds": round(time.perf_counter() - started, 1),
        "overrides": CHANGES[name],
        "config_sha256": digest,
    }
    write_json(kept, record)
    return record


def write(runs: Path, results: Path) -> None:
    """ladder.json and ladder.md, of all that is finished."""
    found = {name: sorted((runs / name_of(name)).glob("seed*.json")) for name in RUNGS}
    records = {name: [read_json(path) for path in paths] for name, paths in found.items() if paths}
    lines = [json.dumps(record) for rows in records.values() for record in rows]
    write_text(results / "ladder.json", "[\n" + ",\n".join(lines) + "\n]\n")
    write_text(results / "ladder.md", table(records))


def table(records: dict[str, list[dict]]) -> str:
    """Percent, in Markdown; mean and standard deviation over the seeds."""
    rows = [
        "| | mean R@10 | R@1, R@5, R@10, text to image | image to text | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, found in records.items():
        means = [statistics.mean(record[key] for record in found) for key in COLUMNS]
        each = [f"{100 * value:.1f}" for value in means]
        both = [100 * record["r10_mean"] for record in found]
        spread = f" ± {statistics.stdev(both):.1f}" if len(both) > 1 else ""
        rows.append(
            f"| {name} | {statistics.mean(both):.1f}{spread} | {', '.join(each[:3])} | {', '.join(each[3:])} | "
            f"{len(found)} |"
        )
    return "\n".join(
        [*rows, "", f"1,000 validation images with five captions each; {EPOCHS} epochs where no number is given.", ""]
    )


if __name__ == "__main__":
    main()
