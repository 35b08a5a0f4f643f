"""Eight tasks, an adapter each on SmolLM2, and how many held-out prompts find their adapter:

    python -m bench.lora_many [--steps 60] [--tiny] [key=value ...]

Five tasks are read from their own datasets (E2E, WebNLG, GSM8K, SQuAD, Alpaca: see lora/README.md); SST-2, CoLA and
PubMedQA become questions whose answer is a word, written as JSON beside the runs. Each adapter is trained for a few
steps by `python -m lora.train`, for the router cares for prompts alone, and `python -m lora.many --measure` routes test
prompts of every task, and lines of WikiText-2, which belong to none. A training that is finished is kept as long as its
config is the same. Writes many.json into --results: for each task where its prompts went.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cells import command, is_begun
from common.config import resolve
from common.errors import ProjectError
from common.files import read_json, write_json
from common.provenance import config_hash
from common.runtime import use_threads
from lora.config import Config
from lora.data import load_labelled
from lora.data.examples import Split

CONFIG = "configs/lora_e2e.yaml"
RUNS = Path("runs/lora_many")
RESULTS = Path("docs/results/lora")
STEPS = 60
LIKED = {"positive": "yes", "negative": "no"}
GOOD = {"acceptable": "yes", "unacceptable": "no"}
TINY_TRAINING = ["data.max_examples=200"]
TINY_ROUTER = ["many.prompts=20", "many.held_out=10"]
Row = dict[str, str]


def labelled_rows(dataset: str, question: str, words: dict[str, str], data_root: str) -> list[Row]:
    """A classification task as questions."""
    rows = []
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        config = resolve(Config, None, [f"data.dataset={dataset}"]).data
        part = load_labelled(config, data_root, split)
        rows += [
            {"instruction": question.format(text=text), "output": words[part.classes[label]]}
            for text, label in zip(part.texts, part.labels, strict=True)
        ]
    return rows


def pubmed_rows(data_root: str) -> list[Row]:
    """PubMedQA (Jin et al. 2019): a question that a paper asks, its abstract, yes, no or maybe."""
    path = Path(data_root) / "pubmedqa" / "ori_pqal.json"
    papers: dict[str, Any] = read_json(path)
    if not papers:
        raise ProjectError(f"put ori_pqal.json into {path.parent} (https://github.com/pubmedqa/pubmedqa)")
    return [
        {
            "instruction": paper["QUESTION"],
            "input": " ".join(paper["CONTEXTS"])[:600],
            "output": paper["final_decision"],
        }
        for paper in papers.values()
    ]


MADE: dict[str, Callable[[str], list[Row]]] = {
    "sst2": lambda root: labelled_rows("sst2", "Does the reviewer like the film?\n{text}", LIKED, root),
    "cola": lambda root: labelled_rows("cola", "Is this sentence good English?\n{text}", GOOD, root),
    "pubmedqa": pubmed_rows,
}
TASKS = {
    "e2e": ["data.dataset=e2e"],
    "webnlg": ["data.dataset=webnlg", "data.max_length=384"],
    "gsm8k": ["data.dataset=gsm8k", "data.max_length=384"],
    "squad": ["data.dataset=squad", "data.max_length=512", "data.validation=0.02"],
    "alpaca": ["data.dataset=alpaca", "data.max_length=384"],
    "sst2": [],
    "cola": [],
    "pubmedqa": ["data.max_length=384"],
}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(args.threads)
    data_root = resolve(Config, Path(CONFIG), []).data_root
    folders = [train(name, args, data_root) for name in TASKS]
    first, *others = map(str, folders)
    words = ["--run", first, f"many.runs=[{','.join(others)}]", "--measure", str(args.measure)]
    extra = TINY_ROUTER if args.tiny else []
    command(["-m", "lora.many", *words, "many.unknown=wikitext2/test.txt", *extra], args.threads)
    result = read_json(folders[0] / "routing.json")
    result |= {"steps": args.steps, "routes": (folders[0] / "routing.csv").read_text(encoding="utf-8").splitlines()}
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / "many.json", result)
    print(json.dumps(result))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora_many", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--measure", type=int, default=200, help="test prompts a task (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads a program")
    parser.add_argument("--runs", type=Path, help=f"run folders (default: {RUNS})")
    parser.add_argument("--results", type=Path, help=f"the result (default: {RESULTS}, with --tiny the run folders)")
    parser.add_argument("--tiny", action="store_true", help="two steps, few prompts: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every training")
    args = parser.parse_args(argv)
    for name in ("steps", "measure", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.tiny:
        args.steps, args.measure = 2, 10
    args.runs = args.runs or (Path("runs/lora_many_tiny") if args.tiny else RUNS)
    args.results = args.results or (args.runs if args.tiny else RESULTS)
    return args


def train(name: str, args: argparse.Namespace, data_root: str) -> Path:
    """One adapter, unless it was trained with the same config; its run folder."""
    folder: Path = args.runs / name
    settings = [
        "seed=0",
        f"train.steps={args.steps}",
        f"train.warmup={max(1, args.steps // 10)}",
        "train.batch_size=4",
        "train.microbatch=4",
        "train.validate_every=0",
        f"train.save_every={args.steps}",
        *TASKS[name],
    ]
    if name in MADE:
        path = (args.runs / f"{name}.json").resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(MADE[name](data_root)), encoding="utf-8")
        settings += ["data.dataset=json", f"data.path={path}"]
    settings += [*args.overrides, *(TINY_TRAINING if args.tiny else [])]
    config = resolve(Config, Path(CONFIG), [f"run_dir={folder}", *settings])
    if (folder / "adapter").is_dir() and is_begun(Config, folder, config_hash(config)):
        return folder
    seconds = command(
        ["-m", "lora.train", "--config", CONFIG, f"run_dir={folder}", *settings, "--overwrite"], args.threads
    )
    print(f"{name}: {seconds:.0f} CPU-s", flush=True)
    return folder


if __name__ == "__main__":
    main()
