"""Datasets for diffusion, each read in its own public format.

CIFAR-10, MNIST and the scikit-learn digits are small and live on the device as one uint8 tensor; CelebA and folders of
images are decoded by worker processes (`folder.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.errors import ProjectError
from diffusion.config import DataConfig
from diffusion.folder import FolderImages, celeba_files, list_images
from diffusion.images import Images, MemoryImages, resize

Split = Literal["train", "test"]
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published beside the archive
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_images(config: DataConfig, data_root: str, split: Split = "train") -> Images | None:
    """The images of a split, read from `data_root` or downloaded there; None where a folder has no such split.

    Raises:
        ProjectError: the files are neither there nor to be had; the message says which go where.
    """
    root = Path(data_root)
    if config.dataset == "folder":
        folder = root / config.folder
        files = list_images(folder)[: config.max_images or None]
        return (
            FolderImages.open("folder", folder, files, config.image_size, config.workers) if split == "train" else None
        )
    if config.dataset == "celeba":
        folder, files = celeba_files(root, split)
        files = files[: config.max_images or None] if split == "train" else files
        return FolderImages.open("celeba", folder, files, config.image_size, config.workers, crop=148)
    reader = {"cifar10": _cifar10, "mnist": _mnist, "digits": _digits}[config.dataset]
    data = resize(reader(root, split), config.image_size)
    return data.head(config.max_images) if split == "train" else data


def _cifar10(root: Path, split: Split) -> MemoryImages:
    folder = root / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if not all((folder / name).is_file() for name in names):
        _download(
            "CIFAR-10", CIFAR_URL, CIFAR_MD5, root, f"{folder}/data_batch_1.bin ... data_batch_5.bin and test_batch.bin"
        )
    records = []
    for name in names:
        raw = np.fromfile(folder / name, dtype=np.uint8)
        if raw.size == 0 or raw.size % 3073:
            raise ProjectError(
                f"{folder / name} is damaged: its size is not a multiple of 3073 bytes, 1 label and 3 x 32 x 32 pixels"
            )
        records.append(raw.reshape(-1, 3073))
    table = torch.from_numpy(np.concatenate(records))
    if int(table[:, 0].max()) > 9:
        raise ProjectError(f"{folder} is damaged: labels above 9")
    return MemoryImages("cifar10", table[:, 1:].reshape(-1, 3, 32, 32).contiguous(), table[:, 0].long(), CIFAR_NAMES)


def _mnist(root: Path, split: Split) -> MemoryImages:
    from torchvision.datasets import MNIST

    try:
        data = MNIST(str(root), train=split == "train", download=True)
    # torchvision asserts what the files' headers say
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise ProjectError(
            f"MNIST: put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            f"t10k-labels-idx1-ubyte into {root}/MNIST/raw, "
            f"or use configs/ddpm_digits.yaml, which needs no download ({_reason(error)})"
        ) from None
    return MemoryImages("mnist", data.data[:, None], data.targets.long(), tuple("0123456789"))


def _digits(root: Path, split: Split) -> MemoryImages:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with 17 grey levels: 1,500 to train on, 297 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))
    index = order[:1500] if split == "train" else order[1500:]
    pixels = torch.from_numpy(bunch.images)[index].mul(255 / 16).round().byte()
    return MemoryImages("digits", pixels[:, None], torch.from_numpy(bunch.target)[index].long(), tuple("0123456789"))


def _download(name: str, url: str, md5: str, root: Path, files: str) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(url, str(root), md5=md5)
    except (OSError, RuntimeError) as error:
        raise ProjectError(
            f"{name}: put {files} there, or use configs/ddpm_digits.yaml, which needs no download ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    return f"not readable, and no download: {str(error).splitlines()[0] if str(error) else 'a damaged file'}"
