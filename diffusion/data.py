"""The images that a config asks for.

CIFAR-10, MNIST and its kind, and the scikit-learn digits are small and live on the device as one uint8 tensor; CelebA
and folders of images are decoded by worker processes. The readers are in `common.images`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import ProjectError
from common.images import (
    FolderImages,
    Images,
    Listing,
    Split,
    celeba_files,
    list_split,
    read_cifar10,
    read_digits,
    read_mnist,
    resize,
)
from common.images.memory import draw_indices
from diffusion.config import DataConfig
from diffusion.latents import load_latents

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
        return load_folder(config, root, split)
    if config.dataset == "celeba":
        _, files = celeba_files(root, split, OTHERWISE)
        listing = subset(Listing(files, None, ()), config, split)
        return FolderImages("celeba", listing, config.image_size, config.workers, crop=148)
    if config.dataset == "digits":
        data = read_digits(split)
    elif config.dataset == "cifar10":
        data = read_cifar10(root, split, OTHERWISE)
    else:
        data = read_mnist(root, split, config.dataset, OTHERWISE)
    data = resize(data, config.image_size)
    return data.draw(config.max_images, DATA_SEED) if split == "train" else data


def load_folder(config: DataConfig, root: Path, split: Split) -> Images | None:
    """A person's own images; None where nothing is held out. What was left out of the folder is said once."""
    folder = root / Path(config.folder).expanduser()
    listing = list_split(folder, split, config.held_out, "data.folder", OTHERWISE)
    if split == "train":
        for note in listing.notes:
            print(f"note: {note}", file=sys.stderr)
    if not listing.files:
        if split == "train":
            raise ProjectError(f"data.folder: {folder} has no image left to train on; lower data.held_out")
        return None
    return FolderImages("folder", subset(listing, config, split), config.image_size, config.workers, grey=config.grey)


def subset(listing: Listing, config: DataConfig, split: Split) -> Listing:
    """`data.max_images` of the training files, drawn by seed."""
    if split != "train" or not config.max_images:
        return listing
    chosen = {listing.files[i] for i in draw_indices(len(listing.files), config.max_images, DATA_SEED).tolist()}
    return listing.keep(lambda path: path in chosen)
