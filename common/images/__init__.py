"""Readers of public image formats, and images in the order in which a training run sees them."""

from common.images.folder import FolderImages
from common.images.formats import Split, celeba_files, read_cifar10, read_cifar100, read_digits, read_mnist
from common.images.listing import Listing, list_images, list_own, list_split
from common.images.memory import Images, MemoryImages, batch_indices, resize

__all__ = [
    "FolderImages",
    "Images",
    "Listing",
    "MemoryImages",
    "Split",
    "batch_indices",
    "celeba_files",
    "list_images",
    "list_own",
    "list_split",
    "read_cifar10",
    "read_cifar100",
    "read_digits",
    "read_mnist",
    "resize",
]
