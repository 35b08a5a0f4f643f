"""Feature extractors, their caches, and the metrics on features, against brute force, known answers and
torchmetrics.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.config import ConfigError
from common.errors import ProjectError
from common.judges import classifier, features, inception
from common.judges.classifier import (
    SmallCNN,
    accuracy,
    cached_classifier,
    load_resnet20,
    new_classifier,
    train_classifier,
)
from common.judges.features import (
    build_extractor,
    conditional_accuracy,
    extract,
    inception_score,
    nearest_neighbours,
    precision_recall_density_coverage,
    reference_statistics,
)

DATA_ROOT = Path(os.environ.get("DATA_ROOT") or "data")
IDENTITY = {"dataset": "toy", "split": "train", "size": 16}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int = 16, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=rng(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits at 16 pixels: ((train images, labels), (test images, labels)), every fifth one for
    testing.
    """
    data = pytest.importorskip("sklearn.datasets").load_digits()
    small = torch.from_numpy(data.images).float()[:, None] * (255 / 16)  # (1797, 1, 8, 8)
    images = nn.functional.interpolate(small, scale_factor=2, mode="bilinear").round().to(torch.uint8)
    labels, test = torch.from_numpy(data.target).long(), torch.arange(len(images)) % 5 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


class TestResNet20:
    def test_accuracy_on_cifar10(self) -> None:
        batch, weights = DATA_ROOT / "cifar-10-batches-bin/test_batch.bin", DATA_ROOT / "pretrained_resnet_cifar10"
        if not (batch.is_file() and weights.is_dir()):
            pytest.skip(f"needs {batch} and {weights}")
        # label, then 3 x 32 x 32 pixels
        rows = torch.from_numpy(np.fromfile(batch, np.uint8, 1000 * 3073)).view(1000, 3073)
        network = load_resnet20(weights)
        assert sum(p.numel() for p in network.parameters()) == 269_722
        # of the first 1,000 test images 919 are right; of all 10,000, 9,173, the number known for this checkpoint
        assert accuracy(network, rows[:, 1:].view(-1, 3, 32, 32), rows[:, 0]) == pytest.approx(0.919, abs=0.0015)

    def test_shortcut_is_option_a(self) -> None:
        block = classifier.ResidualBlock(2, 6, stride=2).eval()
        nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
        x = torch.rand(1, 2, 4, 4, generator=rng(0))
        expected = torch.zeros(1, 6, 2, 2)
        for channel, row, column in np.ndindex(2, 2, 2):
            expected[0, channel + 2, row, column] = x[0, channel, 2 * row, 2 * column]
        assert torch.equal(block(x), expected)

    def test_missing_and_foreign_weights_say_so(self, tmp_path: Path) -> None:
        with pytest.raises(ProjectError, match="no ResNet-20 weights"):
            load_resnet20(tmp_path)
        (tmp_path / "resnet20.th").write_bytes(b"not a checkpoint")
        with pytest.raises(ProjectError, match="damaged, or holds more than tensors"):
            load_resnet20(tmp_path)
        torch.save({"state_dict": {"module.linear.bias": torch.zeros(10)}}, tmp_path / "resnet20.th")
        with pytest.raises(ProjectError, match="not a ResNet-20 checkpoint"):
            load_resnet20(tmp_path / "resnet20.th")


class TestSmallCNN:
    def test_learns_digits_and_is_cached(self, digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train, test = digits
        network = cached_classifier("digits", train, test, tmp_path, log=lambda _: None)
        assert network.name == "fd_digits" and network.test_accuracy >= 0.97
        predicted = extract(network, test[0])[1].argmax(1)
        assert (predicted == test[1]).double().mean().item() == pytest.approx(network.test_accuracy)

        def never(*_: object) -> None:
            raise AssertionError("trained although the cache holds this classifier")

        monkeypatch.setattr(classifier, "train_classifier", never)
        again = cached_classifier("digits", train, test, tmp_path, log=lambda _: None)
        assert again.test_accuracy == network.test_accuracy
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
        )
        changed = train[0].clone()
        changed[0, 0, 0, 0] ^= 1
        for arguments in (("digits", train, test, tmp_path, 1), ("digits", (changed, train[1]), test, tmp_path)):
            # another seed or one other pixel: another classifier
            with pytest.raises(AssertionError, match="trained although"):
                cached_classifier(*arguments, log=lambda _: None)

    def test_training_is_a_function_of_the_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(classifier.RECIPE, "images_seen", 500)
        images, labels = random_images(50), torch.arange(50) % 3

        def weights(seed: int, global_seed: int) -> Tensor:
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            network = train_classifier(new_classifier("fd_x", 1, 3, seed), images, labels, seed)
            assert torch.equal(torch.get_rng_state(), before)
            return torch.cat([p.flatten() for p in network.parameters()])

        first = weights(0, 0)
        assert torch.equal(first, weights(0, 1))
        assert not torch.equal(first, weights(1, 0))

    @pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 27), (3, 32), (1, 5)])
    def test_any_size(self, channels: int, size: int) -> None:
        network = SmallCNN("fd_x", channels, 7).eval()
        f, log_probs = network(random_images(2, size, channels))
        assert f.shape == (2, 128) and log_probs.shape == (2, 7) and f.dtype == log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))

    def test_augmentation_moves_by_little(self) -> None:
        """The centre of mass of a centred blob stays within the stated 1/14 of the size; identity would not move it
        at all.
        """
        axis = torch.arange(28.0) - 13.5
        blob = torch.exp(-(axis[:, None] ** 2 + axis**2) / 18).expand(64, 1, 28, 28)
        moved = classifier.augment(blob, rng(0))[:, 0]
        mass = moved.sum((1, 2))
        x, y = (moved.sum(1) * axis).sum(1) / mass, (moved.sum(2) * axis).sum(1) / mass
        # a shift d in the input moves the blob by |A^-1 d|, A = rotation, scale and shear: at most 1 / (0.9 - 0.15) of
        # 2 pixels an axis
        assert (x**2 + y**2).sqrt().max() < 2 * math.sqrt(2) / 0.75 and x.std() > 0.5 and y.std() > 0.5
        assert x.mean().abs() < 0.5 and y.mean().abs() < 0.5


class TestInception:
    def test_same_features_as_torchmetrics(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The real weights need a download; random ones show that images, features and logits go the right way."""
        fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        fid = pytest.importorskip("torchmetrics.image.fid")
        with monkeypatch.context() as patch:
            patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
            patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            torch.manual_seed(0)
            reference = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
        torch.save(reference.state_dict(), tmp_path / "weights.pth")
        ours = features.InceptionFeatures(tmp_path / "weights.pth")
        grey = random_images(2, 8)
        f, log_probs = extract(ours, grey)
        assert ours.name == "fid" and f.shape == (2, 2048) and log_probs.shape == (2, 1008)
        torch.testing.assert_close(f, reference(grey.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(log_probs, (f @ reference.fc.weight.T).log_softmax(1), rtol=1e-5, atol=1e-5)

    def test_weights_that_run_code_are_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("torch_fidelity")
        marker = tmp_path / "executed"

        class Malicious:
            def __reduce__(self):
                return Path.touch, (marker,)

        torch.save({"weight": Malicious()}, tmp_path / "weights.pth")
        with pytest.raises(ProjectError, match="holds more than tensors"):
            features.InceptionFeatures(tmp_path / "weights.pth")
        assert not marker.exists()

    def test_without_weights_or_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        # nothing listens there
        monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:9/weights-inception.pth")
        with pytest.raises(ProjectError, match="put that file there"):
            build_extractor("inception", "mnist", tmp_path, tmp_path)
        lines: list[str] = []
        with pytest.raises(ConfigError, match="no labels"):
            build_extractor("auto", "celeba", tmp_path, tmp_path, log=lines.append)
        assert len(lines) == 1 and lines[0].startswith("no FID")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/weights-inception.pth").write_bytes(b"half a download")
        with pytest.raises(ProjectError, match="damaged: delete it"):
            build_extractor("inception", "mnist", tmp_path, tmp_path)

    def test_auto_falls_back_to_a_classifier(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:9/weights-inception.pth")
        monkeypatch.setitem(classifier.RECIPE, "images_seen", 200)
        data = (random_images(20), torch.arange(20) % 4)
        chosen = build_extractor("auto", "toy", tmp_path, tmp_path, lambda: (data, data), log=lambda _: None)
        assert chosen.name == "fd_toy" and chosen(data[0])[1].shape == (20, 4) and 0 <= chosen.test_accuracy <= 1


class CountingExtractor(nn.Module):
    """Four fixed pixels as features; counts the images it has seen."""

    name, test_accuracy = "fd_pixels", None

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.seen = 0

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        self.seen += len(images)
        return images.flatten(1)[:, :4].float() * self.scale, None


class TestReferenceStatistics:
    def test_hit_miss_and_value(self, tmp_path: Path) -> None:
        images, extractor = random_images(60), CountingExtractor()
        first = reference_statistics(extractor, images, tmp_path, IDENTITY, batch_size=7)
        np.testing.assert_allclose(first.cov, np.cov(images.flatten(1)[:, :4].numpy(), rowvar=False), rtol=1e-10)
        assert first.count == 60 and extractor.seen == 60
        again = reference_statistics(extractor, images, tmp_path, IDENTITY)
        assert (
            extractor.seen == 60
            and torch.equal(again.cov, first.cov)
            and torch.equal(again.mean, first.mean)
            and again.count == 60
        )
        changed = images.clone()
        changed[-1, -1, -1, -1] ^= 1
        misses = [
            (extractor, changed, IDENTITY),
            (extractor, images[:-1], IDENTITY),
            (extractor, images, {**IDENTITY, "split": "test"}),
            (CountingExtractor(2.0), images, IDENTITY),
        ]
        for count, (network, other, identity) in enumerate(misses, 2):
            seen = network.seen
            reference_statistics(network, other, tmp_path, identity)
            assert network.seen == seen + len(other)
            assert len(list(tmp_path.glob("statistics-fd_pixels-*.safetensors"))) == count

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "garbage"])
    def test_damage_is_noticed_and_repaired(
        self, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        images, extractor = random_images(60), CountingExtractor()
        first = reference_statistics(extractor, images, tmp_path, IDENTITY)
        [path] = tmp_path.iterdir()
        content = bytearray(path.read_bytes())
        content[-20] ^= 4  # inside a tensor, where safetensors itself notices nothing
        path.write_bytes({"flip": content, "truncate": content[:-50], "empty": b"", "garbage": b"x" * 500}[damage])
        with caplog.at_level(logging.WARNING):
            again = reference_statistics(extractor, images, tmp_path, IDENTITY)
        assert [
            record.message for record in caplog.records if "damaged" in record.message and path.name in record.message
        ]
        assert len(caplog.records) == 1 and torch.equal(again.cov, first.cov)
        caplog.clear()
        reference_statistics(extractor, images, tmp_path, IDENTITY)
        assert not caplog.records and extractor.seen == 120
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary files

    def test_floats_are_refused(self) -> None:
        with pytest.raises(ValueError, match="uint8"):
            extract(CountingExtractor(), torch.zeros(2, 1, 4, 4))


class TestNearestNeighbours:
    @pytest.mark.parametrize("chunk", [2**23, 4096])
    def test_brute_force(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "CHUNK_ELEMENTS", chunk)  # 4096: four references at a time
        queries, reference = random_images(9, 6, seed=1), random_images(31, 6, seed=2)
        reference[17] = queries[3]
        distance = np.linalg.norm(
            queries.flatten(1).numpy()[:, None].astype(float) - reference.flatten(1).numpy()[None], axis=2
        )
        found, index = nearest_neighbours(queries, reference, 5)
        np.testing.assert_array_equal(index, np.argsort(distance, axis=1)[:, :5])
        np.testing.assert_allclose(found, np.sort(distance, axis=1)[:, :5], rtol=1e-9)
        assert index[3, 0] == 17 and found[3, 0] == 0
        with pytest.raises(ValueError, match="32 neighbours among 31"):
            nearest_neighbours(queries, reference, 32)


class TestManifoldMetrics:
    def test_identical_sets(self) -> None:
        x = torch.randn(80, 6, generator=rng(0))
        result = precision_recall_density_coverage(x, x, k=3)
        assert result["precision"] == result["recall"] == result["coverage"] == 1
        # each ball holds its own centre and exactly k neighbours, so the mean over points is (k + 1) / k
        # the k-th lies on the border, where rounding may decide
        assert result["density"] == pytest.approx(4 / 3, abs=1.5 / 80)

    def test_disjoint_sets(self) -> None:
        x = torch.randn(50, 4, generator=rng(1))
        assert precision_recall_density_coverage(x, x + 1000) == {
            "precision": 0,
            "recall": 0,
            "density": 0,
            "coverage": 0,
        }

    def test_a_dropped_mode_costs_recall_and_coverage_only(self) -> None:
        modes = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]]).repeat_interleave(100, 0)
        real = modes + torch.randn(400, 2, generator=rng(2))
        fake = modes[:100] + torch.randn(100, 2, generator=rng(3))  # the first of four modes
        result = precision_recall_density_coverage(real, fake)
        assert result["precision"] > 0.9 and 0.2 < result["recall"] <= 0.25 and 0.2 < result["coverage"] <= 0.25
        reverse = precision_recall_density_coverage(fake, real)
        assert reverse["recall"] == result["precision"] and reverse["precision"] == result["recall"]

    @pytest.mark.parametrize("chunk", [2**23, 100])
    def test_brute_force(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "CHUNK_ELEMENTS", chunk)
        real, fake, k = torch.randn(40, 3, generator=rng(4)), 0.7 * torch.randn(30, 3, generator=rng(5)) + 0.5, 4

        def radius(points: np.ndarray, i: int) -> float:
            return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

        x, y = real.double().numpy(), fake.double().numpy()
        in_real = np.array([[np.linalg.norm(b - a) <= radius(x, i) for b in y] for i, a in enumerate(x)])  # (N, M)
        in_fake = np.array([[np.linalg.norm(b - a) <= radius(y, j) for j, b in enumerate(y)] for a in x])
        expected = {
            "precision": in_real.any(0).mean(),
            "recall": in_fake.any(1).mean(),
            "density": in_real.sum() / (k * 30),
            "coverage": in_real.any(1).mean(),
        }
        assert 0.2 < expected["recall"] < 0.95  # neither trivial case
        assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected, abs=1e-12)

    def test_too_few_points(self) -> None:
        with pytest.raises(ValueError, match="more than 5 points"):
            precision_recall_density_coverage(torch.zeros(5, 2), torch.zeros(9, 2))


class TestScores:
    def test_inception_score_of_known_distributions(self) -> None:
        certain = torch.eye(8).repeat(50, 1)  # every class equally often, each without doubt: the score is their number
        assert inception_score(certain, splits=1) == (pytest.approx(8, rel=1e-12), 0)
        assert inception_score(torch.full((40, 8), 1 / 8), splits=4) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
        by_class = torch.eye(8).repeat_interleave(500, 0)
        assert (
            inception_score(by_class, splits=8)[0] > 7.8
            and inception_score(torch.eye(8).repeat(500, 1), splits=8)[0] > 7.8
        )

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_inception_score_matches_torchmetrics(self) -> None:
        inception = pytest.importorskip("torchmetrics.image.inception")
        logits = 3 * torch.randn(64, 10, generator=rng(6), dtype=torch.float64)

        class Logits(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return logits

        metric = inception.InceptionScore(feature=Logits(), splits=1)
        metric.update(random_images(64))
        assert inception_score(logits.softmax(1), splits=1)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-6)

    def test_conditional_accuracy(self) -> None:
        log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.6, 0.3, 0.1]]).log()
        assert conditional_accuracy(log_probs, torch.tensor([0, 2, 0, 0])) == 0.75
        with pytest.raises(ValueError, match="3 labels for 4 images"):
            conditional_accuracy(log_probs, torch.zeros(3, dtype=torch.int64))
