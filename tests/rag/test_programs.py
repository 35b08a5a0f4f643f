"""Train and evaluate as a person would: resume, two processes, what appears in the run folder, and what is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rag.eval
import rag.train
from common.checkpoint import Checkpoints
from common.config import ConfigError, Options, load, resolve
from common.logging import read_metrics
from rag.config import Config
from rag.data import load_collection
from rag.negatives import Examples, load_examples
from tests.helpers import ROOT, errors, same, status, stop_in_check, two_processes

TINY_YAML = ROOT / "configs/rag_factworld_tiny.yaml"
# 96 of some 340 training questions: an epoch is three steps of 32
TINY = [
    "data.entities=70", "data.max_questions=96", "model.width=16", "model.layers=1", "model.heads=2",
    "model.vocabulary=400",
    "model.dropout=0.2", "train.batch_size=32", "train.steps=8", "train.log_every=1", "train.save_every=100",
    "train.validate_every=4", "train.validation_questions=20", "train.validation_passages=60", "precision=fp32",
    "device=cpu", "eval.resamples=200",
]  # fmt: skip
KINDS = {
    "bi_encoder": ["loss.symmetric=true", "negatives.count=2"],
    "chunks": ["train.chunk=20", "model.pooling=cls"],
    "cross_encoder": ["model.kind=cross_encoder", "negatives.count=3", "train.batch_size=8"],
}
TIMING = "questions_per_second"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def tiny(run_dir, data_root, *overrides: str) -> Config:
    return resolve(Config, TINY_YAML, [*TINY, f"run_dir={run_dir}", f"data_root={data_root}", *overrides])


def train(config: Config, **options) -> int:
    return status(rag.train.train, config, Options("train", **options))


def evaluate(run_dir, *overrides: str) -> dict:
    config, _ = load(Config, "rag", "eval", ["--run", str(run_dir), *overrides])
    assert status(rag.eval.main, config, Options("eval")) == 0
    return json.loads((run_dir / "eval.json").read_text())


def lines(run_dir) -> list[dict]:
    return [{k: v for k, v in line.items() if k != TIMING} for line in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_resumes_exactly(kind, tmp_path, data_root, monkeypatch):
    """Stopped in the middle of an epoch and at its end: every tensor and every line equal to a run that was not."""
    assert train(tiny(tmp_path / "whole", data_root, *KINDS[kind])) == 0
    config = tiny(tmp_path / "run", data_root, *KINDS[kind])
    stop_in_check(monkeypatch, 4, 6)
    assert train(config) == 143
    assert train(config, resume=True) == 143
    assert train(config, resume=True) == 0
    first = Checkpoints.load(tmp_path / "whole/checkpoints/00000008.pt")
    second = Checkpoints.load(tmp_path / "run/checkpoints/00000008.pt")
    assert same(first["parts"], second["parts"]) and same(first["rng"], second["rng"])
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert sum("val_ndcg_at_10" in line for line in lines(tmp_path / "run")) == 2


def test_everything_is_measured_and_left_behind(tmp_path, data_root, capsys):
    """A retriever and the cross-encoder that ranks what it finds; eval.json, predictions, an encoder for others."""
    assert train(tiny(tmp_path / "run", data_root)) == 0
    assert train(tiny(tmp_path / "cross", data_root, *KINDS["cross_encoder"])) == 0
    result = evaluate(
        tmp_path / "run", f"rerank.model={tmp_path / 'cross'}", "search.depth=20", "eval.num_questions=40"
    )
    metrics = result["metrics"]
    assert all(math.isfinite(value) for value in metrics.values())
    for arm in ("bm25", "trained", "hybrid", "reranked"):
        for name in ("recall_at_1", "recall_at_20", "mrr_at_10", "ndcg_at_10", "answer_at_5", "ndcg_at_10_two_hop"):
            assert 0 <= metrics[f"{name}_{arm}"] <= 1
    assert metrics["ndcg_at_10"] == metrics["ndcg_at_10_reranked"] and metrics["ms_rerank_reranked"] > 0
    assert metrics["ndcg_at_10_low"] <= metrics["ndcg_at_10"] <= metrics["ndcg_at_10_high"]
    assert metrics["hybrid_over_bm25_difference"] == pytest.approx(
        metrics["ndcg_at_10_hybrid"] - metrics["ndcg_at_10_bm25"]
    )
    assert result["n"] == {"questions": 40, "passages": 140}
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == result and "nDCG " in out
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and len(rows[0]["found"]["bm25"]["passages"]) <= 10
    shown = json.loads((tmp_path / "run/samples/found.json").read_text())  # what the report has of them
    by_question = {row["text"]: row for row in rows}
    for item in shown:
        row = by_question[item["question"]]
        assert item["trained"].startswith("\u2713") == bool(
            set(row["gold"]) & set(row["found"]["trained"]["passages"][:1])
        )
    assert len(shown) == 6 and list(shown[0]) == ["question", "right", "bm25", "trained", "hybrid", "reranked"]
    assert (tmp_path / "run/figures/recall.png").read_bytes().startswith(b"\x89PNG")
    hits = [bool(set(row["gold"]) & set(row["found"]["trained"]["passages"][:1])) for row in rows]
    assert np.mean(hits) == pytest.approx(metrics["hit_at_1_trained"])
    from transformers import AutoModel, AutoTokenizer

    encoder = AutoModel.from_pretrained(tmp_path / "run/encoder", add_pooling_layer=False)
    weights = Checkpoints.load(tmp_path / "run/checkpoints/00000008.pt")["parts"]["model"]
    assert torch.equal(encoder.embeddings.word_embeddings.weight, weights["network.embeddings.word_embeddings.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "run/encoder").pad_token_id == 0


def test_overwriting_learns_word_pieces_anew(tmp_path, data_root):
    assert train(tiny(tmp_path / "run", data_root, "train.steps=1")) == 0
    old = (tmp_path / "run/encoder/tokenizer.json").read_bytes()
    assert train(tiny(tmp_path / "run", data_root, "train.steps=1", "model.vocabulary=300"), overwrite=True) == 0
    assert (tmp_path / "run/encoder/tokenizer.json").read_bytes() != old


def test_milvus_gives_the_same_numbers(tmp_path, data_root):
    pytest.importorskip("milvus_lite", reason="pip install 'seven-projects[milvus]'")
    assert train(tiny(tmp_path / "run", data_root)) == 0
    words = ["eval.num_questions=30", "search.depth=20"]
    here = evaluate(tmp_path / "run", *words)["metrics"]
    there = evaluate(tmp_path / "run", *words, "index.backend=milvus")["metrics"]
    for name in ("ndcg_at_10_trained", "ndcg_at_10_bm25", "recall_at_20_trained"):
        assert there[name] == pytest.approx(here[name], abs=0.02), name  # equal but for ties


def test_overfits_one_batch(tmp_path, data_root):
    config = tiny(
        tmp_path / "run", data_root, "data.max_questions=32", "model.dropout=0", "model.width=64", "model.layers=2",
        "train.steps=80", "train.lr=3e-3", "train.warmup=5", "train.validate_every=0",
    )  # fmt: skip
    assert train(config) == 0
    log = lines(tmp_path / "run")
    assert log[0]["accuracy"] < 0.5
    assert np.mean([line["accuracy"] for line in log[-5:]]) > 0.95 and log[-1]["loss"] < 0.3 * log[0]["loss"]


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
def test_two_processes_are_as_one(kind, tmp_path, data_root):
    """Each encodes half of the texts; the candidates are those of both."""
    words = [*TINY, *KINDS[kind], "train.steps=3", "model.dropout=0", "precision=fp64", "train.validate_every=0",
             f"data_root={data_root}"]  # fmt: skip
    two_processes("rag.train", "--config", str(TINY_YAML), *words, f"run_dir={tmp_path / 'two'}")
    assert train(resolve(Config, TINY_YAML, [*words, f"run_dir={tmp_path / 'one'}"])) == 0
    first = Checkpoints.load(tmp_path / "one/checkpoints/00000003.pt")["parts"]["model"]
    second = Checkpoints.load(tmp_path / "two/checkpoints/00000003.pt")["parts"]["model"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=1e-6)


def test_dry_run(tmp_path, data_root, capsys):
    assert train(tiny(tmp_path / "run", data_root), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "parameters; vectors of 16 numbers" in out and "# 140 passages; questions:" in out
    assert not (tmp_path / "run").exists()


def test_a_search_of_two_steps_is_trained_for_both(tmp_path, data_root, capsys):
    config = tiny(tmp_path / "run", data_root, "search.hops=2", "train.steps=1")
    collection = load_collection(config.data, config.data_root)
    asked = [question for question in collection.train if len(question.relevant) > 1]
    assert asked and train(config) == 0
    assert f"{len(collection.train) + len(asked)} questions, 140 passages" in capsys.readouterr().err
    found = evaluate(tmp_path / "run", "eval.num_questions=40")["metrics"]
    assert found["complete_at_1_two_hop_bm25"] == 0 < found["complete_at_20_two_hop_bm25"] <= 1
    assert found["complete_at_5_one_hop_bm25"] > found["complete_at_5_two_hop_bm25"]


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(data_root):
    config = tiny("unused", data_root)
    collection = load_collection(config.data, config.data_root)
    return collection, config, load_examples(collection, config, lambda text: None)


def test_hard_negatives_are_wrong_and_mined_once(examples):
    collection, config, found = examples
    for i, question in enumerate(found.questions):
        negatives = [row for row in found.negatives[i].tolist() if row >= 0]
        assert sorted(row for row in found.positives[i].tolist() if row >= 0) == sorted(collection.rows_of(question))
        assert not set(negatives) & set(collection.rows_of(question)) and 0 < len(negatives) <= config.negatives.depth
        assert not any(question.answers[0] in collection.passages[row].text for row in negatives)
    said = []
    again = load_examples(collection, config, said.append)
    assert not said and np.array_equal(again.negatives, found.negatives)
    load_examples(
        collection, resolve(Config, TINY_YAML, [*TINY, f"data_root={config.data_root}", "bm25.k1=2"]), said.append
    )
    assert "looking for hard negatives" in said[0]


def test_batches_are_functions_of_the_step(examples):
    _, _, found = examples
    a, b = found.batch(7, 32, 2, 0), found.batch(7, 32, 2, 0)
    assert a.questions == b.questions and np.array_equal(a.negatives, b.negatives)
    assert a.questions != found.batch(8, 32, 2, 0).questions != found.batch(8, 32, 2, 1).questions
    seen = [text for step in range(1, len(found) // 32 + 1) for text in found.batch(step, 32, 1, 0).questions]
    assert len(set(seen)) == len(seen)  # within an epoch each question once
    for positive, negatives, gold in zip(a.positives, a.negatives, a.gold, strict=True):
        assert positive in gold and not set(negatives.tolist()) & set(gold)


def test_questions_without_judged_passages_learn_from_the_answer(examples):
    """As NQ-open: the best passage with the answer in it is taken for right; a question without one is left out."""
    from dataclasses import replace

    collection, config, _ = examples
    bare = replace(collection, train=[replace(question, gold={}) for question in collection.train])
    bare.train.append(replace(bare.train[0], id="hopeless", answers=("nowhere to be found",)))
    said = []
    found = load_examples(bare, config, said.append)
    assert found.unusable >= 1 and "have no passage that answers them" in said[-1]
    gold = {question.id: question for question in collection.train}
    right = [
        int(found.positives[i, 0]) in collection.rows_of(gold[question.id])
        for i, question in enumerate(found.questions)
        if question.kind == "one_hop"
    ]
    assert np.mean(right) > 0.9


def test_missing_hard_negatives_are_drawn():
    from rag.data import Question

    asked = [Question(str(i), f"what {i}?") for i in range(4)]
    found = Examples(asked, np.array([[0], [1], [2], [-1]], np.int32), np.full((4, 0), -1, np.int32), 3)
    assert len(found) == 3 and found.unusable == 1
    for step in range(1, 30):
        batch = found.batch(step, 3, 2, 0)
        assert not any(gold[0] in row for gold, row in zip(batch.gold, batch.negatives.tolist(), strict=True))


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.dataset=folder"], "data.folder: must name a folder"),
        (["model.width=15"], "model.width: must be a multiple"),
        (["loss.temperature=0"], "loss.temperature"),
        (["negatives.count=0", "model.kind=cross_encoder"], "negatives.count: must be at least 1"),
        (["search.k=200"], "search.depth: must be at least search.k"),
        (["index.uri=http://x"], "index.uri: needs index.backend=milvus"),
        (["negatives.skip=30"], "negatives.depth: must be above"),
        (["bm25.b=1.5"], "bm25.b"),
    ],
)
def test_what_cannot_work_is_refused(overrides, words, tmp_path, data_root):
    with pytest.raises(ConfigError, match=words):
        tiny(tmp_path / "run", data_root, *overrides)


def test_mistakes_end_as_one_line(tmp_path, data_root, capsys):
    assert train(tiny(tmp_path / "run", data_root, "train.batch_size=5000")) == 2
    assert "train.batch_size: must be at most the number of training questions" in errors(capsys.readouterr().err)[0]
    assert train(tiny(tmp_path / "run", data_root, "data.dataset=squad")) == 1
    assert "train-v1.1.json is missing" in errors(capsys.readouterr().err)[0]
    if (ROOT / "data/ir_cacm").is_dir():
        assert train(tiny(tmp_path / "run", ROOT / "data", "data.dataset=cacm")) == 1
        assert "no questions to train on; evaluate" in errors(capsys.readouterr().err)[0]
    assert not (tmp_path / "run").exists()
    assert train(tiny(tmp_path / "run", data_root, "train.steps=1", "model.kind=cross_encoder")) == 0
    config, _ = load(Config, "rag", "eval", ["--run", str(tmp_path / "run")])
    capsys.readouterr()
    assert status(rag.eval.main, config, Options("eval")) == 1
    assert "holds a cross-encoder" in errors(capsys.readouterr().err)[0]
    config, _ = load(Config, "rag", "eval", ["--run", str(tmp_path / "run"), "model.kind=bi_encoder"])
    assert status(rag.eval.main, config, Options("eval")) == 1
    assert "of another model than the config's" in errors(capsys.readouterr().err)[0]


def test_every_config_is_valid():
    for path in sorted(ROOT.glob("configs/rag_*.yaml")):
        assert resolve(Config, path, []).train.steps >= 1


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
@pytest.mark.parametrize("world", [1, 2])
def test_passages_of_like_length_share_a_chunk_and_find_back(kind, world, tmp_path, data_root):
    config = tiny(tmp_path, data_root, f"model.kind={kind}", "negatives.count=3")
    collection = load_collection(config.data, config.data_root)
    batch = load_examples(collection, config, lambda text: None).batch(1, 8, 3, 0)
    seen = []
    for rank, part in enumerate(rag.train.shares(batch, world)):
        texts = Texts()
        run = SimpleNamespace(world=world, rank=rank, device=torch.device("cpu"))
        chunks, places = rag.train.tokenize(batch, collection, texts, config, run)
        rows = rag.train.passages_of(batch, part, kind)
        wanted = [collection.passages[int(row)].whole for row in rows]
        asked = batch.questions[part]
        if kind == "cross_encoder":
            wanted = list(zip([question for question in asked for _ in range(4)], wanted, strict=True))
        else:
            wanted = [*asked, *wanted]
        given = [texts.given[int(number)] for chunk in chunks for number in chunk["input_ids"]]
        restored = dict(zip(places.tolist(), given, strict=True))
        assert [restored[place] for place in range(len(wanted))] == wanted
        passages = [text[1] for text in given] if kind == "cross_encoder" else given[len(asked) :]
        lengths = [len(text) for text in passages]
        assert lengths == sorted(lengths)
        seen += rows.tolist()
    assert sorted(seen) == sorted([*batch.positives, *batch.negatives.reshape(-1)])


class Texts:
    """A tokenizer that numbers what it is given."""

    def __init__(self):
        self.given = []

    def _number(self, texts):
        self.given += texts
        return {"input_ids": torch.arange(len(self.given) - len(texts), len(self.given))}

    questions = passages = _number

    def pairs(self, questions, passages):
        return self._number(list(zip(questions, passages, strict=True)))
