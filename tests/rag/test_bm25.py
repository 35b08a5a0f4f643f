"""BM25 against bm25s and rank_bm25, and what neither of them can do: change."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.config import ConfigError
from common.errors import ProjectError
from rag.config import AnalyserConfig, BM25Config
from rag.search.analyser import Analyser
from rag.search.bm25 import BM25

VARIANTS = ["lucene", "robertson", "atire", "bm25l", "bm25+"]
WORDS = [f"w{i}" for i in range(60)]


def texts(count: int, seed: int = 0) -> list[str]:
    """Made-up passages: some words in nearly all of them, most in few."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, len(WORDS) + 1) ** 1.1
    lengths = rng.integers(3, 40, count)
    return [" ".join(rng.choice(WORDS, n, p=weight / weight.sum())) for n in lengths]


def plain() -> Analyser:
    return Analyser(AnalyserConfig(stemmer="none", stop_words="none"))


def build(passages: list[str], variant: str = "lucene", **constants: float) -> BM25:
    index = BM25(BM25Config(variant=variant, **constants), plain())
    index.add(passages)
    return index


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_bm25s(variant):
    bm25s = pytest.importorskip("bm25s")
    passages = texts(200)
    queries = texts(40, seed=1)
    peer = bm25s.BM25(k1=1.3, b=0.6, delta=0.7, method=variant)
    peer.index([text.split() for text in passages], show_progress=False)
    ours = build(passages, variant, k1=1.3, b=0.6, delta=0.7)
    for query in queries:
        np.testing.assert_allclose(ours.scores(query), peer.get_scores(query.split()), atol=1e-5, rtol=1e-5)
    scores, rows = ours.search(queries, 10)
    for query, best, found in zip(queries, scores, rows, strict=True):
        expected = peer.get_scores(query.split())
        np.testing.assert_allclose(best, np.sort(expected)[::-1][:10], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(expected[found], best, atol=1e-5, rtol=1e-5)


def test_equals_rank_bm25():
    """BM25+ is the same there; its Okapi differs by an idf of its own, so each term's saturation is compared."""
    rank_bm25 = pytest.importorskip("rank_bm25")
    passages = texts(150)
    tokens = [text.split() for text in passages]
    queries = texts(20, seed=1)
    peer = rank_bm25.BM25Plus(tokens, k1=1.2, b=0.75, delta=1)
    ours = build(passages, "bm25+", delta=1.0)
    for query in queries:
        np.testing.assert_allclose(ours.scores(query), peer.get_scores(query.split()), atol=1e-4)
    okapi = rank_bm25.BM25Okapi(tokens, k1=1.2, b=0.75)
    atire = build(passages, "atire")
    for word in WORDS[:20]:
        there, here = okapi.get_scores([word]), atire.scores(word)
        df = sum(word in text for text in tokens)
        if 0 < df < len(passages):
            np.testing.assert_allclose(here / math.log(len(passages) / df), there / okapi.idf[word], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_changes_equal_a_rebuild(variant, tmp_path):
    """After random adds, removals, saves and loads: to the last bit what an index built from scratch says."""
    rng = np.random.default_rng(3)
    pool = texts(400, seed=5)
    queries = texts(15, seed=6)
    index = BM25(BM25Config(variant=variant), plain())
    kept: dict[int, str] = {}
    for turn in range(12):
        new = [pool[i] for i in rng.integers(0, len(pool), rng.integers(1, 60))]
        kept |= dict(zip(index.add(new), new, strict=True))
        if turn % 3:
            gone = rng.choice(list(kept), rng.integers(1, len(kept) // 2 + 1), replace=False).tolist()
            index.remove(gone)
            for row in gone:
                del kept[row]
        if turn == 7:
            index.save(tmp_path / "index")
            index = BM25.load(tmp_path / "index")
        rows = sorted(kept)
        fresh = build([kept[row] for row in rows], variant)
        assert len(index) == len(fresh) == len(rows)
        expected, places = fresh.search(queries, 7)
        scores, found = index.search(queries, 7)
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(found, np.where(places < 0, -1, np.array(rows)[places]))
        for query in queries[:3]:
            np.testing.assert_array_equal(index.scores(query)[rows], fresh.scores(query))


def test_removed_passages_are_not_found_and_rows_are_not_given_again():
    index = build(["red apple", "red pear", "blue sky"])
    index.remove([0])
    assert index.add(["red plum"]) == range(3, 4)
    _, rows = index.search(["red"], 5)
    assert rows.tolist() == [[1, 3, -1, -1, -1]]
    with pytest.raises(ValueError, match="not in the index"):
        index.remove([1, 0])
    assert len(index) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_idf_is_never_negative(variant):
    """A word in every passage must not count against those that have it."""
    index = build(["the cat", "the dog", "the the bird", "the"], variant)
    assert (index.idf(np.arange(1, 5), 4) >= 0).all()
    assert (index.scores("the") >= 0).all()
    scores, _ = index.search(["the cat"], 4)
    assert (scores[np.isfinite(scores)] >= 0).all()


def test_equal_scores_come_in_the_order_of_their_rows():
    index = build(["red apple"] * 50 + ["red red"])
    _, rows = index.search(["red"], 5)
    assert rows.tolist() == [[50, 0, 1, 2, 3]]


def test_odd_queries_and_collections():
    index = build(["", "red apple", "!!!"])
    scores, rows = index.search(["", "unheard", "apple red"], 2)
    assert rows.tolist() == [[-1, -1], [-1, -1], [1, -1]]
    assert np.isneginf(scores[:2]).all()
    empty = BM25(BM25Config(), plain())
    assert empty.search(["red"], 3)[1].tolist() == [[-1, -1, -1]]
    assert empty.add([]) == range(0, 0)
    with pytest.raises(ValueError, match="k must be"):
        index.search(["red"], 0)


@pytest.mark.parametrize("emptied", [False, True])
def test_saved_with_its_analyser(emptied, tmp_path):
    index = BM25(BM25Config(k1=0.9, b=0.4), Analyser(AnalyserConfig()))
    index.add(["Running dogs", "A cat sleeps", "dogs of war"])
    if emptied:
        index.remove([0, 1, 2])
    index.save(tmp_path / "index")
    loaded = BM25.load(tmp_path / "index")
    assert loaded.config == index.config and loaded.analyser.config == index.analyser.config
    np.testing.assert_array_equal(loaded.search(["the dog runs"], 3)[1], index.search(["the dog runs"], 3)[1])
    assert loaded.search(["dog"], 1)[1].tolist() == [[-1 if emptied else 0]]
    if not emptied:
        assert isinstance(loaded.segments[0].impacts, np.memmap)
    before = (tmp_path / "index/impacts.npy").read_bytes()
    loaded.add(["one more dog"])
    loaded.search(["dog"], 3)
    assert (tmp_path / "index/impacts.npy").read_bytes() == before  # what changes stays in memory


def test_a_foreign_or_damaged_index_is_refused(tmp_path, monkeypatch):
    index = build(texts(20))
    index.save(tmp_path / "index")
    with pytest.raises(ProjectError, match="no lexical index"):
        BM25.load(tmp_path)
    whole = (tmp_path / "index/rows.npy").read_bytes()
    (tmp_path / "index/rows.npy").write_bytes(whole[:-40])
    with pytest.raises(ProjectError, match="damaged"):
        BM25.load(tmp_path / "index")
    (tmp_path / "index/rows.npy").write_bytes(whole)
    BM25.load(tmp_path / "index")
    monkeypatch.setattr("rag.search.analyser.PROBE", "another release of the stemmer")
    with pytest.raises(ProjectError, match="gives other terms"):
        BM25.load(tmp_path / "index")


def test_the_analyser():
    assert Analyser(AnalyserConfig())("The Running of the dogs, in 1,024 cafés!") == ["run", "dog", "1", "024", "café"]
    assert Analyser(AnalyserConfig(stemmer="none", stop_words="none", min_length=2))("A cat x") == ["cat"]
    assert Analyser(AnalyserConfig())("ＡＢＣ x²") == ["abc", "x2"]  # compatibility forms
    assert Analyser(AnalyserConfig(stemmer="french", stop_words="none"))("chevaux") == ["cheval"]
    assert "system" in Analyser(AnalyserConfig())("system")
    assert Analyser(AnalyserConfig(stop_words="scikit-learn"))("the system") == []
    with pytest.raises(ConfigError, match=r"klingon.*is no stemmer"):
        Analyser(AnalyserConfig(stemmer="klingon"))
    prints = {Analyser(AnalyserConfig(stemmer=name)).fingerprint for name in ("none", "english", "porter", "french")}
    assert len(prints) == 4
