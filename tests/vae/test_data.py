"""Which images a VAE sees: splits that never mix, and pixels as bits or as continuous values."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from common.errors import ProjectError
from common.images import read_digits
from vae.config import DataConfig
from vae.data import Dsprites, binarize, binarize_static, bits_per_dimension, datasets, dequantize, load_images
from vae.data.dsprites import NUM_IMAGES

CPU = torch.device("cpu")
SPLITS = ("train", "validation", "test")


def settings(**changes):
    """A data section: the digits, which need no files, or what the changes say."""
    return DataConfig(**{"dataset": "digits", "image_size": 8, "workers": 0, **changes})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(images):
    """Each image as bytes."""
    return [image.numpy().tobytes() for image in images]


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(root, name="MNIST", count=40):
    """A dataset of `count` and `count` images in MNIST's format; each image has its own number in its first pixels."""
    for prefix, first in (("train", 0), ("t10k", 100)):
        images = np.full((count, 28, 28), 128, np.uint8)
        images[:, 0, 0] = first + np.arange(count)
        write_idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))


# -- splits ------------------------------------------------------------------------------------------------------------


def test_without_validation_training_images_are_the_files_own():
    train = load_images(settings(), "nowhere")
    assert torch.equal(train.images, read_digits("train").images)
    assert load_images(settings(), "nowhere", "validation") is None
    assert torch.equal(load_images(settings(), "nowhere", "test").images, read_digits("test").images)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_validation_images_are_set_apart_from_the_training_images(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    config = settings(dataset=name, image_size=28, validation=12)
    parts = {split: load_images(config, str(tmp_path), split) for split in SPLITS}
    numbers = {split: data.images[:, 0, 0, 0].tolist() for split, data in parts.items()}
    assert [len(data) for data in parts.values()] == [28, 12, 40]
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(40))
    assert numbers["test"] == list(range(100, 140))
    assert numbers["validation"] != list(range(12))  # drawn, not the first of a file
    for split in ("train", "validation"):
        assert parts[split].labels.tolist() == [number % 10 for number in numbers[split]]
        assert parts[split].name == name and parts[split].class_names == parts["test"].class_names
        assert torch.equal(parts[split].images, load_images(config, str(tmp_path), split).images)


def test_max_images_bounds_training_only_and_draws_from_what_is_left(tmp_path):
    write_mnist(tmp_path)
    config = settings(dataset="mnist", image_size=28, validation=12, max_images=10)
    numbers = {split: load_images(config, str(tmp_path), split).images[:, 0, 0, 0].tolist() for split in SPLITS}
    assert [len(n) for n in numbers.values()] == [10, 12, 40]
    assert not set(numbers["train"]) & set(numbers["validation"])
    whole = settings(dataset="mnist", image_size=28, validation=12)
    assert numbers["validation"] == load_images(whole, str(tmp_path), "validation").images[:, 0, 0, 0].tolist()


def test_validation_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ProjectError, match=r"data\.validation: 1500 of 1500"):
        load_images(settings(validation=1500), "nowhere")


def test_images_are_resized():
    assert load_images(settings(image_size=16), "nowhere").shape == (1, 16, 16)


def test_absent_files_are_named_with_the_config_that_needs_none(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def offline(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(MNIST, "download", offline)
    with pytest.raises(ProjectError, match=r"(?s)train-images-idx3-ubyte.*configs/vae_digits\.yaml"):
        load_images(settings(dataset="mnist", image_size=28), str(tmp_path))


@pytest.fixture
def pictures(tmp_path):
    """Forty grey images in two folders, each of its own grey."""
    for i in range(40):
        folder = tmp_path / "pictures" / ("ab"[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * i).save(folder / f"{i}.png")
    return tmp_path


def test_a_folder_has_the_same_three_splits(pictures):
    config = settings(dataset="folder", folder="pictures", held_out=0.3, validation=7, grey=True)
    parts = {split: load_images(config, str(pictures), split) for split in SPLITS}
    files = {split: {path.name for path in data.files} for split, data in parts.items()}
    assert len(files["validation"]) == 7
    for one, other in itertools.combinations(SPLITS, 2):
        assert not files[one] & files[other]
    assert len(set.union(*files.values())) == 40
    few = settings(dataset="folder", folder="pictures", held_out=0.3, validation=7, grey=True, max_images=5)
    assert {path.name for path in load_images(few, str(pictures), "train").files} < files["train"]
    assert {path.name for path in load_images(few, str(pictures), "validation").files} == files["validation"]
    drawn = parts["validation"].draw(0)
    greys = {6 * int(path.stem) for path in parts["validation"].files}
    assert drawn.shape == (1, 8, 8) and set(drawn.images[:, 0, 0, 0].tolist()) == greys
    assert [int(path.stem) % 2 for path in parts["train"].files] == parts["train"].labels.tolist()


def test_a_folder_without_held_out_images_has_no_test_split(pictures):
    config = settings(dataset="folder", folder="pictures", held_out=0.0)
    assert load_images(config, str(pictures), "test") is None
    assert len(load_images(config, str(pictures), "train")) == 40


def test_celeba_has_validation_images_of_its_training_partition(pictures, monkeypatch):
    files = sorted((pictures / "pictures").rglob("*.png"))
    partition = {"train": files[:30], "test": files[30:]}
    monkeypatch.setattr(datasets, "celeba_files", lambda root, split, _: (root, partition[split]))
    config = settings(dataset="celeba", validation=6, max_images=20)
    parts = {split: load_images(config, "nowhere", split) for split in SPLITS}
    assert [len(data) for data in parts.values()] == [20, 6, 10]
    assert len({path for data in parts.values() for path in data.files}) == 36
    assert set(parts["validation"].files) <= set(files[:30]) and parts["test"].files == files[30:]
    assert parts["train"].shape == (3, 8, 8) and parts["train"].crop == 148


def test_static_bits_of_a_folder_are_refused(pictures):
    with pytest.raises(ProjectError, match=r"data\.binarize: static .* use dynamic"):
        load_images(settings(dataset="folder", folder="pictures", binarize="static"), str(pictures))


def test_dsprites_splits():
    config = settings(dataset="dsprites", image_size=32, max_images=300, validation=100)
    parts = {split: load_images(config, "nowhere", split) for split in SPLITS}
    assert [len(data) for data in parts.values()] == [300, 100, 10_000]
    assert len(torch.cat([data.indices for data in parts.values()]).unique()) == 10_400
    for split, data in parts.items():
        assert isinstance(data, Dsprites) and data.shape == (1, 32, 32)
        assert torch.equal(data.indices, load_images(config, "nowhere", split).indices)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation": 20_000}, r"data\.validation: at most 10000"),
        ({"max_images": NUM_IMAGES}, r"data\.max_images: only 727280"),
    ],
)
def test_what_dsprites_cannot_be_is_refused(changes, says):
    with pytest.raises(ProjectError, match=says):
        load_images(settings(**{"dataset": "dsprites", "image_size": 32, **changes}), "nowhere")


# -- bits --------------------------------------------------------------------------------------------------------------


def test_bits_have_the_grey_values_as_their_means():
    levels = torch.arange(256, dtype=torch.uint8)
    draws = 4000
    bits = binarize(levels.expand(draws, 256), generator())
    assert bits.dtype == torch.float32 and set(bits.unique().tolist()) == {0.0, 1.0}
    ones = bits.sum(0).long().tolist()
    assert ones[0] == 0 and ones[255] == draws
    p_values = [stats.binomtest(ones[level], draws, level / 255).pvalue for level in range(1, 255)]
    assert min(p_values) > 0.001 / 254
    assert 0.4 < np.mean(p_values) < 0.65  # neither too far from the means nor too near


def test_black_is_never_white_whatever_the_noise(monkeypatch):
    images = torch.tensor([0, 1, 255], dtype=torch.uint8)
    for noise, bits in ((0.0, [0, 1, 1]), (1 - 2**-24, [0, 0, 1])):
        monkeypatch.setattr(torch, "rand", lambda shape, noise=noise, **_: torch.full(shape, noise))
        assert binarize(images, generator()).tolist() == bits


def test_dynamic_bits_are_drawn_anew_and_follow_the_seed():
    images = torch.full((50, 1, 8, 8), 128, dtype=torch.uint8)
    source = generator(3)
    first, second = binarize(images, source), binarize(images, source)
    assert not torch.equal(first, second)
    assert torch.equal(first, binarize(images, generator(3)))
    assert not torch.equal(first, binarize(images, generator(4)))
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.1


def test_static_bits_never_change_and_differ_between_files():
    images = torch.full((5000, 1, 4, 4), 100, dtype=torch.uint8)
    torch.manual_seed(1)
    first = binarize_static(images, 1)
    torch.manual_seed(2)
    assert first.dtype == torch.uint8 and first.unique().tolist() == [0, 255]
    assert torch.equal(first, binarize_static(images, 1))
    assert not torch.equal(first, binarize_static(images, 2))
    assert float((first > 0).float().mean()) == pytest.approx(100 / 255, abs=0.01)
    # 4,096 images are drawn at once: the next have other noise
    assert not torch.equal(first[:900], first[4096:4996])


def test_static_images_are_the_same_in_every_subset(tmp_path):
    write_mnist(tmp_path)
    whole = load_images(settings(dataset="mnist", image_size=28, binarize="static"), str(tmp_path))
    config = settings(dataset="mnist", image_size=28, binarize="static", validation=12, max_images=10)
    parts = {split: load_images(config, str(tmp_path), split) for split in SPLITS}
    every = set(rows(whole.images))
    assert len(every) == 40
    for split in ("train", "validation"):
        assert set(rows(parts[split].images)) <= every
    for data in parts.values():
        assert data.images.unique().tolist() == [0, 255]
        assert float(data.images.float().mean()) / 255 == pytest.approx(0.5, abs=0.03)  # of grey 128
    assert not set(rows(parts["test"].images)) & every


def test_dynamic_and_none_leave_grey_pixels_to_the_reader():
    for kind in ("none", "dynamic"):
        assert len(load_images(settings(binarize=kind), "nowhere").images.unique()) == 17


# -- continuous values -------------------------------------------------------------------------------------------------


def test_dequantised_pixels_fill_their_256th_evenly():
    images = torch.arange(256, dtype=torch.uint8).expand(4000, 256)
    values = dequantize(images, generator())
    assert values.dtype == torch.float32
    assert torch.equal((values * 256).floor().long(), images.long())
    inside = (values * 256 - images).double().flatten()
    assert stats.kstest(inside.numpy(), "uniform").statistic < 0.002
    assert torch.equal(values, dequantize(images, generator()))


def test_dequantised_pixels_never_round_up_to_the_next_value(monkeypatch):
    """255 and the largest number below 1 add up to 256 in 32 bits; a logit of 1 would be infinite."""
    images = torch.arange(256, dtype=torch.uint8)
    largest = 1 - 2**-24
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, largest))
    values = dequantize(images, generator())
    assert torch.equal((values * 256).floor().byte(), images)
    assert float(values.max()) < 1 and bool(values.logit().isfinite().all())


def test_bits_per_dimension_includes_the_dequantisation_constant():
    """A density that is constant on each 256th is a probability of the 256 values: the same bits either way."""
    probabilities = torch.rand(256, generator=generator(), dtype=torch.float64)
    probabilities /= probabilities.sum()
    images = torch.randint(256, (7, 30), generator=generator(1), dtype=torch.uint8)
    exact = -probabilities[images.long()].log2().mean(1)
    values = dequantize(images, generator(2))
    density = 256 * probabilities[(values * 256).floor().long()]
    torch.testing.assert_close(bits_per_dimension(density.log().sum(1), 30), exact)
    assert float(bits_per_dimension(torch.tensor(0.0), 30)) == 8
    assert float(bits_per_dimension(torch.tensor(30 * math.log(256)), 30)) == pytest.approx(0, abs=1e-6)
