"""The images that a config asks for.

CIFAR-10, MNIST and its kind, and the scikit-learn digits are small and live on the device as one uint8 tensor; CelebA
and folders of images are decoded by worker processes. The readers are in `common.images`.
"""

from __future__ import annotations

from pathlib import Path

from common.files import place_of
from common.images import (
    FolderImages,
    Images,
    Listing,
    Split,
    celeba_files,
    list_own,
    read_cifar10,
    read_digits,
    read_mnist,
    resize,
)
from common.images.memory import draw_indices
from diffusion.config import DataConfig
from diffusion.latents import load_latents

CELEBA_CROP = 148  # pixels a side of the centre square, as usual
DATA_SEED = 0  # of subsets: the same images whatever the seed of a run
OTHERWISE = "use configs/ddpm_digits.yaml, which needs no download"


def load_images(config: DataConfig, data_root: str, split: Split = "train") -> Images | None:
    """The images of a split, read from `data_root` or downloaded there; None where a folder has no such split.

    Raises:
        ProjectError: the files are neither there nor to be had; the message says which go where.
    """
    root = Path(data_root)
    if config.dataset == "latents":
        return load_latents(config).draw(config.max_images, DATA_SEED) if split == "train" else None
    if config.dataset == "folder":
        folder = place_of(config.folder, root)
        own = list_own(folder, split, config.held_out, OTHERWISE, silent=split == "test")
        return None if own is None else open_files(own, config, split)
    if config.dataset == "celeba":
        _, files = celeba_files(root, split, OTHERWISE)
        return open_files(Listing(files, None, ()), config, split)
    if config.dataset == "digits":
        data = read_digits(split)
    elif config.dataset == "cifar10":
        data = read_cifar10(root, split, OTHERWISE)
    else:
        data = read_mnist(root, split, config.dataset, OTHERWISE)
    data = resize(data, config.image_size)
    return data.draw(config.max_images, DATA_SEED) if split == "train" else data


def open_files(listing: Listing, config: DataConfig, split: Split) -> FolderImages:
    """Image files, of the training files `data.max_images` drawn by seed."""
    if split == "train":
        listing = listing.at(draw_indices(len(listing.files), config.max_images, DATA_SEED).tolist())
    is_own = config.dataset == "folder"
    return FolderImages(
        config.dataset,
        listing,
        config.image_size,
        config.workers,
        crop=0 if is_own else CELEBA_CROP,
        grey=is_own and config.grey,
        patience=config.patience,
    )
