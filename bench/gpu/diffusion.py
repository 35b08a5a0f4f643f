"""CIFAR-10 diffusion at GPU scale:  python -m bench.gpu.diffusion PART [--minutes 9] [--tiny] [key=value ...]

Parts, in this order:
    speed      images a second, model FLOPs utilisation and memory of a training step, by precision, layout,
               compilation and batch
    train      --objective edm | ddpm --images 10e6: configs/edm_cifar_cond.yaml, cut to so many images, the learning
               rate zero at the last
    evaluate   50,000 samples and their Frechet distance; tables by sampler and evaluations, and by guidance; pictures
    pack       --objective edm | ddpm: the averaged weights as files of at most 15 MiB; unpack: back into a run folder
               that evaluate reads
    all        speed, train edm, train ddpm, evaluate

Each command ends by itself; with status 75 the same one goes on. What is done is kept in --work only, so results under
docs/ that came with the repository are never taken for this machine's. `ddpm` is the same network, data, batches and
number of images with the objective of configs/ddpm_cifar.yaml. `key=value` changes a setting of the config, for train,
or of the evaluation, for evaluate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.gpu import campaign, diffusion_pack, diffusion_speed
from common.checkpoint import Checkpoints
from common.config import UNUSABLE, explain, flatten, resolve, to_yaml
from common.errors import exits_cleanly
from common.files import atomic_open, write_text
from common.logging import read_metrics
from common.runtime import choose_device
from diffusion.config import Config

EDM, DDPM = Path("configs/edm_cifar_cond.yaml"), Path("configs/ddpm_cifar.yaml")
OBJECTIVES = ("edm", "ddpm")
CHECKPOINT_SECONDS = 120
LEAVE = 30.0  # seconds from the stop signal to the end: a step, a checkpoint of 0.6 GB, and the interpreter
# may differ from the command that started a run
FREE = ("run_dir", "data_root", "device", "compile", "train.save_every")
PICTURE_BYTES = 300_000
TABLE_CELL = r"_(nfe\d+|w[\d.]+)$"  # how the metrics that repeat the two tables end
TINY = [
    "model.channels=8",
    "model.groups=4",
    "model.multipliers=[1,2]",
    "model.blocks=1",
    "model.head_channels=8",
    "data.max_images=200",
    "train.batch_size=8",
    "train.log_every=1",
    "sample.steps=3",
    "sample.count=10",
]
TINY_DIGITS = [
    "data.dataset=digits",
    "data.image_size=8",
    "data.flip=false",
    "model.image_channels=1",
    "model.attention=[4]",
]
TABLES = {"eval.nfe_table": "[1,2,3,5,10,20,35,50]", "eval.guidance_table": "[1,1.5,2,3,4]", "eval.neighbours": "8"}
TINY_TABLES = {
    "eval.nfe_table": "[1,5]",
    "eval.guidance_table": "[1,2]",
    "eval.neighbours": "2",
    "eval.manifold_samples": "40",
}


# -- configs -----------------------------------------------------------------------------------------------------------


def base_config(args: argparse.Namespace) -> Config:
    """configs/edm_cifar_cond.yaml with the command line's changes; with --tiny a small network, on digits where
    CIFAR-10 is absent.
    """
    overrides = [f"device={args.device}"]
    if args.tiny:
        root = Path(resolve(Config, EDM, changes(args, "data_root")).data_root)
        overrides += TINY if (root / "cifar-10-batches-bin").is_dir() else TINY + TINY_DIGITS
    return resolve(
        Config, EDM, [*overrides, *(item for item in args.overrides if not item.startswith(("eval.", "sample.")))]
    )


def changes(args: argparse.Namespace, *sections: str) -> list[str]:
    """Those of the command line's `key=value` whose first word is one of `sections`."""
    return [item for item in args.overrides if item.partition("=")[0].split(".")[0] in sections]


def experiment(args: argparse.Namespace, objective: str) -> Config:
    """The config of one training run of `--images` images.

    The config's warm-up and the half-life of its average are kept as shares of the run. With the images a second that
    `speed` found, a checkpoint is due every two minutes, and the network is compiled if that was faster; otherwise
    every 500 steps, and not compiled.
    """
    base, found = base_config(args), campaign.read_json(args.work / "speed.json").get("train", {})
    steps = math.ceil((args.images or (64 if args.tiny else 10e6)) / base.train.batch_size)
    share = steps / base.train.steps
    rate = found.get("images_per_second", 500 * base.train.batch_size / CHECKPOINT_SECONDS)
    schedule = dataclasses.replace(
        base.train,
        steps=steps,
        warmup=round(base.train.warmup * share),
        ema=base.train.ema ** (1 / share),
        save_every=max(1, round(CHECKPOINT_SECONDS * rate / base.train.batch_size)),
        sample_every=math.ceil(steps / 4),
    )
    compiled = base.compile or bool(found.get("compile"))
    config = dataclasses.replace(base, train=schedule, compile=compiled, run_dir=str(args.work / objective))
    return config if objective == "edm" else dataclasses.replace(config, objective=resolve(Config, DDPM).objective)


def kept_config(args: argparse.Namespace, objective: str) -> tuple[Path, Config]:
    """The file with the config that a run was first started with, written now if it is new, and the config.

    What may differ is as now. Exits if the command asks for another run than the one begun.
    """
    path, config = args.work / f"{objective}.yaml", experiment(args, objective)
    if not path.exists():
        write_text(path, to_yaml(config))
    kept = resolve(Config, path)
    was, now = flatten(kept), flatten(config)
    differ = [f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key] and key not in FREE]
    if differ:
        raise SystemExit(
            f"error: {path} was started with other settings ({'; '.join(differ)}): give the same command, or another "
            "--work"
        )
    return path, dataclasses.replace(
        kept, compile=config.compile, device=config.device, data_root=config.data_root, run_dir=config.run_dir
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, budget: campaign.Budget, facts: dict[str, Any]) -> bool:
    """Train one objective until it is done, which is the result, or the budget is over."""
    objective, started = args.objective or "edm", budget.used()
    path, config = kept_config(args, objective)
    run, total = Path(config.run_dir), config.train.steps
    if trained_steps(run) < total:
        now = [f"{key}={getattr(config, key)}" for key in ("run_dir", "data_root", "device", "compile")]
        status = campaign.run_until(
            [sys.executable, "-m", "diffusion.train", "--config", str(path), "--resume", *now],
            budget.left() - (0 if args.tiny else LEAVE),
        )
        if status not in (0, campaign.STOPPED):
            raise SystemExit(f"error: diffusion.train ended with status {status}")
        campaign.spend(args.work, f"train_{objective}", budget.used() - started)
    done = trained_steps(run)
    report_training(args, objective, config, done, facts)
    return done >= total


def trained_steps(run: Path) -> int:
    """Updates that the newest checkpoint of a run has seen; 0 without one."""
    return Checkpoints(run / "checkpoints").newest_step() or 0


def report_training(args: argparse.Namespace, objective: str, config: Config, done: int, facts: dict[str, Any]) -> None:
    """Write train_<objective>.json and the log of the run so far, and print a row of it."""
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    if not lines:  # stopped before the first logged step, or unpacked
        return print(f"{objective}: {done} of {config.train.steps} steps")
    last = lines[-max(1, len(lines) // 20) :]  # a twentieth of the run
    row = {
        "objective": objective,
        "steps": done,
        "of": config.train.steps,
        "images": done * config.train.batch_size,
        "loss": statistics.fmean(line["loss"] for line in last),
        "lr": lines[-1]["lr"],
        "images_per_second": statistics.median(line["images_per_second"] for line in lines),
        "mfu": statistics.median(line["mfu"] for line in lines) if all("mfu" in line for line in lines) else None,
    }
    seconds = campaign.read_json(args.work / "seconds.json").get(f"train_{objective}", 0.0)
    content = {"metrics": row, "loss_is": "the mean of the last twentieth of the lines", "config": flatten(config)}
    campaign.write_result(args.out / f"train_{objective}.json", content, facts, seconds)
    shutil.copyfile(Path(config.run_dir) / "metrics.jsonl", args.out / f"train_{objective}.jsonl")
    campaign.print_table("training", [row])


def evaluate(args: argparse.Namespace, budget: campaign.Budget, facts: dict[str, Any]) -> bool:
    """Evaluate each run that there is, or the one of `--objective`; with all of them done, print their tables."""
    runs = [name for name in OBJECTIVES if args.objective in (None, name) and trained_steps(args.work / name)]
    if not runs:
        raise SystemExit(f"error: no trained run in {args.work}: train first, or unpack one")
    if not args.fid:
        print(
            "no FID: distances are on the features of the classifier named below; --fid needs the Inception weights, "
            "95 MB"
        )
    results = [evaluate_run(args, name, budget, facts) for name in runs]
    if not all(results):
        return False
    columns = {result["metrics"]["objective"]: result["metrics"] for result in results}
    metrics = dict.fromkeys(metric for column in columns.values() for metric in column if metric != "objective")
    campaign.print_table(
        "evaluation",
        [{"metric": metric, **{name: column.get(metric) for name, column in columns.items()}} for metric in metrics],
    )
    campaign.print_table(
        "by sampler and network evaluations", [row for result in results for row in result["samplers"]]
    )
    campaign.print_table("by guidance", [row for result in results for row in result["guidance"]])
    return True


def evaluate_run(
    args: argparse.Namespace, objective: str, budget: campaign.Budget, facts: dict[str, Any]
) -> dict[str, Any]:
    """The result of one run, kept in --work under the checkpoint and the settings it is of; {} if the budget is over
    before it is there.
    """
    run, name = args.work / objective, f"eval_{objective}{'_fid' if args.fid else ''}"
    settings, step, kept = evaluation_settings(args), trained_steps(run), args.work / f"{name}.json"
    result = campaign.read_json(kept)
    if (result.get("settings"), result.get("steps")) != (settings, step):
        started = budget.used()
        status = campaign.run_until(
            [
                sys.executable,
                "-m",
                "diffusion.eval",
                "--run",
                str(run),
                *settings,
                f"device={args.device}",
                f"data_root={base_config(args).data_root}",
            ],
            budget.left() - (0 if args.tiny else LEAVE),
        )
        seconds = campaign.spend(args.work, f"{name}_{step}", budget.used() - started)
        if status == campaign.STOPPED:
            return {}
        if status:
            raise SystemExit(f"error: diffusion.eval ended with status {status}")
        campaign.write_result(kept, collect(run, objective, settings, step), facts, seconds)
        result = campaign.read_json(kept)
    shutil.copyfile(kept, args.out / kept.name)
    for picture in ("samples", "neighbours", "samplers"):
        publish_picture(run / f"figures/{picture}.png", args.out / f"{objective}_{picture}.png")
    return result


def evaluation_settings(args: argparse.Namespace) -> list[str]:
    """The `key=value` that diffusion.eval is given; where no ResNet-20 is at hand, a classifier is trained on the
    training images.
    """
    config = base_config(args)
    resnet20 = config.data.dataset == "cifar10" and (Path(config.data_root) / "pretrained_resnet_cifar10").is_dir()
    settings = TABLES | {
        "eval.features": "inception" if args.fid else "resnet20" if resnet20 else "classifier",
        "eval.num_samples": str(args.samples),
        "eval.nfe_samples": str(args.table_samples),
        "sample.batch_size": "16" if args.tiny else "1000",
    }
    settings |= TINY_TABLES if args.tiny else {}
    settings |= dict(item.split("=", 1) for item in changes(args, "eval", "sample"))
    return [f"{key}={value}" for key, value in settings.items()]


def collect(run: Path, objective: str, settings: list[str], step: int) -> dict[str, Any]:
    """What diffusion.eval left in the run folder, in one object: the metrics, and a row for each line of its two
    tables.
    """
    config, found = resolve(Config, run / "config.yaml"), campaign.read_json(run / "eval.json")
    if found["checkpoint_step"] != step:
        raise SystemExit(
            f"error: {run}/eval.json is of step {found['checkpoint_step']}, the newest checkpoint of step {step}"
        )
    samplers, guidance = (campaign.read_json(run / f"figures/{kind}.json") for kind in ("samplers", "guidance"))
    metrics = {
        "objective": objective,
        "steps": step,
        "of": config.train.steps,
        "images": step * config.train.batch_size,
    }
    metrics |= {key: value for key, value in found["metrics"].items() if not re.search(TABLE_CELL, key)}
    return {
        "metrics": metrics,
        "settings": settings,
        "steps": step,
        "n": found["n"],
        "fd_floor_is": "held-out images against the training images: as many as were generated, or all there are",
        "samples": f"{found['sampler']}, {found['sampler_steps']} steps, guidance {found['guidance']}, "
        f"seed {found['seeds'][0]}, "
        f"{found['weights']} weights; the grid shows the first images, none chosen",
        "samplers": [
            {"objective": objective, "sampler": name, **cells} for name, cells in samplers.get("rows", {}).items()
        ],
        "guidance": [
            {"objective": objective, "guidance": scale, **cells} for scale, cells in guidance.get("rows", {}).items()
        ],
        "tables": {key: samplers.get(key) for key in ("metric", "n", "floor")},
    }


def publish_picture(source: Path, target: Path) -> None:
    """Copy a PNG, if it is there; above 300 kB as 256 colours, which a repository can carry."""
    if not source.is_file():
        return
    if source.stat().st_size <= PICTURE_BYTES:
        shutil.copyfile(source, target)
        return
    from PIL import Image

    with Image.open(source) as image, atomic_open(target) as file:
        image.convert("RGB").quantize(256).save(file, "PNG", optimize=True)


def everything(args: argparse.Namespace, budget: campaign.Budget, facts: dict[str, Any]) -> bool:
    """speed, train edm, train ddpm, evaluate: as far as the budget reaches."""
    if not diffusion_speed.speed(args, base_config(args), budget, facts):
        return False
    for objective in OBJECTIVES:
        if budget.over() or not train(argparse.Namespace(**{**vars(args), "objective": objective}), budget, facts):
            return False
    return not budget.over() and evaluate(argparse.Namespace(**{**vars(args), "objective": None}), budget, facts)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 0 when the part is done, `campaign.UNFINISHED` when the same command goes on, 1
    and 2 for errors.
    """
    args = parse(argv)
    budget = campaign.Budget.of(args)
    try:
        config = base_config(args)
    except UNUSABLE as error:
        print(f"error: {explain(error, Config, EDM)}", file=sys.stderr)
        sys.exit(2)
    facts = campaign.facts(choose_device(args.device))
    if args.part in ("pack", "unpack"):
        objective = args.objective or "edm"
        run, folder = args.work / objective, args.folder or args.work / f"packed_{objective}"
        done = (
            diffusion_pack.pack(run, folder, args.dtype) if args.part == "pack" else diffusion_pack.unpack(run, folder)
        )
    elif args.part == "speed":
        done = diffusion_speed.speed(args, config, budget, facts)
    else:
        done = {"train": train, "evaluate": evaluate, "all": everything}[args.part](args, budget, facts)
    print(f"{args.part}: done" if done else f"{args.part}: out of time; the same command goes on", flush=True)
    sys.exit(0 if done else campaign.UNFINISHED)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = campaign.parser("diffusion", __doc__)
    parser.add_argument("part", choices=("speed", "train", "evaluate", "pack", "unpack", "all"))
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over the YAML, dotted: train.batch_size=256"
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="train, pack and unpack: default edm; evaluate: default every run there is",
    )
    parser.add_argument(
        "--images",
        type=float,
        help="train: how many, such as 10e6; the learning rate is zero at the last (default 10e6)",
    )
    parser.add_argument("--samples", type=int, help="evaluate: default 50000")
    parser.add_argument("--table-samples", type=int, help="evaluate: images a cell of the tables (default 2000)")
    parser.add_argument(
        "--fid", action="store_true", help="evaluate: with the Inception network, where its weights are or can be had"
    )
    parser.add_argument("--seconds", type=float, help="speed: of steady steps a setting (default 30)")
    parser.add_argument(
        "--first", type=int, help="speed: only so many of its settings, the likely best first (default all six)"
    )
    parser.add_argument(
        "--train-seconds", type=float, default=960, help="speed: say how many images fit into so many (default 960)"
    )
    parser.add_argument("--folder", type=Path, help="pack, unpack: default <work>/packed_<objective>")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="pack: matrices and kernels in this (default bf16)"
    )
    args = campaign.settle(parser.parse_intermixed_args(argv))
    for name, tiny, full in (("samples", 50, 50_000), ("table_samples", 20, 2000), ("seconds", 0.2, 30.0)):
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.tiny else full)
    return args


if __name__ == "__main__":
    main()
