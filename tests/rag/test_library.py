"""A folder of documents that changes, and its index, which follows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import rag.index
from common.config import ConfigError, load, resolve
from common.errors import ProjectError
from rag.config import AnalyserConfig, BM25Config, Config, DataConfig, IndexConfig, ModelConfig, SearchConfig
from rag.load import write_folder
from rag.model.encoder import build_model, build_tokenizer, fingerprint
from rag.search import library as libraries
from rag.search.embed import Embedder
from rag.search.library import Library
from tests.helpers import errors, status

SMALL = ModelConfig(name="scratch", vocabulary=400, width=16, layers=1, heads=2, query_length=16, passage_length=32)
TEXTS = {
    "cats.md": "# Cats\n\nCats sleep all day.\n\n# Food\n\nThey eat fish.",
    "dogs.txt": "Dogs run in the park.",
    "birds.txt": "Birds fly over the sea.",
}


@pytest.fixture(scope="module")
def embedder():
    tokenizer = build_tokenizer(SMALL, list(TEXTS.values()) * 5)
    torch.manual_seed(0)
    return Embedder(build_model(SMALL, len(tokenizer.inner)).eval(), tokenizer, nullcontext, 8)


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def config(**index) -> Config:
    return Config(
        data=DataConfig(dataset="folder", folder="x", chunk_words=12, chunk_overlap=2),
        model=SMALL,
        index=IndexConfig(shard=2, **index),
        search=SearchConfig(k=3, depth=5),
    )


def open_it(tmp_path, embedder, settings: Config | None = None) -> Library:
    return Library(
        tmp_path / "index", settings or config(), embedder, fingerprint(embedder.model, SMALL), lambda text: None
    )


def ids(library: Library, question: str, mode: str = "bm25") -> list[str]:
    retriever = library.retriever()
    retriever.config = replace(retriever.config, mode=mode)
    return [hit.passage.id for hit in retriever.search([question])[0]]


@pytest.mark.parametrize("backend", ["flat", "hnsw", "milvus"])
def test_files_come_change_and_go(backend, tmp_path, embedder, documents):
    if backend == "milvus":
        pytest.importorskip("milvus_lite", reason="pip install 'seven-projects[milvus]'")
    settings = config(backend="milvus") if backend == "milvus" else config(kind=backend)
    first = open_it(tmp_path, embedder, settings)
    done = first.update(documents)
    assert (len(done.added), done.passages) == (3, 4)
    assert ids(first, "cats sleep")[0] == "cats.md#0"
    assert set(ids(first, "cats", "dense")) <= {"cats.md#0", "cats.md#1", "dogs.txt#0", "birds.txt#0"}
    again = open_it(tmp_path, embedder, settings)
    done = again.update(documents)
    assert (done.added, done.changed, done.deleted, done.passages) == ([], [], [], 4)
    (documents / "cats.md").write_text("# Cats\n\nCats purr.")
    (documents / "dogs.txt").unlink()
    (documents / "new.txt").write_text("Whales sing in the sea.")
    done = again.update(documents)
    assert (done.added, done.changed, done.deleted, done.passages) == (["new.txt"], ["cats.md"], ["dogs.txt"], 3)
    assert ids(again, "cats sleep fish") == ["cats.md#0"]
    assert ids(again, "dogs park") == [] and ids(again, "sea whales")[0] == "new.txt#0"
    found = again.retriever().search(["cats purr"])[0]
    assert found[0].passage.text == "Cats purr."
    assert set(ids(again, "cats", "dense")) == {"cats.md#0", "birds.txt#0", "new.txt#0"}


def test_an_updated_index_equals_a_new_one(tmp_path, embedder, documents):
    grown = open_it(tmp_path / "a", embedder)
    for name in list(TEXTS):
        (documents / name).rename(documents / f".{name}")
    for name in TEXTS:
        (documents / f".{name}").rename(documents / name)
        grown.update(documents)
    (documents / "dogs.txt").write_text("Dogs bark at cats in the park.")
    grown.update(documents)
    fresh = open_it(tmp_path / "b", embedder)
    fresh.update(documents)
    for mode in ("bm25", "dense", "hybrid"):
        for question in ("cats in the park", "who flies over the sea?", "fish"):
            assert sorted(ids(grown, question, mode)) == sorted(ids(fresh, question, mode))
    a, b = (library.retriever() for library in (grown, fresh))
    np.testing.assert_allclose(
        a.lexical.search(["cats in the park"], 3)[0], b.lexical.search(["cats in the park"], 3)[0], rtol=1e-6
    )


def test_only_what_changed_is_encoded(tmp_path, embedder, documents, monkeypatch):
    seen = []
    encode = Embedder.passages

    def count(self, passages):
        seen.extend(passage.id for passage in passages)
        return encode(self, passages)

    monkeypatch.setattr(Embedder, "passages", count)
    library = open_it(tmp_path, embedder)
    library.update(documents)
    assert len(seen) == 4
    (documents / "new.txt").write_text("Whales sing.")
    library.update(documents)
    assert seen[4:] == ["new.txt#0"]


def test_interrupted_indexing_goes_on(tmp_path, embedder, documents, monkeypatch):
    """Stopped after the first of two shards: the old state opens, and the next attempt encodes the second alone."""
    library = open_it(tmp_path, embedder)
    (documents / "birds.txt").rename(tmp_path / "birds.txt")
    library.update(documents)
    (tmp_path / "birds.txt").rename(documents / "birds.txt")
    for i in range(3):
        (documents / f"more{i}.txt").write_text(f"More text {i}.")
    calls = []
    encode = Embedder.passages

    def break_down(self, passages):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(list(passages))
        return encode(self, passages)

    monkeypatch.setattr(Embedder, "passages", break_down)
    with pytest.raises(KeyboardInterrupt):
        library.update(documents)
    old = open_it(tmp_path, embedder)
    assert ids(old, "cats sleep")[0] == "cats.md#0" and ids(old, "birds") == []
    calls.clear()
    monkeypatch.setattr(Embedder, "passages", lambda self, p: calls.append(p) or encode(self, p))
    done = old.update(documents)
    assert done.passages == 7 and sum(len(part) for part in calls) == 2  # of four new ones, two were there
    assert ids(old, "birds")[0] == "birds.txt#0"


def test_rows_of_deleted_passages_are_given_up(tmp_path, embedder, documents):
    library = open_it(tmp_path, embedder)
    library.update(documents)
    for i in range(6):
        (documents / "cats.md").write_text(f"# Cats\n\nCats number {i}.")
        library.update(documents)
    passages = libraries.StoredPassages(library.states.current() / "passages.jsonl")
    assert len(passages) < 7  # of 9 that there have been
    assert ids(library, "number 5 cats")[0] == "cats.md#0"
    assert library.retriever().search(["cats"])[0][0].passage.text == "Cats number 5."


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("analyser", {"analyser": AnalyserConfig(stemmer="none")}),
        ("bm25", {"bm25": BM25Config(k1=2.0)}),
        ("index.kind", {"index": IndexConfig(kind="hnsw")}),
        ("data.chunk_words", {"data": DataConfig(dataset="folder", folder="x", chunk_words=60)}),
    ],
)
def test_other_settings_are_refused(name, change, tmp_path, embedder, documents):
    open_it(tmp_path, embedder).update(documents)
    with pytest.raises(ProjectError, match=f"was made with {name}="):
        open_it(tmp_path, embedder, replace(config(), **change))


def test_another_encoder_is_refused(tmp_path, embedder, documents):
    open_it(tmp_path, embedder).update(documents)
    with pytest.raises(ProjectError, match="was made with encoder="):
        Library(tmp_path / "index", config(), embedder, "of other weights", lambda text: None)


def test_no_index_yet(tmp_path, embedder):
    with pytest.raises(ProjectError, match="holds no index yet"):
        open_it(tmp_path, embedder).retriever()


def test_the_program(tmp_path, embedder, documents, capsys, monkeypatch):
    """--corpus, then --run, as a person types them, with an encoder from a folder."""
    encoder = tmp_path / "encoder"

    def write(folder):
        embedder.tokenizer.inner.save_pretrained(folder)
        embedder.model.network.save_pretrained(folder)

    write_folder(encoder, write)
    monkeypatch.chdir(tmp_path)
    short = {"corpus": "data.folder", "ask": "index.ask"}
    words = [
        f"model.name={encoder}",
        "model.passage_length=32",
        "model.query_length=16",
        "device=cpu",
        "precision=fp32",
    ]
    settings, options = load(Config, "rag", "index", ["--corpus", "documents", *words], short)
    assert status(rag.index.main, settings, options) == 0
    assert "3 new (2 txt, 1 md: birds.txt, cats.md, dogs.txt); 4 passages" in capsys.readouterr().err
    words = ["--run", "runs/documents", "--ask", "Do cats sleep?"]
    settings, options = load(Config, "rag", "index", words, short)
    assert status(rag.index.main, settings, options) == 0
    out, err = capsys.readouterr()
    assert "nothing has changed; 4 passages" in err and out.startswith("1. ") and "Cats sleep all day." in out
    settings, options = load(Config, "rag", "index", [*words, "bm25.k1=2"], short)
    assert status(rag.index.main, settings, options) == 1
    assert "was made with bm25=" in errors(capsys.readouterr().err)[0]
    with pytest.raises(ConfigError, match=r"data.folder: name the folder"):
        rag.index.settle(resolve(Config, None, []))
    (tmp_path / "nothing").mkdir()
    settings, options = load(Config, "rag", "index", ["--corpus", "nothing", f"model.name={encoder}"], short)
    assert status(rag.index.main, settings, options) == 1
    assert not (tmp_path / "runs/nothing/index").exists()
