"""Train and evaluate the configs behind the tables of docs/results/gnn/README.md and gnn/README.md:

    python -m bench.gnn_table [--only gcn_cora] [--quick] [--write]

Each row is `python -m gnn.train --config ... train.seeds=N` and `python -m gnn.eval`, in a run folder of its own under
runs/gnn_table. A row that is finished is not repeated, one that was stopped, or evaluated with other settings, goes on
(delete its folder to start afresh). Writes docs/results/gnn/<config>.json (the evaluation with machine, versions,
commit and seconds) and <config>.csv (a line a seed), and with --write puts the tables between the markers in
docs/results/gnn/README.md, and their main columns as one table in gnn/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.config import resolve
from common.files import read_json
from common.provenance import config_hash
from gnn.config import Config

RESULTS = Path("docs/results/gnn")
RUNS = Path("runs/gnn_table")
README = Path("gnn/README.md")
EVIDENCE = RESULTS / "README.md"


@dataclass(frozen=True)
class Row:
    """A config, how many seeds of it, and what others report: figures as printed there, with where."""

    config: str
    seeds: int
    published: str = ""


TABLES: dict[str, tuple[tuple[str, ...], tuple[Row, ...]]] = {
    "nodes": (
        ("test_accuracy", "test_macro_f1", "val_accuracy"),
        (
            Row("gcn_cora", 100, "81.5 (Kipf & Welling 2017)"),
            Row("gat_cora", 20, "83.0 ± 0.7 (Veličković et al. 2018)"),
            Row("sage_cora", 20),
            Row("gcnii_cora", 10, "85.5 ± 0.5 (Chen et al. 2020)"),
            Row("grand_cora", 10, "85.4 ± 0.4 (Feng et al. 2020)"),
            Row("gcn_citeseer", 100, "70.3 (Kipf & Welling 2017)"),
            Row("gat_citeseer", 20, "72.5 ± 0.7 (Veličković et al. 2018)"),
            Row("sage_citeseer", 20),
            Row("gcnii_citeseer", 5, "73.4 ± 0.6 (Chen et al. 2020)"),
            Row("grand_citeseer", 10, "75.4 ± 0.4 (Feng et al. 2020)"),
        ),
    ),
    "links": (
        ("auc", "ap", "mrr", "auc_hard", "ap_hard", "mrr_hard"),
        (
            Row("vgae_cora", 10, "AUC 91.4, AP 92.6 (Kipf & Welling 2016)"),
            Row("maskgae_cora", 10),
            Row("vgae_citeseer", 10, "AUC 90.8, AP 92.0 (Kipf & Welling 2016)"),
            Row("maskgae_citeseer", 10),
        ),
    ),
    "communities": (
        ("modularity", "nmi", "ari", "conductance"),
        (Row("dmon_cora", 10, "modularity 76.5, NMI 48.8 (Tsitsulin et al. 2023)"), Row("dmon_email", 10)),
    ),
    "graphs": (
        ("test_accuracy", "test_macro_f1"),
        (
            Row(
                "gin_proteins",
                1,
                "76.2 ± 2.8, best test epoch (Xu et al. 2019); 73.3 ± 4.0, honest (Errica et al. 2020)",
            ),
            Row("gin_mutag", 1, "89.4 ± 5.6, best test epoch (Xu et al. 2019)"),
        ),
    ),
}

SUMMARY = {
    "nodes": ("test_accuracy",),
    "links": ("auc", "ap", "mrr_hard"),
    "communities": ("modularity", "nmi"),
    "graphs": ("test_accuracy",),
}  # the columns of each table that stand in gnn/README.md


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gnn_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], metavar="CONFIG", help="only this row; may be repeated")
    parser.add_argument(
        "--quick", action="store_true", help="two seeds of two steps each, into runs/gnn_quick: does everything run?"
    )
    parser.add_argument(
        "--write", action="store_true", help="put the tables into the READMEs; with --only none, of what is there"
    )
    args = parser.parse_args()
    rows = [row for _, table in TABLES.values() for row in table if not args.only or row.config in args.only]
    failed = [row.config for row in rows if not run_row(row, args.quick)]
    if args.write and not args.quick:
        write_readme()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_row(row: Row, quick: bool) -> bool:
    """Train, evaluate and record one row; whether it worked."""
    folder = Path("runs/gnn_quick" if quick else RUNS) / row.config
    short = ["train.steps=2", "eval.figures=false", "eval.tables=false"] if quick else []
    path = Path(f"configs/{row.config}.yaml")
    seeds = f"train.seeds={min(row.seeds, 2) if quick else row.seeds}"
    wanted = config_hash(resolve(Config, path, [seeds, *short]))
    if read_json(folder / "eval.json").get("config_sha256") != wanted:  # missing, or of another config
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        train = [
            sys.executable,
            "-m",
            "gnn.train",
            "--config",
            str(path),
            f"run_dir={folder}",
            seeds,
            *short,
            "--overwrite" if quick else "--resume",
        ]
        print(" ".join(train[1:]), flush=True)
        if subprocess.run(train, stderr=subprocess.DEVNULL if not quick else None, check=False).returncode:
            return False
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cost = {
            "train_cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "train_seconds": round(time.perf_counter() - started, 1),
        }
        if subprocess.run([sys.executable, "-m", "gnn.eval", "--run", str(folder), *short], check=False).returncode:
            return False
        if not quick:
            record(row, folder, cost)
    return True


def record(row: Row, folder: Path, cost: dict[str, float]) -> None:
    """Copy what the README shows of a run to docs/results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result, environment = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("eval.json", "env.json")
    )
    machine = {key: environment[key] for key in ("commit", "device_name", "versions") if key in environment}
    command = f"python -m gnn.train --config configs/{row.config}.yaml train.seeds={row.seeds}"
    text = json.dumps({**result, **cost, "command": command, "cpu_count": os.cpu_count(), **machine}, indent=1)
    (RESULTS / f"{row.config}.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(folder / "seeds.csv", RESULTS / f"{row.config}.csv")


def recorded(row: Row) -> tuple[dict[str, float], int, str]:
    """(metrics, number of seeds, CPU-seconds a seed as text) of a row; empty where it was not run."""
    path = RESULTS / f"{row.config}.json"
    if not path.exists():
        return {}, 0, ""
    result = json.loads(path.read_text(encoding="utf-8"))
    count = len(result["seeds"])
    cost = f"{result['train_cpu_seconds'] / count:.1f}" if "train_cpu_seconds" in result else ""
    return result["metrics"], count, cost


def table_of(name: str) -> str:
    """A table in Markdown, from what has been recorded; a blank cell means "not run"."""
    columns, rows = TABLES[name]
    counted = "folds" if name == "graphs" else "seeds"
    lines = [
        f"| config | {counted} | {' | '.join(columns)} | CPU-s each | published |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for row in rows:
        metrics, count, cost = recorded(row)
        cells = [cell(metrics, column) for column in columns]
        lines.append(f"| {row.config} | {count or ''} | {' | '.join(cells)} | {cost} | {row.published} |")
    return "\n".join(lines)


def summary() -> str:
    """The main columns of all tables as one table in Markdown, whose figures stand with authors and costs in the
    evidence.
    """
    lines = ["| config | seeds | here | published |", "|---" * 4 + "|"]
    for name, columns in SUMMARY.items():
        for row in TABLES[name][1]:
            metrics, count, _ = recorded(row)
            cells = [(column, cell(metrics, column)) for column in columns]
            here = ", ".join(
                text if column == "test_accuracy" else f"{column} {text}" for column, text in cells if text
            )
            published = re.sub(r" \([^)]*\)", "", row.published)  # without the authors
            lines.append(f"| {row.config} | {count or ''} | {here} | {published} |")
    return "\n".join(lines)


def cell(metrics: dict[str, float], name: str) -> str:
    """`82.4 ± 0.8`: mean and standard deviation over the seeds, in percent."""
    if name not in metrics:
        return ""
    spread = f" ± {100 * metrics[f'{name}_std']:.1f}" if f"{name}_std" in metrics else ""
    return f"{100 * metrics[name]:.1f}{spread}"


def write_readme() -> None:
    """Replace what stands between `<!-- table NAME -->` and `<!-- end -->` in the two READMEs."""
    put_tables(EVIDENCE, {name: table_of(name) for name in TABLES})
    put_tables(README, {"summary": summary()})


def put_tables(path: Path, tables: dict[str, str]) -> None:
    """Put each table between the markers of its name in a Markdown file."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        start = f"<!-- table {name} -->"
        before, _, rest = text.partition(start)
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{start}\n{table}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
