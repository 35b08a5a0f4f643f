"""Examples to learn from: each training question with a passage that answers it and passages that only look as if they
did, which BM25 finds.

Mining takes as long as searching for every training question, so it is done once and kept, under a name made of all
that decides it.

Legend: N questions, P right passages at most, H hard negatives at most, B questions a step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ProjectError
from common.files import atomic_open
from common.runtime import mix_seed
from rag.config import Config
from rag.data.corpus import Collection, Question
from rag.metrics.scores import answer_at
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25

Array = np.ndarray[Any, Any]
CACHE = "rag_cache"  # below data_root
BATCH = 1000  # questions searched at once
EPOCH_STREAM = 7_400_001
DRAW_STREAM = 7_400_002


@dataclass(frozen=True)
class Batch:
    """What a step learns from; rows are places in the corpus.

    Attributes:
        questions: B texts.
        positives: int64 (B,).
        negatives: int64 (B, negatives.count).
        gold: all right rows of each question, so that none of them counts as wrong.
    """

    questions: list[str]
    positives: Array
    negatives: Array
    gold: list[list[int]]


class Examples:
    """Training questions with their right and their misleading passages.

    Args:
        positives: int32 (N, P) and negatives (N, H), filled up with -1.
        num_passages: of the corpus, from which missing hard negatives are drawn.
    """

    def __init__(self, questions: list[Question], positives: Array, negatives: Array, num_passages: int) -> None:
        usable = positives[:, 0] >= 0 if positives.shape[1] else np.zeros(len(questions), bool)
        self.questions = [question for question, use in zip(questions, usable, strict=True) if use]
        self.positives = positives[usable]
        self.negatives = negatives[usable]
        self.num_passages = num_passages
        self.unusable = int((~usable).sum())

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, step: int, size: int, count: int, seed: int) -> Batch:
        """The batch of step 1, 2, ...: each epoch goes once through all questions in an order of its own. A function of
        (seed, step) alone.
        """
        places = np.arange((step - 1) * size, step * size)
        chosen = np.empty(size, np.int64)
        for epoch in np.unique(places // len(self)):
            order = np.random.default_rng(mix_seed(seed, EPOCH_STREAM, int(epoch))).permutation(len(self))
            inside = places // len(self) == epoch
            chosen[inside] = order[places[inside] % len(self)]
        rng = np.random.default_rng(mix_seed(seed, DRAW_STREAM, step))
        gold = [[int(row) for row in self.positives[i] if row >= 0] for i in chosen]
        positives = np.array([rows[int(rng.integers(0, len(rows)))] for rows in gold], np.int64)
        negatives = np.stack([self._negatives(int(i), rows, count, rng) for i, rows in zip(chosen, gold, strict=True)])
        return Batch([self.questions[i].text for i in chosen], positives, negatives, gold)

    def _negatives(self, place: int, gold: list[int], count: int, rng: np.random.Generator) -> Array:
        """So many of a question's hard negatives; where there are too few, any passage that is not right."""
        mined = self.negatives[place]
        mined = mined[mined >= 0]
        rows = rng.permutation(mined)[:count].tolist()
        while len(rows) < count:
            other = int(rng.integers(0, self.num_passages))
            if other not in gold or self.num_passages <= len(gold):
                rows.append(other)
        return np.array(rows, np.int64)


def load_examples(
    collection: Collection, config: Config, say: Callable[[str], None], track: Callable[[Any], Iterator[Any]] = iter
) -> Examples:
    """The training questions of a collection with their passages, from the cache or mined now. `ProjectError` where no
    question has a passage to learn from.
    """
    path = Path(config.data_root) / CACHE / f"negatives-{key_of(collection, config)}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file["positives"], file["negatives"]
    except (OSError, ValueError, KeyError, EOFError):
        say(f"looking for hard negatives of {len(collection.train)} questions with BM25, once: {path}")
        found = mine(collection, config, track)
        with atomic_open(path) as file:
            np.savez(file, positives=found[0], negatives=found[1])
    examples = Examples(collection.train, *found, len(collection.passages))
    if len(examples) == 0:
        raise ProjectError(f"{collection.name} has no training question with a passage that answers it")
    if examples.unusable:
        say(f"note: {examples.unusable} training questions have no passage that answers them, and are left out")
    return examples


def key_of(collection: Collection, config: Config) -> str:
    """A name for what mining depends on: passages, questions, BM25 and what counts as a negative."""
    digest = hashlib.sha256(collection.passages.fingerprint().encode())
    for question in collection.train:
        digest.update(f"{question.id}\n{question.text}\n{question.answers}\n{sorted(question.gold.items())}\n".encode())
    sections = [asdict(config.bm25), asdict(config.negatives), Analyser(config.analyser).fingerprint]
    digest.update(json.dumps(sections, sort_keys=True).encode())
    return digest.hexdigest()[:20]


def build_bm25(collection: Collection, config: Config) -> BM25:
    """A lexical index of all passages of a collection."""
    index = BM25(config.bm25, Analyser(config.analyser))
    index.add(passage.whole for passage in collection.passages)
    index.refresh()
    return index


def mine(collection: Collection, config: Config, track: Callable[[Any], Iterator[Any]]) -> tuple[Array, Array]:
    """Right passages (N, P) and hard negatives (N, negatives.depth), int32, filled up with -1.

    Right are the judged passages; where a dataset has judged none, the best one that BM25 finds with the answer in it
    (distant supervision, as Karpukhin et al. 2020 do for such datasets).
    """
    index = build_bm25(collection, config)
    questions = collection.train
    rights: list[list[int]] = []
    wrongs: list[list[int]] = []
    for start in track(range(0, len(questions), BATCH)):
        part = questions[start : start + BATCH]
        _, rows = index.search([question.text for question in part], config.negatives.depth + 10)
        for question, found in zip(part, rows.tolist(), strict=True):
            right, wrong = sort_out(question, [row for row in found if row >= 0], collection, config)
            rights.append(right)
            wrongs.append(wrong)
    return padded(rights), padded(wrongs)


def sort_out(
    question: Question, found: list[int], collection: Collection, config: Config
) -> tuple[list[int], list[int]]:
    """What BM25 found for a question, as (right rows, misleading rows)."""
    settings = config.negatives
    right = collection.rows_of(question)
    answering: set[int] = set()
    if question.answers and (not settings.with_answer or not right):
        answering = {
            row for row in found if answer_at([collection.passages[row].text], question.answers, 1) and row not in right
        }
    if not right and not question.gold:
        right = [row for row in found if row in answering][:1]
    left_out = set(right) | (set() if settings.with_answer else answering)
    return right, [row for row in found if row not in left_out][settings.skip : settings.depth]


def padded(lists: Iterable[list[int]]) -> Array:
    """Lists of different lengths as one array, filled up with -1. int32 (N, longest)"""
    each = list(lists)
    result = np.full((len(each), max((len(item) for item in each), default=0)), -1, np.int32)
    for i, item in enumerate(each):
        result[i, : len(item)] = item
    return result
