"""The images that a config asks for.

MNIST and its kind, CIFAR-10, the scikit-learn digits and dSprites are held as one uint8 tensor; CelebA and folders of
images are decoded by worker processes. The readers are in `common.images`. Which images belong to a subset depends on
the config alone and never on the seed of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.errors import ProjectError
from common.files import place_of
from common.images import (
    FolderImages,
    Listing,
    MemoryImages,
    celeba_files,
    list_own,
    read_cifar10,
    read_digits,
    read_mnist,
    resize,
)
from common.images.memory import draw_indices
from vae.config import DataConfig
from vae.data.binarize import binarize_static
from vae.data.dsprites import NUM_IMAGES, Dsprites, split_indices

Split = Literal["train", "validation", "test"]
FileSplit = Literal["train", "test"]  # what the files know

DATA_SEED = 0  # of subsets of the training images
VALIDATION_SEED = 1  # of the images set apart from them
OTHERWISE = "use configs/vae_digits.yaml, which needs no download"
CELEBA_CROP = 148  # pixels a side of the centre square, as usual
MOST_DSPRITES = 10_000  # test images, and validation images at most


def load_images(config: DataConfig, data_root: str, split: Split = "train") -> MemoryImages | FolderImages | None:
    """The images of a split, read from `data_root` or downloaded there; None where there is no such split.

    `data.validation` images are set apart from the training images, by a fixed seed, to choose by; the test images are
    the files' own. Of dSprites, which have no files, each split is a part of one random order of the grid.

    With `data.binarize=static` the pixels are 0 or 255. Dynamic binarisation is the reader's: see `binarize`.

    Raises:
        ProjectError: the files are neither there nor to be had, and the message says which go where; or the split
            cannot be had as the config says.
    """
    if split == "validation" and not config.validation:
        return None
    if config.dataset == "dsprites":
        return load_dsprites(config, split)
    files: FileSplit = "test" if split == "test" else "train"
    if config.dataset in ("folder", "celeba"):
        return load_files(config, Path(data_root), split, files)
    data = resize(read_whole(config, Path(data_root), files), config.image_size)
    if config.binarize == "static":
        data.images = binarize_static(data.images, number=1 if files == "train" else 2)
    return data if split == "test" else take(data, choose(len(data), config, split))


def read_whole(config: DataConfig, root: Path, files: FileSplit) -> MemoryImages:
    """A dataset that fits into memory, as its files have it."""
    if config.dataset == "digits":
        return read_digits(files)
    if config.dataset == "cifar10":
        return read_cifar10(root, files, OTHERWISE)
    return read_mnist(root, files, config.dataset, OTHERWISE)


def load_dsprites(config: DataConfig, split: Split) -> Dsprites:
    """dSprites drawn at `data.image_size`, with their factors. All of them at 64 pixels take 3 GB."""
    if config.validation > MOST_DSPRITES:
        raise ProjectError(f"data.validation: at most {MOST_DSPRITES} of the dSprites, not {config.validation}")
    most = NUM_IMAGES - MOST_DSPRITES - config.validation
    if config.max_images > most:
        raise ProjectError(f"data.max_images: only {most} dSprites are in no other split; 0 takes them all")
    indices = split_indices(split, config.max_images, config.validation, DATA_SEED, MOST_DSPRITES)
    return Dsprites(indices, config.image_size)


def load_files(config: DataConfig, root: Path, split: Split, files: FileSplit) -> FolderImages | None:
    """CelebA, or a person's own images; None where nothing is held out. What was left out of a folder is said once."""
    if config.binarize == "static":
        raise ProjectError(
            f"data.binarize: static is for datasets held in memory, not for {config.dataset}; use dynamic or none"
        )
    if config.dataset == "celeba":
        _, found = celeba_files(root, files, OTHERWISE)
        listing: Listing | None = Listing(found, None, ())
    else:
        folder = place_of(config.folder, root)
        listing = list_own(folder, files, config.held_out, OTHERWISE, silent=split != "train")
    if listing is None:
        return None
    if split != "test":
        listing = listing.at(choose(len(listing.files), config, split).tolist())
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


def choose(size: int, config: DataConfig, split: Split) -> Tensor:
    """Which of `size` training images are in the split train or validation: int64, ascending.

    `data.validation` are drawn first, then `data.max_images` of the others.
    """
    if config.validation >= size:
        raise ProjectError(f"data.validation: {config.validation} of {size} training images leave none to train on")
    is_held = torch.zeros(size, dtype=torch.bool)
    if config.validation:
        is_held[draw_indices(size, config.validation, VALIDATION_SEED)] = True
    if split == "validation":
        return is_held.nonzero()[:, 0]  # (V, 1) -> (V,)
    rest = (~is_held).nonzero()[:, 0]
    return rest[draw_indices(len(rest), config.max_images, DATA_SEED)]


def take(data: MemoryImages, index: Tensor) -> MemoryImages:
    """The images of these numbers."""
    labels = None if data.labels is None else data.labels[index]
    return MemoryImages(data.name, data.images[index], labels, data.class_names)
