"""What a reader answers, as a table over several seeds of the same experiment:

    for S in 0 1 2; do R=runs/rag_factworld_$S
        python -m rag.train        --config configs/rag_factworld.yaml seed=$S run_dir=$R
        python -m rag.train_reader --config configs/rag_factworld.yaml seed=$S run_dir=$R compile=true
        python -m rag.answer       --run $R
    done
    python -m bench.rag_seeds runs/rag_factworld_0 runs/rag_factworld_1 runs/rag_factworld_2 [--name factworld]

Reads the answers.json of finished runs whose configs differ in nothing but the seed. Writes <name>.json (mean, standard
deviation and the values themselves, by metric) and <name>.md (in percent, kinds of questions apart) into --results.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cells import spread
from common.config import resolve
from common.files import read_json, write_json, write_text
from common.provenance import config_hash
from rag.config import Config

RESULTS = Path("docs/results/rag")
ANSWERS = "answers.json"
ROWS = {
    "em_closed_book": "exact match, closed book",
    "em_random": "exact match, random passages",
    "em_retrieved": "exact match, found",
    "em_gold": "exact match, right passages",
    "edit_followed": "edits followed",
    "citation_precision_retrieved": "citations that are right, found",
    "citation_recall_retrieved": "right passages shown that are cited",
    "abstention_auroc": "AUROC of abstention",
    "withheld_removed": "withheld, right passages removed",
    "withheld_answerable": "withheld, right passages shown",
    "em_said": "exact match of what is said",
}
KINDS = {"": "all", "_one_hop": "one hop", "_two_hop": "two hops"}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    results = [read_json(run / ANSWERS) for run in args.runs]
    seeds = [seed for result in results for seed in result["seeds"]]
    together = {
        name: values for name in results[0]["metrics"] if len(values := values_of(name, results)) == len(results)
    }
    record: dict[str, Any] = {
        "project": "rag",
        "reader": results[0]["reader"],
        "seeds": seeds,
        "n": results[0]["n"],
        "split": results[0]["split"],
        "seconds": [result["seconds"] for result in results],
        "metrics": {},
        "values": together,
    }
    for name, values in together.items():
        record["metrics"][name] = statistics.mean(values)
        if len(values) > 1:
            record["metrics"][f"{name}_std"] = statistics.stdev(values)
    write_json(args.results / f"{args.name}.json", record)
    text = table(together)
    write_text(args.results / f"{args.name}.md", text)
    print(text, end="")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked: every run is there, none twice, all of one experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rag_seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--name", default="factworld", help="of the two files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for run in args.runs:
        if not (run / ANSWERS).is_file():
            parser.error(f"{run} has no {ANSWERS}; run rag.answer first")
    configs = [resolve(Config, run / "config.yaml") for run in args.runs]
    seeds = [config.seed for config in configs]
    if len(set(seeds)) < len(seeds):
        parser.error(f"seeds must differ: {', '.join(map(str, seeds))}")
    if len({config_hash(replace(config, seed=0)) for config in configs}) > 1:
        parser.error("these runs differ in more than their seed")
    return args


def values_of(name: str, results: list[dict[str, Any]]) -> list[float]:
    """A metric of each run that has it."""
    return [result["metrics"][name] for result in results if name in result["metrics"]]


def table(together: dict[str, list[float]]) -> str:
    """Markdown: a line for each measure, a column for each kind of questions that there is."""
    kinds = {kind: heading for kind, heading in KINDS.items() if f"em_retrieved{kind}" in together}
    lines = [f"| percent | {' | '.join(kinds.values())} |", "|---" * (len(kinds) + 1) + "|"]
    for name, heading in ROWS.items():
        if name in together:
            cells = [together.get(f"{name}{kind}", []) for kind in kinds]
            shown = [spread([100 * value for value in values], 1) if values else "" for values in cells]
            lines.append(f"| {heading} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
