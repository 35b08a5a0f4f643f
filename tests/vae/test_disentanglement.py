"""MIG, DCI, the FactorVAE score and SAP: their ends, their invariances, and their parts against scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import balanced_accuracy_score, mutual_info_score
from sklearn.svm import LinearSVC

from vae.data.dsprites import CATEGORICAL, FACTOR_SIZES, factors_of, split_indices
from vae.metrics.disentanglement import (
    DCI,
    PRUNED,
    concentration,
    dci,
    factor_vae_score,
    factor_vae_score_of_table,
    mig,
    mutual_information,
    sap,
    score_codes,
    squared_correlation,
    threshold_accuracy,
    to_bins,
)

SIZES = (1, 3, 4, 5, 10)  # a constant, a categorical and three ordered factors: 600 images
SHAPE = (1,)
GRID = torch.tensor(list(itertools.product(*map(range, SIZES))))  # every combination once
FEW_TREES = 20


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perfect():
    """Each factor in a latent of its own, with the prior's mean and variance; two more of noise, and one dead."""
    own = GRID[:, 1:].float()
    own = (own - own.mean(0)) / own.std(0)
    return torch.cat([own, normal(len(GRID), 2), torch.full((len(GRID), 1), 0.3)], dim=1)


def mixed():
    """Latents that each know something of several factors."""
    return perfect()[:, :4] @ normal(4, 6, seed=1) + 0.1 * normal(len(GRID), 6, seed=2)


def scores(codes, factors=GRID, categorical=SHAPE):
    """Every score but DCI's with its full number of trees, which takes seconds."""
    return {
        "mig": mig(codes, factors),
        "sap": sap(codes, factors, categorical),
        "factor_vae_score": factor_vae_score_of_table(codes, factors),
        **dci(codes, factors, categorical, trees=FEW_TREES)._asdict(),
    }


# -- the ends ----------------------------------------------------------------------------------------------------------


def test_a_perfect_code_has_the_most_of_every_score():
    codes = perfect()[:, :4]
    assert mig(codes, GRID) == pytest.approx(1, abs=1e-12)
    assert sap(codes, GRID, SHAPE) == pytest.approx(1, abs=1e-12)
    assert factor_vae_score_of_table(codes, GRID) == 1
    parts = dci(codes, GRID, SHAPE, trees=100)
    assert min(parts) > 0.99
    # latents that know nothing cost little: by chance they know something of 600 images
    for name, score in scores(perfect()).items():
        assert score > (0.95 if name != "mig" else 0.85), name


def test_noise_has_the_least_of_every_score():
    count = 4000
    factors = GRID[torch.randint(len(GRID), (count,), generator=torch.Generator().manual_seed(1))]
    result = scores(normal(count, 8, seed=2), factors)
    chance = 1 / 4  # the majority vote guesses among four factors
    assert result.pop("factor_vae_score") == pytest.approx(chance, abs=0.06)
    for name, score in result.items():
        assert score < 0.05, name


def test_a_mixed_code_lies_between():
    result = scores(mixed())
    for name in ("mig", "sap", "disentanglement", "completeness"):
        assert 0.02 < result[name] < 0.8, name
    assert result["informativeness"] > 0.6
    # the vote is generous to mixtures as long as its groups are large
    assert result["factor_vae_score"] > 0.9
    assert 0.4 < factor_vae_score_of_table(mixed(), GRID, group=5) < 0.9


def test_a_dead_code_scores_nothing():
    assert scores(torch.zeros(len(GRID), 3)) == {
        "mig": 0,
        "sap": 0,
        "factor_vae_score": 0,
        "disentanglement": 0,
        "completeness": 0,
        "informativeness": 0,
    }


def test_one_latent_is_compared_with_nothing():
    """Its gaps are what it knows itself: all of the first factor."""
    codes = perfect()[:, :1]
    assert mig(codes, GRID) == pytest.approx(1 / 4)
    assert sap(codes, GRID, SHAPE) == pytest.approx(1 / 4)
    assert factor_vae_score_of_table(codes, GRID) == pytest.approx(1 / 4, abs=0.05)
    # importances add up to 1 for each factor, whatever they are worth
    parts = dci(codes, GRID, SHAPE, trees=FEW_TREES)
    assert (parts.disentanglement, parts.completeness) == (0, 1)
    assert parts.informativeness == pytest.approx(1 / 4, abs=0.05)


# -- invariances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [perfect, mixed])
def test_order_and_sign_of_the_latents_do_not_matter(make):
    codes = make()
    latents = codes.shape[1]
    signs = torch.tensor([(-1.0) ** i for i in range(latents)])
    turned = (codes * signs)[:, torch.randperm(latents, generator=torch.Generator().manual_seed(5))]
    other = scores(turned)
    for name, score in scores(codes).items():
        is_exact = name in ("mig", "sap", "factor_vae_score")
        assert other[name] == pytest.approx(score, abs=1e-9 if is_exact else 0.02), name


def test_a_factor_that_never_varies_is_left_out_and_columns_keep_their_numbers():
    without = GRID[:, 1:]
    codes = mixed()
    assert scores(codes) == scores(codes, without, categorical=(0,))
    # and the shape is a factor: without it, the scores are others
    assert scores(codes)["mig"] != scores(codes, GRID[:, 2:], ())["mig"]


def test_scores_are_functions_of_the_seed():
    codes = mixed()
    assert factor_vae_score_of_table(codes, GRID, seed=1) == factor_vae_score_of_table(codes, GRID, seed=1)
    assert factor_vae_score_of_table(codes, GRID, seed=1) != factor_vae_score_of_table(codes, GRID, seed=2)
    first = dci(codes, GRID, SHAPE, seed=1, trees=5)
    np.random.seed(0)
    assert first == dci(codes, GRID, SHAPE, seed=1, trees=5)
    assert first != dci(codes, GRID, SHAPE, seed=2, trees=5)


def test_all_scores_of_a_table():
    codes = mixed()[::3]
    result = score_codes(codes, GRID[::3], SHAPE, seed=4)
    parts = dci(codes, GRID[::3], SHAPE, seed=4)
    assert result == {
        "mig": mig(codes, GRID[::3]),
        "dci": parts.disentanglement,
        "dci_completeness": parts.completeness,
        "dci_informativeness": parts.informativeness,
        "factor_vae_score": factor_vae_score_of_table(codes, GRID[::3], seed=4),
        "sap": sap(codes, GRID[::3], SHAPE),
    }


@pytest.mark.parametrize(
    ("codes", "factors", "says"),
    [
        (torch.zeros(5, 2), torch.zeros(6, 2, dtype=torch.int64), r"not \(5, 2\) and \(6, 2\)"),
        (torch.zeros(5), torch.zeros(5, 2, dtype=torch.int64), "are needed"),
        (torch.full((2, 2), math.nan), torch.eye(2, dtype=torch.int64), "not all finite"),
        (torch.zeros(5, 2), torch.ones(5, 2, dtype=torch.int64), "none of the factors varies"),
    ],
)
def test_codes_that_cannot_be_scored_are_refused(codes, factors, says):
    for score in (mig, dci, sap, factor_vae_score_of_table):
        with pytest.raises(ValueError, match=says):
            score(codes, factors)


def test_a_categorical_column_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"categorical: \[5\] .* 5 factors"):
        sap(mixed(), GRID, (5,))


# -- MIG ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [2, 20])
def test_mutual_information_is_that_of_scikit_learn(bins):
    codes = mixed()
    got = mutual_information(codes, GRID, bins)
    assert got.shape == (6, 4)
    for z, v in itertools.product(range(6), range(4)):
        edges = np.histogram_bin_edges(codes[:, z].numpy().astype(np.float64), bins)
        binned = np.digitize(codes[:, z].numpy().astype(np.float64), edges[1:-1])
        assert got[z, v] == pytest.approx(mutual_info_score(binned, GRID[:, v + 1]), abs=1e-10)


def test_mig_is_the_gap_over_the_entropy():
    information = np.sort(mutual_information(mixed(), GRID), axis=0)
    entropies = np.log(SIZES[1:])
    assert mig(mixed(), GRID) == pytest.approx(np.mean((information[-1] - information[-2]) / entropies))


def test_bins_have_equal_width_and_the_last_holds_the_greatest():
    column = np.array([[0.0], [0.9], [1.0], [5.5], [9.99], [10.0]])
    assert to_bins(column, 10)[:, 0].tolist() == [0, 0, 1, 5, 9, 9]
    assert to_bins(np.full((3, 1), 7.0), 10)[:, 0].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="2 bins"):
        mutual_information(mixed(), GRID, 1)


def test_mig_changes_with_the_bins():
    """As documented: 20 bins cannot hold 40 orientations, so that a perfect code has log 20 / log 40."""
    orientations = torch.arange(40)[:, None]
    assert mig(orientations.float(), orientations, bins=20) == pytest.approx(math.log(20) / math.log(40))
    assert mig(orientations.float(), orientations, bins=40) == pytest.approx(1)
    factors = factors_of(split_indices("test", 0, 0))
    by_bins = {bins: mig(factors.float(), factors, bins) for bins in (10, 20, 40)}
    assert by_bins == pytest.approx({10: 0.787, 20: 0.896, 40: 0.988}, abs=0.001)


def test_mutual_information_of_noise_changes_with_the_number_of_images():
    """As documented: about (bins - 1) (V - 1) / 2N too high."""
    for count in (2000, 8000):
        factors = torch.randint(10, (count, 1), generator=torch.Generator().manual_seed(0))
        uniform = torch.rand(count, 40, generator=torch.Generator().manual_seed(1))
        expected = 19 * 9 / (2 * count)
        assert mutual_information(uniform, factors).mean() == pytest.approx(expected, rel=0.1)


# -- DCI ---------------------------------------------------------------------------------------------------------------


def test_concentration_is_one_minus_the_entropy():
    table = np.array([[1.0, 0, 0], [2, 2, 2], [0, 0, 0], [3, 1, 0]])
    entropy = stats.entropy([0.75, 0.25], base=3)
    assert concentration(table) == pytest.approx([1, 0, 0, 1 - entropy])
    assert concentration(np.array([[2.0], [0.0]])).tolist() == [1, 0]


def test_dci_is_computed_from_scikit_learns_importances():
    codes, seed = mixed(), 3
    order = np.random.default_rng(seed).permutation(len(GRID))
    test, train = order[:150], order[150:]
    columns, skills = [], []
    for v in range(1, 5):
        kind = GradientBoostingClassifier if v == 1 else GradientBoostingRegressor
        model = kind(n_estimators=FEW_TREES, random_state=seed).fit(codes[train].double(), GRID[train, v])
        columns.append(model.feature_importances_)
        if v == 1:
            guess = np.bincount(GRID[train, v]).argmax()
            right = model.score(codes[test].double(), GRID[test, v])
            skills.append(1 - (1 - right) / (GRID[test, v] != guess).float().mean().item())
        else:
            skills.append(model.score(codes[test].double(), GRID[test, v]))
    table = np.stack(columns, 1)
    by_latent = [1 - stats.entropy(row, base=4) for row in table]
    by_factor = [1 - stats.entropy(column, base=6) for column in table.T]
    got = dci(codes, GRID, SHAPE, seed, trees=FEW_TREES)
    assert isinstance(got, DCI)
    assert got.disentanglement == pytest.approx(np.average(by_latent, weights=table.sum(1)))
    assert got.completeness == pytest.approx(np.mean(by_factor))
    assert got.informativeness == pytest.approx(np.mean(skills), abs=0.01)  # R^2 from the training mean, not the test's


def test_disentanglement_and_completeness_are_different_things():
    own = perfect()[:, :4]
    # one latent for two factors: not disentangled, but complete
    merged = torch.stack([own[:, 0] + 10 * own[:, 1], own[:, 2], own[:, 3]], dim=1)
    # two latents for one factor, each with a half of its values: disentangled, but not complete
    split = torch.cat([own, torch.minimum(own[:, 3:], torch.tensor(0.0)), own[:, 3:].clamp(min=0)], dim=1)[
        :, [0, 1, 2, 4, 5]
    ]
    merged_parts, split_parts = (dci(codes, GRID, SHAPE, trees=60) for codes in (merged, split))
    assert merged_parts.completeness > merged_parts.disentanglement + 0.1
    assert split_parts.disentanglement > split_parts.completeness + 0.05


# -- FactorVAE score ---------------------------------------------------------------------------------------------------


def encoder(codes, calls=None):
    """Codes by image number; notes how many are asked for at once."""

    def encode(numbers):
        if calls is not None:
            calls.append(len(numbers))
        return codes[numbers]

    return encode


def test_groups_of_an_encoder_and_of_a_table_score_alike():
    codes = mixed()
    calls = []
    direct = factor_vae_score(encoder(codes, calls), SIZES, seed=1, votes=2000, group=5)
    table = factor_vae_score_of_table(codes, GRID, seed=2, votes=2000, group=5)
    assert 0.4 < direct < 0.9
    assert direct == pytest.approx(table, abs=0.05)  # 1.1 percent is a standard deviation of either
    assert sum(calls) == 10_000 + 4000 * 5 and max(calls) <= 64 * 5
    assert direct == factor_vae_score(encoder(codes), SIZES, seed=1, votes=2000, group=5)


def test_a_perfect_encoder_of_dsprites():
    score = factor_vae_score(lambda numbers: factors_of(numbers)[:, 1:].float(), FACTOR_SIZES, votes=100, group=50)
    assert score == 1
    noise = factor_vae_score(lambda numbers: normal(len(numbers), 10), FACTOR_SIZES, votes=400, group=20)
    assert noise == pytest.approx(0.2, abs=0.08)
    assert FACTOR_SIZES[CATEGORICAL[0]] == 3


def test_a_group_has_one_factor_in_common_and_no_constant_one_is_chosen():
    """The latent of the fixed factor alone is constant in its group: with a constant factor there would be two."""
    seen = []

    def encode(numbers):
        codes = GRID[numbers].float()
        if len(numbers) < 10_000:
            seen.append(codes)
        return codes

    factor_vae_score(encode, SIZES, votes=20, group=40)
    groups = torch.cat(seen)[-40 * 40 :].view(40, 40, 5)
    steady = (groups.var(1) == 0).long()
    assert steady[:, 0].all()  # the constant factor, always
    assert (steady[:, 1:].sum(1) == 1).all()
    assert steady[:, 1:].any(0).all()  # each of the others is chosen


def test_collapsed_latents_take_no_part():
    assert PRUNED == 0.05
    own = perfect()[:, :4]
    # a collapsed latent that is constant in every group would win every vote
    dead = torch.cat([own, 1e-4 * torch.ones(len(GRID), 1)], dim=1)
    assert factor_vae_score_of_table(dead, GRID) == 1
    # the threshold, of the prior's variance: a factor whose latent is below it is lost
    loud = own * torch.tensor([1, 1, 1, math.sqrt(0.051)])
    quiet = own * torch.tensor([1, 1, 1, math.sqrt(0.049)])
    assert factor_vae_score_of_table(loud, GRID) == 1
    assert factor_vae_score_of_table(quiet, GRID) == pytest.approx(3 / 4, abs=0.05)
    assert factor_vae_score_of_table(0.2 * own, GRID) == 0
    assert factor_vae_score(encoder(0.2 * own), SIZES) == 0


def test_votes_are_scored_on_other_groups_than_they_were_found_on():
    """With very few votes and many latents, the majority would know its own groups by heart."""
    codes = normal(len(GRID), 200)
    result = [factor_vae_score_of_table(codes, GRID, seed=seed, votes=30, group=10) for seed in range(20)]
    assert np.mean(result) == pytest.approx(1 / 4, abs=0.07)


def test_an_encoder_needs_a_factor_that_varies():
    with pytest.raises(ValueError, match="none of the factors varies"):
        factor_vae_score(encoder(mixed()), (1, 1))


# -- SAP ---------------------------------------------------------------------------------------------------------------


def test_ordered_factors_are_scored_by_a_line():
    latent, factor = mixed()[:, 0].double().numpy(), GRID[:, 4].numpy()
    line = LinearRegression().fit(latent[:, None], factor)
    assert squared_correlation(latent, factor) == pytest.approx(line.score(latent[:, None], factor))


def test_two_classes_are_scored_as_by_a_support_vector_machine():
    generator = np.random.default_rng(0)
    factor = (np.arange(8000) % 20 == 0).astype(np.int64)  # one in twenty: not balanced
    latent = factor * 1.5 + generator.normal(size=8000)
    machine = LinearSVC(C=1.0, class_weight="balanced").fit(latent[:, None], factor)
    expected = balanced_accuracy_score(factor, machine.predict(latent[:, None]), adjusted=True)
    assert 0.4 < expected < 0.7
    assert threshold_accuracy(latent, factor) == pytest.approx(expected, abs=0.03)


def test_thresholds_name_the_middle_class_whatever_the_scale():
    """And a support vector machine with the regularisation that is in use does not."""
    factor = np.arange(600) % 3
    latent = 0.3 * (factor - 1) + 0.05 * np.random.default_rng(0).normal(size=600)
    for scale in (0.01, 1, 100):
        assert threshold_accuracy(scale * latent, factor) == pytest.approx(1, abs=0.01)
    machine = LinearSVC(C=0.01, class_weight="balanced").fit(latent[:, None], factor)
    assert machine.score(latent[:, None], factor) < 0.7


def test_sap_is_the_mean_gap_and_dead_latents_count_as_guesses():
    codes = mixed()
    table = np.array(
        [
            [threshold_accuracy(z.double().numpy(), GRID[:, 1].numpy())]
            + [squared_correlation(z.double().numpy(), GRID[:, v].numpy()) for v in (2, 3, 4)]
            for z in codes.T
        ]
    )
    ordered = np.sort(table, axis=0)
    expected = np.mean(ordered[-1] - ordered[-2])
    assert sap(codes, GRID, SHAPE) == pytest.approx(expected)
    assert sap(torch.cat([codes, torch.ones(len(GRID), 3)], dim=1), GRID, SHAPE) == pytest.approx(expected)
    # which factor has no order matters
    assert sap(codes, GRID, ()) != pytest.approx(expected, abs=1e-4)
