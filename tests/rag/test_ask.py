"""Asking from a terminal: one question or many, for people and for programs, of a dataset or of one's own documents."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from common.config import Options, load, resolve, to_yaml
from common.pretrained import available
from rag import ask
from rag.config import Config
from rag.data import load_collection
from rag.data.corpus import Passage
from rag.reader.pipeline import Reply
from rag.reader.reader import Answer
from tests.helpers import status
from tests.rag import tiny_lm


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask")
    model = tiny_lm.save(folder / "lm")
    words = ["data.entities=60", "search.mode=bm25", f"reader.model={model}", "reader.answer_tokens=4", "device=cpu"]
    config = resolve(Config, None, [*words, f"run_dir={folder}", "precision=fp32"])
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


def asked(config, **settings):
    return replace(config, ask=replace(config.ask, **settings))


@pytest.fixture(scope="module")
def question(config):
    return load_collection(config.data, "data").test[0].text


def test_words_of_the_command_line_are_the_question(config):
    words = ["--run", config.run_dir, "reader.passages=2", "When was", "Ada=Eve born?", "--json"]
    made, _ = load(Config, "rag", "ask", ask.as_settings(words), short={"question": "ask.question"})
    assert made.ask.question == "When was Ada=Eve born?" and made.ask.json and made.reader.passages == 2
    assert ask.as_settings(["--run", "runs/x"]) == ["--run", "runs/x"]
    assert ask.as_settings(["what is x=3?"]) == ["ask.question=what is x=3?"]


def test_one_question(config, question, capsys):
    assert status(ask.main, asked(config, question=question), Options("ask")) == 0
    out = capsys.readouterr().out
    assert "[1] " in out and "[3] " in out and "confidence" in out


def test_for_programs(config, question, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n\n  \nWho?\n"))
    assert status(ask.main, asked(config, json=True), Options("ask")) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["question"] == question and second["question"] == "Who?"
    assert len(first["sources"]) == 3 and {"id", "title", "text", "number", "cited"} <= set(first["sources"][0])
    assert first["answer"] and not first["withheld"] and 0 <= first["confidence"] <= 1
    assert {"search", "read"} <= set(first["milliseconds"])


def test_withheld(config, question, capsys):
    config = replace(config, reader=replace(config.reader, threshold=1.0))
    assert status(ask.main, asked(config, question=question), Options("ask")) == 0
    assert "do not seem to say" in capsys.readouterr().out
    assert status(ask.main, asked(config, question=question, json=True), Options("ask")) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["withheld"] and reply["answer"] == ""


def test_mistakes(config, capsys, monkeypatch):
    assert status(ask.main, asked(config, question="  "), Options("ask")) == 1
    assert "question is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\x00\nWho?\n"))
    assert status(ask.main, asked(config, json=True), Options("ask")) == 0
    long = "who " * 4000
    assert status(ask.main, asked(config, question=long), Options("ask")) == 1
    assert "leaves no room" in capsys.readouterr().err


def test_sources_are_shown_around_the_answer_and_cannot_steer_a_terminal(capsys):
    from rich.console import Console

    text = "word " * 200 + "It was \x1b]0;x\x07 Ada who came. " + "word " * 200
    reply = Reply("q", Answer("ada", (Passage("x", text, "T\x07itle"), Passage("y", "Other.")), (0,), 0.5), False, {})
    console = Console(width=400, highlight=False)
    ask.print_sources(reply, console)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "[1] Title" in out and "[2] y" in out
    assert "Ada" in out and len(out) < 600 and "Other" not in out


@pytest.mark.skipif(not available("sentence-transformers/all-MiniLM-L6-v2"), reason="MiniLM is not on this machine")
def test_ones_own_documents(config, tmp_path, capsys):
    from rag import index

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "boat.md").write_text("# Boat\n\nThe boat is called Henrietta and lies in Brel.\n")
    (notes / "cat.txt").write_text("The cat is called Mog. It sleeps all day.\n")
    words = [f"data.folder={notes}", f"run_dir={tmp_path / 'run'}", "device=cpu", "precision=fp32"]
    own = resolve(Config, None, words)
    assert status(index.main, own, Options("index")) == 0
    own = resolve(Config, tmp_path / "run" / "config.yaml", [], str(tmp_path / "run"))
    own = replace(own, reader=config.reader)
    capsys.readouterr()
    assert status(ask.main, asked(own, question="What is the boat called?", json=True), Options("ask")) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["sources"][0]["id"].startswith("boat.md")
