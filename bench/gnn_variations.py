"""What each choice is worth on Cora:  python -m bench.gnn_variations [--seeds 5] [--only depth]

Every variation is gcn_cora.yaml (or gcnii_cora.yaml) with one thing changed, trained and evaluated by the project's own
commands in runs/gnn_variations; what is finished is not repeated. Writes docs/results/gnn/variations.json,
variations.md (the tables of gnn/README.md) and depth.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from bench.cells import name_of
from common.config import resolve
from common.files import read_json
from common.provenance import config_hash
from gnn.config import Config
from gnn.core.pictures import draw_depth

RESULTS, RUNS = Path("docs/results/gnn"), Path("runs/gnn_variations")
DEPTHS = (2, 4, 8, 16, 32)
WIDE = "model.hidden=64"
GROUPS: dict[str, dict[str, str]] = {  # group -> label -> overrides of gcn_cora.yaml, or "config: overrides"
    "depth": {
        **{f"GCN, {n} layers": f"{WIDE} model.layers={n} model.dropout=0.5" for n in DEPTHS},
        **{
            f"GCN with residuals, {n} layers": f"{WIDE} model.layers={n} model.dropout=0.5 model.residual=true"
            for n in DEPTHS
        },
        **{
            f"GCN with residuals and layer norm, {n} layers": f"{WIDE} model.layers={n} model.dropout=0.5 "
            "model.residual=true model.norm=layer"
            for n in DEPTHS
        },
        **{f"GCNII, {n} layers": f"gcnii_cora: model.layers={n} train.steps=300" for n in DEPTHS},
        **{f"APPNP, {n} hops": f"model.layer=appnp {WIDE} model.hops={n} model.dropout=0.5" for n in DEPTHS},
    },
    "width": {f"width {n}": f"model.hidden={n}" for n in (4, 8, 16, 32, 64, 128)},
    "dropout": {f"dropout {p}": f"model.dropout={p}" for p in (0.0, 0.2, 0.5, 0.7, 0.8, 0.9)},
    "penalty": {f"weight decay {w}": f"train.weight_decay={w}" for w in ("0", "1e-4", "5e-4", "1e-3", "5e-3")},
    "normalisation": {
        "none between layers": "model.norm=none",
        "batch norm": "model.norm=batch",
        "layer norm": "model.norm=layer",
        "features as they are": "data.normalize=false",
    },
    "layer": {kind: f"model.layer={kind}" for kind in ("mlp", "gcn", "sage", "gin", "gat", "gatv2", "appnp")},
    "features": {"sparse features": "data.storage=sparse", "dense features": "data.storage=dense"},
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gnn_variations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="only this group; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every variation, such as data_root=...")
    args = parser.parse_args()
    for group, variations in GROUPS.items():
        if not args.only or group in args.only:
            for label, change in variations.items():
                run(group, label, change, args)
    results = collect()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "variations.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "variations.md").write_text(tables(results), encoding="utf-8")
    if "depth" in results:
        draw_depth(RESULTS / "depth.png", curves(results["depth"]))


def run(group: str, label: str, change: str, args: argparse.Namespace) -> None:
    """Train and evaluate one variation, unless it is done."""
    folder = RUNS / group / name_of(label)
    config, _, overrides = change.rpartition(": ")
    words = [
        f"run_dir={folder}",
        f"train.seeds={args.seeds}",
        "eval.figures=false",
        *overrides.split(),
        *args.overrides,
    ]
    path = f"configs/{config or 'gcn_cora'}.yaml"
    wanted = config_hash(resolve(Config, Path(path), words))
    if (folder / "done.json").exists() and read_json(folder / "eval.json").get("config_sha256") == wanted:
        return
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "gnn.train", "--config", path, "--resume", *words],
        stderr=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - started
    subprocess.run([sys.executable, "-m", "gnn.eval", "--run", str(folder)], stdout=subprocess.DEVNULL, check=True)
    (folder / "done.json").write_text(json.dumps({"change": change, "seconds": round(seconds, 1)}), encoding="utf-8")
    print(f"{group}: {label}, {seconds:.0f} s", flush=True)


def collect() -> dict[str, dict[str, dict]]:
    """group -> label -> metrics, seeds and seconds of everything that is done."""
    found: dict[str, dict[str, dict]] = {}
    for group, variations in GROUPS.items():
        for label in variations:
            folder = RUNS / group / name_of(label)
            if (folder / "done.json").exists():
                result, note = (
                    json.loads((folder / name).read_text(encoding="utf-8")) for name in ("eval.json", "done.json")
                )
                found.setdefault(group, {})[label] = {"metrics": result["metrics"], "seeds": result["seeds"], **note}
    return found


def tables(results: dict[str, dict[str, dict]]) -> str:
    """One table a group in Markdown; percent, mean and standard deviation over the seeds."""
    lines = []
    for group, rows in results.items():
        lines += [f"| {group} | test accuracy | validation accuracy | seeds |", "|---|---|---|---|"]
        for label, row in rows.items():
            m = row["metrics"]
            cells = [
                f"{100 * m[name]:.1f} ± {100 * m.get(f'{name}_std', 0):.1f}"
                for name in ("test_accuracy", "val_accuracy")
            ]
            lines.append(f"| {label} | {' | '.join(cells)} | {len(row['seeds'])} |")
        lines.append("")
    return "\n".join(lines)


def curves(rows: dict[str, dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """method -> depth -> (mean, standard deviation) of the test accuracy."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for label, row in rows.items():
        method, _, rest = label.rpartition(", ")
        metrics = row["metrics"]
        found.setdefault(method, {})[int(rest.split()[0])] = (
            metrics["test_accuracy"],
            metrics.get("test_accuracy_std", 0.0),
        )
    return found


if __name__ == "__main__":
    main()
