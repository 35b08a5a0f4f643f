"""What each choice is worth: train variations of one diffusion config over several seeds and tabulate them.

    python -m bench.diffusion_variations --config configs/ddpm_digits.yaml --seeds 3 --jobs 2

Every variation differs from the config in the keys shown and is sampled with (almost) the same number of network
evaluations. Writes a table to docs/results/diffusion/variations.json, prints it as Markdown; the last line of stdout is
the JSON. Finished runs are kept under runs/variations/ and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.checkpoint import read_weights
from common.config import resolve
from common.files import read_json, write_json
from common.provenance import config_hash, trained_otherwise
from diffusion.config import Config

VARIATIONS: dict[str, list[str]] = {
    "eps, cosine": ["objective.prediction=eps", "objective.schedule=cosine"],
    "eps, linear": ["objective.prediction=eps", "objective.schedule=linear"],
    "eps, cosine, min-SNR": ["objective.prediction=eps", "objective.schedule=cosine", "objective.weighting=min_snr"],
    "x0, cosine": ["objective.prediction=x0", "objective.schedule=cosine"],
    "v, cosine": ["objective.prediction=v", "objective.schedule=cosine"],
    "v, linear": ["objective.prediction=v", "objective.schedule=linear"],
    "v, linear, zero terminal SNR": [
        "objective.prediction=v",
        "objective.schedule=linear",
        "objective.zero_terminal_snr=true",
    ],
    "EDM, Heun": ["objective.kind=edm", "sample.sampler=heun", "sample.steps=10"],
    "flow, uniform t": ["objective.kind=flow", "objective.flow_time=uniform", "sample.sampler=euler"],
    "flow, logit-normal t": ["objective.kind=flow", "objective.flow_time=logit_normal", "sample.sampler=euler"],
    "eps, cosine, time added instead of scale-shift": [
        "objective.prediction=eps",
        "objective.schedule=cosine",
        "model.scale_shift=false",
    ],
}


def run_one(name: str, seed: int, config: str, threads: int) -> dict[str, float]:
    """Train and evaluate one variation with one seed: averaged weights, then the raw weights of the last step."""
    folder = Path("runs/variations") / f"{name.replace(', ', '-').replace(' ', '_')}_seed{seed}"
    results = {}
    for weights in ("ema", "raw"):
        kept = folder / f"eval_{weights}.json"
        settings = [f"seed={seed}", "train.sample_every=0", *VARIATIONS[name]]
        measured = [f"sample.weights={weights}", "eval.neighbours=0"]
        wanted = resolve(Config, Path(config), [*settings, *measured])
        if read_json(kept).get("config_sha256") != config_hash(wanted):
            if not is_trained(folder, wanted):
                command("train", ["--config", config, "--overwrite", f"run_dir={folder}", *settings], threads)
            write_json(kept, json.loads(command("eval", ["--run", str(folder), *measured], threads)))
        results[weights] = json.loads(kept.read_text())["metrics"]
    distance = next(key for key in results["ema"] if key.startswith(("fd_", "fid")) and key != "fd_floor")
    return {
        "fd": results["ema"][distance],
        "fd_raw": results["raw"][distance],
        "fd_floor": results["ema"]["fd_floor"],
        "conditional_accuracy": results["ema"]["conditional_accuracy"],
        "recall": results["ema"]["recall"],
    }


def is_trained(folder: Path, wanted: Config) -> bool:
    """Whether a whole training with these settings lies there, none that was stopped."""
    if not (folder / "model.safetensors").exists():
        return False
    facts = read_weights(folder / "model.safetensors")[1]
    same = not trained_otherwise(facts.get("config", ""), wanted, free=("run_dir", "sample.", "eval."))
    return same and facts["step"] == facts.get("total_steps")


def command(program: str, arguments: list[str], threads: int) -> str:
    """Run `python -m diffusion.<program>`; the last line of its output."""
    done = subprocess.run(
        [sys.executable, "-m", f"diffusion.{program}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"diffusion.{program} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def summarise(name: str, runs: list[dict[str, float]]) -> dict[str, object]:
    """Mean and standard deviation over the seeds."""
    row: dict[str, object] = {"variation": name, "overrides": VARIATIONS[name], "seeds": len(runs)}
    for metric in runs[0]:
        values = [run[metric] for run in runs]
        row[metric] = statistics.mean(values)
        row[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ddpm_digits.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--only", nargs="+", choices=list(VARIATIONS), default=list(VARIATIONS), metavar="NAME")
    parser.add_argument("--out", default="docs/results/diffusion/variations.json")
    args = parser.parse_args()

    tasks = [(name, seed) for name in args.only for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(tasks, pool.map(lambda task: run_one(*task, args.config, args.threads), tasks), strict=True))
    rows = [summarise(name, [results[name, seed] for seed in range(args.seeds)]) for name in args.only]
    table = {"config": args.config, "seeds": args.seeds, "rows": rows}
    write_json(Path(args.out), table)
    print("| variation | Fréchet distance | without EMA | conditional accuracy | recall |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variation']} | {row['fd']:.2f} ± {row['fd_std']:.2f} | {row['fd_raw']:.2f} ± "
            f"{row['fd_raw_std']:.2f} "
            f"| {row['conditional_accuracy']:.3f} ± {row['conditional_accuracy_std']:.3f} | {row['recall']:.3f} |"
        )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
