"""Measure what retrieval is worth to the reader, and whether its answers come from the passages:

    python -m rag.answer --run runs/rag_squad [reader.weights=base reader.passages=5 answer.num_questions=500 ...]

Writes `answers.json`, `answers.jsonl` and `answers.csv` (what each arm said to each question, with sources), with
answer.label=base `answers-base.json` and so on; for the report a few of these as `samples/answers.json`, and
`figures/answers.png`; and into `calibration.json` the threshold of abstention for `rag.ask`. The last line of stdout is
the content of `answers.json`.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from rag.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag", "answer")

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from common.config import require
from common.errors import ProjectError, exits_cleanly
from common.files import read_json, sha256, write_csv, write_json, write_text
from common.provenance import discard, made_by, output_hashes
from common.run import Run
from rag.metrics import answers as measures
from rag.metrics.answers import Arm
from rag.data import Collection, Question, load_collection
from rag.data.corpus import drawn
from rag.metrics.figures import save_answers
from rag.reader.pipeline import calibrated, open_retriever, open_run_reader
from rag.reader.reader import Reader
from rag.reader.weights import ADAPTER, CALIBRATION, MARKER, find_reader
from rag.search.retriever import Retriever

QUESTION_STREAM, CALIBRATION_STREAM, EXAMPLE_STREAM = 7_500_011, 7_500_012, 7_500_013
SHOWN_QUESTIONS = 6


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Ask a sample of questions in every arm."""
    started = time.perf_counter()
    collection = load_collection(config.data, config.data_root)
    questions = choose(collection, config.answer.split, config.answer.num_questions, config.seed, QUESTION_STREAM)
    with Run(config, options) as run:
        retriever = open_retriever(config, options, run, collection)
        reader, name = open_run_reader(config, run, collection)
        run.display.say(f"reader: {name}; {len(questions)} questions")
        threshold = calibrate(reader, name, retriever, collection, config)
        metrics, arms = measure(reader, retriever, collection, questions, threshold, config, run)
        stem = f"answers-{config.answer.label}" if config.answer.label else "answers"
        outputs = (f"{stem}.jsonl", f"{stem}.csv", f"samples/{stem}.json", f"figures/{stem}.png")
        discard(run.folder, outputs)
        predictions = [measures.prediction(question, i, arms) for i, question in enumerate(questions)]
        write_text(run.folder / outputs[0], "".join(json.dumps(item) + "\n" for item in predictions))
        write_csv(run.folder / outputs[1], measures.flat(predictions))
        few = drawn(SHOWN_QUESTIONS, len(predictions), config.seed, EXAMPLE_STREAM)
        write_json(run.folder / outputs[2], [measures.example(predictions[i]) for i in few.tolist()])
        save_answers(metrics, config.answer.arms, f"{run.folder.name}: {name}", run.folder / outputs[3])
        result = {
            "project": "rag",
            "config": run.folder.name,
            "reader": name,
            "metrics": metrics,
            "n": {"questions": len(questions), "passages": len(collection.passages)},
            "seeds": [config.seed],
            "seconds": round(time.perf_counter() - started, 1),
            "split": config.answer.split,
            "precision": str(run.machine.amp_dtype or "float32").removeprefix("torch."),
            "files": output_hashes(run.folder, outputs),
            **made_by(config, [fingerprint(config, name)]),
        }
        write_json(run.folder / f"{stem}.json", result)
        show(metrics, arms, f"{run.folder.name}: {name}")
        print(json.dumps(result), flush=True)


def choose(collection: Collection, split: str, count: int, seed: int, stream: int) -> list[Question]:
    """Questions with answers, drawn by seed. `ProjectError` where there are none."""
    questions = [question for question in collection.questions(split) if question.answers]
    if not questions:
        raise ProjectError(f"{collection.name} has no {split} questions with answers; choose another data.dataset")
    return [questions[i] for i in drawn(count, len(questions), seed, stream)]


def fingerprint(config: Config, name: str) -> str:
    """Of the finetuned reader's file where there is one, else of its name."""
    folder = find_reader(config)
    if folder is None:
        return hashlib.sha256(name.encode()).hexdigest()
    files = (folder / ADAPTER / "adapter_model.safetensors", folder / MARKER)
    return next(sha256(path) for path in files if path.is_file())


def calibrate(reader: Reader, name: str, retriever: Retriever, collection: Collection, config: Config) -> float:
    """The threshold of abstention: set on validation questions, with what is found for them and with what is left when
    the passages that have the answer are taken away; written down. As it was before where answer.calibration is 0.
    """
    if config.reader.threshold >= 0:
        return config.reader.threshold
    if not config.answer.calibration:
        return calibrated(config, name)
    require(
        any(question.answers for question in collection.validation),
        "answer.calibration",
        f"must be 0: {collection.name} has no validation questions with answers",
    )
    questions = choose(collection, "validation", config.answer.calibration, config.seed, CALIBRATION_STREAM)
    alone = replace(config, answer=replace(config.answer, arms=("retrieved",)))
    shown = measures.show_passages(questions, retriever, collection, alone)
    found = measures.ask(reader, questions, shown.arms["retrieved"])
    removed = measures.ask(reader, questions, shown.removed)
    there = measures.answerable(found, questions)
    sure = np.array([answer.confidence for answer in found.answers])[there]
    unsure = np.array([answer.confidence for answer in removed.answers])
    threshold = measures.best_threshold(sure, unsure) if there.any() else 0.0
    path = Path(config.run_dir) / CALIBRATION
    about = {"threshold": threshold, "answerable": int(there.sum()), "removed": len(unsure)}
    write_json(path, read_json(path) | {name: about})  # of other readers: as it was
    return threshold


def measure(
    reader: Reader,
    retriever: Retriever,
    collection: Collection,
    questions: list[Question],
    threshold: float,
    config: Config,
    run: Run,
) -> tuple[dict[str, float], dict[str, Arm]]:
    """Every number by name, and what each arm said."""
    shown = measures.show_passages(questions, retriever, collection, config)
    arms = {}
    for arm, passages in shown.arms.items():
        run.display.say(f"{arm}: {len(questions)} questions")
        arms[arm] = measures.ask(reader, questions, passages)
    metrics = measures.measure_arms(arms, questions, config.answer.resamples)
    metrics |= measures.measure_sources(arms, questions, collection)
    metrics |= measures.latency(arms, shown.seconds, len(questions))
    retrieved = arms.get("retrieved")
    if retrieved is not None:
        metrics["shown_right"] = float(measures.answerable(retrieved, questions).mean())
        if config.answer.removed:
            run.display.say(f"without the right passages: {len(questions)} questions")
            arms["removed"] = measures.ask(reader, questions, shown.removed)
            metrics |= measures.measure_abstention(retrieved, arms["removed"], questions, threshold)
        if config.answer.edited and config.data.dataset == "factworld":
            run.display.say("with another answer in the right passage")
            metrics |= measures.measure_edits(reader, retrieved, questions, config)[0]
    metrics |= measures.measure_kinds(arms, questions, collection, threshold)
    if config.answer.poisoned and shown.arms.get("retrieved"):
        run.display.say(f"hostile passages: {config.answer.poisoned} questions")
        passages = shown.arms["retrieved"]
        assert passages is not None
        metrics |= measures.measure_poison(reader, questions, passages, config.answer.poisoned)
    return metrics, arms


def show(metrics: dict[str, float], arms: dict[str, Arm], title: str) -> None:
    """Print a table with a line for each arm, and below it everything else but times and intervals."""
    columns = {"em": "EM", "f1": "F1", "support": "support", "citation_precision": "cited right", "ms_read": "ms read"}
    table = Table("passages", *columns.values(), title=title, caption="support: the cited passage has the answer")
    for arm in arms:
        values = [metrics.get(f"{name}_{arm}") for name in columns]
        if metrics.get(f"em_{arm}") is not None:
            table.add_row(arm.replace("_", " "), *("" if value is None else f"{value:.4f}" for value in values))
    console = Console()
    console.print(table)
    for key, value in metrics.items():
        if key.startswith(("abstention", "withheld", "edit", "poison", "em_said", "shown_right", "threshold")):
            console.print(f"{key.replace('_', ' ')}: {value:.4f}")


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
