"""Public collections, each in its own format, written small; the real ones where they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ProjectError
from rag.config import DataConfig
from rag.data import beir, classic, load_collection, squad
from rag.data.corpus import Collection, LineTable, Passage, Passages, Question, check, drawn, shrink, split_by_group
from tests.helpers import ROOT

DATA = ROOT / "data"


def squad_file(articles: dict[str, list[str]]) -> str:
    """SQuAD's JSON with one question a paragraph."""
    items = []
    for title, texts in articles.items():
        paragraphs = [
            {
                "context": text,
                "qas": [{"id": f"{title}{i}", "question": f"what is {i}?", "answers": [{"text": "x"}, {"text": "x"}]}],
            }
            for i, text in enumerate(texts)
        ]
        items.append({"title": title, "paragraphs": paragraphs})
    return json.dumps({"data": items})


def write_squad(root: Path) -> None:
    folder = root / "squad"
    folder.mkdir()
    (folder / "train-v1.1.json").write_text(squad_file({f"T_{i}": [f"text {i} a", "the same"] for i in range(10)}))
    (folder / "dev-v1.1.json").write_text(squad_file({"D": ["text d", "other d"]}))


def test_squad_is_one_corpus_split_by_article(tmp_path):
    write_squad(tmp_path)
    data = load_collection(DataConfig(dataset="squad", validation=0.2), str(tmp_path))
    assert len(data.passages) == 10 + 1 + 2  # the same text once
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 2)
    assert len({question.group for question in data.validation}) == 2
    assert data.passages[0].title == "T 0" and data.test[0].answers == ("x",)
    assert "9 of 22 paragraphs" in data.notes[0]
    again = load_collection(DataConfig(dataset="squad", validation=0.2), str(tmp_path))
    assert again.validation == data.validation and again.passages.fingerprint() == data.passages.fingerprint()
    other = load_collection(DataConfig(dataset="squad", validation=0.2, world=1), str(tmp_path))
    assert other.validation != data.validation


def test_no_article_is_in_two_splits():
    passages = Passages([Passage("a", "text"), Passage("b", "text")])
    one, other = (Question(name, "what?", gold={"a": 1}, group="same article") for name in ("1", "2"))
    with pytest.raises(ProjectError, match="'same article' has questions in train and in test"):
        check(Collection("c", passages, train=[one], test=[other]))
    check(Collection("c", passages, train=[one], test=[replace(other, group="another")]))


def test_what_cannot_be_measured_is_refused():
    passages = Passages([Passage("a", "text")])
    with pytest.raises(ProjectError, match="has no passages"):
        check(Collection("c", Passages([])))
    with pytest.raises(ProjectError, match="'gone', which is not in the corpus"):
        check(Collection("c", passages, test=[Question("1", "what?", gold={"gone": 1})]))
    with pytest.raises(ProjectError, match="question '1' of test is empty"):
        check(Collection("c", passages, test=[Question("1", " ", gold={"a": 1})]))
    noted = check(Collection("c", passages, test=[Question("1", "what?", gold={"a": 1})]))
    assert "every passage answers a test question" in noted.notes[0]


def test_a_smaller_corpus_is_drawn_whatever_it_answers():
    passages = Passages([Passage(str(i), f"text {i}") for i in range(100)])
    asked = [Question(f"q{i}", "what?", gold={str(i): 1}) for i in range(30)]
    data = shrink(Collection("c", passages, train=asked[:20], test=asked[20:]), 40, 3, 0)
    assert len(data.passages) == 40 and len(data.train) == 3
    check(data)
    answering = {name for question in asked for name in question.gold}
    assert any(passage.id not in answering for passage in data.passages)
    assert drawn(5, 50, 1).tolist() == sorted(set(drawn(5, 50, 1).tolist())) != list(range(5))


def test_groups_stay_together():
    asked = [Question(str(i), "what?", group=f"g{i % 7}") for i in range(70)]
    first, second = split_by_group(asked, 0.3, 0)
    assert len(first) + len(second) == 70 and {q.group for q in second}.isdisjoint(q.group for q in first)
    assert len({question.group for question in second}) == 2


def test_nq_over_a_table_of_passages(tmp_path):
    folder = tmp_path / "nq_open"
    folder.mkdir()
    (folder / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"He said ""yes"" twice."\tYes\n2\tNo quotes\tNo\n')
    for part, count in (("train", 20), ("dev", 3)):
        lines = [json.dumps({"question": f"{part} {i}", "answer": ["a", "b"]}) for i in range(count)]
        (folder / f"NQ-open.{part}.jsonl").write_text("\n".join(lines))
    data = load_collection(DataConfig(dataset="nq"), str(tmp_path))
    assert [passage.text for passage in data.passages] == ['He said "yes" twice.', "No quotes"]
    assert data.passages[1].whole == "No. No quotes" and data.passages.row_of("2") == 1
    assert data.passages.row_of("3") is None and len(data.passages[0:2]) == 2
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 3)
    assert data.test[0].answers == ("a", "b") and data.test[0].gold == {}


def test_msmarco(tmp_path):
    folder = tmp_path / "msmarco"
    folder.mkdir()
    (folder / "collection.tsv").write_text("0\tzero\n1\tone\n2\ttwö")
    for name, query, passage in (("train", "7", "0"), ("dev.small", "9", "2")):
        (folder / f"queries.{name}.tsv").write_text(f"{query}\twhat?\n8\tunjudged\n")
        (folder / f"qrels.{name}.tsv").write_text(f"{query}\t0\t{passage}\t1\n")
    data = beir.load_msmarco(tmp_path, DataConfig(dataset="msmarco"))
    assert [passage.text for passage in data.passages] == ["zero", "one", "twö"]
    assert data.test[0].gold == {"2": 1} and len(data.validation) == 1


def test_a_table_whose_ids_do_not_count_is_refused(tmp_path):
    (tmp_path / "collection.tsv").write_text("0\tzero\n5\tone\n")
    table = LineTable(tmp_path / "collection.tsv", beir.parse_msmarco)
    with pytest.raises(ProjectError, match="passage 1: has the id '5'"):
        table[1]


def test_beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    corpus = [{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "text": "y"}, {"_id": "a", "text": "again"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps({"_id": str(i), "text": "q"}) for i in range(10)))
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n0\ta\t2\n0\tb\t0\n1\tb\t1\n")
    data = load_collection(DataConfig(dataset="beir", folder=str(tmp_path)), "")
    assert data.test[0].gold == {"a": 2, "b": 0} and data.test[0].relevant == ["a"] and len(data.test) == 2
    assert data.notes[0] == "1 passages left out whose id was there before: a"
    assert not data.train and not data.validation
    (tmp_path / "qrels/train.tsv").write_text("h\th\th\n" + "".join(f"{i}\ta\t1\n" for i in range(2, 10)))
    data = beir.load_beir(tmp_path, DataConfig(dataset="beir", folder="x", validation=0.25))
    assert (len(data.train), len(data.validation)) == (6, 2)
    (tmp_path / "qrels/test.tsv").write_text("h\th\th\nunknown\ta\t1\n")
    with pytest.raises(ProjectError, match="judges the query 'unknown'"):
        beir.load_beir(tmp_path, DataConfig(dataset="beir", folder="x"))


def test_classic_formats(tmp_path):
    (tmp_path / "docs").write_text(
        ".I 1\n.T\nA title\nof two lines\n.W\nfirst\n.X\n1 5 1\n.I 02\n.W\n second\n.K\nkey\n"
    )
    assert [(p.id, p.title, p.text) for p in classic.make_passages(tmp_path / "docs", "WK")] == [
        ("1", "A title of two lines", "first"),
        ("2", "", "second key"),
    ]
    (tmp_path / "docs").write_text("nothing")
    with pytest.raises(ProjectError, match="no record"):
        classic.read_records(tmp_path / "docs")


@pytest.mark.parametrize("dataset", ["squad", "nq", "msmarco", "scifact", "cacm", "cranfield"])
def test_missing_files_say_where_to_get_them(dataset, tmp_path):
    with pytest.raises(ProjectError, match=r"is missing: (download|unpack) .*http|github"):
        load_collection(DataConfig(dataset=dataset), str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"data": [', "not in SQuAD's format"), ('{"data": [{"title": "x"}]}', "KeyError 'paragraphs'")],
)
def test_a_damaged_squad(text, words, tmp_path):
    write_squad(tmp_path)
    (tmp_path / "squad/dev-v1.1.json").write_text(text)
    with pytest.raises(ProjectError, match=words):
        squad.load_squad(tmp_path, DataConfig(dataset="squad"))


@pytest.mark.parametrize(
    ("dataset", "passages", "test"), [("cacm", 3204, 52), ("cranfield", 1400, 225), ("scifact", 5183, 300)]
)
def test_real_collections(dataset, passages, test):
    folder = DATA / {"scifact": "scifact"}.get(dataset, f"ir_{dataset}")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    data = load_collection(DataConfig(dataset=dataset), str(DATA))
    assert (len(data.passages), len(data.test)) == (passages, test)
    if dataset == "cranfield":
        assert sum(len(question.gold) for question in data.test) in (1836, 1837)
        assert {grade for question in data.test for grade in question.gold.values()} == {1, 2, 3, 4}
    if dataset == "cacm":
        assert sum(len(question.gold) for question in data.test) == 796
        assert data.test[0].text.startswith("What articles exist which deal with TSS")
