"""Public image datasets, each read in its own format and downloaded by its usual library where it is not there.

Every reader takes the folder that holds all datasets and `otherwise`, what a person without the files can do instead;
it ends the message of the `ProjectError` that says which files go where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.errors import ProjectError
from common.images.memory import MemoryImages

Split = Literal["train", "test"]
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published beside the archive
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
CIFAR100_MD5 = "03b5dce01913d631647c71ecec9e9cb8"
DIGIT_NAMES = tuple("0123456789")
MNIST_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
QMNIST_KINDS = ("images-idx3-ubyte", "labels-idx2-int")
QMNIST_FILES = ", ".join(f"qmnist-{split}-{kind}" for split in ("train", "test") for kind in QMNIST_KINDS)
FASHION_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
KMNIST_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
# name -> torchvision's class, which is also the folder's name, the files, the classes
IDX_FORMATS = {
    "mnist": ("MNIST", MNIST_FILES, DIGIT_NAMES),
    "fashion_mnist": ("FashionMNIST", MNIST_FILES, FASHION_NAMES),
    "kmnist": ("KMNIST", MNIST_FILES, KMNIST_NAMES),
    "qmnist": ("QMNIST", QMNIST_FILES, DIGIT_NAMES),
}
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(root: Path, split: Split, otherwise: str = "") -> MemoryImages:
    """CIFAR-10's binary version: 50,000 and 10,000 images of 3 x 32 x 32, ten classes."""
    folder = root / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if not all((folder / name).is_file() for name in names):
        _download(
            f"CIFAR-10: put {folder}/data_batch_1.bin ... data_batch_5.bin and test_batch.bin there{_or(otherwise)}",
            CIFAR_URL,
            CIFAR_MD5,
            root,
        )
    table = torch.cat([_cifar_records(folder / name, 1) for name in names])
    if int(table[:, 0].max()) > 9:
        raise ProjectError(f"{folder} is damaged: labels above 9")
    return MemoryImages("cifar10", table[:, 1:].reshape(-1, 3, 32, 32).contiguous(), table[:, 0].long(), CIFAR_NAMES)


def read_cifar100(root: Path, split: Split, otherwise: str = "") -> MemoryImages:
    """CIFAR-100's binary version: 50,000 and 10,000 images of 3 x 32 x 32, a hundred fine classes, named by the
    dataset's own list.
    """
    folder = root / "cifar-100-binary"
    names = ["train.bin", "test.bin", "fine_label_names.txt"]
    if not all((folder / name).is_file() for name in names):
        _download(f"CIFAR-100: put {', '.join(names)} into {folder}{_or(otherwise)}", CIFAR100_URL, CIFAR100_MD5, root)
    classes = tuple((folder / "fine_label_names.txt").read_text(encoding="utf-8").split())
    table = _cifar_records(folder / f"{split}.bin", 2)  # coarse and fine label, pixels
    if len(classes) != 100 or int(table[:, 1].max()) > 99:
        raise ProjectError(f"{folder} is damaged: not a hundred classes")
    names_of = tuple(name.replace("_", " ") for name in classes)
    return MemoryImages("cifar100", table[:, 2:].reshape(-1, 3, 32, 32).contiguous(), table[:, 1].long(), names_of)


def _cifar_records(path: Path, labels: int) -> torch.Tensor:
    """A file of CIFAR's binary format as bytes: (N, labels + 3 * 32 * 32)."""
    length = labels + 3 * 32 * 32
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % length:
        words = "1 label" if labels == 1 else f"{labels} labels"
        raise ProjectError(
            f"{path} is damaged: its size is not a multiple of {length} bytes, {words} and 3 x 32 x 32 pixels"
        )
    return torch.from_numpy(raw.reshape(-1, length))


def read_mnist(root: Path, split: Split, name: str = "mnist", otherwise: str = "") -> MemoryImages:
    """MNIST, or a dataset in its IDX format: 60,000 and 10,000 images (qmnist: 60,000) of 1 x 28 x 28, ten classes.

    Args:
        name: mnist, fashion_mnist (Xiao et al. 2017), kmnist (Clanuwat et al. 2018) or qmnist (Yadav & Bottou 2019).
    """
    from torchvision import datasets

    kind, files, classes = IDX_FORMATS[name]
    try:
        data = getattr(datasets, kind)(str(root), train=split == "train", download=True)
    # torchvision asserts what the files' headers say
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ProjectError(f"{kind}: put {files} into {root}/{kind}/raw{_or(otherwise)} ({_reason(error)})") from None
    labels = data.targets.long()
    if labels.ndim == 2:  # QMNIST: the class, then the writer and so on
        labels = labels[:, 0].contiguous()
    if data.data.shape != (len(labels), 28, 28):
        raise ProjectError(f"{kind}: {len(data.data)} images but {len(labels)} labels in {root}/{kind}/raw")
    return MemoryImages(name, data.data[:, None], labels, classes)


def read_digits(split: Split) -> MemoryImages:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with 17 grey levels: 1,500 to train on, 297 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    index = order[:1500] if split == "train" else order[1500:]
    pixels = torch.from_numpy(bunch.images)[index].mul(255 / 16).round().byte()
    return MemoryImages("digits", pixels[:, None], torch.from_numpy(bunch.target)[index].long(), DIGIT_NAMES)


def celeba_files(root: Path, split: Split, otherwise: str = "") -> tuple[Path, list[Path]]:
    """CelebA's aligned images of its official partition, through torchvision, which downloads them when absent."""
    from torchvision.datasets import CelebA

    try:
        data = CelebA(str(root), split=split, download=not (root / "celeba/img_align_celeba").is_dir())
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProjectError(
            f"CelebA: put img_align_celeba/*.jpg and the list_*.txt and identity_CelebA.txt files into {root}/celeba"
            f"{_or(otherwise)} ({reason})"
        ) from None
    folder = root / "celeba/img_align_celeba"
    return folder, [folder / name for name in data.filename]


def _download(remedy: str, url: str, md5: str, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(url, str(root), md5=md5)
    except (OSError, RuntimeError) as error:
        raise ProjectError(f"{remedy} ({_reason(error)})") from None


def _or(otherwise: str) -> str:
    return f", or {otherwise}" if otherwise else ""


def _reason(error: Exception) -> str:
    return f"not readable, and no download: {str(error).splitlines()[0] if str(error) else 'a damaged file'}"
