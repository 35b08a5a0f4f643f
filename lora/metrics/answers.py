"""Scores of written answers against references, each example's own share kept, so that examples can be drawn anew.

BLEU (Papineni et al. 2002) is no mean over examples: n-gram counts are summed first. So an example's share is its
counts, and the score of any draw of examples is computed from their sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.config import Config

ORDER = 4  # longest n-grams of BLEU
Rows = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Score:
    """A metric with each example's share.

    Attributes:
        name: in eval.json.
        shares: (examples, numbers), float64.
        combine: from the sum of shares, and how many there were, to the metric.
    """

    name: str
    shares: Rows
    combine: Callable[[Rows, int], float]

    @property
    def value(self) -> float:
        """Of all examples."""
        return self.combine(self.shares.sum(0), len(self.shares))


def mean_of(name: str, values: Sequence[float]) -> Score:
    """A metric that is the mean of its examples'."""
    return Score(name, np.asarray(values, dtype=np.float64)[:, None], lambda total, count: float(total[0] / count))


def score_answers(answers: Sequence[str], references: Sequence[Sequence[str]], config: Config) -> list[Score]:
    """The metrics that suit a dataset, as fractions.

    BLEU and ROUGE-L for texts that may be worded in many ways, lower-cased for E2E as the challenge's script does; for
    GSM8K whether the number after #### is right; exact match where there is little to word.
    """
    dataset = config.data.dataset
    if dataset == "gsm8k":
        right = [float(final_number(a) == final_number(refs[0])) for a, refs in zip(answers, references, strict=True)]
        return [mean_of("accuracy", right)]
    scores = [exact_match(answers, references), rouge_l(answers, references)]
    if dataset != "squad":
        scores.insert(0, bleu(answers, references, lowercase=dataset == "e2e"))
    return scores


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool) -> Score:
    """Corpus BLEU of sacrebleu (13a tokens, up to 4-grams), as a fraction; several references count together."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(lowercase=lowercase, effective_order=True)
    shares = []
    for answer, refs in zip(answers, references, strict=True):
        found = metric.sentence_score(answer, list(refs))
        shares.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def combine(total: Rows, count: int) -> float:
        counts = [int(number) for number in total[:ORDER]]
        totals = [int(number) for number in total[ORDER : 2 * ORDER]]
        result = BLEU.compute_bleu(counts, totals, int(total[-2]), int(total[-1]), smooth_method="exp")
        return float(result.score) / 100

    return Score("bleu", np.asarray(shares, dtype=np.float64), combine)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """F1 of the longest common subsequence of stemmed words (Lin 2004), against the reference that fits best."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(ref, answer)["rougeL"].fmeasure for ref in refs)
        for answer, refs in zip(answers, references, strict=True)
    ]
    return mean_of("rouge_l", best)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Whether an answer is one of its references, up to case and blanks."""
    right = [
        float(plain(answer) in {plain(ref) for ref in refs}) for answer, refs in zip(answers, references, strict=True)
    ]
    return mean_of("exact_match", right)


def plain(text: str) -> str:
    """Lower case, single blanks."""
    return " ".join(text.lower().split())


def final_number(text: str) -> str:
    """GSM8K's result: what stands after ####, else the last number, without separators; empty without one."""
    tail = text.rsplit("####", maxsplit=1)[-1] if "####" in text else text
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", tail)
    if not numbers:
        return ""
    number = (numbers[0] if "####" in text else numbers[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
