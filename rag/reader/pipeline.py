"""From a question to an answer with sources: search, read, decide whether to say it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common.config import Options
from common.errors import ProjectError
from common.files import read_json
from common.run import Run
from rag.config import Config
from rag.data import load_collection
from rag.data.corpus import Collection, Passage
from rag.metrics.scores import normalise
from rag.reader.examples import PLAIN_EXAMPLES, worked_examples
from rag.reader.reader import Answer, Reader
from rag.reader.weights import CALIBRATION, open_reader
from rag.search.retriever import Retriever

AROUND = ".,;:!?…\"'“”‘’"  # around an answer in its sentence, and not of it
LIBRARY = "folder"  # data.dataset of a person's own documents, which `rag.index` has made searchable


@dataclass(frozen=True)
class Reply:
    """What a person gets.

    Attributes:
        answer: what the reader would say, with its confidence.
        withheld: whether that is below the threshold: the passages do not seem to say.
        seconds: stage -> time.
    """

    question: str
    answer: Answer
    withheld: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values: the answer, empty where it is withheld, its sources and the times."""
        sources = [
            {
                "number": place + 1,
                "id": passage.id,
                "title": passage.title,
                "text": passage.text,
                "cited": place in self.answer.cited and not self.withheld,
            }
            for place, passage in enumerate(self.answer.passages)
        ]
        return {
            "question": self.question,
            "answer": "" if self.withheld else self.answer.text,
            "withheld": self.withheld,
            "confidence": round(self.answer.confidence, 4),
            "sources": sources,
            "milliseconds": {name: round(1000 * value, 1) for name, value in self.seconds.items()},
        }


class Pipeline:
    """A retriever and a reader.

    Args:
        passages: given to the reader.
        threshold: least confidence of an answer that is said.
        name: of the reader, for people.
    """

    def __init__(self, retriever: Retriever, reader: Reader, passages: int, threshold: float, name: str = "") -> None:
        self.retriever = retriever
        self.reader = reader
        self.passages = passages
        self.threshold = threshold
        self.name = name

    def ask(self, question: str) -> Reply:
        """The whole answer to one question. `ProjectError` for an empty one."""
        *_, reply = self.stream(question)
        assert isinstance(reply, Reply)
        return reply

    def stream(self, question: str) -> Iterator[str | Reply]:
        """The answer bit by bit, as it is written; at the end the reply. What was streamed may turn out to be withheld:
        how sure the reader was is known at the end.
        """
        if not question.strip():
            raise ProjectError("the question is empty")
        seconds, passages = self.search(question)
        before = dict(self.reader.seconds)
        for part in self.reader.stream(question, passages):
            if isinstance(part, Answer):
                spent = {name: value - before[name] for name, value in self.reader.seconds.items()}
                withheld = not part.text or part.confidence < self.threshold
                yield Reply(question, part, withheld, seconds | spent)
            else:
                yield part

    def search(self, question: str) -> tuple[dict[str, float], list[Passage]]:
        """Stage -> time, and the passages for the reader."""
        started = time.perf_counter()
        found = self.retriever.find([question], self.passages)
        passages = self.retriever.passages.ranked(found.rows[0])
        return {"search": time.perf_counter() - started}, passages


def open_pipeline(config: Config, options: Options, run: Run) -> Pipeline:
    """The pipeline of a run: of `rag.train` with its dataset, or of `rag.index` with a person's documents."""
    collection = None if config.data.dataset == LIBRARY else load_collection(config.data, config.data_root)
    retriever = open_retriever(config, options, run, collection)
    reader, name = open_run_reader(config, run, collection)
    threshold = config.reader.threshold if config.reader.threshold >= 0 else calibrated(config, name)
    if threshold == 0 and config.reader.threshold < 0:
        run.display.say(
            "note: no answer is withheld, however unsure: this reader has no threshold yet. rag.answer sets one in a "
            "run that has questions, and reader.weights=<that run> reads with it"
        )
    return Pipeline(retriever, reader, config.reader.passages, threshold, name)


def open_retriever(config: Config, options: Options, run: Run, collection: Collection | None) -> Retriever:
    """The search of a run, as search.mode has it.

    Args:
        collection: None for a person's documents, which are in the run's own index.
    """
    from rag.load import load_reranker, load_trained
    from rag.metrics.arms import build_arms
    from rag.model.encoder import Encoder
    from rag.negatives import build_bm25

    if collection is None:
        from rag.index import open_library

        return open_library(config, run).retriever(load_reranker(config, run))
    if config.search.mode == "bm25":
        return Retriever(collection.passages, config.search, build_bm25(collection, config))
    model, tokenizer, _ = load_trained(config, options, run)
    if not isinstance(model, Encoder):
        raise ProjectError(f"{run.folder} holds a cross-encoder, which cannot search; give a bi-encoder's run")
    alone = replace(config, eval=replace(config.eval, zero_shot=False))
    arms = build_arms(collection, alone, run, (model, tokenizer))
    return arms["trained"] if config.search.mode == "dense" else arms.get("reranked", arms["hybrid"])


def open_run_reader(config: Config, run: Run, collection: Collection | None) -> tuple[Reader, str]:
    """The reader of a run and its name, with worked examples where it needs them."""
    examples = list(PLAIN_EXAMPLES) if collection is None else worked_examples(collection, config)
    dtype = run.machine.amp_dtype if run.machine.amp_dtype == torch.bfloat16 else torch.get_default_dtype()
    return open_reader(config, run.device, dtype or torch.float32, examples, run.track)


def calibrated(config: Config, name: str) -> float:
    """The threshold that `rag.answer` has set for this reader on validation questions; 0, which withholds nothing,
    where it has not.
    """
    folders = [Path(config.run_dir)]
    if config.reader.weights not in ("auto", "base"):
        folders.append(Path(config.reader.weights).expanduser())
    for folder in folders:
        found = read_json(folder / CALIBRATION).get(name)
        if isinstance(found, dict):
            return float(found.get("threshold", 0.0))
    return 0.0


def marked(text: str, answer: str) -> list[tuple[str, bool]]:
    """A text in pieces, and whether each has the answer's words: for a page that highlights them. Together the pieces
    are the text, letter by letter.
    """
    words = [word for word in normalise(answer).split() if word]
    pieces: list[tuple[str, bool]] = []
    at = 0
    for start, end in places(text, words):
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    pieces.append((text[at:], False))
    return [(piece, mark) for piece, mark in pieces if piece]


def places(text: str, words: list[str]) -> Iterator[tuple[int, int]]:
    """Where normalised words stand in a text one behind another, articles and punctuation between them or not."""
    spans: list[tuple[str, int, int]] = []  # normalised word, beginning, end
    at = 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        inner = word.strip(AROUND)
        start += word.index(inner)
        spans += [(part, start, start + len(inner)) for part in normalise(word).split()]
    i = 0
    while words and i + len(words) <= len(spans):
        if [span[0] for span in spans[i : i + len(words)]] == words:
            yield spans[i][1], spans[i + len(words) - 1][2]
            i += len(words)
        else:
            i += 1
