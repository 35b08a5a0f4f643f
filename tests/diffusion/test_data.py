"""Datasets read byte by byte as their formats say, an order that is a function of (seed, step), and files that are
not images.
"""

from __future__ import annotations

import itertools
import json
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import Options
from common.errors import ProjectError
from common.images import MemoryImages, batch_indices
from diffusion.config import DataConfig
from diffusion.data import load_images
from diffusion.images import to_float, to_uint8
from tests.helpers import status, tiny, train

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert float(floats.min()) == -1 and float(floats.max()) == 1
    torch.testing.assert_close(
        floats.flatten().double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert torch.equal(to_uint8(floats), values)


def test_to_uint8_clamps_and_rounds():
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0, 1 / 127.5 * 0.49 - 1, 1 / 127.5 * 0.51 - 1])).tolist() == [
        0,
        255,
        128,
        0,
        1,
    ]


def test_pixel_std_is_that_of_the_scaled_pixels():
    images = MemoryImages("x", torch.from_numpy(RNG.integers(0, 256, (20, 3, 4, 4), dtype=np.uint8)), None)
    assert images.pixel_std() == pytest.approx(float(to_float(images.images).double().std(correction=0)), rel=1e-5)


def test_fingerprint_tells_data_apart():
    pixels, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4)
    other = pixels.clone()
    other[0, 0, 0, 0] = 1
    variants = [
        MemoryImages("a", pixels, labels),
        MemoryImages("b", pixels, labels),
        MemoryImages("a", other, labels),
        MemoryImages("a", pixels, labels.flip(0)),
        MemoryImages("a", pixels.view(2, 2, 2, 2), labels),
    ]
    assert len({images.fingerprint() for images in variants}) == len(variants)
    assert variants[0].fingerprint() == MemoryImages("a", pixels.clone(), labels.clone()).fingerprint()


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch"), [(40, 8), (40, 16), (7, 3), (5, 12), (1, 3)])
def test_every_image_once_an_epoch(size, batch):
    epochs = 6
    stream = torch.cat([batch_indices(step, batch, size, seed=3) for step in range(1, epochs * size // batch + 2)])
    orders = [stream[epoch * size : (epoch + 1) * size].tolist() for epoch in range(epochs)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size >= 7:
        assert len({tuple(order) for order in orders}) == epochs, "epochs must be shuffled differently"


def test_order_depends_on_seed_and_step_alone():
    forwards = [batch_indices(step, 6, 20, seed=1) for step in range(1, 30)]
    torch.manual_seed(99)
    backwards = [batch_indices(step, 6, 20, seed=1) for step in range(29, 0, -1)][::-1]
    assert all(map(torch.equal, forwards, backwards))
    assert not torch.equal(batch_indices(1, 20, 20, seed=1), batch_indices(1, 20, 20, seed=2))


def test_batches_start_anywhere():
    images = MemoryImages("x", torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))
    whole = list(itertools.islice(images.batches(1, 6, 0, CPU), 9))
    late = list(itertools.islice(images.batches(5, 6, 0, CPU), 5))
    for (a, a_labels), (b, b_labels) in zip(whole[4:], late, strict=True):
        assert torch.equal(a, b) and torch.equal(a_labels, b_labels)
        assert torch.equal(a.flatten().long(), a_labels), "an image lost its label"


# -- formats -----------------------------------------------------------------------------------------------------------


def write_cifar(root: Path, per_file: int = 3) -> dict[str, np.ndarray]:
    """CIFAR-10's binary version: records of one label byte and 3072 pixels, all red ones first, row by row."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    records = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records[name] = RNG.integers(0, 256, (per_file, 3073), dtype=np.uint8)
        records[name][:, 0] %= 10
        (folder / name).write_bytes(records[name].tobytes())
    return records


def test_cifar10_binary(tmp_path):
    records = write_cifar(tmp_path)
    train, test = (load_images(DataConfig(dataset="cifar10"), str(tmp_path), split) for split in ("train", "test"))
    assert train.shape == (3, 32, 32) and len(train) == 15 and len(test) == 3
    assert len(train.class_names) == 10 and train.class_names[3] == "cat"
    for number, (channel, row, column) in itertools.product((0, 4, 14), ((0, 0, 0), (1, 2, 3), (2, 31, 31))):
        record = records[f"data_batch_{number // 3 + 1}.bin"][number % 3]
        assert int(train.labels[number]) == record[0]
        assert int(train.images[number, channel, row, column]) == record[1 + channel * 1024 + row * 32 + column]
    assert torch.equal(test.images.flatten(1), torch.from_numpy(records["test_batch.bin"][:, 1:]))


@pytest.mark.parametrize("damage", ["cut", "empty", "long", "label"])
def test_damaged_cifar10(damage, tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-bin/data_batch_2.bin"
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[:-1], "empty": b"", "long": content + b"x", "label": b"\xc8" + content[1:]}[damage]
    )
    with pytest.raises(ProjectError, match="damaged"):
        load_images(DataConfig(dataset="cifar10"), str(tmp_path))


def write_mnist(root: Path, count: int = 5, kind: str = "MNIST") -> dict[str, np.ndarray]:
    """MNIST's idx format: a big-endian magic number, the sizes, then the bytes."""
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for name in ("train", "t10k"):
        images, labels = (
            RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            RNG.integers(0, 10, count, dtype=np.uint8),
        )
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes()
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        arrays |= {f"{name} images": images, f"{name} labels": labels}
    return arrays


def test_mnist_idx(tmp_path):
    arrays = write_mnist(tmp_path)
    for split, name in (("train", "train"), ("test", "t10k")):
        data = load_images(DataConfig(dataset="mnist", image_size=28), str(tmp_path), split)
        assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
        assert torch.equal(data.images[:, 0], torch.from_numpy(arrays[f"{name} images"]))
        assert torch.equal(data.labels, torch.from_numpy(arrays[f"{name} labels"]).long())


@pytest.mark.parametrize(("dataset", "folder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_datasets_in_the_format_of_mnist(dataset, folder, tmp_path):
    arrays = write_mnist(tmp_path, kind=folder)
    for split, name in (("train", "train"), ("test", "t10k")):
        data = load_images(DataConfig(dataset=dataset, image_size=28), str(tmp_path), split)
        assert data.name == dataset and len(set(data.class_names)) == 10
        assert torch.equal(data.images[:, 0], torch.from_numpy(arrays[f"{name} images"]))
        assert torch.equal(data.labels, torch.from_numpy(arrays[f"{name} labels"]).long())


def test_qmnist(tmp_path):
    """Its labels are rows of eight big-endian integers, the class first."""
    folder = tmp_path / "QMNIST/raw"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        images, labels = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8), RNG.integers(0, 10, (4, 8))
        (folder / f"qmnist-{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, 4, 28, 28) + images.tobytes()
        )
        (folder / f"qmnist-{split}-labels-idx2-int").write_bytes(
            struct.pack(">III", 0xC02, 4, 8) + labels.astype(">i4").tobytes()
        )
        data = load_images(DataConfig(dataset="qmnist", image_size=28), str(tmp_path), split)
        assert torch.equal(data.images[:, 0], torch.from_numpy(images)) and data.name == "qmnist"
        assert data.labels.tolist() == labels[:, 0].tolist() and data.class_names == tuple("0123456789")


def test_metrics_are_named_after_the_dataset(tmp_path):
    """One training run and its evaluation on a dataset in MNIST's format."""
    write_mnist(tmp_path, 64, "FashionMNIST")
    words = ["data.dataset=fashion_mnist", "data.image_size=28", f"data_root={tmp_path}", "train.steps=2"]
    config = tiny(tmp_path / "run", *words, "eval.num_samples=8", "eval.manifold_samples=0", "eval.neighbours=0")
    assert train(config) == 0
    from diffusion.eval import main

    assert status(main, config, Options("eval")) == 0
    metrics = json.loads((tmp_path / "run/eval.json").read_text())["metrics"]
    assert metrics["fd_fashion_mnist"] > 0


@pytest.mark.parametrize("damage", ["cut", "empty", "magic", "count"])
def test_damaged_mnist(damage, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(
        {
            "cut": path.read_bytes()[:-10],
            "empty": b"",
            "magic": b"\xff" * 40,
            "count": struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(4 * 784),
        }[damage]
    )
    with pytest.raises(ProjectError, match="MNIST"):
        load_images(DataConfig(dataset="mnist", image_size=28), str(tmp_path))


def test_digits_need_no_files():
    train, test = (
        load_images(DataConfig(dataset="digits", image_size=8), "/nowhere", split) for split in ("train", "test")
    )
    assert (len(train), len(test), train.shape) == (1500, 297, (1, 8, 8))
    assert int(train.images.max()) == 255 and set(train.labels.tolist()) == set(range(10))
    seen = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in seen for image in test.images) <= 1, "the splits overlap"


def test_max_images_and_resize():
    data = load_images(DataConfig(dataset="digits", image_size=16, max_images=10), "")
    assert data.images.shape == (10, 1, 16, 16) and data.images.dtype == torch.uint8
    small = load_images(DataConfig(dataset="digits", image_size=8, max_images=10), "")
    enlarged = [Image.fromarray(image[0].numpy()).resize((16, 16), Image.Resampling.BILINEAR) for image in small.images]
    reference = np.stack([np.asarray(image) for image in enlarged])
    assert np.abs(data.images[:, 0].numpy().astype(int) - reference.astype(int)).max() <= 1
    assert len(load_images(DataConfig(dataset="digits", image_size=8, max_images=10), "", "test")) == 297


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("cifar10", "data_batch_1.bin"),
        ("mnist", "train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("kmnist", "KMNIST/raw"),
        ("qmnist", "qmnist-train-labels-idx2-int"),
        ("celeba", "img_align_celeba"),
    ],
)
def test_no_network_and_no_data(dataset, file, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr("socket.socket.connect", offline)
    with pytest.raises(ProjectError) as error:
        load_images(DataConfig(dataset=dataset), str(tmp_path))
    message = str(error.value)
    assert "\n" not in message
    assert file in message and str(tmp_path) in message and "configs/ddpm_digits.yaml" in message
