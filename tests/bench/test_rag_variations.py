"""Variations of retrieval and reading: each group on a little, rows that are kept, what is counted as found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rag.answer
import rag.train
from bench import rag_variations
from bench.rag_variations import cut_articles, in_first_words
from common.config import resolve, to_yaml
from rag.config import Config
from rag.data.corpus import Collection, Passage, Passages, Question
from tests.bench.programs import run_here
from tests.rag import tiny_lm

TINY = [
    "model.name=scratch", "model.width=16", "model.layers=1", "model.heads=2", "model.vocabulary=400",
    "data.dataset=factworld", "data.entities=60", "train.steps=2", "train.warmup=1",
    "train.validate_every=2", "train.save_every=2", "train.batch_size=8", "device=cpu", "precision=fp32",
]  # fmt: skip
PLACE = ["device=cpu", "precision=fp32", "data.dataset=factworld", "data.entities=60"]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The names of programs that were started; data go to a folder of the test."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    return run_here(monkeypatch, "rag", Config, {"train": rag.train.train, "answer": rag.answer.main})


def run(tmp_path: Path, *arguments: str) -> list[dict]:
    group = arguments[0]
    rag_variations.main([*arguments, "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")])
    table = (tmp_path / f"results/variations_{group}.md").read_text()
    rows = json.loads((tmp_path / f"results/variations_{group}.json").read_text())["rows"]
    assert len(table.splitlines()) == len(rows) + 2 and all(row["row"] in table for row in rows)
    return rows


def test_training_once_for_each_config_then_its_encoder_searches(tmp_path, started, capsys):
    only = ["--only", "three", "--only", "none"]
    rows = run(tmp_path, "training", *only, *TINY)
    assert [row["row"] for row in rows] == ["none", "three"]  # the table's order, not that of the command
    assert all(0 <= row["val_ndcg_at_10"] <= 1 and row["loss"] > 0 for row in rows)
    assert run(tmp_path, "training", *only, *TINY) == rows and started == ["train", "train"]
    run(tmp_path, "training", *only, *TINY, "train.lr=0.5")
    assert started == ["train"] * 4

    model = ["--model", str(tmp_path / "runs/three/encoder"), "--questions", "20"]
    rows = run(tmp_path, "search", *model, "--only", "words", "--only", "vectors", "--only", "both", *PLACE)
    scores = {row["row"]: row["ndcg_at_10"] for row in rows}
    assert scores["words"] > scores["vectors"] and all(row["questions"] == 20 for row in rows)
    rows = run(tmp_path, "chunks", *model, "--only", "30 words, 0 repeated", *PLACE)
    assert rows[0]["passages"] > 0 and rows[0]["words"] <= 30
    assert "found" in capsys.readouterr().out


def test_reading(tmp_path, started):
    folder = tmp_path / "run"
    config = resolve(Config, Path("configs/rag_factworld_tiny.yaml"), [*TINY, f"run_dir={folder}"])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    reader = ["reader.kind=generative", f"reader.model={tiny_lm.save(tmp_path / 'lm')}", "reader.answer_tokens=4"]
    arguments = ["--run", str(folder), "--questions", "5", "--only", "one", "--only", "three, best last", *reader]
    rows = run(tmp_path, "reading", *arguments)
    assert [row["row"] for row in rows] == ["one", "three, best last"]
    assert rows[0]["shown_right"] <= rows[1]["shown_right"] and rows[0]["questions"] == 5
    assert run(tmp_path, "reading", *arguments) == rows and started == ["answer", "answer"]


@pytest.mark.parametrize(
    "arguments", [["search", "--only", "wordz"], ["reading"], ["reading", "--run", "nowhere"], ["cooking"]]
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        rag_variations.main(arguments)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_articles_are_cut_between_sentences_and_nothing_is_lost():
    passages = Passages(
        [Passage("a/0", "One two three. Four five.", "A", "a"), Passage("a/1", "Six seven eight nine.", "A", "a")]
        + [Passage("b/0", "Ten.", "B", "b")]
    )
    config = resolve(Config, None, ["data.chunk_words=10", "data.chunk_overlap=0"])
    cut = list(cut_articles(Collection("x", passages), config))
    assert [passage.text for passage in cut] == ["One two three. Four five. Six seven eight nine.", "Ten."]
    assert [(passage.title, passage.group) for passage in cut] == [("A", "a"), ("B", "b")]


def test_found_is_the_right_article_within_the_words_that_are_read():
    question = Question("q", "who?", ("Mira Tolle",), {}, "a")
    other = Passage("b/0", "Mira Tolle too", "", "b")
    right = Passage("a/0", "it was Mira Tolle", "", "a")
    assert in_first_words([other, right], question, 7) == 1
    assert in_first_words([other, right], question, 6) == 0  # the name is cut in two
    assert in_first_words([other], question, 100) == 0  # by accident
    assert in_first_words([right], question, 4) == 1 and in_first_words([], question, 4) == 0
