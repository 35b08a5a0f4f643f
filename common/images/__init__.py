"""Readers of public image formats, and images in the order in which a training run sees them."""

from common.images.folder import FolderImages, list_images
from common.images.formats import Split, celeba_files, read_cifar10, read_digits, read_mnist
from common.images.memory import Images, MemoryImages, batch_indices, resize

__all__ = [
    "FolderImages",
    "Images",
    "MemoryImages",
    "Split",
    "batch_indices",
    "celeba_files",
    "list_images",
    "read_cifar10",
    "read_digits",
    "read_mnist",
    "resize",
]
