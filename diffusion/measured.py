"""What a run measures on its images once and then keeps, so that a resumed run goes on with the same numbers."""

from __future__ import annotations

import hashlib
from typing import Any

from common.images import FolderImages, Images, MemoryImages

SIGMA_SAMPLE = 1000  # images of a folder whose pixels give sigma_data


class Measured:
    """The spread of the training pixels, and a fingerprint of the images it was measured on.

    Attributes:
        sigma_data: standard deviation of the pixels in [-1, 1] (Karras et al. 2022, table 1).
        changed: whether a checkpoint was loaded that had begun with other images.
    """

    def __init__(self, images: Images) -> None:
        sample = images.draw(SIGMA_SAMPLE if isinstance(images, FolderImages) else 0)
        self.sigma_data = sample.pixel_std()
        self.fingerprint = fingerprint(images)
        self.changed = False

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sigma_data": self.sigma_data, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint: its sigma_data stays in force, since the network was trained for its scalings."""
        self.changed = state["fingerprint"] != self.fingerprint
        self.sigma_data = state["sigma_data"]


def fingerprint(images: Images) -> str:
    """SHA-256 of a dataset: of its pixels if they are in memory, else of its files' names and sizes."""
    if isinstance(images, MemoryImages):
        return images.fingerprint()
    digest = hashlib.sha256(f"{images.name} {images.shape}".encode())
    for path in images.files:
        digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
