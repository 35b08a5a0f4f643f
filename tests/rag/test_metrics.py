"""Measures and fusion against ranx and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest

from rag.metrics import scores as metrics
from rag.search import fuse


def rankings(count: int, length: int = 20, seed: int = 0) -> tuple[list[list[str]], list[dict[str, int]]]:
    rng = np.random.default_rng(seed)
    found = [[f"d{i}" for i in rng.permutation(40)[:length]] for _ in range(count)]
    gold = [{f"d{i}": int(rng.integers(1, 4)) for i in rng.permutation(60)[: rng.integers(1, 6)]} for _ in range(count)]
    return found, gold


@pytest.mark.slow  # ranx compiles for a minute
def test_equal_to_ranx():
    ranx = pytest.importorskip("ranx")
    found, gold = rankings(50)
    qrels = ranx.Qrels({f"q{i}": grades for i, grades in enumerate(gold)})
    run = ranx.Run({f"q{i}": {d: 100.0 - r for r, d in enumerate(ranking)} for i, ranking in enumerate(found)})
    names = {
        "recall_at_5": "recall@5", "hit_at_5": "hit_rate@5", "recall_at_20": "recall@20", "mrr_at_10": "mrr@10",
        "ndcg_at_10": "ndcg@10",
    }  # fmt: skip
    theirs = ranx.evaluate(qrels, run, list(names.values()))
    each = [metrics.score_ranking(ranking, grades, (5, 20)) for ranking, grades in zip(found, gold, strict=True)]
    for ours, peer in names.items():
        assert np.mean([scores[ours] for scores in each]) == pytest.approx(theirs[peer], abs=1e-9), ours


@pytest.mark.slow
def test_reciprocal_rank_fusion_equals_ranx():
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(50)[:20] for _ in range(10)])
    second = np.stack([rng.permutation(50)[:15] for _ in range(10)])
    scores, rows = fuse.reciprocal_rank([first, second], 12)

    def as_run(rows):
        return ranx.Run({f"q{q}": {str(d): 100.0 - r for r, d in enumerate(row)} for q, row in enumerate(rows)})

    fused = ranx.fuse(runs=[as_run(first), as_run(second)], method="rrf", params={"k": 60})
    for q in range(10):
        theirs = fused.run[f"q{q}"]
        np.testing.assert_allclose(scores[q], sorted(theirs.values(), reverse=True)[:12], rtol=1e-6)
        np.testing.assert_allclose([theirs[str(row)] for row in rows[q]], scores[q], rtol=1e-6)


def test_a_question_of_two_steps_needs_both_passages():
    gold = {"a": 2, "b": 1, "c": 0}
    assert [metrics.complete_at(["a", "c", "b"], gold, k) for k in (1, 2, 3)] == [0.0, 0.0, 1.0]
    assert metrics.complete_at(["c", "a"], {"c": 0}, 2) == 0.0


def test_gain_equals_scikit_learn():
    from sklearn.metrics import ndcg_score

    found, gold = rankings(20, length=40)
    for ranking, grades in zip(found, gold, strict=True):
        every = sorted({*ranking, *grades})
        place = {name: rank for rank, name in enumerate(ranking)}
        score = [[100.0 - place[name] if name in place else -1.0 - i for i, name in enumerate(every)]]
        theirs = ndcg_score([[grades.get(name, 0) for name in every]], score, k=10)
        assert metrics.ndcg_at(ranking, grades) == pytest.approx(theirs, abs=1e-9)


def test_reciprocal_ranks_by_hand():
    """Ranks are counted from 1, and a row that stands twice in a list counts once."""
    scores, rows = fuse.reciprocal_rank([np.array([[7, 3, 7, -1]]), np.array([[3, 9, -1, -1]])], 4)
    assert rows.tolist() == [[3, 7, 9, -1]]
    np.testing.assert_allclose(scores[0, :3], [1 / 62 + 1 / 61, 1 / 61, 1 / 62], rtol=1e-6)
    assert np.isneginf(scores[0, 3])


def test_weighted_scores_by_hand():
    dense = (np.array([[0.9, 0.5, 0.1, -np.inf]]), np.array([[4, 2, 8, -1]]))
    lexical = (np.array([[12.0, 2.0, -np.inf, -np.inf]]), np.array([[2, 5, -1, -1]]))
    scores, rows = fuse.weighted_scores([dense, lexical], [0.75, 0.25], 4)
    assert rows.tolist() == [[4, 2, 5, 8]]
    np.testing.assert_allclose(scores[0], [0.75, 0.75 * 0.5 + 0.25, 0.0, 0.0], atol=1e-6)
    nothing = (np.full((1, 2), -np.inf), np.full((1, 2), -1))
    assert fuse.weighted_scores([nothing, nothing], [0.5, 0.5], 2)[1].tolist() == [[-1, -1]]


def test_equal_to_squads_judge():
    torchmetrics = pytest.importorskip("torchmetrics.text")
    pairs = [
        ("The Eiffel-Tower!", ["eiffel tower", "Eiffel Tower in Paris"]),
        ("a b c", ["b c d", "x"]),
        ("nothing", ["something else"]),
        ("in the year 1999", ["1999", "the year 1999"]),
        ("An apple, a day.", ["apple day"]),
    ]
    judge = torchmetrics.SQuAD()
    theirs = judge(
        [{"prediction_text": said, "id": str(i)} for i, (said, _) in enumerate(pairs)],
        [
            {"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": str(i)}
            for i, (_, golds) in enumerate(pairs)
        ],
    )
    ours_em = 100 * np.mean([metrics.exact_match(said, golds) for said, golds in pairs])
    ours_f1 = 100 * np.mean([metrics.f1(said, golds) for said, golds in pairs])
    assert ours_em == pytest.approx(float(theirs["exact_match"]))
    assert ours_f1 == pytest.approx(float(theirs["f1"]), abs=1e-4)


def test_an_answer_is_found_as_whole_words():
    assert metrics.answer_at(["It was in 1989.", "the U.S.A. won"], ["USA"], 2) == 1
    assert metrics.answer_at(["It was in 1989.", "the U.S.A. won"], ["USA"], 1) == 0
    assert metrics.answer_at(["a category of things"], ["cat"], 1) == 0
    assert metrics.answer_at(["anything"], ["the"], 1) == 0  # nothing is left of it
    assert metrics.answer_at(["anything"], [], 1) == 0


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    better = metrics.paired_bootstrap(base + 0.05 + 0.1 * rng.standard_normal(400), base, 2000)
    assert better["p"] < 0.01 and better["low"] > 0 and better["difference"] == pytest.approx(0.05, abs=0.02)
    same = metrics.paired_bootstrap(base + 0.3 * rng.standard_normal(400), base, 2000)
    assert same["low"] < 0 < same["high"]
    assert metrics.paired_bootstrap(base, base, 200)["p"] == 1
    with pytest.raises(ValueError, match="same queries"):
        metrics.paired_bootstrap([1.0, 2.0], [1.0], 200)


def test_no_gold_passage_scores_nothing():
    scores = metrics.score_ranking(["a", "b"], {"c": 0}, (1, 5))
    assert set(scores.values()) == {0.0}
