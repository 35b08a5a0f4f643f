"""The ways of searching that an evaluation compares, each on the same questions, and what each question scored.

A generation that reads what was found takes `Result.rows`, so that retrieval is done once.

Legend: Q questions, K places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.run import Run
from rag.config import SCRATCH, Config
from rag.data.corpus import Collection, Passage, Question
from rag.load import load_reranker, load_untrained
from rag.metrics.scores import answer_at, complete_at, score_ranking
from rag.model.encoder import Encoder, Tokenizer, fingerprint
from rag.negatives import CACHE, build_bm25
from rag.search.embed import Embedder, Reranker, embed_into
from rag.search.retriever import Dense, Lexical, Retriever
from rag.search.vectors import VectorFiles, VectorIndex

Array = np.ndarray[Any, Any]
Mode = Literal["bm25", "dense", "hybrid"]
BEGINNING = 25  # words of a passage in an example
# which the plain metric names, without an arm's, are of: the last of these that was measured
ORDER = ("bm25", "zero_shot", "trained", "hybrid", "reranked")


@dataclass
class Result:
    """What one way of searching found.

    Attributes:
        rows: (Q, K), -1 for empty places; scores (Q, K).
        each: metric -> value of each question (Q,).
        seconds: stage -> time for all questions.
    """

    rows: Array
    scores: Array
    each: dict[str, Array]
    seconds: dict[str, float]


def build_arms(
    collection: Collection, config: Config, run: Run, trained: tuple[Encoder, Tokenizer]
) -> dict[str, Retriever]:
    """Name -> retriever: bm25; zero_shot, the encoder as it came; trained; hybrid, of the trained encoder and BM25;
    reranked, the hybrid's best passages read again, where `rerank.model` is given.
    """
    passages = collection.passages
    embedder = embedder_of(*trained, config, run)
    words: Lexical
    vectors: Dense
    if config.index.backend == "milvus":
        words, vectors = open_milvus(collection, config, run, embedder)
    else:
        words = build_bm25(collection, config)
        vectors = open_vectors(collection, config, run, embedder, run.folder / "vectors")

    def arm(
        mode: Mode, dense: Dense | None = None, by: Embedder | None = None, last: Reranker | None = None
    ) -> Retriever:
        settings = replace(config.search, mode=mode)
        return Retriever(passages, settings, words, dense, by, last, config.rerank)

    arms = {"bm25": arm("bm25")}
    if config.eval.zero_shot and config.model.name != SCRATCH:
        before = embedder_of(*load_untrained(config.model, run.device), config, run)
        cache = Path(config.data_root) / CACHE / "vectors"
        arms["zero_shot"] = arm("dense", open_vectors(collection, config, run, before, cache), before)
    arms["trained"] = arm("dense", vectors, embedder)
    arms["hybrid"] = arm("hybrid", vectors, embedder)
    reranker = load_reranker(config, run)
    if reranker is not None:
        arms["reranked"] = arm("hybrid", vectors, embedder, reranker)
    return arms


def embedder_of(model: Encoder, tokenizer: Tokenizer, config: Config, run: Run) -> Embedder:
    """The encoder as a search uses it."""
    return Embedder(model, tokenizer, run.autocast, config.eval.batch_size, run.track)


def open_vectors(collection: Collection, config: Config, run: Run, embedder: Embedder, folder: Path) -> VectorIndex:
    """The vectors of all passages, those that are not on the disk yet made now; then the index over them."""
    files = vector_files(collection, embedder, folder, config.index.shard, run.display.say)
    index = VectorIndex(files, config.index).build(config.seed, run.track)
    run.display.say(f"index: {index.described}, {len(files)} vectors")
    return index


def vector_files(
    collection: Collection, embedder: Embedder, folder: Path, shard: int, say: Callable[[str], None]
) -> VectorFiles:
    """Vectors in a folder named after passages, weights and precision; an interrupted making goes on."""
    about = [
        collection.passages.fingerprint(),
        fingerprint(embedder.model, embedder.tokenizer.config),
        embedder.precision,
    ]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]
    files = VectorFiles(folder / key, embedder.model.dimension)
    missing = len(collection.passages) - len(files)
    if missing:
        say(f"encoding {missing} passages: {files.folder}")
    embed_into(files, collection.passages, embedder, shard)
    return files


def open_milvus(collection: Collection, config: Config, run: Run, embedder: Embedder) -> tuple[Lexical, Dense]:
    """Both searches in a Milvus collection, filled where it is not."""
    from rag.search.analyser import Analyser
    from rag.search.milvus import MilvusIndex

    files = vector_files(collection, embedder, run.folder / "vectors", config.index.shard, run.display.say)
    index = MilvusIndex(
        config.index, config.bm25, Analyser(config.analyser), run.folder / "milvus.db", embedder.model.dimension
    )
    index.synchronise(collection.passages, files, np.ones(len(files), bool))
    run.display.say(f"index: milvus, {config.index.kind}, {len(index)} passages")
    return index.words, index.vectors


def measure(arm: Retriever, questions: Sequence[Question], config: Config, track: Callable[[Any], Any]) -> Result:
    """Search with one arm for every question, and score what it found: by judged passages where there are any, by
    answer strings where there are answers.
    """
    k = max(*config.eval.cutoffs, 10)
    rows, scores = [], []
    seconds: dict[str, float] = {}
    for start in track(range(0, len(questions), 1000)):
        found = arm.find([question.text for question in questions[start : start + 1000]], k)
        rows.append(found.rows)
        scores.append(found.scores)
        for stage, time in found.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + time
    result = Result(np.concatenate(rows), np.concatenate(scores), {}, seconds)
    each = [score(question, row, arm, config) for question, row in zip(questions, result.rows, strict=True)]
    for name in each[0]:
        result.each[name] = np.array([scores.get(name, np.nan) for scores in each])
    return result


def score(question: Question, rows: Array, arm: Retriever, config: Config) -> dict[str, float]:
    """Every measure of one ranking."""
    found = arm.passages.ranked(rows)
    scores: dict[str, float] = {}
    if question.gold:
        ranking = [passage.id for passage in found]
        scores |= score_ranking(ranking, question.gold, config.eval.cutoffs)
        if config.search.hops == 2:
            scores |= {f"complete_at_{k}": complete_at(ranking, question.gold, k) for k in config.eval.cutoffs}
    if question.answers:
        texts = [passage.text for passage in found]
        scores |= {f"answer_at_{k}": answer_at(texts, question.answers, k) for k in config.eval.cutoffs if k <= 20}
    return scores


def prediction(question: Question, place: int, results: dict[str, Result], arms: dict[str, Retriever]) -> str:
    """A line of predictions.jsonl: the question, what is right, and the best ten passages of each arm."""
    found = {}
    for name, result in results.items():
        row = result.rows[place][:10]
        found[name] = {
            "passages": [passage.id for passage in arms[name].passages.ranked(row)],
            "scores": [round(float(x), 5) for x in result.scores[place][:10][row >= 0]],
        }
    about = asdict(question)
    return json.dumps({name: about[name] for name in ("id", "text", "kind", "answers", "gold")} | {"found": found})


def example(question: Question, place: int, results: dict[str, Result], arms: dict[str, Retriever]) -> dict[str, str]:
    """A question as the report shows it: what is right, and the beginning of each arm's first passage, with a mark
    where it is the right one.
    """
    shown = {"question": question.text, "right": ", ".join(question.answers) or ", ".join(question.relevant)}
    for name, result in results.items():
        row = int(result.rows[place][0])
        shown[name] = "nothing" if row < 0 else beginning(arms[name].passages[row], question)
    return shown


def beginning(passage: Passage, question: Question) -> str:
    """The first words of a passage."""
    words = passage.whole.split()
    mark = "\u2713 " if passage.id in question.relevant else ""
    return mark + " ".join(words[:BEGINNING]) + (" ..." if len(words) > BEGINNING else "")
