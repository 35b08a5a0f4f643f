"""What each implementation detail is worth:

    python -m bench.ppo_ablations --env cartpole [--seeds 5] [--jobs 2] [--only "no clipping"]

Each row is the config with one thing changed, trained and evaluated by `python -m ppo.sweep` in runs/ppo_ablations;
what is finished is not repeated, what was stopped goes on. Writes docs/results/ppo/ablations_<env>.json and .md: the
return of the last policy over the seeds as interquartile mean with its 95 % interval, and the worst seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS, RUNS = Path("docs/results/ppo"), Path("runs/ppo_ablations")
CONFIGS = {"cartpole": "configs/ppo_cartpole.yaml", "lunarlander": "configs/ppo_lunarlander.yaml"}
CHANGES = {
    "as configured": "",
    "no clipping of the ratio": "train.clip=1000000",
    "value clipping": "train.clip_value=0.2",
    "advantages not normalised": "train.normalize_advantage=false",
    "one epoch": "train.epochs=1",
    "no GAE, lambda = 1": "train.gae_lambda=1",
    "one-step advantages, lambda = 0": "train.gae_lambda=0",
    "truncation taken for termination": "train.bootstrap_truncated=false",
    "default initial weights": "model.orthogonal=false",
    "gradients not clipped": "train.max_grad_norm=0",
    "constant rate and clip": "train.lr_decay=constant train.clip_decay=constant",
    "linear rate and clip": "train.lr_decay=linear train.clip_decay=linear",
    "entropy bonus 0": "train.entropy_weight=0",
    "entropy bonus 0.01": "train.entropy_weight=0.01",
    "relu": "model.activation=relu",
    "one trunk for both": "model.shared=true",
    "Adam's epsilon 1e-8": "train.adam_eps=1e-8",
    "observations normalised": "env.normalize_observations=true",
    "rewards normalised": "env.normalize_rewards=true",
    "stopped at KL 0.02": "train.target_kl=0.02",
    "rewards as they are": "env.normalize_rewards=false",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ppo_ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", choices=list(CONFIGS), default="cartpole")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", action="append", choices=list(CHANGES), help="only this row; may be repeated")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for every row; a row's own change comes after"
    )
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for number, (label, change) in enumerate(CHANGES.items()):
        folder = RUNS / args.env / f"{number:02d}"
        if not args.only or label in args.only:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "ppo.sweep",
                    "--config",
                    CONFIGS[args.env],
                    "--seeds",
                    str(args.seeds),
                    "--jobs",
                    str(args.jobs),
                    "--folder",
                    str(folder),
                    "eval.video=false",
                    *args.overrides,
                    *change.split(),
                ],
                stdout=subprocess.DEVNULL,
                check=True,
            )
            print(label, flush=True)
        if (folder / "sweep.json").exists():
            result = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
            rows[label] = {
                "change": change,
                "command": result["command"],
                "metrics": result["metrics"],
                "seeds": result["seeds"],
            }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"ablations_{args.env}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"ablations_{args.env}.md").write_text(table(rows), encoding="utf-8")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown; a blank cell means that no seed had the figure."""
    lines = [
        "| change | return, most likely action | worst seed | return, drawn actions | steps to solve (seeds that did) "
        "| seeds |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        m, count = row["metrics"], len(row["seeds"])
        spread = [
            f"{m[f'{name}_iqm']:.1f} ({m[f'{name}_iqm_low']:.1f} to {m[f'{name}_iqm_high']:.1f})"
            if f"{name}_iqm" in m
            else ""
            for name in ("return_mean", "return_mean_stochastic")
        ]
        solved = (
            f"{m['steps_to_solve_median']:,.0f} ({m.get('steps_to_solve_seeds', count):.0f})"
            if "steps_to_solve" in m
            else "never"
        )
        lines.append(f"| {label} | {spread[0]} | {m['return_mean_min']:.1f} | {spread[1]} | {solved} | {count} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
