"""Measure how well passages are found, by words, by vectors, by both, and ranked again:

    python -m rag.eval --run runs/rag_squad [rerank.model=runs/rag_squad_rerank data.dataset=scifact ...]

Writes `eval.json`, `predictions.jsonl` (a line a question, with what each way of searching found), `figures/recall.png`
and, for the report, a few predictions as `samples/found.json` into the run folder; the last line of stdout is the
content of `eval.json`.

Legend: Q questions.
"""

# The config is read before PyTorch is imported, so that a typo is reported in a blink.
from common.config import Options, load
from rag.config import Config

if __name__ == "__main__":
    CONFIG, OPTIONS = load(Config, "rag", "eval")

import json
import time

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.checkpoint import weights_hash
from common.errors import ProjectError, exits_cleanly
from common.files import write_json, write_text
from common.metrics import bootstrap_interval
from common.provenance import discard, made_by, output_hashes
from common.run import Run
from rag.metrics.arms import ORDER, Result, build_arms, example, measure, prediction
from rag.data import Collection, load_collection
from rag.data.corpus import Question, by_kind, drawn
from rag.load import load_trained
from rag.metrics.figures import save_recall
from rag.metrics.scores import paired_bootstrap
from rag.model.encoder import Encoder

EXAMPLES = "samples/found.json"
FIGURE = "figures/recall.png"
OUTPUTS = (
    "predictions.jsonl",
    EXAMPLES,
    FIGURE,
)  # what is written before eval.json, and goes before it is written anew
QUESTION_STREAM, EXAMPLE_STREAM = 7_600_001, 7_600_002
SHOWN_QUESTIONS = 6
# whether one way of searching is better than another: pairs that are compared on the same questions
COMPARED = (("trained", "zero_shot"), ("hybrid", "trained"), ("hybrid", "bm25"), ("reranked", "hybrid"))
SHOWN = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_20": "R@20",
    "mrr_at_10": "MRR",
    "ndcg_at_10": "nDCG",
    "answer_at_1": "A@1",
    "answer_at_20": "A@20",
}


@exits_cleanly
def main(config: Config, options: Options) -> None:
    """Evaluate one checkpoint."""
    started = time.perf_counter()
    collection = load_collection(config.data, config.data_root)
    questions = choose(collection, config)
    with Run(config, options) as run:
        model, tokenizer, step = load_trained(config, options, run)
        if not isinstance(model, Encoder):
            raise ProjectError(
                f"{run.folder} holds a cross-encoder, which ranks what others find: python -m rag.eval --run "
                f"<a bi-encoder's run> rerank.model={run.folder}"
            )
        for note in collection.notes:
            run.display.say(note)
        marks = made_by(config, [weights_hash({name: value.cpu() for name, value in model.state_dict().items()})])
        arms = build_arms(collection, config, run, (model, tokenizer))
        results = {}
        for name, arm in arms.items():
            run.display.say(f"{name}: {len(questions)} questions")
            results[name] = measure(arm, questions, config, run.track)
        metrics = summarise(results, questions, config)
        discard(run.folder, OUTPUTS)
        lines = [prediction(question, i, results, arms) for i, question in enumerate(questions)]
        write_text(run.folder / "predictions.jsonl", "\n".join(lines) + "\n")
        if f"recall_at_{config.eval.cutoffs[0]}_{next(iter(results))}" in metrics:  # passages were judged
            title = f"{run.folder.name}: {len(questions):,} questions, {len(collection.passages):,} passages"
            save_recall(metrics, list(results), config.eval.cutoffs, title, run.folder / FIGURE)
        few = drawn(SHOWN_QUESTIONS, len(questions), config.seed, EXAMPLE_STREAM)
        write_json(run.folder / EXAMPLES, [example(questions[i], i, results, arms) for i in few.tolist()])
        result = {
            "project": "rag",
            "config": run.folder.name,
            "checkpoint_step": step,
            "total_steps": config.train.steps,
            "metrics": metrics,
            "n": {"questions": len(questions), "passages": len(collection.passages)},
            "seeds": [config.seed],
            "seconds": round(time.perf_counter() - started, 1),
            "split": config.eval.split,
            "precision": str(run.machine.amp_dtype or "float32").removeprefix("torch."),
            "files": output_hashes(run.folder, OUTPUTS),
            **marks,
        }
        write_json(run.folder / "eval.json", result)
        show(metrics, results, f"{run.folder.name} after {step} of {config.train.steps} steps")
        print(json.dumps(result), flush=True)


def choose(collection: Collection, config: Config) -> list[Question]:
    """The questions to measure with, drawn by seed."""
    questions = collection.questions(config.eval.split)
    if not questions:
        raise ProjectError(f"data.dataset={config.data.dataset} has no {config.eval.split} questions")
    return [questions[i] for i in drawn(config.eval.num_questions, len(questions), config.seed, QUESTION_STREAM)]


def summarise(results: dict[str, Result], questions: list[Question], config: Config) -> dict[str, float]:
    """All numbers by name: `<metric>_<arm>`, and `<metric>` of the run's own search, the last of `ORDER` there is; its
    interval; whether one arm is better than another; kinds of questions apart; milliseconds a question by stage.
    """
    metrics: dict[str, float] = {}
    own = [name for name in ORDER if name in results][-1]
    for name, value in results[own].each.items():
        metrics[name] = float(np.nanmean(value))
    main_metric = "ndcg_at_10" if "ndcg_at_10" in results[own].each else f"answer_at_{config.eval.cutoffs[0]}"
    judged = ~np.isnan(results[own].each[main_metric])
    if judged.sum() >= 2:
        low, high = bootstrap_interval(results[own].each[main_metric][judged], num_resamples=config.eval.resamples)
        metrics |= {f"{main_metric}_low": low, f"{main_metric}_high": high}
    for name, result in results.items():
        metrics |= {f"{metric}_{name}": float(np.nanmean(value)) for metric, value in result.each.items()}
    for better, worse in COMPARED:
        if better in results and worse in results and judged.sum() >= 2:
            first, second = (results[arm].each[main_metric][judged].tolist() for arm in (better, worse))
            compared = paired_bootstrap(first, second, config.eval.resamples)
            metrics |= {f"{better}_over_{worse}_{key}": value for key, value in compared.items()}
    apart = [main_metric, *(metric for metric in results[own].each if metric.startswith("complete_at_"))]
    for kind, where in by_kind(questions).items():
        for name, result in results.items():
            for metric in apart:
                metrics[f"{metric}_{kind}_{name}"] = float(np.nanmean(result.each[metric][where]))
    for name, result in results.items():
        for stage, seconds in result.seconds.items():
            metrics[f"ms_{stage}_{name}"] = 1000 * seconds / len(questions)
    return metrics


def show(metrics: dict[str, float], results: dict[str, Result], title: str) -> None:
    """Print a table with a line for each way of searching, and below it the comparisons."""
    columns = [name for name in SHOWN if name in metrics]
    caption = "MRR and nDCG of the first 10; ms a question"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("search", min_width=max(map(len, ORDER)), no_wrap=True)
    for column in [*(SHOWN[metric] for metric in columns), "ms"]:
        table.add_column(column, justify="right")
    for name, result in results.items():
        time = sum(value for key, value in metrics.items() if key.startswith("ms_") and key.endswith(f"_{name}"))
        table.add_row(name, *(f"{np.nanmean(result.each[metric]):.4f}" for metric in columns), f"{time:.2f}")
    console = Console()
    console.print(table)
    for key, value in metrics.items():
        if key.endswith("_difference"):
            pair = key.removesuffix("_difference")
            console.print(
                f"{pair.replace('_', ' ')}: {value:+.4f} [{metrics[f'{pair}_low']:+.4f}, "
                f"{metrics[f'{pair}_high']:+.4f}], p {metrics[f'{pair}_p']:.4f}"
            )


if __name__ == "__main__":
    main(CONFIG, OPTIONS)
