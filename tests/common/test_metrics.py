"""Frechet distance, streaming statistics and bootstrap intervals against closed forms, numpy and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean
from torch import nn

from common.metrics import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_between,
    frechet_distance,
    interquartile_mean,
    matrix_sqrt,
    symmetric_eigen,
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_gaussian(dim: int, seed: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    factor = torch.randn(dim, rank or dim, generator=rng(seed), dtype=torch.float64)
    return torch.randn(dim, generator=rng(seed + 1), dtype=torch.float64), factor @ factor.T / dim


def rotation(dim: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=rng(9), dtype=torch.float64))[0]


class TestFrechetDistance:
    def test_matches_torchmetrics_on_the_same_features(self) -> None:
        fid = pytest.importorskip("torchmetrics.image.fid")

        class Features(nn.Module):
            num_features = 24

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return images.flatten(1)[:, :24].double() / 255

        real = torch.randint(0, 256, (300, 3, 4, 4), generator=rng(0), dtype=torch.uint8)
        fake = (torch.randint(0, 256, (200, 3, 4, 4), generator=rng(1)) * 2 // 3).to(torch.uint8)
        metric = fid.FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        a, b = (FeatureStatistics().update(Features()(x)) for x in (real, fake))
        assert frechet_between(a, b, 200) == pytest.approx(metric.compute().item(), rel=1e-5)

    def test_correlated_gaussians_match_the_general_matrix_square_root(self) -> None:
        linalg = pytest.importorskip("scipy.linalg")
        (m1, c1), (m2, c2) = random_gaussian(30, 0), random_gaussian(30, 5)
        expected = ((m1 - m2) ** 2).sum().item() + np.trace(
            (c1 + c2).numpy() - 2 * linalg.sqrtm((c1 @ c2).numpy()).real
        )
        assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize("rotated", [False, True])
    @pytest.mark.parametrize("singular", [False, True])
    def test_commuting_covariances_have_a_closed_form(self, rotated: bool, singular: bool) -> None:
        """For covariances Q diag(s^2) Q^T with a common Q the distance is |m1 - m2|^2 + |s1 - s2|^2."""
        dim = 40
        m1, m2, s1, s2 = torch.rand(4, dim, generator=rng(2), dtype=torch.float64) + 0.1
        if singular:
            s1[:25], s2[10:20] = 0, 0
        q = rotation(dim) if rotated else torch.eye(dim, dtype=torch.float64)
        value = frechet_distance(m1, q @ torch.diag(s1**2) @ q.T, m2, q @ torch.diag(s2**2) @ q.T)
        expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
        assert value == pytest.approx(expected.item(), rel=1e-6)

    @pytest.mark.parametrize("rank", [5, 50])
    def test_identical_is_zero_and_never_negative(self, rank: int) -> None:
        mean, cov = random_gaussian(50, 3, rank)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-6 * cov.trace().item()

    @pytest.mark.parametrize("rank", [8, 20])
    def test_symmetric(self, rank: int) -> None:
        a, b = random_gaussian(20, 0, rank), random_gaussian(20, 7)
        assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-6)

    def test_computes_in_float64(self) -> None:
        one = torch.ones(1, 1, dtype=torch.float64)
        mean = torch.full((1,), 1e4, dtype=torch.float64)
        # float32 sees equal means
        assert frechet_distance(mean, one, mean + 1e-4, one) == pytest.approx(1e-8, rel=1e-3)

    def test_refuses_two_dimensions(self) -> None:
        with pytest.raises(ValueError, match="one dimension"):
            frechet_distance(*random_gaussian(3, 0), *random_gaussian(4, 0))

    def test_refuses_fewer_samples_than_asked(self) -> None:
        real, fake = (FeatureStatistics().update(torch.randn(n, 3, generator=rng(n))) for n in (50, 40))
        assert frechet_between(real, fake, 40) > 0
        with pytest.raises(ValueError, match="asked for 41 generated samples, got 40"):
            frechet_between(real, fake, 41)


def test_matrix_sqrt_squares_to_its_argument() -> None:
    cov = random_gaussian(12, 4, rank=6)[1]
    root = matrix_sqrt(cov)
    torch.testing.assert_close(root @ root, cov, rtol=0, atol=1e-12)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)


class TestFeatureStatistics:
    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_streaming_equals_numpy(self, offset: float) -> None:
        """An offset of 1e6 leaves about four digits to E[x^2] - E[x]^2; the covariance must not lose them."""
        x = torch.randn(101, 7, generator=rng(0), dtype=torch.float64) + offset
        statistics = FeatureStatistics()
        for batch in x.split([1, 30, 2, 0, 68]):
            statistics.update(batch)
        assert statistics.count == 101
        np.testing.assert_allclose(statistics.mean, x.numpy().mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(statistics.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)

    def test_float32_features_are_summed_in_float64(self) -> None:
        x = torch.randn(2000, 3, generator=rng(1)) + 1000
        statistics = FeatureStatistics()
        for batch in x.split(100):
            statistics.update(batch)
        assert statistics.mean.dtype == statistics.cov.dtype == torch.float64
        np.testing.assert_allclose(statistics.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-10)

    def test_merge_equals_one_stream(self) -> None:
        x = torch.randn(90, 5, generator=rng(2)) * torch.arange(1, 6)
        parts = [FeatureStatistics().update(p) for p in (x[:20], x[20:21], x[21:])]
        merged = FeatureStatistics().merge(FeatureStatistics())
        for part in parts:
            merged.merge(part)
        whole = FeatureStatistics().update(x)
        assert merged.count == 90
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-12, atol=1e-12)
        # a part is left as it was
        torch.testing.assert_close(parts[0].mean, x[:20].double().mean(0), rtol=1e-12, atol=1e-12)

    def test_tensors_round_trip(self) -> None:
        statistics = FeatureStatistics().update(torch.randn(9, 4, generator=rng(3)))
        again = FeatureStatistics.from_tensors(statistics.to_tensors())
        assert again.count == 9 and torch.equal(again.mean, statistics.mean) and torch.equal(again.cov, statistics.cov)

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match="no features yet"):
            _ = FeatureStatistics().mean
        with pytest.raises(ValueError, match="at least two samples, got 1"):
            _ = FeatureStatistics().update(torch.zeros(1, 2)).cov
        with pytest.raises(ValueError, match=r"shape \(N, D\)"):
            FeatureStatistics().update(torch.zeros(2, 2, 2))
        with pytest.raises(ValueError, match="2 dimensions, but 3 before"):
            FeatureStatistics().update(torch.zeros(2, 3)).update(torch.zeros(2, 2))
        with pytest.raises(ValueError, match="NaN or infinity"):
            FeatureStatistics().update(torch.tensor([[0.0, float("nan")]]))


class TestBootstrap:
    def test_close_to_the_normal_interval(self) -> None:
        values = np.random.default_rng(0).normal(5.0, 2.0, 400)
        low, high = bootstrap_interval(values, level=0.95, num_resamples=4000)
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * half)

    def test_seed_and_level(self) -> None:
        values = [1.0, 2.0, 4.0, 8.0, 16.0]
        assert bootstrap_interval(values, seed=1, num_resamples=500) == bootstrap_interval(
            values, seed=1, num_resamples=500
        )
        narrow, wide = (
            bootstrap_interval(values, 0.5, num_resamples=500),
            bootstrap_interval(values, 0.99, num_resamples=500),
        )
        assert wide[0] < narrow[0] < narrow[1] < wide[1]

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match="at least two values"):
            bootstrap_interval([1.0])
        with pytest.raises(ValueError, match="level"):
            bootstrap_interval([1.0, 2.0], level=95)


def test_interquartile_mean_against_scipy_and_by_hand():
    values = np.random.default_rng(0).normal(size=(3, 20))
    # 20 divides by four: plain trimming
    np.testing.assert_allclose(interquartile_mean(values), trim_mean(values, 0.25, axis=-1))
    assert interquartile_mean(np.array([1.0, 2, 3])) == pytest.approx((0.25 * 1 + 2 + 0.25 * 3) / 1.5)
    assert interquartile_mean(np.array([5.0])) == 5.0
    assert interquartile_mean(np.array([0.0, 1, 2, 3, 1000, -1000, 1, 2])) == pytest.approx(1.5)


def test_bootstrap_interval_of_another_statistic():
    values = np.r_[np.random.default_rng(0).normal(size=40), 1e6]  # an outlier that only the mean sees
    low, high = bootstrap_interval(values, statistic=interquartile_mean, num_resamples=2000)
    assert -0.5 < low < interquartile_mean(values) < high < 0.5


def test_eigenvalues_where_the_fast_algorithm_gives_up(monkeypatch):
    """The covariance of five samples in forty dimensions: the other algorithm finds the same."""
    samples = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = samples.T @ samples
    expected, _ = symmetric_eigen(covariance)

    def gives_up(matrix):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    values, vectors = symmetric_eigen(covariance)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((vectors * values) @ vectors.T, covariance, rtol=1e-9, atol=1e-9)
