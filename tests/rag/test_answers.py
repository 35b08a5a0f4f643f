"""The arms show what they say, every measure counts what it says, and a reader that reads passes where others fail."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from common.config import ConfigError, Options, resolve, to_yaml
from rag import answer as program
from rag.config import Config
from rag.data import factworld, load_collection
from rag.data.corpus import Passage, Question
from rag.metrics import answers as measures
from rag.metrics.answers import Arm
from rag.metrics.scores import answer_at
from rag.negatives import build_bm25
from rag.reader.pipeline import Pipeline, calibrated, marked
from rag.reader.reader import Answer, matching
from rag.search.retriever import Retriever
from tests.helpers import status
from tests.rag import tiny_lm

SETTINGS = ["data.entities=60", "search.mode=bm25", "reader.passages=3", "answer.resamples=100", "device=cpu"]


@pytest.fixture(scope="module")
def config():
    return resolve(Config, None, SETTINGS)


@pytest.fixture(scope="module")
def collection(config):
    return load_collection(config.data, "data")


@pytest.fixture(scope="module")
def retriever(config, collection):
    return Retriever(collection.passages, config.search, build_bm25(collection, config))


class Scholar:
    """Knows which words each question's answer may be and finds them in what it is shown; is sure where it does."""

    def __init__(self, config, collection):
        self.world = factworld.make_world(config.data)
        self.known = {question.text: question for question in collection.test + collection.validation}
        self.seconds = {"prompt": 0.0, "read": 0.0, "write": 0.0}

    def answer(self, questions, passages):
        given = [[] for _ in questions] if passages is None else passages
        return [self._one(self.known[text], tuple(its)) for text, its in zip(questions, given)]

    def _one(self, question, passages):
        relation = question.id.split("/")[2]
        here = [p for p in passages if p.id in question.relevant]
        for value in self.world.values(relation):
            if answer_at([p.text for p in here], [value], 9):
                place = matching(value, passages)
                return Answer(value, passages, place, 0.9, -0.1, 0.0)
        return Answer("nobody", passages, (), 0.2, -1.6, 0.5)

    def stream(self, question, passages):
        (answer,) = self.answer([question], [passages])
        yield from answer.text
        yield answer


# -- arms --------------------------------------------------------------------------------------------------------------


def test_what_each_arm_shows(collection, retriever, config):
    questions = collection.test[:40]
    shown = measures.show_passages(questions, retriever, collection, config)
    assert list(shown.arms) == ["closed_book", "random", "retrieved", "gold"] and shown.arms["closed_book"] is None
    found = retriever.search([question.text for question in questions], 3)
    for i, question in enumerate(questions):
        assert [p.id for p in shown.arms["retrieved"][i]] == [hit.passage.id for hit in found[i]]
        assert {p.id for p in shown.arms["gold"][i]} == set(question.relevant)
        assert len(shown.arms["random"][i]) == 3
        for arm in (shown.arms["random"][i], shown.removed[i]):
            assert len({p.id for p in arm}) == len(arm) and 1 <= len(arm) <= 3
            assert not {p.id for p in arm} & set(question.relevant)
            assert not answer_at([p.whole for p in arm], question.answers, 3)
    again = measures.show_passages(questions, retriever, collection, config)
    assert again.arms["random"] == shown.arms["random"]
    other = measures.show_passages(questions, retriever, collection, replace(config, seed=1))
    assert other.arms["random"] != shown.arms["random"]


def test_without_judgements_the_right_passage_is_the_best_with_the_answer(collection, retriever, config):
    bare = [replace(question, gold={}) for question in collection.test[:30]]
    shown = measures.show_passages(bare, retriever, collection, config)
    for question, its in zip(bare, shown.arms["gold"]):
        assert len(its) <= 1 and (not its or answer_at([its[0].whole], question.answers, 1))
    assert sum(map(len, shown.arms["gold"])) > 20


# -- measures ----------------------------------------------------------------------------------------------------------


def passage(name, text):
    return Passage(name, text, name)


QUESTIONS = [
    Question("1", "who?", ("Ada",), {"a": 1}),
    Question("2", "where?", ("Brel",), {"b": 1}),
    Question("3", "when?", ("1871",), {"c": 1, "d": 1}),
]
A, B, C, D, E = (
    passage("a", "It was Ada."),
    passage("b", "In Brel."),
    passage("c", "Before."),
    passage("d", "In 1871."),
    passage("e", "Ada and Brel."),
)


class Corpus:
    """Five passages."""

    passages = (A, B, C, D, E)

    def rows_of(self, question):
        return [i for i, p in enumerate(self.passages) if p.id in question.relevant]


ARM = Arm(
    [
        Answer("Ada", (A, E), (0,), 0.9),  # right, cited right
        Answer("Brel", (E, B), (0,), 0.8),  # right, from a passage that has it and is not the one
        Answer("1872", (C, D), (0, 1), 0.3),  # wrong; both right passages are cited
    ],
    {"read": 0.3},
)


def test_sources_are_counted():
    found = measures.measure_sources({"retrieved": ARM, "closed_book": ARM}, QUESTIONS, Corpus())
    assert found["citation_precision_retrieved"] == pytest.approx(3 / 4)
    assert found["citation_recall_retrieved"] == pytest.approx(3 / 4)
    assert found["support_retrieved"] == pytest.approx(2 / 3)
    assert found["grounded_closed_book"] == pytest.approx(2 / 3)
    assert found["cited_retrieved"] == 1 and "support_closed_book" not in found


def test_arms_are_compared():
    worse = Arm([Answer("x"), Answer("Brel street"), Answer("1871")], {"read": 0.6})
    found = measures.measure_arms({"retrieved": ARM, "closed_book": worse}, QUESTIONS, 200)
    assert found["em_retrieved"] == pytest.approx(2 / 3) and found["em_closed_book"] == pytest.approx(1 / 3)
    assert found["f1_closed_book"] == pytest.approx((2 / 3 + 1) / 3)
    assert found["em_retrieved_low"] <= found["em_retrieved"] <= found["em_retrieved_high"]
    assert found["retrieved_over_closed_book_em_difference"] == pytest.approx(1 / 3)
    kinds = [replace(question, kind=kind) for question, kind in zip(QUESTIONS, ("one", "two", "one"))]
    found = measures.measure_arms({"retrieved": ARM}, kinds, 200)
    assert found["em_retrieved_one"] == pytest.approx(1 / 2) and found["em_retrieved_two"] == 1
    assert measures.latency({"gold": worse}, {"bm25": 0.03}, 3) == pytest.approx({"ms_bm25": 10, "ms_read_gold": 200})


def test_kinds_of_questions_apart():
    removed = Arm([Answer("?", (C,), (), sure) for sure in (0.1, 0.85, 0.2)])
    kinds = [replace(question, kind=kind) for question, kind in zip(QUESTIONS, ("one", "two", "one"))]
    arms = {"retrieved": ARM, "removed": removed}
    found = measures.measure_kinds(arms, kinds, Corpus(), 0.5)
    assert found["citation_precision_retrieved_one"] == 1 and found["citation_precision_retrieved_two"] == 0
    assert found["abstention_auroc_two"] == 0  # .8 against .85
    assert found["abstention_auroc_one"] == 1 and found["withheld_removed_one"] == 1
    assert not [name for name in found if "threshold" in name or "removed_retrieved" in name]
    assert measures.measure_kinds(arms, QUESTIONS, Corpus(), 0.5) == {}


def test_abstention_is_judged_as_scikit_learn_does():
    removed = Arm([Answer("?", (C,), (), sure) for sure in (0.1, 0.85, 0.2)])
    found = measures.measure_abstention(ARM, removed, QUESTIONS, 0.5)
    expected = roc_auc_score([1, 1, 1, 0, 0, 0], [0.9, 0.8, 0.3, 0.1, 0.85, 0.2])
    assert found["abstention_auroc"] == pytest.approx(expected)
    assert found["withheld_removed"] == pytest.approx(2 / 3) and found["withheld_answerable"] == pytest.approx(1 / 3)
    assert found["em_said"] == 1
    assert measures.answerable(ARM, QUESTIONS).tolist() == [True, True, True]
    assert measures.answerable(Arm([Answer("x", (C,))]), QUESTIONS[:1]).tolist() == [False]


def test_the_threshold_has_the_best_balanced_accuracy():
    rng = np.random.default_rng(0)
    sure, unsure = rng.beta(4, 2, 50), rng.beta(2, 4, 80)
    cut = measures.best_threshold(sure, unsure)
    labels = np.r_[np.ones(50), np.zeros(80)]
    values = np.r_[sure, unsure]
    best = max(balanced_accuracy_score(labels, values >= other) for other in np.linspace(0, 1, 201))
    assert balanced_accuracy_score(labels, values >= cut) >= best
    assert measures.best_threshold(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == pytest.approx(0.5)


# -- a reader that reads, and one that does not ------------------------------------------------------------------------


def test_a_reader_that_reads_passes(collection, retriever, config):
    questions = [question for question in collection.test if question.kind == "one_hop"][:60]
    reader = Scholar(config, collection)
    shown = measures.show_passages(questions, retriever, collection, config)
    arms = {name: measures.ask(reader, questions, passages) for name, passages in shown.arms.items()}
    found = measures.measure_arms(arms, questions, 100)
    assert found["em_gold"] > 0.9 and found["em_closed_book"] == found["em_random"] == 0
    assert found["retrieved_over_closed_book_em_p"] <= 0.02
    edits, after = measures.measure_edits(reader, arms["retrieved"], questions, config)
    assert "edit_followed_one_hop" not in edits
    assert edits["edit_followed"] > 0.9 and edits["edit_kept"] < 0.05 and edits["edited"] == len(after.answers) > 20
    removed = measures.ask(reader, questions, shown.removed)
    assert measures.measure_abstention(arms["retrieved"], removed, questions, 0.5)["abstention_auroc"] > 0.95

    class Parrot(Scholar):
        """Has learned the world by heart and does not read."""

        def _one(self, question, passages):
            return Answer(question.answers[0], passages, (), 0.9)

    edits, _ = measures.measure_edits(Parrot(config, collection), arms["retrieved"], questions, config)
    assert edits["edit_followed"] == 0 and edits["edit_kept"] == 1


def test_a_pipeline_withholds(collection, retriever, config):
    reader = Scholar(config, collection)
    pipeline = Pipeline(retriever, reader, 3, 0.5)
    question = next(q for q in collection.test if q.kind == "one_hop" and pipeline.ask(q.text).answer.confidence > 0.5)
    *parts, reply = pipeline.stream(question.text)
    assert "".join(parts) == reply.answer.text == question.answers[0] and not reply.withheld
    plain = reply.as_json()
    assert [source["id"] for source in plain["sources"] if source["cited"]] == question.relevant
    assert set(plain["milliseconds"]) == {"search", "prompt", "read", "write"}
    reply = Pipeline(retriever, reader, 3, 0.95).ask(question.text)
    assert reply.withheld and reply.as_json()["answer"] == ""
    assert not any(source["cited"] for source in reply.as_json()["sources"])


def test_marking_keeps_every_letter():
    text = "In  the Year 1871, Mira (Tolle) left; Mira Tolle's house."
    for answer in ("mira tolle", "1871", "the year", "absent", "", "Mira Tolle left"):
        pieces = marked(text, answer)
        assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, mark in marked(text, "Mira Tolle") if mark] == ["Mira (Tolle)"]
    assert [piece for piece, mark in marked(text, "year 1871") if mark] == ["Year 1871"]


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("run")
    model = tiny_lm.save(folder / "lm")
    reader = replace(config.reader, model=str(model), examples=1, answer_tokens=4)
    answer = replace(config.answer, num_questions=6, calibration=5, poisoned=1)
    config = replace(config, run_dir=str(folder), reader=reader, answer=answer, precision="fp32")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder, config


def test_the_program_writes_what_it_measures(run_folder, capsys):
    folder, config = run_folder
    assert status(program.main, config, Options("answer")) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((folder / "answers.json").read_text())
    metrics = printed["metrics"]
    wanted = {f"{m}_{a}" for m in ("em", "f1") for a in ("closed_book", "random", "retrieved", "gold")}
    assert wanted | {"abstention_auroc", "poison_changed_as_it_is", "poison_changed_neutralised"} <= set(metrics)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and set(lines[0]["said"]) == {"closed_book", "random", "retrieved", "gold", "removed"}
    shown = json.loads((folder / "samples/answers.json").read_text())  # what the report has of them
    assert [item["question"] for item in shown] == [line["question"] for line in lines]
    assert shown[0]["gold"] == lines[0]["said"]["gold"]["answer"]
    assert (folder / "figures/answers.png").read_bytes().startswith(b"\x89PNG")
    for arm in ("retrieved", "gold"):
        assert metrics[f"em_{arm}"] == pytest.approx(np.mean([line["said"][arm]["em"] for line in lines]))
    for line in lines:
        for said in line["said"].values():
            assert set(said["cited"]) <= set(said["sources"])
    with (folder / "answers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 30
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration[printed["reader"]]["threshold"] == metrics["threshold"]
    assert calibrated(config, printed["reader"]) == metrics["threshold"] and calibrated(config, "another") == 0
    other = replace(config.answer, label="other", arms=("closed_book", "gold"), num_questions=2, calibration=0)
    assert status(program.main, replace(config, answer=other), Options("answer")) == 0
    assert (folder / "answers-other.csv").is_file() and len((folder / "answers.jsonl").read_text().splitlines()) == 6
    with pytest.raises(ConfigError, match="label"):
        replace(other, label="../x")


def test_peoples_mistakes(run_folder, capsys):
    _, config = run_folder
    assert status(program.main, replace(config, search=replace(config.search, mode="hybrid")), Options("answer")) == 1
    assert "train first" in capsys.readouterr().err
    none = replace(config, answer=replace(config.answer, split="validation"))
    empty = replace(none, reader=replace(config.reader, weights="nowhere"))
    assert status(program.main, empty, Options("answer")) == 2
    assert "reader.weights" in capsys.readouterr().err
    assert torch.get_default_dtype() == torch.float32
