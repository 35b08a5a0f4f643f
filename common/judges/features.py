"""What generated images are measured with: feature extractors, and the metrics computed from features.

A feature extractor is a module with a `name` that maps uint8 images to (features, log-probabilities). The name is the
metric's name: a Frechet distance is called `fid` on the Inception network only; on any other it is `fd_<classifier>`,
and compares with nothing else.

Shape legend: N real or reference images, M generated ones, C channels, H x W pixels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.config import ConfigError
from common.errors import ProjectError
from common.judges.classifier import (
    cache_path,
    cached_classifier,
    checksum,
    json_hash,
    load_resnet20,
    read_cache,
    write_cache,
)
from common.judges.inception import InceptionFeatures, TruncatedInception, inception_weights, truncated_weights
from common.metrics import FeatureStatistics

CHUNK_ELEMENTS = 2**23  # of one block of a distance matrix: 67 MB in float64

Labelled = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # ((train images, labels), (test images, labels))
Track = Callable[[Iterable[Any]], Iterable[Any]]


class FeatureExtractor(Protocol):
    """An `nn.Module` in evaluation mode.

    Attributes:
        name: the metric's name.
        class_names: of its class predictions; None where they are those of the dataset it was trained on here.
        test_accuracy: that of its class predictions, where it was measured.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def test_accuracy(self) -> float | None: ...
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, C, H, W) -> features float32 (B, D), log-probabilities float32 (B, K) or None."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def build_extractor(
    features: str,
    dataset: str,
    data_root: Path,
    cache_dir: Path,
    labelled: Callable[[], Labelled] | None = None,
    *,
    weights: str = "",
    inception: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
    track: Track = iter,
) -> FeatureExtractor:
    """The extractor that `eval.features` asks for.

    Args:
        features: inception, inception768, inception_spatial, resnet20, classifier (trained here on `labelled`), or
            auto: the first of inception, resnet20 (for CIFAR-10 only) and classifier that can be had.
        labelled: called only when a classifier is to be trained; None for a dataset without labels.
        weights: the ResNet-20 checkpoint; default data_root/pretrained_resnet_cifar10.
        inception: file or folder for inception768 and inception_spatial; default as `truncated_weights` says.
        dtype: what the Inception networks compute in.
    `ProjectError` when what was asked for by name is not there, `ConfigError` when the dataset has no labels to train a
    classifier on.
    """
    if features in ("auto", "inception"):
        try:
            return InceptionFeatures(inception_weights()).to(device)  # always in float32: its FID is compared
        except ProjectError as error:
            if features == "inception":
                raise
            log(f"no FID, but a Frechet distance on a classifier's features: {error}")
    if features in ("inception768", "inception_spatial"):
        network = TruncatedInception(truncated_weights(data_root, inception), features, dtype)
        return network.to(device).to(memory_format=torch.channels_last)
    resnet20 = Path(weights) if weights else data_root / "pretrained_resnet_cifar10"
    if features == "resnet20" or (features == "auto" and dataset == "cifar10" and resnet20.exists()):
        return load_resnet20(resnet20).to(device)
    if labelled is None:
        raise ConfigError(
            "eval.features", f"{dataset} has no labels to train a classifier on; use inception or resnet20"
        )
    return cached_classifier(dataset, *labelled(), cache_dir, seed, device, log, track)


# -- features of many images -------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(
    extractor: FeatureExtractor, images: Tensor, batch_size: int = 250, track: Track = iter
) -> tuple[Tensor, Tensor | None]:
    """Features (N, D) and log-probabilities (N, K) or None, float32 on the CPU, of uint8 images (N, C, H, W) on any
    device.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    device = next(extractor.parameters()).device
    features, log_probs = [], []
    for batch in track(images.split(batch_size)):
        f, p = extractor(batch.to(device))
        features.append(f.float().cpu())
        if p is not None:
            log_probs.append(p.float().cpu())
    return torch.cat(features), torch.cat(log_probs) if log_probs else None


def reference_statistics(
    extractor: FeatureExtractor,
    images: Tensor,
    cache_dir: Path,
    identity: dict[str, Any],
    batch_size: int = 250,
    track: Track = iter,
) -> FeatureStatistics:
    """Mean and covariance of the features of `images`, from the cache or computed now.

    `identity` says in JSON types which images these are: dataset, split, preprocessing. The file name carries a hash of
    it, of the pixels, and of the extractor's name and weights, so that statistics of other images or of another network
    are never taken for these.
    """
    weights = json_hash({name: checksum(tensor) for name, tensor in extractor.state_dict().items()})
    identity = {
        **identity,
        "num_images": len(images),
        "images": checksum(images),
        "extractor": extractor.name,
        "weights": weights,
    }
    path = cache_path(cache_dir, f"statistics-{extractor.name}", identity)
    cached = read_cache(path, identity)
    if cached is not None:
        return FeatureStatistics.from_tensors(cached[0])
    statistics = FeatureStatistics()
    for batch in track(images.split(batch_size)):
        statistics.update(extract(extractor, batch, batch_size)[0])
    write_cache(path, statistics.to_tensors(), identity)
    return statistics


# -- metrics -----------------------------------------------------------------------------------------------------------


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) float64: |a|^2 - 2 a b + |b|^2, in which float32 would lose the small distances
    between near points.
    """
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)[None]).clamp(min=0)


def nearest_neighbours(queries: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances (M, k) float64 and indices (M, k) int64 of the k nearest of `reference` (N, ...) to each of
    `queries` (M, ...).

    Both may be features or uint8 pixels. Memory stays at a block of the distance matrix however large N and M are.
    """
    if not 1 <= k <= len(reference):
        raise ValueError(
            f"cannot find {k} neighbours among {len(reference)} references: k must be between 1 and their number"
        )
    queries, reference = queries.flatten(1), reference.flatten(1)  # (M, D), (N, D)
    distances, indices = [], []
    for block in queries.split(1024):  # (B, D)
        best = torch.full((len(block), 0), torch.inf, dtype=torch.float64, device=queries.device)
        index = torch.zeros(len(block), 0, dtype=torch.int64, device=queries.device)
        start = 0
        for part in reference.split(max(1, CHUNK_ELEMENTS // max(1024, reference.shape[1]))):
            here = torch.arange(start, start + len(part), device=queries.device).expand(len(block), -1)
            candidates = torch.cat([best, squared_distances(block, part)], dim=1)  # (B, at most k + part)
            best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=1, largest=False)
            index = torch.cat([index, here], dim=1).gather(1, chosen)
            start += len(part)
        distances.append(best.sqrt())
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """How well two sets of features cover each other: real (N, D), fake (M, D) -> {"precision", "recall", "density",
    "coverage"}.

    The real manifold is the union of balls around the real points, each reaching to its k-th nearest real neighbour;
        the fake one likewise. precision: share of fake points in the real manifold; recall: share of real points in the
        fake one (Kynkaanniemi et al. 2019, eq. 2)
        density: in how many real balls a fake point lies on average, over k; unlike the others it may exceed 1
        coverage: share of real balls that hold a fake point (both Naeem et al. 2020, section 3)
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{k}-th neighbours need more than {k} points a side, got {len(real)} real and {len(fake)} fake"
        )
    # (N,), one more than k: each point is nearest to itself
    real_radius = nearest_neighbours(real, real, k + 1)[0][:, -1]
    fake_radius = nearest_neighbours(fake, fake, k + 1)[0][:, -1]  # (M,)
    in_real_balls = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # (M,)
    recalled, covered = 0, 0
    rows = max(1, CHUNK_ELEMENTS // len(fake))
    for points, radius in zip(real.split(rows), real_radius.split(rows), strict=True):
        distance = squared_distances(points, fake).sqrt()  # (rows, M)
        inside = distance <= radius[:, None]
        in_real_balls += inside.sum(dim=0)
        covered += int(inside.any(dim=1).sum())
        recalled += int((distance <= fake_radius[None]).any(dim=1).sum())
    return {
        "precision": (in_real_balls > 0).double().mean().item(),
        "recall": recalled / len(real),
        "density": in_real_balls.double().mean().item() / k,
        "coverage": covered / len(real),
    }


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and population standard deviation over `splits` of exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016,
    section 4).

    probabilities: (M, K), rows summing to 1. The rows are shuffled, always in the same way, because generated images
    often come ordered by class, and a split of one class would score 1.
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(
            f"probabilities must be (M, K) with M at least splits={splits}, got {tuple(probabilities.shape)}"
        )
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(0))
    scores = []
    for p in probabilities.detach().cpu().double()[order].tensor_split(splits):  # (M / splits, K)
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0, keepdim=True))  # 0 log 0 = 0
        scores.append(divergence.sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def conditional_accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Share of generated images whose most probable class (log_probs (M, K)) is the label they were asked for
    (labels (M,)).
    """
    if len(log_probs) != len(labels) or len(labels) == 0:
        raise ValueError(f"one requested label an image expected, got {len(labels)} labels for {len(log_probs)} images")
    return (log_probs.argmax(dim=1).cpu() == labels.cpu()).double().mean().item()
