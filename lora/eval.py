"""Measure a finetuned model, and the base beside it:

    python -m lora.eval --run runs/lora_e2e [eval.split=validation eval.num_examples=200 generate.beams=4 ...]

Writes `eval.json`, `predictions.jsonl` (or `predictions.csv` of a classifier) and, for the report, a few of these as
`samples/examples.json` into the run folder; the last line of stdout is the content of `eval.json`.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from lora.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "lora", "eval")

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import exits_cleanly
from common.files import place_of, write_csv, write_json
from common.provenance import discard, made_by, output_hashes
from common.run import Run
from common.terminal import show_metrics
from lora.adapters.inject import disabled
from lora.data import Example, encode, load_examples, load_labelled, prompt_text, read_classes
from lora.data.rows import read_text, write_json_rows
from lora.generate import answer_all
from lora.metrics.answers import Score, score_answers
from lora.metrics.classes import accuracy, matthews
from lora.metrics.comparing import compare, intervals
from lora.metrics.losses import class_scores, example_losses, text_losses
from lora.tuning import Base, load_base, load_tuned
from lora.tuning.tasks import draw

EXAMPLES = "samples/examples.json"
SHOWN = 6  # examples there
# written before eval.json, and go before it is written anew
OUTPUTS = ("predictions.jsonl", "predictions.csv", EXAMPLES)
Metrics = dict[str, float]


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate one checkpoint."""
    started = time.perf_counter()
    with Run(config, options) as run:
        measure = evaluate_classes if config.classifies else evaluate_answers
        metrics, rows, step, state_hash = measure(config, options, run)
        discard(run.folder, OUTPUTS)
        written = write_predictions(rows, run.folder, config)
        write_json(run.folder / EXAMPLES, [shown(row) for row in draw(rows, SHOWN, config.seed)])
        result = {
            "project": "lora",
            "config": run.folder.name,
            "checkpoint_step": step,
            "total_steps": config.train.steps,
            "metrics": metrics,
            "n": {"examples": len(rows), "resamples": config.eval.resamples},
            "seeds": [config.seed],
            "seconds": round(time.perf_counter() - started, 1),
            "split": config.eval.split,
            "precision": str(run.machine.amp_dtype or torch.get_default_dtype()).removeprefix("torch."),
            "files": output_hashes(run.folder, [written]),
            **made_by(config, [state_hash]),
        }
        write_json(run.folder / "eval.json", result)
        show_metrics(metrics, f"{run.folder.name} after {step} of {config.train.steps} steps")
        print(json.dumps(result), flush=True)


def note(text: str) -> None:
    """Print what a person should know where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


# -- answers -----------------------------------------------------------------------------------------------------------


def evaluate_answers(config: Config, options: Options, run: Run) -> tuple[Metrics, list[dict[str, Any]], int, str]:
    """Losses, answers and what was forgotten, of the adapted model and of the base.

    Returns metrics, a row an example, the checkpoint's step, a hash of what was learnt.
    """
    examples = draw(
        load_examples(config.data, config.data_root, config.eval.split, note), config.eval.num_examples, config.seed
    )
    base, step = load_tuned(config, options, run)
    rows: list[dict[str, Any]] = [
        {"id": example.id, "prompt": example.prompt, "context": example.context, "references": list(example.references)}
        for example in examples
    ]
    metrics, scores = judge(base, examples, rows, "answer", config, run)
    if config.eval.base:
        with as_base(base, config, run) as before:
            others, other_scores = judge(before, examples, rows, "base", config, run)
        metrics |= {f"{name}_base": value for name, value in others.items()}
        metrics |= differences(scores, other_scores, config)
    for score in scores:
        low, high = intervals(score, config.eval.resamples, config.seed)
        metrics |= {f"{score.name}_low": low, f"{score.name}_high": high}
    return metrics, rows, step, base.mark


@contextlib.contextmanager
def as_base(tuned: Base, config: Config, run: Run) -> Iterator[Base]:
    """The model before it was trained: adapters switched off, or the base loaded anew where all of it has learned."""
    if config.train.method == "lora":
        with disabled(tuned.model):
            yield tuned
    else:
        yield load_base(config, run)


def judge(
    base: Base, examples: Sequence[Example], rows: list[dict[str, Any]], column: str, config: Config, run: Run
) -> tuple[Metrics, list[Score]]:
    """Every metric of one model; its answers go into `rows`."""
    metrics: Metrics = {}
    scores: list[Score] = []
    tokens = encode(examples, config.data, base.tokenizer)
    fitting = [item for item in tokens if len(item) <= config.data.max_length]
    if len(fitting) < len(tokens):
        note(f"note: the loss is over {len(fitting)} of {len(tokens)} examples: the others are too long")
    if fitting:
        sums, counts = example_losses(base.model, fitting, config.eval.batch_size, run)
        metrics |= {"loss": float(sums.sum() / counts.sum()), "perplexity": perplexity(sums, counts)}
    if config.eval.generate:
        before = "" if column == "answer" else worked_examples(config, base)
        texts = [before + prompt_text(example, config.data, base.tokenizer) for example in examples]
        answers = answer_all(base, texts, config, run)
        if before:  # it goes on with a next example of its own
            answers = [text.split("\n\n")[0].strip() for text in answers]
        for row, text in zip(rows, answers, strict=True):
            row[column] = text
        scores = score_answers(answers, [example.references for example in examples], config)
        metrics |= {score.name: score.value for score in scores}
    if config.eval.general_text:
        text = read_text(place_of(config.eval.general_text, config.data_root))
        sums, counts = text_losses(
            base.model, base.tokenizer, text, config.eval.general_tokens, config.eval.batch_size, run
        )
        metrics["general_perplexity"] = perplexity(sums, counts)
    return metrics, scores


def perplexity(sums: Tensor, counts: Tensor) -> float:
    """Of a token: e to the mean loss, at most the largest number there is."""
    return math.exp(min(float(sums.sum() / counts.sum()), 700.0))


def worked_examples(config: Config, base: Base) -> str:
    """Training examples with their answers, drawn by seed, to stand before the base's prompts."""
    if not config.eval.shots:
        return ""
    chosen = draw(load_examples(config.data, config.data_root, "train", note), config.eval.shots, config.seed)
    return "".join(f"{prompt_text(item, config.data, base.tokenizer)}{item.completion}\n\n" for item in chosen)


def differences(scores: list[Score], others: list[Score], config: Config) -> Metrics:
    """Intervals of what was gained, over draws of the examples."""
    found: Metrics = {}
    for ours, other in zip(scores, others, strict=True):
        low, high = compare(ours, other, config.eval.resamples, config.seed)
        found |= {f"{ours.name}_gain_low": low, f"{ours.name}_gain_high": high}
    return found


# -- classes -----------------------------------------------------------------------------------------------------------


def evaluate_classes(config: Config, options: Options, run: Run) -> tuple[Metrics, list[dict[str, Any]], int, str]:
    """Accuracy, Matthews' correlation and loss of a classifier, with intervals. A base has no classes to compare."""
    part = load_labelled(config.data, config.data_root, config.eval.split, note, read_classes(run.folder))
    chosen = draw(range(len(part)), config.eval.num_examples, config.seed)
    texts = [part.texts[i] for i in chosen]
    labels = [part.labels[i] for i in chosen]
    base, step = load_tuned(config, options, run)
    loss, predicted = class_scores(base.model, texts, labels, base.tokenizer, config, run)
    metrics = {"loss": loss}
    for score in (accuracy(predicted, labels), matthews(predicted, labels, len(part.classes))):
        low, high = intervals(score, config.eval.resamples, config.seed)
        metrics |= {score.name: score.value, f"{score.name}_low": low, f"{score.name}_high": high}
    rows = [
        {"id": part.ids[i], "text": part.texts[i], "label": part.classes[label], "predicted": part.classes[guess]}
        for i, label, guess in zip(chosen, labels, predicted, strict=True)
    ]
    return metrics, rows, step, base.mark


# -- files -------------------------------------------------------------------------------------------------------------


def write_predictions(rows: list[dict[str, Any]], folder: Path, config: Config) -> str:
    """Every example with what the models made of it; returns the file's name."""
    if config.classifies:
        write_csv(folder / "predictions.csv", rows)
        return "predictions.csv"
    write_json_rows(folder / "predictions.jsonl", rows)
    return "predictions.jsonl"


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A prediction as the report shows it: what was asked, what is right, what the models say."""
    if "text" in row:
        return {"text": row["text"], "right": row["label"], "finetuned": row["predicted"]}
    asked = "\n".join(part for part in (row["prompt"], row["context"]) if part)
    said = {name: row[column] for name, column in (("base", "base"), ("finetuned", "answer")) if column in row}
    return {"prompt": asked, "right": row["references"][0], **said}


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
