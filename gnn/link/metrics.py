"""Metrics of link prediction, from the scores of pairs of nodes; a higher score means "rather linked".

Two families answer two questions:

    AUC, average precision   Do links score higher than non-links, over all pairs at once?
    MRR, Hits@K              Where does a link stand among the K negatives that were made for it (Li et al. 2023)?

Ties are never decided in the model's favour: for the AUC an equal pair counts one half, for the average precision all
pairs of one score enter together (as in scikit-learn), and a tied positive has the mean of the ranks that it could
have. A constant scorer therefore has AUC 1/2, average precision equal to the share of positives, and mean rank (K + 2)
/ 2.

All arithmetic is float64. Legend: P positives, Q negatives of all of them together, K negatives a positive.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: the probability that a random positive scores above a random negative (Mann & Whitney
    1947).

    Args: scores `positive` (P,), `negative` any shape with Q > 0 entries. ValueError where either is empty or not
        finite.
    """
    # (P,), (Q,)
    positive = _scores(positive, "positive")
    negative = _scores(negative, "negative").sort().values
    below = torch.searchsorted(negative, positive)  # (P,) negatives that score lower
    not_above = torch.searchsorted(negative, positive, right=True)  # (P,) lower or equal
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def average_precision(positive: Tensor, negative: Tensor, negative_weight: float = 1.0) -> float:
    """Sum over thresholds of the precision there times the gain in recall there, thresholds being the distinct scores.

    Args: scores `positive` (P,), `negative` any shape with Q > 0 entries. A negative counts as `negative_weight` of a
    pair: with P / Q, positives and negatives weigh the same in all, so that numbers from few and from many negatives
    compare. ValueError where either is empty or not finite, or for a weight that is not positive.
    """
    positive, negative = _scores(positive, "positive"), _scores(negative, "negative")
    if not negative_weight > 0:
        raise ValueError(f"negative_weight must be above 0, got {negative_weight}")
    score, order = torch.cat([positive, negative]).sort(descending=True)  # (P + Q,)
    is_positive = (order < len(positive)).double()
    # the last pair of each group of equal scores
    last = torch.cat([score[1:] != score[:-1], torch.ones(1, dtype=torch.bool)])
    true = is_positive.cumsum(0)[last]  # (distinct scores,) positives at or above this score
    false = negative_weight * (1 - is_positive).cumsum(0)[last]
    gain = torch.diff(true, prepend=true.new_zeros(1)) / len(positive)
    return (gain * true / (true + false)).sum().item()


def ranks(positive: Tensor, negative: Tensor) -> Tensor:
    """The rank of each positive among itself and its own negatives, float64 (P,), 1 is best; ties stand at their mean
    rank.

    Args: scores `positive` (P,), `negative` (P, K) with K > 0. ValueError for other shapes, or scores that are not
        finite.
    """
    if negative.ndim != 2 or len(negative) != len(positive):
        raise ValueError(
            f"ranks need one row of negatives for each of {len(positive)} positives, got shape {tuple(negative.shape)}"
        )
    shape = negative.shape
    positive = _scores(positive, "positive")
    negative = _scores(negative, "negative").view(shape)
    above = (negative > positive[:, None]).sum(1)  # (P,)
    equal = (negative == positive[:, None]).sum(1)
    return 1 + above.double() + equal.double() / 2


def mean_reciprocal_rank(rank: Tensor) -> float:
    """Mean of 1 / rank over `ranks` (P,)."""
    return rank.double().reciprocal().mean().item()


def hits_at(rank: Tensor, k: int) -> float:
    """Share of positives whose rank (P,) is k or better; of a tie, the mean rank decides."""
    return (rank <= k).double().mean().item()


def pair_metrics(
    positive: Tensor, negative: Tensor, own_negative: Tensor, hits: Iterable[int] = (), suffix: str = ""
) -> dict[str, float]:
    """All metrics of one scorer on one set of negatives, named `auc`, `ap`, `mrr`, `hits_at_1` ..., each with `suffix`.

    Args: `positive` (P,); `negative` any shape, for AUC and AP, where positives and negatives weigh the same in all;
    `own_negative` (P, K), for MRR and Hits@K. A k of `hits` that is above K is left out: every rank is at most K + 1.
    """
    rank = ranks(positive, own_negative)
    found = {
        "auc": auc(positive, negative),
        "ap": average_precision(positive, negative, positive.numel() / max(1, negative.numel())),
        "mrr": mean_reciprocal_rank(rank),
    }
    found |= {f"hits_at_{k}": hits_at(rank, k) for k in hits if k <= own_negative.shape[1]}
    return {name + suffix: value for name, value in found.items()}


def _scores(values: Tensor, name: str) -> Tensor:
    """Scores as float64 (count,) on the CPU."""
    values = values.detach().double().cpu().flatten()
    if not len(values):
        raise ValueError(
            f"no {name} pairs to score: give the part of the split more edges (link.val_share, link.test_share)"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{int((~values.isfinite()).sum())} of {len(values)} {name} scores are not finite: the model has diverged"
        )
    return values
