"""Whether retrieval helps a reader, and whether its answers come from what it was shown. No files.

Four arms ask the same questions of the same weights: from memory, with random passages, with those that were found, and
with the right ones. In all of them the reader has to say something (see rag/reader/reader.py), so that none wins by
keeping silent. What follows is causal: the passages that have the answer are taken away, or say something else, and the
answer has to change with them.

Legend: Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.metrics import bootstrap_interval
from common.runtime import mix_seed
from rag.config import Config
from rag.data import factworld
from rag.data.corpus import Collection, Passage, Question, by_kind
from rag.metrics.scores import answer_at, exact_match, f1, paired_bootstrap
from rag.reader.examples import has_answer
from rag.reader.poison import HARMLESS, POISONS, damage
from rag.reader.reader import Answer, GenerativeReader, Reader
from rag.search.retriever import Retriever

Floats = NDArray[np.float64]
RANDOM_STREAM = 7_500_001
DEPTH = 50  # passages found, of which those that remain when the right ones are taken away are shown
COMPARED = (("retrieved", "closed_book"), ("retrieved", "random"), ("gold", "retrieved"))


@dataclass
class Arm:
    """One way of giving passages to the reader.

    Attributes:
        answers: one a question.
        seconds: stage -> time for all questions.
    """

    answers: list[Answer]
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, places: Sequence[int]) -> Arm:
        """The answers to some of the questions, without times."""
        return Arm([self.answers[place] for place in places])

    def em(self, questions: Sequence[Question]) -> Floats:
        """Exact match of each. (Q,)"""
        pairs = zip(self.answers, questions, strict=True)
        return np.array([exact_match(answer.text, question.answers) for answer, question in pairs])

    def f1(self, questions: Sequence[Question]) -> Floats:
        """F1 of each. (Q,)"""
        return np.array([f1(answer.text, question.answers) for answer, question in zip(self.answers, questions)])


@dataclass
class Shown:
    """The passages of each question in each arm; None = none at all.

    Attributes:
        removed: what is found once all that has the answer is taken away.
    """

    arms: dict[str, list[list[Passage]] | None]
    removed: list[list[Passage]]
    seconds: dict[str, float]


# -- what is shown -----------------------------------------------------------------------------------------------------


def show_passages(questions: Sequence[Question], retriever: Retriever, collection: Collection, config: Config) -> Shown:
    """The passages of every arm."""
    k = config.reader.passages
    found = retriever.find([question.text for question in questions], max(DEPTH, 2 * k))
    ranked = [retriever.passages.ranked(rows) for rows in found.rows]
    removed = [
        [passage for passage in its if not is_right(passage, question)][:k]
        for its, question in zip(ranked, questions, strict=True)
    ]
    every: dict[str, list[list[Passage]] | None] = {
        "closed_book": None,
        "random": [strangers(question, i, collection, config) for i, question in enumerate(questions)],
        "retrieved": [its[:k] for its in ranked],
        "gold": [
            right_passages(question, its, collection)[:k] for question, its in zip(questions, ranked, strict=True)
        ],
    }
    return Shown({name: every[name] for name in config.answer.arms}, removed, found.seconds)


def is_right(passage: Passage, question: Question) -> bool:
    """Whether a passage was judged relevant, or has the answer's words."""
    return passage.id in question.relevant or has_answer(passage, question)


def right_passages(question: Question, found: Sequence[Passage], collection: Collection) -> list[Passage]:
    """The passages judged relevant; where nobody has judged, the best found that has the answer."""
    if question.gold:
        return [collection.passages[row] for row in collection.rows_of(question)]
    return [passage for passage in found if is_right(passage, question)][:1]


def strangers(question: Question, number: int, collection: Collection, config: Config) -> list[Passage]:
    """Passages drawn by seed that have nothing to do with the answer."""
    rng = np.random.default_rng(mix_seed(config.seed, RANDOM_STREAM, number))
    drawn = (collection.passages[int(row)] for row in rng.integers(0, len(collection.passages), 20 * DEPTH))
    chosen: list[Passage] = []
    for passage in drawn:
        if len(chosen) == config.reader.passages:
            break
        if not is_right(passage, question) and passage not in chosen:
            chosen.append(passage)
    return chosen


# -- asking ------------------------------------------------------------------------------------------------------------


def ask(reader: Reader, questions: Sequence[Question], passages: list[list[Passage]] | None) -> Arm:
    """Answers to every question, and what each stage took."""
    before = dict(reader.seconds)
    answers = reader.answer([question.text for question in questions], passages)
    return Arm(answers, {name: value - before[name] for name, value in reader.seconds.items()})


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure_arms(arms: dict[str, Arm], questions: Sequence[Question], resamples: int) -> dict[str, float]:
    """EM and F1 of each arm with 95 percent intervals, kinds of questions apart, and the arms compared in pairs."""
    metrics: dict[str, float] = {}
    kinds = by_kind(questions)
    for name, arm in arms.items():
        for measure, values in (("em", arm.em(questions)), ("f1", arm.f1(questions))):
            metrics[f"{measure}_{name}"] = float(values.mean())
            if len(values) >= 2:
                low, high = bootstrap_interval(values, num_resamples=resamples)
                metrics |= {f"{measure}_{name}_low": low, f"{measure}_{name}_high": high}
            for kind, where in kinds.items():
                metrics[f"{measure}_{name}_{kind}"] = float(values[where].mean())
    for better, worse in COMPARED:
        if better in arms and worse in arms and len(questions) >= 2:
            for measure in ("em", "f1"):
                one, other = (getattr(arms[name], measure)(questions) for name in (better, worse))
                found = paired_bootstrap(one, other, resamples)
                metrics |= {f"{better}_over_{worse}_{measure}_{key}": value for key, value in found.items()}
    return metrics


def measure_sources(arms: dict[str, Arm], questions: Sequence[Question], collection: Collection) -> dict[str, float]:
    """Whether answers come from where they say.

    `support_<arm>`: share of answers whose words stand in a passage that they cite. `grounded_<arm>`: in a right
    passage, whether it was shown or not, which can be asked of the closed book, too. `citation_precision_<arm>`: share
    of citations that name a right passage; `citation_recall_<arm>`: share of the right passages that were shown and
    are cited.
    """
    metrics = {}
    for name, arm in arms.items():
        grounded, supported, precision, recall = [], [], [], []
        for answer, question in zip(arm.answers, questions, strict=True):
            right = [collection.passages[row] for row in collection.rows_of(question)]
            if right:
                grounded.append(holds(right, answer))
            cited = [answer.passages[place] for place in answer.cited]
            supported.append(holds(cited, answer))
            precision += [float(is_relevant(passage, question)) for passage in cited]
            recall += [float(p in cited) for p in answer.passages if is_relevant(p, question)]
        metrics[f"grounded_{name}"] = mean(grounded)
        if name != "closed_book":
            metrics[f"support_{name}"] = mean(supported)
            metrics[f"citation_precision_{name}"] = mean(precision)
            metrics[f"citation_recall_{name}"] = mean(recall)
            metrics[f"cited_{name}"] = mean([float(bool(answer.cited)) for answer in arm.answers])
    return {key: value for key, value in metrics.items() if not np.isnan(value)}


def holds(passages: Sequence[Passage], answer: Answer) -> float:
    """1 where one of the passages has the answer's words."""
    return answer_at([passage.whole for passage in passages], [answer.text], len(passages))


def is_relevant(passage: Passage, question: Question) -> bool:
    """By judgement where there is one, else by the answer's words."""
    return passage.id in question.relevant if question.gold else is_right(passage, question)


def measure_kinds(
    arms: dict[str, Arm], questions: Sequence[Question], collection: Collection, threshold: float
) -> dict[str, float]:
    """Sources and abstention of each kind of questions apart: the same numbers with the kind behind their names."""
    metrics: dict[str, float] = {}
    for kind, places in by_kind(questions).items():
        its = [questions[place] for place in places]
        parts = {name: arm.of(places) for name, arm in arms.items()}
        found = measure_sources({name: part for name, part in parts.items() if name != "removed"}, its, collection)
        if {"retrieved", "removed"} <= set(parts):
            found |= measure_abstention(parts["retrieved"], parts["removed"], its, threshold)
        metrics |= {f"{name}_{kind}": value for name, value in found.items() if name != "threshold"}
    return metrics


def measure_abstention(
    retrieved: Arm, removed: Arm, questions: Sequence[Question], threshold: float
) -> dict[str, float]:
    """How well confidence tells questions whose answer was shown from the same questions once it is taken away.

    `abstention_auroc`: the probability that a question of the first kind has the higher confidence. With the threshold:
    `withheld_removed`, as it should be, `withheld_answerable`, as it should not; and the exact match of what is said.
    """
    from sklearn.metrics import roc_auc_score

    there = answerable(retrieved, questions)
    sure = np.array([answer.confidence for answer in retrieved.answers])
    unsure = np.array([answer.confidence for answer in removed.answers])
    said = sure >= threshold
    metrics = {
        "threshold": threshold,
        "withheld_retrieved": float((~said).mean()),
        "withheld_removed": float((unsure < threshold).mean()),
    }
    if there.any():
        labels = np.concatenate([np.ones(int(there.sum())), np.zeros(len(unsure))])
        metrics["abstention_auroc"] = float(roc_auc_score(labels, np.concatenate([sure[there], unsure])))
        metrics["withheld_answerable"] = float((~said)[there].mean())
    if said.any():
        metrics["em_said"] = float(retrieved.em(questions)[said].mean())
    return metrics


def answerable(arm: Arm, questions: Sequence[Question]) -> NDArray[np.bool_]:
    """Whether a right passage was among those shown. (Q,)"""
    pairs = zip(arm.answers, questions, strict=True)
    return np.array([any(is_right(p, question) for p in answer.passages) for answer, question in pairs], bool)


def best_threshold(sure: Floats, unsure: Floats) -> float:
    """The confidence that best divides answerable questions from others: the one with the highest balanced accuracy
    (Youden 1950), in the middle of the gap that it lies in.
    """
    values = np.unique(np.concatenate([sure, unsure]))
    cuts = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [1.0]])
    gains = [float((sure >= cut).mean() + (unsure < cut).mean()) for cut in cuts]
    return float(cuts[int(np.argmax(gains))])


def measure_edits(
    reader: Reader, retrieved: Arm, questions: Sequence[Question], config: Config
) -> tuple[dict[str, float], Arm | None]:
    """FactWorld: the passage that states the answer is replaced by one that states another in the same words, among the
    same others. `edit_followed`: share of the new answers, of those questions that were answered rightly before;
    `edit_kept`: share of the old ones, which then come from somewhere else.
    """
    world = factworld.make_world(config.data)
    chosen, given, wanted = [], [], []
    for question, answer, right in zip(questions, retrieved.answers, retrieved.em(questions), strict=True):
        passage, new = world.edited(question)
        if right and any(shown.id == passage.id for shown in answer.passages):
            chosen.append(question)
            given.append([passage if shown.id == passage.id else shown for shown in answer.passages])
            wanted.append(new)
    if not chosen:
        return {"edited": 0.0}, None
    after = ask(reader, chosen, given)
    followed = [exact_match(answer.text, [new]) for answer, new in zip(after.answers, wanted, strict=True)]
    kept = after.em(chosen)
    metrics = {"edit_followed": mean(followed), "edit_kept": float(kept.mean()), "edited": float(len(chosen))}
    for kind, places in by_kind(chosen).items():
        metrics |= {f"edit_followed_{kind}": mean([followed[i] for i in places]), f"edited_{kind}": float(len(places))}
    return metrics, after


def measure_poison(
    reader: Reader, questions: Sequence[Question], passages: list[list[Passage]], count: int
) -> dict[str, float]:
    """What thirty hostile passages change, with `reader.neutralise` and without, and what harmless words in the same
    place change.
    """
    asked = [question.text for question in questions[:count]]
    given = [its for its in passages[:count]]
    readers = {"neutralised": reader}
    if isinstance(reader, GenerativeReader):
        readers["as_it_is"] = reader.unguarded()
    metrics = {"poison_harmless_changed": damage(reader, asked, given, [HARMLESS]).changed}
    for name, used in readers.items():
        found = damage(used, asked, given, POISONS)
        metrics |= {
            f"poison_changed_{name}": found.changed,
            f"poison_obeyed_{name}": found.obeyed,
            f"poison_invented_{name}": found.invented,
        }
    return metrics


def latency(arms: dict[str, Arm], search: dict[str, float], count: int) -> dict[str, float]:
    """Milliseconds a question by stage; those of the reader are means over batches."""
    times = {f"ms_{stage}": 1000 * value / count for stage, value in search.items()}
    for name, arm in arms.items():
        times |= {f"ms_{stage}_{name}": 1000 * value / count for stage, value in arm.seconds.items()}
    return times


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


# -- what is written ---------------------------------------------------------------------------------------------------


def prediction(question: Question, place: int, arms: dict[str, Arm]) -> dict[str, Any]:
    """A question, what is right, and what each arm said with which sources."""
    said = {}
    for name, arm in arms.items():
        answer = arm.answers[place]
        said[name] = {
            "answer": answer.text,
            "em": exact_match(answer.text, question.answers),
            "f1": round(f1(answer.text, question.answers), 4),
            "confidence": round(answer.confidence, 5),
            "sources": [passage.id for passage in answer.passages],
            "cited": [answer.passages[i].id for i in answer.cited],
        }
    about = {"id": question.id, "question": question.text, "kind": question.kind, "answers": list(question.answers)}
    return about | {"right": question.relevant, "said": said}


def example(item: dict[str, Any]) -> dict[str, str]:
    """A prediction as the report shows it: what is right, and what each arm said."""
    said = {name: said["answer"] for name, said in item["said"].items()}
    return {"question": item["question"], "right": ", ".join(item["answers"]), **said}


def flat(predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as rows of a table, one for each question and arm."""
    rows = []
    for item in predictions:
        for arm, said in item["said"].items():
            lists = {name: " | ".join(said[name]) for name in ("sources", "cited")}
            about = {"id": item["id"], "question": item["question"], "right": " | ".join(item["answers"]), "arm": arm}
            rows.append(about | {**said, **lists})
    return rows
