"""Mathematics that more than one project measures itself with. No networks, no files, no plots.

Shape legend: N samples, D feature dimensions. Statistics are float64 throughout: a covariance of 2048 features has
eigenvalues over more orders of magnitude than float32 has digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import ArrayLike
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, seen in batches of any size and in any order.

    Only count, mean and scatter matrix S = sum_i (x_i - mean)(x_i - mean)^T are kept, on the CPU in float64, so that a
    million vectors cost no more memory than one. Two such summaries merge exactly (Chan, Golub & LeVeque 1979), and a
    batch is merged the same way. Unlike E[x x^T] - mean mean^T, this subtracts no two large, nearly equal numbers.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.empty(0)  # (D,) once something has been seen
        self._scatter = torch.empty(0, 0)  # (D, D)

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add `features` (N, D) of any floating dtype on any device; returns self. ValueError on another shape or on
        NaN and infinity.
        """
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(
                f"features must be floating point of shape (N, D), got {features.dtype} {tuple(features.shape)}"
            )
        if len(features) == 0:
            return self
        features = features.detach()
        x = (features.cpu() if features.device.type == "mps" else features).double()  # Apple's GPUs have no float64
        mean = x.mean(dim=0)  # (D,)
        if not torch.isfinite(mean).all():
            raise ValueError("features hold NaN or infinity: the images or the network that made them are broken")
        centred = x - mean
        self._combine(len(x), mean.cpu(), (centred.T @ centred).cpu())  # (D, N) @ (N, D) -> (D, D)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Add everything `other` has seen, as from another process; returns self."""
        if other.count > 0:
            self._combine(other.count, other._mean, other._scatter)
        return self

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count = count
            self._mean = mean.clone()
            self._scatter = scatter.clone()
            return
        if len(mean) != len(self._mean):
            raise ValueError(
                f"features have {len(mean)} dimensions, but {len(self._mean)} before: use one feature extractor "
                "throughout"
            )
        total = self.count + count
        delta = mean - self._mean
        # Chan et al. 1979: each part's scatter about its own mean, plus that of the two means about the common one
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,) float64 on the CPU. ValueError when nothing has been seen."""
        if self.count < 1:
            raise ValueError("no features yet: call update() first")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """(D, D) float64 on the CPU, divided by N - 1 as numpy.cov does. ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples, got {self.count}")
        return self._scatter / (self.count - 1)

    def to_tensors(self) -> dict[str, Tensor]:
        """A plain dict of tensors, for safetensors or an all-gather. ValueError when nothing has been seen."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> FeatureStatistics:
        """The inverse of `to_tensors`."""
        statistics = cls()
        statistics._combine(int(tensors["count"]), tensors["mean"].double(), tensors["scatter"].double())
        return statistics


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) ascending and vectors (D, D) of a symmetric matrix.

    PyTorch divides and conquers, which is fast and now and then does not converge on a matrix of very low rank, such as
    the covariance of a few images in 2,048 dimensions; the slower algorithm of Dhillon & Parlett 2004 then does.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # torch.linalg.LinAlgError
        from scipy.linalg import eigh

        values, vectors = (torch.from_numpy(part) for part in eigh(matrix.numpy(), driver="evr"))
    return values, vectors


def matrix_sqrt(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix (D, D), by its eigenvalues.

    Rounding leaves the zero eigenvalues of a singular matrix slightly negative; they are set to zero.
    """
    eigenvalues, vectors = symmetric_eigen(matrix)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians (Heusel et al. 2017, eq. 6, after Dowson & Landau 1982):

        |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))

    Args: means (D,), covariances (D, D), symmetric and positive semi-definite; singular ones are fine.
    cov1 cov2 is not symmetric, but has the eigenvalues of the symmetric cov1^(1/2) cov2 cov1^(1/2), so the trace of its
    root is the sum of their square roots. Computed in float64 on the CPU. Not negative: rounding of identical inputs
    may dip below zero and is cut.
    """
    mean1, cov1, mean2, cov2 = (t.detach().cpu().double() for t in (mean1, cov1, mean2, cov2))
    if not (mean1.shape == mean2.shape and cov1.shape == cov2.shape == (len(mean1), len(mean1))):
        raise ValueError(
            f"two Gaussians of one dimension expected, got means {tuple(mean1.shape)}, {tuple(mean2.shape)} "
            f"and covariances {tuple(cov1.shape)}, {tuple(cov2.shape)}"
        )
    root = matrix_sqrt(cov1)
    product = root @ cov2 @ root
    eigenvalues, _ = symmetric_eigen((product + product.T) / 2)  # (D,)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root
    return max(0.0, distance.item())


def frechet_between(reference: FeatureStatistics, generated: FeatureStatistics, num_samples: int) -> float:
    """Frechet distance between two sets of features, provided that at least `num_samples` were generated.

    The estimate is biased upwards by an amount that shrinks with the number of samples (Chong & Forsyth 2020), so a
    distance from fewer samples than reported does not compare with anything: that is a ValueError, never a number.
    """
    if generated.count < num_samples:
        raise ValueError(
            f"asked for {num_samples} generated samples, got {generated.count}: "
            "generate the rest, or ask for fewer (and report that number)"
        )
    return frechet_distance(reference.mean, reference.cov, generated.mean, generated.cov)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis: neither a lucky nor a failed run decides it (Agarwal et al. 2021).
    (..., N) -> (...).

    A quarter of N rarely is a whole number: the runs at the cut count by the part of them that lies inside.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    count = ordered.shape[-1]
    place = np.arange(count)
    # of each in the middle half
    weight = np.clip(np.minimum(place + 1, 0.75 * count) - np.maximum(place, 0.25 * count), 0.0, 1.0)
    return (ordered * weight).sum(axis=-1) / weight.sum()


def bootstrap_interval(
    values: ArrayLike,
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = 10_000,
    statistic: Callable[..., Any] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a statistic of `values`, a 1-D sequence of numbers (Efron 1979).

    `level` is the coverage in (0, 1); `statistic` takes a 1-D array. The same seed gives the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs a 1-D sequence of at least two values, got shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    result = scipy.stats.bootstrap(
        (values,),
        statistic,
        n_resamples=num_resamples,
        confidence_level=level,
        method="percentile",
        batch=1000,  # resamples in memory at once
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
