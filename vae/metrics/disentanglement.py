"""How far a code separates known factors: MIG, DCI, the FactorVAE score and SAP.

Legend: N images, Z latents, F factors, V values of a factor, G images a group.

Every score reads the posterior's mean and not a draw from it. Factors that never vary (the color of dSprites) are left
out; every other one counts, among them the shape, which some papers leave out. Factors whose values have no order
(shape) are named in `categorical`, by their columns, and are classified where the others are regressed. The scores are
fractions and functions of their inputs and the seed. The order and the signs of the latents do not matter, but for
codes on the very edge of a bin (MIG) and splits of equal worth (DCI).

No two of them mean the same, and none is comparable between papers unless estimator, bins and number of samples are:
what is chosen here is said at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BINS = 20  # of each latent, for MIG
PRUNED = 0.05  # latents whose mean varies less than this part of the prior's variance take no part
PRIOR_VARIANCE = 1.0
VOTES = 800  # to find the majority, and as many again to score it (Kim & Mnih 2018: 800)
GROUP = 100  # images with one factor in common, for one vote
TREES = 100  # of each of DCI's ensembles
TESTED = 0.25  # share of the images on which DCI's predictors are tested
VARIANCE_SAMPLES = 10_000  # images from which each latent's variance is measured where codes come from an encoder
GROUPS_AT_ONCE = 64  # that an encoder is given

Encode = Callable[[Tensor], Tensor]  # image numbers, int64 (N,), to codes, float (N, Z)


class DCI(NamedTuple):
    """Eastwood & Williams 2018: how few factors a latent serves, how few latents a factor needs, how well all predict
    it.
    """

    disentanglement: float
    completeness: float
    informativeness: float


def score_codes(
    codes: Tensor, factors: Tensor, categorical: Collection[int] = (), seed: int = 0, bins: int = BINS
) -> dict[str, float]:
    """All scores of one table of codes, by their names in `eval.json`.

    A quarter of a minute on one core with 10,000 images and 10 latents, nearly all of it DCI's trees.

    Args:
        codes: posterior means, float (N, Z).
        factors: int64 (N, F).
        categorical: columns of `factors` whose values have no order.
    Raises:
        ValueError: codes that are no numbers, or factors of which none varies.
    """
    parts = dci(codes, factors, categorical, seed)
    return {
        "mig": mig(codes, factors, bins),
        "dci": parts.disentanglement,
        "dci_completeness": parts.completeness,
        "dci_informativeness": parts.informativeness,
        "factor_vae_score": factor_vae_score_of_table(codes, factors, seed),
        "sap": sap(codes, factors, categorical),
    }


# -- MIG ---------------------------------------------------------------------------------------------------------------


def mig(codes: Tensor, factors: Tensor, bins: int = BINS) -> float:
    """Mutual information gap (Chen et al. 2018, eq. 6): the mean over the factors of

        (I(z_a; v) - I(z_b; v)) / H(v),   z_a and z_b the latents that know most and second most of the factor v.

    Chen et al. estimate I from the posterior's density; this is the estimate that most tables since have (Locatello et
    al. 2019): of the mean, in `bins` equal bins from each latent's least value to its greatest.

    It changes with the bins and the number of images, so state both. Fewer bins than values cap it: with 20 bins, a
    code that is the factor itself scores (log 20) / (log 40) = 0.81 on 40 orientations, and 0.90 over all of dSprites
    (10,000 images), where 40 bins give 0.99. Few images add about (bins - 1) (V - 1) / 2N nats to every I. One outlier
    widens all bins of its latent.
    """
    information = mutual_information(codes, factors, bins)  # (Z, F)
    _, values, _ = _check(codes, factors)
    ordered = np.sort(np.vstack([np.zeros_like(information[:1]), information]), axis=0)  # of one latent, second is 0
    entropies = np.array([_entropy(np.bincount(column)) for column in values.T])
    return float(np.mean((ordered[-1] - ordered[-2]) / entropies))


def mutual_information(codes: Tensor, factors: Tensor, bins: int = BINS) -> np.ndarray:
    """I(z; v) in nats of each binned latent and each factor that varies: (Z, F)."""
    latents, values, _ = _check(codes, factors)
    if bins < 2:
        raise ValueError(f"mutual information needs 2 bins or more, not {bins}")
    binned = to_bins(latents, bins)
    return np.array([[_mutual_information(z, v) for v in values.T] for z in binned.T])


def to_bins(latents: np.ndarray, bins: int) -> np.ndarray:
    """Which of `bins` equal parts of each column's range a number lies in: int64 (N, Z). A constant column is bin 0."""
    least = latents.min(0)
    width = np.ptp(latents, axis=0)
    place = (latents - least) / np.where(width > 0, width, 1)  # in [0, 1]
    return np.minimum((place * bins).astype(np.int64), bins - 1)  # the greatest value belongs to the last bin


def _mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """I = H(one) + H(other) - H(both), of whole numbers from 0 on."""
    width = int(other.max()) + 1
    joint = np.bincount(one * width + other, minlength=width * (int(one.max()) + 1)).reshape(-1, width)
    return max(_entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint.ravel()), 0.0)


def _entropy(counts: np.ndarray) -> float:
    """In nats, of weights that need not add up to 1."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# -- DCI ---------------------------------------------------------------------------------------------------------------


def dci(codes: Tensor, factors: Tensor, categorical: Collection[int] = (), seed: int = 0, trees: int = TREES) -> DCI:
    """Disentanglement, completeness and informativeness (Eastwood & Williams 2018, section 2).

    Each factor is predicted from all latents by gradient-boosted trees, whose importances R (Z, F) say which latents
    it needs. With P the rows of R as distributions over factors, and Q its columns as distributions over latents:

        disentanglement = sum_z (R_z / R) (1 - H(P_z) / log F),   completeness = mean_v (1 - H(Q_v) / log Z)

    A factor's importances add up to 1 even where its prediction is worth nothing: read informativeness first.

    Eastwood & Williams use a lasso or a random forest; the trees are Locatello et al.'s (2019), except that ordered
    factors are regressed here: a classifier of 40 orientations has 40 times as many trees. Informativeness is the share
    of the best constant guess's error that the prediction removes on images held out: R^2 for ordered factors, and the
    same with wrong classes instead of squares for the others; the mean is over the factors, and a guess scores 0. That
    an orientation is cyclic counts for nothing here, as in the tables before.
    """
    latents, values, columns = _check(codes, factors, categorical)
    order = np.random.default_rng(seed).permutation(len(latents))
    test, train = np.split(order, [max(round(TESTED * len(order)), 1)])
    if not len(train):
        raise ValueError(f"DCI needs more than {len(latents)} images")
    importances = []
    skills = []
    for factor, column in zip(values.T, columns, strict=True):
        parts = (latents[train], factor[train], latents[test], factor[test])
        importance, skill = _predict(*parts, column in categorical, seed, trees)
        importances.append(importance)
        skills.append(skill)
    table = np.stack(importances, axis=1)  # (Z, F)
    total = table.sum()
    share = table.sum(1) / total if total > 0 else np.zeros(len(table))  # (Z,)
    return DCI(float(share @ concentration(table)), float(concentration(table.T).mean()), float(np.mean(skills)))


def concentration(table: np.ndarray) -> np.ndarray:
    """1 - H / log n of each row of n weights, as a distribution: 1 with all on one, 0 where they are equal or zero."""
    result = np.zeros(len(table))
    for i, row in enumerate(table):
        if row.sum() > 0:
            result[i] = 1 - _entropy(row) / math.log(len(row)) if len(row) > 1 else 1
    return result


def _predict(
    train: np.ndarray,
    train_factor: np.ndarray,
    test: np.ndarray,
    test_factor: np.ndarray,
    classify: bool,
    seed: int,
    trees: int,
) -> tuple[np.ndarray, float]:
    """Importance of each latent for a factor, (Z,), and the share of a constant guess's error that is removed."""
    from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor

    kind = GradientBoostingClassifier if classify else GradientBoostingRegressor
    model = kind(n_estimators=trees, random_state=seed)
    if len(np.unique(train_factor)) < 2:  # nothing to learn from
        return np.zeros(train.shape[1]), 0.0
    predicted = model.fit(train, train_factor).predict(test)
    if classify:
        error = np.mean(predicted != test_factor)
        guessed = np.mean(np.bincount(train_factor).argmax() != test_factor)
    else:
        error = np.mean((predicted - test_factor) ** 2)
        guessed = np.mean((train_factor.mean() - test_factor) ** 2)
    skill = 1 - error / guessed if guessed > 0 else 0.0
    return model.feature_importances_, max(float(skill), 0.0)


# -- FactorVAE score ---------------------------------------------------------------------------------------------------


def factor_vae_score(
    encode: Encode, factor_sizes: Sequence[int], seed: int = 0, votes: int = VOTES, group: int = GROUP
) -> float:
    """FactorVAE score (Kim & Mnih 2018, section 4): accuracy of a majority vote that names the factor which a group of
    images has in common, from the latent that varies least among them.

    A latent's variance in the group is taken relative to its variance over all images. Latents whose variance is below
    0.05 of the prior's have collapsed and take no part; without any other the score is 0. The majority is found on
    `votes` groups and scored on as many others. Guessing scores 1 / F, so that noise is near 0.2 on dSprites, not 0;
    and the score is generous: random rotations of the five factors reach 0.7 to 1, where their MIG is 0.06 to 0.28.

    Args:
        encode: posterior means of images by number, int64 (N,) -> float (N, Z); as many as 64 groups at once.
        factor_sizes: values of each factor; images are numbered with the last factor changing fastest, and every
            combination has one.
        group: G, images a group.
    """
    generator = np.random.default_rng(seed)
    sizes = np.array(factor_sizes)
    varying = np.flatnonzero(sizes > 1)
    if not len(varying):
        raise ValueError("none of the factors varies")
    some = generator.integers(math.prod(factor_sizes), size=VARIANCE_SAMPLES)
    every = _encode(encode, some, GROUPS_AT_ONCE * group)
    fixed = generator.choice(varying, size=2 * votes)
    values = generator.integers(sizes, size=(2 * votes, group, len(sizes)))
    for one, factor in zip(values, fixed, strict=True):
        one[:, factor] = one[0, factor]
    numbers = np.ravel_multi_index(tuple(np.moveaxis(values, -1, 0)), tuple(factor_sizes))  # (votes, G)
    codes = _encode(encode, numbers.ravel(), GROUPS_AT_ONCE * group)
    spread = codes.reshape(2 * votes, group, -1).var(1, ddof=1)  # (votes G, Z) -> (votes, G, Z) -> (votes, Z)
    return _majority(spread, every.var(0, ddof=1), fixed)


def factor_vae_score_of_table(
    codes: Tensor, factors: Tensor, seed: int = 0, votes: int = VOTES, group: int = GROUP
) -> float:
    """The FactorVAE score where only some images are encoded: groups are drawn, with repetition, from the rows that
    have a value of a factor in common. Every value of a factor should have tens of rows.

    Args:
        codes: float (N, Z).
        factors: int64 (N, F).
    """
    latents, values, _ = _check(codes, factors)
    generator = np.random.default_rng(seed)
    fixed = generator.integers(values.shape[1], size=2 * votes)
    rows = [[np.flatnonzero(column == value) for value in range(column.max() + 1)] for column in values.T]
    spread = np.empty((2 * votes, latents.shape[1]))
    for vote, factor in enumerate(fixed):
        value = values[generator.integers(len(values)), factor]
        same = rows[factor][value]
        spread[vote] = latents[same[generator.integers(len(same), size=group)]].var(0, ddof=1)
    return _majority(spread, latents.var(0, ddof=1), fixed)


def _majority(spread: np.ndarray, variance: np.ndarray, fixed: np.ndarray) -> float:
    """Accuracy of the vote on the second half of the groups.

    Args:
        spread: variance of each latent in each group, (votes, Z).
        variance: of each latent over all images, (Z,).
        fixed: which factor the group has in common, (votes,).
    """
    active = variance >= PRUNED * PRIOR_VARIANCE
    if not active.any():
        return 0.0
    steadiest = np.argmin(spread[:, active] / variance[active], axis=1)
    half = len(fixed) // 2
    counts = np.zeros((int(active.sum()), int(fixed.max()) + 1))
    np.add.at(counts, (steadiest[:half], fixed[:half]), 1)
    named = counts.argmax(1)  # the factor that each latent stands for
    return float(np.mean(named[steadiest[half:]] == fixed[half:]))


def _encode(encode: Encode, numbers: np.ndarray, at_once: int) -> np.ndarray:
    parts = [encode(torch.from_numpy(numbers[i : i + at_once])) for i in range(0, len(numbers), at_once)]
    return torch.cat([part.detach().double().cpu() for part in parts]).numpy()


# -- SAP ---------------------------------------------------------------------------------------------------------------


def sap(codes: Tensor, factors: Tensor, categorical: Collection[int] = ()) -> float:
    """Separated attribute predictability (Kumar et al. 2018, section 3): the mean over the factors of the gap between
    the two latents that predict it best, each alone.

    Ordered factors: R^2 of a line. Others: V - 1 thresholds on the latent that make the classes' balanced accuracy
    large, as Kumar et al. have it. (A linear SVM with C = 0.01, which some libraries fit instead, depends on the
    latent's scale and may never name the middle one of three classes.) Balanced accuracy is rescaled so that guessing
    is 0, as R^2 is; without that, a latent of noise would lower the score of a perfect code, and a dead one would not.
    """
    latents, values, columns = _check(codes, factors, categorical)
    table = np.zeros(
        (latents.shape[1] + 1, values.shape[1])
    )  # a further latent that knows nothing: of one, second is 0
    for v, column in enumerate(columns):
        score = threshold_accuracy if column in categorical else squared_correlation
        for z in np.flatnonzero(np.ptp(latents, axis=0) > 0):
            table[z, v] = score(latents[:, z], values[:, v])
    ordered = np.sort(table, axis=0)
    return float(np.mean(ordered[-1] - ordered[-2]))


def squared_correlation(latent: np.ndarray, factor: np.ndarray) -> float:
    """R^2 of the least-squares line."""
    return float(np.corrcoef(latent, factor)[0, 1] ** 2)


def threshold_accuracy(latent: np.ndarray, factor: np.ndarray) -> float:
    """Balanced accuracy of V - 1 thresholds, from 0 for a guess to 1: (accuracy - 1/V) / (1 - 1/V)."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.tree import DecisionTreeClassifier

    classes = len(np.unique(factor))
    tree = DecisionTreeClassifier(max_leaf_nodes=classes, class_weight="balanced", random_state=0)
    predicted = tree.fit(latent[:, None], factor).predict(latent[:, None])
    return max(float(balanced_accuracy_score(factor, predicted, adjusted=True)), 0.0)


# -- inputs ------------------------------------------------------------------------------------------------------------


def _check(
    codes: Tensor, factors: Tensor, categorical: Collection[int] = ()
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Codes float64 (N, Z), the factors that vary as numbers from 0 on (N, F), and their columns.

    Values that do not occur are closed up: a factor's numbers are then 0 to V - 1.
    """
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise ValueError(
            f"codes (N, Z) and factors (N, F) are needed, not {tuple(codes.shape)} and {tuple(factors.shape)}"
        )
    if any(not 0 <= column < factors.shape[1] for column in categorical):
        raise ValueError(f"categorical: {sorted(categorical)} are not all columns of {factors.shape[1]} factors")
    latents = codes.detach().double().cpu().numpy()
    if not np.isfinite(latents).all():
        raise ValueError("the codes are not all finite")
    table = factors.cpu().numpy()
    columns = [i for i in range(table.shape[1]) if len(np.unique(table[:, i])) > 1]
    if not columns:
        raise ValueError("none of the factors varies")
    values = np.stack([np.unique(table[:, i], return_inverse=True)[1] for i in columns], axis=1)
    return latents, values.astype(np.int64), columns
