"""PPO on Atari from pixels, with a GPU:

    python -m bench.gpu.ppo speed|train|evaluate [--game pong|breakout] [--minutes 9] [--tiny]

    speed      agent steps a second for several numbers of environments, and what environments, choosing actions and
               learning take of it
    train      `ppo.train` for as many steps as fit into --commands times --minutes at the measured speed; the
               learning rate ends at zero
    evaluate   `ppo.eval`: 100 games with the best and with the last policy; curve and film

In this order. `train` makes its plan once, in <work>/<game>/plan.json; a command that runs out of time saves, exits
with status 75, and the same command goes on. Results in --out: speed.json, train_<game>.json, eval_<game>.json,
<game>_curve.png, <game>_episode.gif.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence
from safetensors import safe_open

import ppo.train
from bench.gpu import campaign
from bench.ppo import stopwatch
from bench.rounds import peak_memory
from common.config import Options, resolve
from common.errors import ProjectError, exits_cleanly
from common.files import atomic_open, write_json
from common.logging import read_metrics
from common.runtime import choose_device
from ppo.config import Config

ROLLOUT = 128  # steps of each environment between two updates, as in configs/ppo_pong.yaml
TINY = ["train.rollout=8", "train.batch_size=8", "train.epochs=1"]
LEAVE = 40.0  # seconds that a training needs to end: one update, a checkpoint, the process itself
START = 20.0  # seconds until it takes its first step
SAVES = 12  # of a training: each begins new games, and resuming plays again what came after the last
GIF_BYTES = 300_000
# (scale, keep every so many frames), until it fits
SMALLER = ((1, 1), (0.67, 1), (0.67, 2), (0.5, 2), (0.5, 3), (0.34, 4), (0.34, 8))


def config_path(game: str) -> Path:
    return Path(f"configs/ppo_{game}.yaml")


def settings(args: argparse.Namespace, count: int) -> list[str]:
    """Overrides for `count` environments. From 32 on a rollout is cut into 16 minibatches, below into ones of 256,
    as in the paper.
    """
    shape = TINY if args.tiny else [f"train.rollout={ROLLOUT}", f"train.batch_size={max(2 * ROLLOUT, 8 * count)}"]
    return [f"env.count={count}", *shape, f"device={args.device}", *args.overrides]


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> int:
    """A row for each number of environments. Returns the exit status."""
    budget, device = campaign.Budget.of(args), choose_device(args.device)
    facts, kept, known = campaign.facts(device), args.work / "speed.json", conditions(args, device)
    earlier = campaign.read_json(kept)
    rows: list[dict[str, Any]] = earlier["rows"] if earlier.get("settings") == known else []
    status, longest = 0, 2 * args.seconds
    for count in args.counts:
        if count in [row["count"] for row in rows]:
            continue
        if budget.over(1.3 * longest):
            status = campaign.UNFINISHED
            break
        began = time.perf_counter()
        rows.append(measure(args, count, args.seconds))
        longest = max(longest, time.perf_counter() - began)
        total = campaign.spend(args.work, "speed", time.perf_counter() - began)
        write_json(kept, {"settings": known, "rows": rows})
        campaign.write_result(args.out / "speed.json", {"settings": known, "rows": rows}, facts, total)
        print(f"{count} environments: {rows[-1]['steps_per_s']:,.0f} steps/s", flush=True)
    campaign.print_table(f"ppo.train, {args.game}", rows)
    return status


def conditions(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a measured speed holds for."""
    return {
        "game": args.game,
        "overrides": args.overrides,
        "tiny": args.tiny,
        "machine": campaign.facts(device)["machine"],
    }


def measure(args: argparse.Namespace, count: int, seconds: float) -> dict[str, Any]:
    """`ppo.train` for about `seconds`, after some updates in the same process that warm up and tell how many that will
    be.

    Returns a row: agent steps a second (dead rows are none), and shares of the time. A step's actions are read from the
    device, and so are the numbers logged after each update, so the clock need not wait for it anywhere else.
    """
    folder = args.work / "speed"
    words = [*settings(args, count), f"run_dir={folder}", "train.log_every=1", "train.save_every=1000000"]
    size = resolve(Config, config_path(args.game), words).train.rollout * count
    lines, _ = timed_run(args, [*words, f"train.steps={3 * size}"])
    updates = max(3, round(seconds * lines[-1]["updates_per_second"]))
    gpu = choose_device(args.device).type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    lines, spent = timed_run(args, [*words, f"train.steps={updates * size}"])
    shutil.rmtree(folder)
    total = sum(1 / line["updates_per_second"] for line in lines)
    config = resolve(Config, config_path(args.game), words)
    return {
        "count": count,
        "backend": config.env.backend,
        "batch_size": config.train.batch_size,
        "steps_per_s": lines[-1]["env_steps"] / total,
        "environment": spent["environment"] / total,
        "inference": (spent["collect"] - spent["environment"]) / total,
        "update": 1 - spent["collect"] / total,
        "environment_ms": 1000 * spent["environment"] / (updates * config.train.rollout),
        "update_ms": 1000 * (total - spent["collect"]) / updates,
        "updates": updates,
        "seconds": total,
        "threads": int(spent["threads"]),
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "host_peak_gib": peak_memory() / 1024,
    }


def timed_run(args: argparse.Namespace, words: list[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """`ppo.train` in this process: the lines of its log, and the seconds inside environments and inside
    `Collector.collect`.
    """
    config = resolve(Config, config_path(args.game), words)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    said = io.StringIO()
    try:
        with stopwatch() as spent, contextlib.redirect_stderr(said):
            ppo.train.train(config, Options("train", overwrite=True))
    except SystemExit:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        for number, handler in handlers.items():  # those of the run would swallow a signal
            signal.signal(number, handler)
    return read_metrics(Path(config.run_dir) / "metrics.jsonl"), spent


# -- train -------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Begin or go on. Returns the exit status."""
    budget, run = campaign.Budget.of(args), args.work / args.game
    plan = make_plan(args, budget)
    device = choose_device(args.device)
    if finished(run):
        print(f"{run} has ended after {plan['steps']:,} steps; delete it to begin anew")
        return 0
    status = campaign.run_until(
        [
            sys.executable,
            "-m",
            "ppo.train",
            "--config",
            str(config_path(args.game)),
            "--resume",
            *plan["overrides"],
            f"run_dir={run}",
        ],
        budget.left() - LEAVE,
    )
    if status not in (0, campaign.STOPPED):
        raise ProjectError(f"ppo.train ended with status {status}; what it said stands above")
    lines, seconds = read_metrics(run / "metrics.jsonl"), campaign.spend(args.work, args.game, budget.used())
    every = max(1, len(lines) // 200)
    metrics = {name: lines[-1][name] for name in ("env_steps", "episodes", "return_mean", "lr")} if lines else {}
    curve = [[line["env_steps"], line["return_mean"]] for line in lines[::every] if not math.isnan(line["return_mean"])]
    write_json(run / "seconds.json", {"seconds": seconds})
    content = {
        "game": args.game,
        "finished": status == 0,
        "plan": plan,
        "metrics": numbers_only(metrics),
        "curve": curve,
    }
    campaign.write_result(args.out / f"train_{args.game}.json", content, campaign.facts(device), seconds)
    campaign.print_table(
        f"{args.game}, {'done' if status == 0 else 'to be continued'}", [{"planned": plan["steps"], **metrics}]
    )
    return campaign.UNFINISHED if status else 0


def make_plan(args: argparse.Namespace, budget: campaign.Budget) -> dict[str, Any]:
    """Steps and overrides of a training, kept from its first command to its last: the learning rate's way to zero
    depends on them.
    """
    path = args.work / args.game / "plan.json"
    plan = campaign.read_json(path)
    if plan:
        return plan
    words = settings(args, args.envs)
    config = resolve(Config, config_path(args.game), words)
    size, rate = args.envs * config.train.rollout, 0.0
    steps = args.steps
    if not steps:
        known = campaign.read_json(args.work / "speed.json")
        here = {**conditions(args, choose_device(args.device)), "game": None} == {
            **known.get("settings", {}),
            "game": None,
        }
        rates = [row["steps_per_s"] for row in known["rows"] if row["count"] == args.envs] if here else []
        rate = rates[0] if rates else measure(args, args.envs, args.seconds)["steps_per_s"]
        seconds = args.commands * (60 * args.minutes - LEAVE - START) - budget.used()
        steps = int(0.9 * rate * seconds)
    updates = max(2, steps // size)
    plan = {
        "steps": updates * size,
        "updates": updates,
        "measured_steps_per_s": rate,
        "overrides": [*words, f"train.steps={updates * size}", f"train.save_every={max(1, updates // SAVES)}"],
    }
    write_json(path, plan)
    print(f"{args.game}: {plan['steps']:,} steps, {updates} updates", flush=True)
    return plan


def finished(run: Path) -> bool:
    """Whether the plan is carried out: a training that was stopped leaves its weights behind, too, with the number
    of its last update.
    """
    plan, path = campaign.read_json(run / "plan.json"), run / "last.safetensors"
    if not plan or not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return int(file.metadata()["update"]) >= plan["updates"]


def numbers_only(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: the mean return before the first episode is over."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


# -- evaluate ----------------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> int:
    """`ppo.eval`, all games of a kind side by side. Returns the exit status."""
    budget, run = campaign.Budget.of(args), args.work / args.game
    if not finished(run):
        raise ProjectError(
            f"{run} holds no finished training: python -m bench.gpu.ppo train --game {args.game} makes one"
        )
    short = ["env.max_episode_steps=40", "eval.video_frames=20"] if args.tiny else []
    command = [
        sys.executable,
        "-m",
        "ppo.eval",
        "--run",
        str(run),
        f"device={args.device}",
        f"eval.episodes={args.episodes}",
        f"eval.count={args.episodes}",
        *short,
        *args.overrides,
    ]
    status = campaign.run_until(command, budget.left() - 10)
    if status == campaign.STOPPED:
        print("out of time: add --minutes 20, or env.max_episode_steps=10000 against a policy that loops")
        return campaign.UNFINISHED
    if status:
        raise ProjectError(f"ppo.eval ended with status {status}; what it said stands above")
    found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    copy(run / "figures/learning_curve.png", args.out / f"{args.game}_curve.png")
    film = run / "figures/episode.gif"
    if film.exists():
        shrink(film, args.out / f"{args.game}_episode.gif")
    trained = campaign.read_json(run / "seconds.json").get("seconds")
    content = {
        "game": args.game,
        "metrics": found["metrics"],
        "n": found["n"],
        "policy": found["policy"],
        "update": found["checkpoint_step"],
        "plan": campaign.read_json(run / "plan.json"),
        "training_seconds": trained,
    }
    facts = campaign.facts(choose_device(args.device))
    campaign.write_result(args.out / f"eval_{args.game}.json", content, facts, budget.used())
    return 0


def copy(source: Path, target: Path) -> None:
    """One file, whole or not at all; nothing where there is none (a curve needs a finished episode)."""
    if source.exists():
        with atomic_open(target) as file:
            file.write(source.read_bytes())


def shrink(source: Path, target: Path, limit: int = GIF_BYTES) -> None:
    """The film in at most `limit` bytes: as it is, then smaller, then with fewer frames a second, then cut short.

    Raises:
        ProjectError: not even two frames fit.
    """
    content = source.read_bytes()
    with Image.open(source) as film:
        pause = film.info.get("duration", 40)
        frames = [frame.convert("L") for frame in ImageSequence.Iterator(film)]
    tries = [(scale, every, len(frames)) for scale, every in SMALLER]
    while tries[-1][2] > 2:
        tries.append((*SMALLER[-1], tries[-1][2] // 2))
    for scale, every, length in tries:
        if len(content) <= limit:
            break
        size = tuple(round(scale * side) for side in frames[0].size)
        parts = [frame.resize(size, Image.Resampling.LANCZOS).quantize(32) for frame in frames[:length:every]]
        buffer = io.BytesIO()
        parts[0].save(buffer, format="GIF", save_all=True, append_images=parts[1:], duration=pause * every, loop=0)
        content = buffer.getvalue()
    if len(content) > limit:
        raise ProjectError(f"{source}: two frames alone have more than {limit} bytes")
    with atomic_open(target) as file:
        file.write(content)


# -- the command line --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what --tiny leaves open filled in."""
    parser = campaign.parser("ppo", __doc__)
    parser.add_argument("part", choices=("speed", "train", "evaluate"))
    parser.add_argument("--game", choices=("pong", "breakout"), default="pong")
    parser.add_argument(
        "--counts",
        type=lambda text: [int(part) for part in text.split(",")],
        default="8,32,64,128,256",
        help="speed: numbers of environments (default %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="speed: of each measurement (default %(default)s)")
    parser.add_argument("--envs", type=int, default=64, help="train: environments (default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=0, help="train: agent steps (default: what fits, from speed.json or a measurement)"
    )
    parser.add_argument(
        "--commands", type=int, default=1, help="train: spread the steps over so many commands of --minutes each"
    )
    parser.add_argument("--episodes", type=int, default=100, help="evaluate: games of each kind (default %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over the config, such as env.backend=envpool"
    )
    args = campaign.settle(parser.parse_intermixed_args(argv))
    if args.tiny:
        args.counts, args.seconds, args.envs, args.episodes = [2, 4], min(args.seconds, 0.5), 2, 2
        args.steps = args.steps or 64
    return args


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run one part; exit status 75 means that the same command goes on."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that are started
    args = parse(argv)
    sys.exit({"speed": speed, "train": train, "evaluate": evaluate}[args.part](args))


if __name__ == "__main__":
    main()
