"""The images that a config asks for.

CIFAR-10, MNIST and its kind, and the scikit-learn digits are small and live on the device as one uint8 tensor; CelebA
and folders of images are decoded by worker processes. The readers are in `common.images`.
"""

from __future__ import annotations

from pathlib import Path

from common.images import (
    FolderImages,
    Images,
    Split,
    celeba_files,
    list_images,
    read_cifar10,
    read_digits,
    read_mnist,
    resize,
)
from diffusion.config import DataConfig

OTHERWISE = "use configs/ddpm_digits.yaml, which needs no download"


def load_images(config: DataConfig, data_root: str, split: Split = "train") -> Images | None:
    """The images of a split, read from `data_root` or downloaded there; None where a folder has no such split.

    Raises:
        ProjectError: the files are neither there nor to be had; the message says which go where.
    """
    root = Path(data_root)
    if config.dataset == "folder":
        folder = root / config.folder
        files = list_images(folder, "data.folder", OTHERWISE)[: config.max_images or None]
        return (
            FolderImages.open("folder", folder, files, config.image_size, config.workers) if split == "train" else None
        )
    if config.dataset == "celeba":
        folder, files = celeba_files(root, split, OTHERWISE)
        files = files[: config.max_images or None] if split == "train" else files
        return FolderImages.open("celeba", folder, files, config.image_size, config.workers, crop=148)
    if config.dataset == "digits":
        data = read_digits(split)
    elif config.dataset == "cifar10":
        data = read_cifar10(root, split, OTHERWISE)
    else:
        data = read_mnist(root, split, config.dataset, OTHERWISE)
    data = resize(data, config.image_size)
    return data.head(config.max_images) if split == "train" else data
