"""How well passages were found, and how well questions were answered. No files, no networks.

Two notions of a right passage are kept apart by name: one that the dataset's annotators chose (`recall_at_5`), and one
that merely contains the answer's words (`answer_at_5`), which may be there by accident and is all that NQ-open offers.

Legend: Q queries, K places of a ranking.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Gold = Mapping[str, int]  # passage id -> grade; above 0 is relevant

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


# -- rankings ----------------------------------------------------------------------------------------------------------


def recall_at(ranking: Sequence[str], gold: Gold, k: int) -> float:
    """Share of the relevant passages among the first k; 0 where there are none."""
    relevant = {passage for passage, grade in gold.items() if grade > 0}
    if not relevant:
        return 0.0
    return len(relevant & set(ranking[:k])) / len(relevant)


def hit_at(ranking: Sequence[str], gold: Gold, k: int) -> float:
    """1 where any of the first k is relevant: what papers on open-domain questions call top-k accuracy."""
    return float(any(gold.get(passage, 0) > 0 for passage in ranking[:k]))


def complete_at(ranking: Sequence[str], gold: Gold, k: int) -> float:
    """1 where all relevant passages are among the first k, as a question needs them that takes several to answer; 0
    where there are none.
    """
    return float(recall_at(ranking, gold, k) == 1)


def reciprocal_rank_at(ranking: Sequence[str], gold: Gold, k: int = 10) -> float:
    """1 / rank of the first relevant passage, 0 where none is among the first k; its mean is MRR@k."""
    for rank, passage in enumerate(ranking[:k], start=1):
        if gold.get(passage, 0) > 0:
            return 1.0 / rank
    return 0.0


def ndcg_at(ranking: Sequence[str], gold: Gold, k: int = 10) -> float:
    """Normalised discounted cumulative gain (Järvelin & Kekäläinen 2002), as trec_eval computes it: the gain is the
    grade, the discount log2(1 + rank), and the best possible ranking scores 1.
    """
    gains = [max(0, gold.get(passage, 0)) for passage in ranking[:k]]
    best = sorted((grade for grade in gold.values() if grade > 0), reverse=True)[:k]
    ideal = discounted(best)
    return discounted(gains) / ideal if ideal else 0.0


def discounted(gains: Sequence[int]) -> float:
    """Sum of gains, each over log2(1 + rank)."""
    return float(sum(gain / np.log2(rank + 1) for rank, gain in enumerate(gains, start=1)))


def answer_at(texts: Sequence[str], answers: Sequence[str], k: int) -> float:
    """1 where any of the first k texts has one of the answers in it, word for word after SQuAD's normalisation."""
    wanted = [f" {normalise(answer)} " for answer in answers]
    for text in texts[:k]:
        words = f" {normalise(text)} "
        if any(answer.strip() and answer in words for answer in wanted):
            return 1.0
    return 0.0


def score_ranking(ranking: Sequence[str], gold: Gold, cutoffs: Sequence[int]) -> dict[str, float]:
    """Every measure by gold passages of one query."""
    scores = {f"recall_at_{k}": recall_at(ranking, gold, k) for k in cutoffs}
    scores |= {f"hit_at_{k}": hit_at(ranking, gold, k) for k in cutoffs}
    return scores | {"mrr_at_10": reciprocal_rank_at(ranking, gold), "ndcg_at_10": ndcg_at(ranking, gold)}


# -- answers -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65_536)  # a passage is found for many questions
def normalise(text: str) -> str:
    """Text as SQuAD's judges compare it: lower case, no punctuation, no articles, single spaces (Rajpurkar et al.
    2016).
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, both normalised."""
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Overlap of words with the right answer it is nearest to: harmonic mean of precision and recall."""
    return max((word_f1(answer, gold) for gold in golds), default=0.0)


def word_f1(answer: str, gold: str) -> float:
    """The same for one right answer; two empty ones are equal."""
    said = normalise(answer).split()
    right = normalise(gold).split()
    common = sum((Counter(said) & Counter(right)).values())
    if not said or not right:
        return float(said == right)
    if common == 0:
        return 0.0
    precision = common / len(said)
    recall = common / len(right)
    return 2 * precision * recall / (precision + recall)


# -- comparing ---------------------------------------------------------------------------------------------------------


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Whether the first system is better than the second on the same queries (Efron & Tibshirani 1993, chapter 16).

    Queries are drawn with replacement, each with both its scores.

    Returns:
        `difference` of the means; `low` and `high`, its 95 percent percentile interval; `p`, two-sided: twice the
        smaller share of resamples on either side of zero, at least 1 / resamples.
    """
    a = np.asarray(first, np.float64)
    b = np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"two lists of scores of the same queries are needed, got {a.shape} and {b.shape}")
    differences = a - b
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one at a time: a matrix of all would not fit where there are many queries
        means[i] = differences[rng.integers(0, len(a), len(a))].mean()
    below = float((means <= 0).mean())
    above = float((means >= 0).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": min(1.0, max(2 * min(below, above), 1 / resamples)),
    }
