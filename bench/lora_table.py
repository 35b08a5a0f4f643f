"""What kinds and ranks of adapters are worth at equal steps, beside full finetuning:

    python -m bench.lora_table sst2 [--seeds 3] [--only "rank 8"] [--tiny] [key=value ...]

`sst2` and `cola` finetune MiniLM and are read on test texts, seeds from 0. `e2e` finetunes SmolLM2 for 40 steps; it is
where that task's config was chosen, so it is read on validation examples and its seeds begin at 1000. Each cell is
`python -m lora.train` and `python -m lora.eval`, in a folder of its own under --runs; a cell that is finished is kept
as long as its config is the same, one that was stopped goes on. Writes <table>.json (a record a cell and seed) and
<table>.md (mean and standard deviation over the seeds) into --results after every cell.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.cells import name_of, spread, train_and_evaluate
from common.checkpoint import Checkpoints
from common.config import resolve
from common.files import read_json, write_json, write_text
from common.logging import read_metrics
from common.provenance import config_hash
from common.runtime import use_threads
from lora.config import Config

RUNS = Path("runs/lora_table")
RESULTS = Path("docs/results/lora")


@dataclass(frozen=True)
class Table:
    """A task: its config, the rows, what is measured."""

    config: str
    settings: tuple[str, ...]  # for every row
    rows: dict[str, tuple[str, ...]]
    columns: dict[str, str]  # metric -> its heading
    first_seed: int
    validated: str  # the metric of metrics.jsonl that choices are made on
    caption: str


def ranks(*values: int) -> dict[str, tuple[str, ...]]:
    """Rows of plain LoRA: alpha is twice the rank, so that the update's scale is the same in all."""
    return {f"rank {rank}": (f"adapter.rank={rank}", f"adapter.alpha={2 * rank}") for rank in values}


def kinds(rank: int, pissa: str, lora_plus: str) -> dict[str, tuple[str, ...]]:
    """Rows of the same rank, each with one thing changed. PiSSA and LoRA+ have learning rates of their own."""
    common = (f"adapter.rank={rank}", f"adapter.alpha={2 * rank}")
    return {
        # alpha / sqrt(r) is 2 at rank 8, as in the other rows, and 1 here; plain LoRA with the same alpha has 1/6 here
        "rsLoRA, rank 32": ("adapter.rank=32", "adapter.alpha=5.657", "adapter.rslora=true"),
        f"DoRA, rank {rank}": (*common, "adapter.dora=true"),
        f"PiSSA, rank {rank}": (*common, "adapter.init=pissa", f"train.lr={pissa}"),
        f"LoRA+, rank {rank}": (*common, "adapter.lora_plus=16", f"train.lr={lora_plus}"),
        f"QLoRA (NF4), rank {rank}": (*common, "model.quantize=nf4"),
    }


# learning rates were chosen on validation texts, seed 1000, of one (LoRA+, head) to three (docs/results/lora)
ENCODER = {
    "frozen, new head": ("train.method=head", "train.lr=1.0e-2"),
    **ranks(1, 2, 4, 8, 16, 32),
    "queries and values, rank 8": ("adapter.targets=[query,value]",),
    **kinds(8, pissa="1.0e-3", lora_plus="3.0e-4"),
    "full": ("train.method=full", "train.lr=1.0e-4"),
}
ATTENTION = "adapter.targets=[q_proj,k_proj,v_proj,o_proj]"
TABLES = {
    "sst2": Table(
        "configs/lora_sst2.yaml",
        (),
        ENCODER,
        {"accuracy": "accuracy, %"},
        0,
        "val_accuracy",
        "SST-2 test texts (1,821); MiniLM, 22.6 million numbers.",
    ),
    "cola": Table(
        "configs/lora_cola.yaml",
        (),
        ENCODER,
        {"matthews": "Matthews, x 100", "accuracy": "accuracy, %"},
        0,
        "val_accuracy",
        "CoLA, GLUE's development texts (1,043), which no choice has read; MiniLM, 22.6 million numbers.",
    ),
    "e2e": Table(
        "configs/lora_e2e.yaml",
        (
            "train.lr=4.0e-3",
            "compile=true",
            "train.steps=40",
            "train.warmup=5",
            "train.validate_every=40",
            "eval.split=validation",
            "eval.num_examples=150",
            "eval.base=false",
            "eval.general_text=",
            "eval.shots=0",
            "generate.beams=1",
        ),
        {
            **ranks(1, 2, 4, 8, 16, 32),
            "attention only, rank 8": (ATTENTION,),
            "attention only, rank 24": (ATTENTION, "adapter.rank=24", "adapter.alpha=48"),
            **kinds(8, pissa="2.0e-3", lora_plus="5.0e-4"),
            "full": ("train.method=full", "train.lr=2.5e-4", "model.dtype=fp32"),
        },
        {"bleu": "BLEU", "rouge_l": "ROUGE-L"},
        1000,
        "val_loss",
        "E2E, 150 validation examples drawn by seed, greedy; 40 steps; SmolLM2-135M, 134.5 million numbers.",
    ),
}
TINY = ["train.steps=2", "train.warmup=1", "train.validate_every=2", "eval.num_examples=20", "eval.resamples=20"]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(args.threads)
    table = TABLES[args.table]
    extra = [*args.overrides, *(TINY if args.tiny else [])]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for row in args.only or table.rows:
            record = run_row(table, row, seed, args.runs / args.table, extra, args.threads)
            shown = ", ".join(f"{name} {record[name]:.3f}" for name in table.columns)
            print(f"{row}, seed {seed}: {shown}", flush=True)
            write(args.table, args.runs, args.results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, help="default: 0, of e2e 1000")
    parser.add_argument("--only", action="append", metavar="ROW", default=[], help="may be repeated")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--runs", type=Path, help=f"run folders (default: {RUNS})")
    parser.add_argument("--results", type=Path, help=f"the table (default: {RESULTS}, with --tiny the run folders)")
    parser.add_argument("--tiny", action="store_true", help="two steps: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every row")
    args = parser.parse_intermixed_args(argv)  # settings may stand after options
    rows = TABLES[args.table].rows
    for name in args.only:
        if name not in rows:
            parser.error(f"--only: no row {name!r}; there are: {', '.join(rows)}")
    for name in ("seeds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.first_seed is None:
        args.first_seed = TABLES[args.table].first_seed
    args.runs = args.runs or (Path("runs/lora_table_tiny") if args.tiny else RUNS)
    args.results = args.results or (args.runs if args.tiny else RESULTS)
    return args


def folder_of(row: str, runs: Path) -> Path:
    """A row's runs."""
    return runs / name_of(row)


def run_row(table: Table, row: str, seed: int, runs: Path, extra: list[str], threads: int) -> dict:
    """Train and evaluate, unless that was done with the same config; the record."""
    folder = folder_of(row, runs) / f"seed{seed}"
    kept = folder.with_suffix(".json")
    settings = [f"seed={seed}", *table.settings, *table.rows[row], *extra]
    config = resolve(Config, Path(table.config), [f"run_dir={folder}", *settings])
    record = read_json(kept)
    if record.get("config_sha256") == config_hash(config):
        return record
    result, origin = train_and_evaluate("lora", Config, table.config, settings, folder, threads)
    learned = Checkpoints.load(folder / f"checkpoints/{config.train.steps:08d}.pt")["parts"]["learned"]
    record = {
        "row": row,
        "seed": seed,
        "split": result["split"],
        "examples": result["n"]["examples"],
        **result["metrics"],
        "validation": validation(folder, table.validated),
        "learned_numbers": sum(value.numel() for value in learned.values()),
        "steps": config.train.steps,
        **origin,
    }
    write_json(kept, record)
    return record


def validation(folder: Path, name: str) -> float | None:
    """The last figure of that name that training logged."""
    found = [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]
    return found[-1] if found else None


def write(name: str, runs: Path, results: Path) -> None:
    """<table>.json and <table>.md, of all that is finished."""
    table = TABLES[name]
    found = {row: sorted(folder_of(row, runs / name).glob("seed*.json")) for row in table.rows}
    records = {row: [read_json(path) for path in paths] for row, paths in found.items() if paths}
    lines = [json.dumps(record) for rows in records.values() for record in rows]
    write_text(results / f"{name}.json", "[\n" + ",\n".join(lines) + "\n]\n")
    write_text(results / f"{name}.md", render(table, records))


def render(table: Table, records: dict[str, list[dict]]) -> str:
    """The records in Markdown: fractions as percent, mean and standard deviation over the seeds."""
    validated = table.validated.removeprefix("val_")
    lines = [
        f"| | {' | '.join(table.columns.values())} | validation {validated} | numbers that learn | CPU-s | seeds |",
        "|---" * (len(table.columns) + 5) + "|",
    ]
    for row, found in records.items():
        cells = [spread([100 * record[name] for record in found], 1) for name in table.columns]
        known = [record["validation"] for record in found if record["validation"] is not None]
        checked = f"{statistics.mean(known):.3f}" if known else ""
        times = [record["train_cpu_seconds"] for record in found if record["train_cpu_seconds"] is not None]
        cost = f"{statistics.mean(times):.0f}" if times else ""
        numbers = f"{found[0]['learned_numbers']:,}"
        lines.append(f"| {row} | {' | '.join(cells)} | {checked} | {numbers} | {cost} | {len(found)} |")
    return "\n".join([*lines, "", table.caption, ""])


if __name__ == "__main__":
    main()
