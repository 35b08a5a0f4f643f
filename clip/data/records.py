"""What the readers of all formats give: one record an image, and the rules for what is wrong with some of them."""

from __future__ import annotations

import zlib
from typing import Any

from common.errors import ProjectError
from common.images.folder import FORGIVEN, MOST_BAD

SHOWN = 3  # examples in a note


class Record(dict[str, Any]):
    """One image: `source` (a path or a `Member`), `name`, `texts` (its captions), `split` (train, val or test)."""


def refuse_many(bad: int, total: int, about: str) -> None:
    """`ProjectError` where so much is wrong that it must be the wrong folder, or a damaged copy."""
    if bad == total or bad > max(MOST_BAD * total, FORGIVEN):
        raise ProjectError(f"{bad} of {total} entries cannot be used, more than {MOST_BAD:.0%}: {about}")


def held_out_split(name: str, share: float) -> str:
    """train, val or test by a hash of the name, so that images that come later move no other."""
    place = zlib.crc32(name.encode()) / 2**32
    return "test" if place < share / 2 else "val" if place < share else "train"
