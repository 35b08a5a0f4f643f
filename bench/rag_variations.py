"""What each choice in retrieval and reading is worth, on validation questions; test questions are never read:

    python -m bench.rag_variations search   [--model runs/rag_squad/encoder]     # words, fusion, depth
    python -m bench.rag_variations chunks   [--model runs/rag_squad/encoder]     # the same text cut otherwise
    python -m bench.rag_variations training                                      # negatives, batch, temperature
    python -m bench.rag_variations reading  --run runs/rag_squad                 # passages, order, wording

`search` and `chunks` ask SQuAD, `--questions` drawn by seed 1000. For `chunks` the paragraphs of each article are one
document, cut into passages of so many words; found is a question whose answer stands in the right article within the
first 360 words of what was found, however many passages those are: what a reader is given costs by the word. `training`
trains SQuAD's retriever on 1,280 questions a row, seed 1000. `reading` asks the reader of a run, or with
`reader.weights=base` the model as it comes, with passages that BM25 finds.

Every row is one group's defaults with the keys shown; further `key=value` count for all rows. Writes
variations_<group>.json and .md into --results after every row; rows of `training` and `reading` that are there are kept
as long as their config is the same. Vectors are kept in `data_root/rag_cache`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench import cells
from bench.cells import name_of
from bench.rag_collections import open_embedder
from common.config import resolve
from common.files import read_json, write_json, write_text
from common.logging import read_metrics
from common.provenance import config_hash
from common.runtime import use_threads
from rag.config import Config
from rag.data import load_collection
from rag.data.chunks import Section, chunk
from rag.data.corpus import Collection, Passage, Passages, Question, drawn
from rag.metrics.arms import measure, vector_files
from rag.metrics.scores import answer_at
from rag.negatives import CACHE, build_bm25
from rag.search.embed import Embedder
from rag.search.retriever import Retriever
from rag.search.vectors import VectorIndex

SEED = 1000
STREAM = 7_600_011
BUDGET = 360  # words of what was found that count
RESULTS = Path("docs/results/rag")
Record = dict[str, Any]

BM25, DENSE = ["search.mode=bm25"], ["search.mode=dense"]
SCORES = ["search.fusion=score"]


def steps(count: int) -> list[str]:
    """Settings of a training of so many steps, a quarter of them to warm up."""
    names = ("steps", "validate_every", "save_every", "log_every")
    return [f"train.warmup={count // 4}", *(f"train.{name}={count}" for name in names)]


ROWS: dict[str, dict[str, list[str]]] = {
    "search": {
        "words": BM25,
        "words, as they are written": [*BM25, "analyser.stemmer=none"],
        "words, all of them": [*BM25, "analyser.stop_words=none"],
        "words, without 318 common ones": [*BM25, "analyser.stop_words=scikit-learn"],
        "words, k1 0.9, b 0.4": [*BM25, "bm25.k1=0.9", "bm25.b=0.4"],
        "words, k1 2": [*BM25, "bm25.k1=2"],
        "words, BM25+": [*BM25, "bm25.variant=bm25+"],
        "vectors": DENSE,
        "both": [],
        "both, rank constant 10": ["search.rrf_k=10"],
        "both, rank constant 200": ["search.rrf_k=200"],
        "both, 20 candidates": ["search.depth=20"],
        "both, 500 candidates": ["search.depth=500"],
        "both, scores, vectors 0.3": [*SCORES, "search.dense_weight=0.3"],
        "both, scores, vectors 0.5": SCORES,
        "both, scores, vectors 0.7": [*SCORES, "search.dense_weight=0.7"],
    },
    "chunks": {
        "paragraphs as they are": [],
        **{
            f"{words} words, {overlap} repeated": [f"data.chunk_words={words}", f"data.chunk_overlap={overlap}"]
            for words, overlap in ((30, 0), (60, 0), (60, 15), (120, 0), (120, 30), (240, 0), (240, 60))
        },
    },
    "training": {
        "one hard negative": [],
        "none": ["negatives.count=0"],
        "three": ["negatives.count=3"],
        "not the five best": ["negatives.skip=5"],
        "without a margin": ["loss.margin=2"],
        "batches of 16, rate 1e-5": ["train.batch_size=16", "train.lr=1e-5", *steps(80)],
        "batches of 256, rate 4e-5": ["train.batch_size=256", "train.lr=4e-5", *steps(5)],
        "temperature 0.02": ["loss.temperature=0.02"],
        "temperature 0.1": ["loss.temperature=0.1"],
        "asked both ways": ["loss.symmetric=true"],
        "rate 1e-4": ["train.lr=1e-4"],
    },
    "reading": {
        "three passages": [],
        "one": ["reader.passages=1"],
        "five": ["reader.passages=5"],
        "three, best last": ["reader.order=best_last"],
        "three, no worked examples": ["reader.examples=0"],
        "three, eight worked examples": ["reader.examples=8"],
        "three, chat": ["reader.style=chat"],
    },
}
CONFIG = "configs/rag_squad.yaml"
SHORT = [*steps(20), "train.validation_questions=1000"]  # of 64 questions
COLUMNS = {
    "search": {"ndcg_at_10": "nDCG@10", "recall_at_1": "recall@1", "recall_at_20": "recall@20"},
    "chunks": {"found": "found", "passages": "passages", "words": "words a passage"},
    "training": {"val_ndcg_at_10": "validation nDCG@10", "loss": "loss", "seconds": "CPU-s"},
    "reading": {"em_retrieved": "EM", "f1_retrieved": "F1", "shown_right": "right passage shown", "ms": "ms"},
}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    use_threads(args.threads)
    measured: dict[str, Callable[[str, argparse.Namespace], Record]] = {
        "search": search_row,
        "chunks": chunks_row,
        "training": training_row,
        "reading": reading_row,
    }
    for name in args.only or ROWS[args.group]:
        record = {"row": name, **measured[args.group](name, args)}
        print(f"{name}: " + ", ".join(f"{key} {shown(record[key])}" for key in COLUMNS[args.group]), flush=True)
        write(args.group, record, args.results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rag_variations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", choices=list(ROWS))
    parser.add_argument("--only", action="append", metavar="ROW", default=[], help="may be repeated")
    parser.add_argument("--model", default="", help="search, chunks: an encoder (default: the config's)")
    parser.add_argument("--run", type=Path, help="reading: the folder of rag.train_reader's run")
    parser.add_argument("--questions", type=int, default=0, help="default: 1000, reading 100")
    parser.add_argument("--runs", type=Path, default=Path("runs/rag_variations"), help="training: run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every row")
    args = parser.parse_intermixed_args(argv)
    for name in args.only:
        if name not in ROWS[args.group]:
            parser.error(f"--only: no row {name!r}; there are: {', '.join(ROWS[args.group])}")
    if args.group == "reading" and (args.run is None or not (args.run / "config.yaml").is_file()):
        parser.error("reading needs --run, the folder of a run")
    args.questions = args.questions or (100 if args.group == "reading" else 1000)
    return args


def settings_of(name: str, args: argparse.Namespace) -> list[str]:
    """What a row changes, then what holds for all rows."""
    model = [f"model.name={args.model}"] if args.model else []
    return [*ROWS[args.group][name], *model, *args.overrides]


def asked(collection: Collection, count: int) -> list[Question]:
    """Validation questions, drawn by seed."""
    return [collection.validation[i] for i in drawn(count, len(collection.validation), SEED, STREAM)]


# -- searching ---------------------------------------------------------------------------------------------------------


@cache
def shared_embedder(config: Config) -> Embedder:
    """One for all rows that read with the same encoder."""
    return open_embedder(config)


def open_retriever(collection: Collection, config: Config) -> Retriever:
    """Words, vectors or both, as the config has it."""
    mode = config.search.mode
    words = build_bm25(collection, config) if mode != "dense" else None
    if mode == "bm25":
        return Retriever(collection.passages, config.search, words)
    embedder = shared_embedder(Config(model=config.model, device=config.device, precision=config.precision))
    folder = Path(config.data_root) / CACHE / "vectors"
    vectors = VectorIndex(vector_files(collection, embedder, folder, config.index.shard, print), config.index).build()
    return Retriever(collection.passages, config.search, words, vectors, embedder)


def search_row(name: str, args: argparse.Namespace) -> Record:
    """How well questions of SQuAD find their passage."""
    config = resolve(Config, Path(CONFIG), settings_of(name, args))
    collection = load_collection(config.data, config.data_root)
    questions = asked(collection, args.questions)
    result = measure(open_retriever(collection, config), questions, config, iter)
    means = {metric: round(float(np.nanmean(each)), 4) for metric, each in result.each.items()}
    times = {f"ms_{stage}": round(1000 * value / len(questions), 3) for stage, value in result.seconds.items()}
    return {"settings": ROWS["search"][name], "questions": len(questions), **means, **times}


def chunks_row(name: str, args: argparse.Namespace) -> Record:
    """Whether answers stand in the first words of what is found, where articles are cut this way."""
    config = resolve(Config, Path(CONFIG), settings_of(name, args))
    collection = load_collection(config.data, config.data_root)
    questions = asked(collection, args.questions)
    cut = collection
    if ROWS["chunks"][name]:
        cut = replace(collection, passages=Passages(cut_articles(collection, config)))
    found = open_retriever(cut, config).find([question.text for question in questions], 30)
    right = [
        in_first_words(cut.passages.ranked(rows), question, BUDGET)
        for rows, question in zip(found.rows, questions, strict=True)
    ]
    words = [len(passage.text.split()) for passage in cut.passages]
    return {
        "settings": ROWS["chunks"][name],
        "questions": len(questions),
        "found": round(float(np.mean(right)), 4),
        "passages": len(words),
        "words": round(float(np.mean(words)), 1),
    }


def cut_articles(collection: Collection, config: Config) -> Iterator[Passage]:
    """Passages of data.chunk_words, the paragraphs of an article one text."""
    articles: dict[str, list[Passage]] = {}
    for passage in collection.passages:
        articles.setdefault(passage.group, []).append(passage)
    for group, passages in articles.items():
        # as one paragraph: cut between sentences, wherever a paragraph ends
        text = " ".join(passage.text.strip() for passage in passages)
        parts = chunk([Section("", (text,))], config.data.chunk_words, config.data.chunk_overlap)
        for number, (_, part) in enumerate(parts):
            yield Passage(f"{group}/{number}", part, passages[0].title, group)


def in_first_words(passages: list[Passage], question: Question, budget: int) -> float:
    """1 where the answer stands in the right article's part of the first so many words of these passages."""
    for passage in passages:
        words = passage.text.split()[:budget]
        budget -= len(words)
        if passage.group == question.group and answer_at([" ".join(words)], question.answers, 1):
            return 1.0
        if budget <= 0:
            break
    return 0.0


# -- training and reading ----------------------------------------------------------------------------------------------


def training_row(name: str, args: argparse.Namespace) -> Record:
    """A short training, and its validation questions after the last step."""
    settings = [*SHORT, f"seed={SEED}", *settings_of(name, args)]
    folder = args.runs / name_of(name)
    digest = config_hash(resolve(Config, Path(CONFIG), settings))
    kept = folder.with_suffix(".json")
    if read_json(kept).get("config_sha256") == digest:
        return read_json(kept)
    shutil.rmtree(folder, ignore_errors=True)
    arguments = ["-m", "rag.train", "--config", CONFIG, f"run_dir={folder}", *settings]
    seconds = cells.command(arguments, args.threads)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    measured = {key: round(value, 4) for key, value in last.items() if key == "loss" or key.startswith("val_")}
    record = {"settings": ROWS["training"][name], **measured, "seconds": round(seconds, 1), "config_sha256": digest}
    write_json(kept, record)
    return record


def reading_row(name: str, args: argparse.Namespace) -> Record:
    """What a reader answers; its search is by words, so that it needs no trained encoder."""
    label = f"variation_{name_of(name)}"
    settings = [
        "search.mode=bm25",
        "answer.split=validation",
        "answer.arms=[retrieved]",
        "answer.removed=false",
        "answer.edited=false",
        "answer.calibration=0",
        f"answer.num_questions={args.questions}",
        f"answer.label={label}",
        f"seed={SEED}",
        *settings_of(name, args),
    ]
    digest = config_hash(resolve(Config, args.run / "config.yaml", settings))
    kept = args.run / f"{label}.json"
    if read_json(kept).get("config_sha256") == digest:
        return read_json(kept)
    started = time.perf_counter()
    cells.command(["-m", "rag.answer", "--run", str(args.run), *settings], args.threads)
    result = read_json(args.run / f"answers-{label}.json")
    metrics = result["metrics"]
    measured = {key: metrics[key] for key in ("em_retrieved", "f1_retrieved", "shown_right")}
    times = sum(value for key, value in metrics.items() if key.startswith("ms_"))
    record = {
        "settings": [*ROWS["reading"][name], *args.overrides],
        "reader": Path(result["reader"]).name,
        "questions": args.questions,
        **measured,
        "ms": round(times, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "config_sha256": digest,
    }
    write_json(kept, record)
    return record


# -- the table ---------------------------------------------------------------------------------------------------------


def write(group: str, record: Record, results: Path) -> None:
    """Put a row into the group's files, in the order of `ROWS`."""
    path = results / f"variations_{group}.json"
    rows = {row["row"]: row for row in read_json(path).get("rows", [])} | {record["row"]: record}
    ordered = [rows[name] for name in ROWS[group] if name in rows]
    write_json(path, {"group": group, "rows": ordered})
    columns = {key: heading for key, heading in COLUMNS[group].items() if any(key in row for row in ordered)}
    lines = [f"| | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for row in ordered:
        cells = [shown(row[key]) if key in row else "" for key in columns]
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    write_text(results / f"variations_{group}.md", "\n".join([*lines, ""]))


def shown(value: float) -> str:
    """`20,958`, `0.8258`, `117.2`."""
    return f"{value:,}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
