"""Scores against the libraries that the field uses, intervals, and what an evaluation leaves behind."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math

import numpy as np
import pytest
import torch

from common.config import resolve
from lora.config import Config
from lora.data import Example
from lora.metrics.answers import bleu, exact_match, final_number, mean_of, rouge_l, score_answers
from lora.metrics.classes import accuracy, matthews
from lora.metrics.comparing import compare, intervals
from lora.metrics.losses import text_losses
from lora.model import load_tokenizer
from lora.model.load import load_llama
from tests.lora.small import call, train

ANSWERS = ["The Blue Fox serves Thai food.", "It is a pub near the river .", "Cheap, and good!", "Old Owl"]
REFERENCES = [
    ["Blue Fox serves Thai food by the river.", "The Blue Fox has Thai food."],
    ["A pub near the river.", "It is a pub close to the river.", "Near the river is a pub."],
    ["It is cheap."],
    ["Old Owl", "The Old Owl"],
]


def config(**data) -> Config:
    return resolve(Config, None, [f"data.{key}={value}" for key, value in data.items()])


@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_is_sacrebleus(lowercase):
    import sacrebleu

    score = bleu(ANSWERS, REFERENCES, lowercase)
    most = max(map(len, REFERENCES))
    streams = [[refs[i] if i < len(refs) else None for refs in REFERENCES] for i in range(most)]
    expected = sacrebleu.corpus_bleu(ANSWERS, streams, lowercase=lowercase).score / 100
    assert score.value == pytest.approx(expected, abs=1e-9)
    assert 0.05 < score.value < 0.95
    one = bleu(ANSWERS[:2], REFERENCES[:2], lowercase)
    part = score.combine(score.shares[:2].sum(0), 2)
    assert part == pytest.approx(one.value, abs=1e-12)


def test_rouge_takes_the_reference_that_fits_best():
    score = rouge_l(["a b c d"], [["x y z", "a b c e"]])
    assert score.value == pytest.approx(0.75)


def test_exact_match_is_not_particular_about_blanks_and_case():
    assert exact_match(["The  pub.", "the bar"], [["the pub."], ["the pub"]]).value == 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.00", "1234"),
        ("the answer is 12, no: 15.5", "15.5"),
        ("#### -3 apples", "-3"),
        ("#### 10.50", "10.5"),
        ("none", ""),
    ],
)
def test_results_of_sums(text, number):
    assert final_number(text) == number


def test_each_dataset_has_its_metrics():
    names = {
        dataset: [score.name for score in score_answers(["#### 3"], [["#### 3"]], config(dataset=dataset))]
        for dataset in ("e2e", "squad", "gsm8k")
    }
    assert names == {
        "e2e": ["bleu", "exact_match", "rouge_l"],
        "squad": ["exact_match", "rouge_l"],
        "gsm8k": ["accuracy"],
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_score_as_scikit_learn_has_it(classes):
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=200).tolist()
    predicted = [label if rng.random() < 0.6 else int(rng.integers(classes)) for label in labels]
    assert accuracy(predicted, labels).value == pytest.approx(accuracy_score(labels, predicted))
    assert matthews(predicted, labels, classes).value == pytest.approx(matthews_corrcoef(labels, predicted))
    assert matthews([0] * 200, labels, classes).value == 0


def test_intervals_hold_what_they_should():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    low, high = intervals(mean_of("x", values.tolist()), 2000, 1)
    expected = 1.96 * values.std() / math.sqrt(400)
    assert values.mean() - low == pytest.approx(expected, rel=0.15)
    assert high - values.mean() == pytest.approx(expected, rel=0.15)


def test_pairs_are_drawn_together():
    """Two models that differ by .1 on every example: the difference is sure, though each mean is not."""
    values = np.random.default_rng(0).normal(size=100)
    low, high = compare(mean_of("x", (values + 0.1).tolist()), mean_of("x", values.tolist()), 500, 0)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_perplexity_of_text_is_that_of_its_windows(base):
    from lora.metrics import losses

    model = load_llama(base, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(base)

    class Still:
        device = torch.device("cpu")

        def track(self, items):
            return items

        autocast = contextlib.nullcontext

    text = "Red Fox is a pub near the river. " * 20
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:101]
    before, losses.WINDOW = losses.WINDOW, 40
    try:
        sums, counts = text_losses(model, tokenizer, text, 100, 8, Still())
    finally:
        losses.WINDOW = before
    assert counts.tolist() == [40, 40, 20]
    for number, start in enumerate((0, 40, 80)):
        window = torch.tensor([ids[start : start + 41]])
        expected = torch.nn.functional.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum")
        assert float(sums[number]) == pytest.approx(float(expected), rel=1e-5)


# -- the program -------------------------------------------------------------------------------------------------------


def test_an_evaluation_compares_base_and_adapted(trained, tmp_path, capsys):
    (tmp_path / "general.txt").write_text("Anna likes the Greek food at Old Owl. " * 30)
    words = [f"eval.general_text={tmp_path / 'general.txt'}", "eval.general_tokens=200", "eval.shots=1"]
    assert call("eval", trained, *words) == 0
    result = json.loads((trained / "eval.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    metrics = result["metrics"]
    for name in ("loss", "perplexity", "bleu", "exact_match", "rouge_l", "general_perplexity"):
        assert name in metrics, name
        assert f"{name}_base" in metrics, name
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["loss"] != metrics["loss_base"]
    assert metrics["rouge_l_low"] <= metrics["rouge_l"] <= metrics["rouge_l_high"]
    rows = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 == result["n"]["examples"]
    assert set(rows[0]) == {"id", "prompt", "context", "references", "answer", "base"}
    assert all(row["id"].startswith("test-") for row in rows)
    shown = json.loads((trained / "samples/examples.json").read_text())  # what the report has of them
    assert shown[0] == {
        "prompt": rows[0]["prompt"],
        "right": rows[0]["references"][0],
        "base": rows[0]["base"],
        "finetuned": rows[0]["answer"],
    }


def test_the_base_after_full_finetuning_is_the_one_before(base, tmp_path):
    assert train(base, tmp_path / "full", "train.method=full", "train.lr=0.003") == 0
    assert train(base, tmp_path / "lora") == 0
    words = ["eval.generate=false"]
    assert call("eval", tmp_path / "full", *words) == 0
    assert call("eval", tmp_path / "lora", *words) == 0
    full, lora = (json.loads((tmp_path / name / "eval.json").read_text())["metrics"] for name in ("full", "lora"))
    assert full["loss_base"] == pytest.approx(lora["loss_base"], rel=1e-6)
    assert full["loss"] < full["loss_base"]


def test_validation_and_test_are_different_examples(trained):
    ids = []
    for split in ("validation", "test"):
        assert call("eval", trained, f"eval.split={split}", "eval.generate=false") == 0
        ids.append({json.loads(line)["id"] for line in (trained / "predictions.jsonl").read_text().splitlines()})
    assert not ids[0] & ids[1]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, base):
    """A small BERT with random weights and the small base's tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertModel(settings).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture
def spam(tmp_path):
    """Texts whose class is their first word's."""
    path = tmp_path / "own.csv"
    rows = [f"{'Red Fox' if i % 2 else 'Old Owl'} is number {i},{'fox' if i % 2 else 'owl'}\n" for i in range(80)]
    path.write_text("text,label\n" + "".join(rows))
    return [
        "data.dataset=csv",
        f"data.path={path}",
        "data.test=0.2",
        "train.steps=40",
        "train.lr=0.01",
        "train.log_every=40",
        "eval.num_examples=0",
    ]


KINDS = {
    "lora": [],
    "own head": ["model.pooling=model"],
    "full": ["train.method=full", "train.lr=0.003"],
    "head": ["train.method=head"],
    "nf4": ["model.quantize=nf4"],
}


@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
def test_a_classifier_learns(encoder, spam, tmp_path, words):
    run_dir = tmp_path / "run"
    assert train(encoder, run_dir, *spam, *words) == 0
    assert call("eval", run_dir) == 0
    metrics = json.loads((run_dir / "eval.json").read_text())["metrics"]
    assert metrics["accuracy"] > (0.6 if words == ["train.method=head"] else 0.9)
    assert -1 <= metrics["matthews"] <= 1
    with (run_dir / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert metrics["accuracy"] == pytest.approx(right / 16)


def test_new_texts_are_classified(encoder, spam, tmp_path, capsys, monkeypatch):
    """By the classes of the training, wherever its data are; all columns of a person's file are kept."""
    run_dir, out = tmp_path / "run", tmp_path / "out.csv"
    assert train(encoder, run_dir, *spam) == 0
    assert json.loads((run_dir / "classes.json").read_text()) == ["fox", "owl"]
    (tmp_path / "own.csv").unlink()
    capsys.readouterr()
    assert call("classify", run_dir, "Red Fox is number 3", "Old Owl is number 3", words="text") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["fox", "owl"] and all(0.5 < float(line[1]) <= 1 for line in lines)

    (tmp_path / "new.csv").write_text("ticket,text\n7,Old Owl is number 5\n8,Red Fox is number 5\n")
    short = {"file": "classify.file", "out": "classify.out"}
    words = ["--file", str(tmp_path / "new.csv"), "--out", str(out)]
    assert call("classify", run_dir, *words, short=short, words="text") == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["ticket"], row["predicted"]) for row in rows] == [("7", "owl"), ("8", "fox")]
    assert call("classify", run_dir, "a text", *words, short=short, words="text") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert call("classify", run_dir, words="text") == 1 and "no text" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("Red Fox is here\n"))
    assert call("classify", run_dir, words="text") == 0 and capsys.readouterr().out.startswith("fox\t")


def test_classes_are_those_of_the_training(encoder, spam, tmp_path, capsys):
    """A file with fewer classes is read by the run's; one with another class, or a run that goes on with others, is
    refused; and a merged model has the names.
    """
    from transformers import AutoModelForSequenceClassification

    run_dir = tmp_path / "run"
    assert train(encoder, run_dir, *spam, "model.pooling=model") == 0
    own = tmp_path / "own.csv"
    own.write_text("text,label\n" + "".join(f"Old Owl is number {i},owl\n" for i in range(40)))
    assert call("eval", run_dir) == 0
    assert json.loads((run_dir / "eval.json").read_text())["metrics"]["accuracy"] > 0.9
    assert train(encoder, run_dir, *spam, "model.pooling=model", "train.steps=41", resume=True) == 1
    own.write_text(own.read_text() + "A cat is here,cat\n")
    assert call("eval", run_dir) == 1 and "the run has learned fox, owl" in capsys.readouterr().err
    assert train(encoder, run_dir, *spam, "model.pooling=model", "train.steps=41", resume=True) == 1
    assert "has learned the classes fox, owl; the data have cat, owl" in capsys.readouterr().err
    assert call("merge", run_dir, f"--out={tmp_path / 'merged'}", "merge.dtype=fp32", short={"out": "merge.out"}) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "fox", 1: "owl"}
    assert call("merge", run_dir, "--out=elsewhere", "model.pooling=mean", short={"out": "merge.out"}) == 2


def weights_of(run_dir, step):
    from common.checkpoint import Checkpoints

    return Checkpoints.load(run_dir / f"checkpoints/{step:08d}.pt")["parts"]["learned"]


def test_without_dropout_parts_of_a_batch_are_the_batch(encoder, spam, tmp_path):
    settings = [*spam, "train.steps=3", "train.batch_size=8", "model.dropout=0"]
    assert train(encoder, tmp_path / "whole", *settings) == 0
    assert train(encoder, tmp_path / "parts", *settings, "train.microbatch=2") == 0
    assert train(encoder, tmp_path / "dropped", *settings, "model.dropout=0.5") == 0
    whole, parts, dropped = (weights_of(tmp_path / name, 3) for name in ("whole", "parts", "dropped"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(dropped[name], value, atol=1e-3) for name, value in whole.items())


def test_a_classifiers_adapter_is_one_that_peft_reads(encoder, spam, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    run_dir = tmp_path / "run"
    assert train(encoder, run_dir, *spam, "model.pooling=model", "train.steps=5") == 0
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), run_dir / "adapter"
    ).eval()
    state = weights_of(run_dir, 5)
    assert torch.equal(theirs.base_model.model.classifier.weight, state["classifier.weight"])
    assert json.loads((run_dir / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_merged_model_answers_as_base_and_adapter(trained, base, tmp_path):
    from transformers import AutoModelForCausalLM

    from common.checkpoint import Checkpoints
    from lora.adapters.inject import inject, load_adapter_state
    from lora.model import hidden_states, token_logits
    from lora.settings import AdapterConfig

    out = tmp_path / "merged"
    assert call("merge", trained, f"--out={out}", "merge.dtype=fp32", short={"out": "merge.out"}) == 0
    model = load_llama(base, torch.float32, torch.device("cpu"))
    inject(model, AdapterConfig(rank=4))
    load_adapter_state(model, Checkpoints.load(trained / "checkpoints/00000004.pt")["parts"]["learned"])
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = token_logits(model, hidden_states(model, tokens))
        torch.testing.assert_close(theirs(input_ids=tokens).logits, expected, atol=5e-3, rtol=1e-3)
        untrained = load_llama(base, torch.float32, torch.device("cpu"))(tokens)
    assert (untrained - expected).abs().max() > 0.5
    assert (out / "tokenizer.json").is_file()
    assert call("merge", trained, f"--out={out}", short={"out": "merge.out"}) == 1


def test_tied_layers_are_refused_or_untied(base, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    words = ["adapter.targets=[embed_tokens,q_proj]", "train.lr=0.01"]
    assert train(base, tmp_path / "run", *words) == 0
    out = tmp_path / "merged"
    kinds = {"short": {"out": "merge.out"}}
    assert call("merge", tmp_path / "run", f"--out={out}", "merge.dtype=fp32", **kinds) == 1
    assert "untie" in capsys.readouterr().err
    assert not out.exists()
    assert call("merge", tmp_path / "run", f"--out={out}", "merge.dtype=fp32", "merge.untie=true", **kinds) == 0
    settings = json.loads((out / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = load_llama(out, torch.float32, torch.device("cpu"))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    embedding = theirs.get_input_embeddings().weight
    assert not torch.equal(embedding, theirs.get_output_embeddings().weight)


def test_example_ids_are_the_persons_own(base, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"id": f"mine-{i}", "instruction": f"name: Red Fox {i}", "output": "Red Fox is a pub."} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    words = ["data.dataset=json", f"data.path={path}", "data.test=0.2"]
    assert train(base, tmp_path / "run", *words) == 0
    assert call("eval", tmp_path / "run") == 0
    ids = [json.loads(line)["id"] for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert all(name.startswith("mine-") for name in ids)
    assert Example("x", "a", "b").references == ()
