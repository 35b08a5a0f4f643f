"""Which files of a folder are its images, of which classes, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common.errors import ProjectError
from common.images.reading import SUFFIXES

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that is there
MOSTLY = 0.9  # share of images in class folders from which on the others are taken for strays


@dataclass(frozen=True)
class Listing:
    """Image files, sorted by path, and the class of each.

    Attributes:
        labels: numbers of `classes`, one a file; None where there are not at least two.
        notes: what was left out, for a person to read.
    """

    files: list[Path]
    labels: list[int] | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def at(self, numbers: Iterable[int]) -> Listing:
        """The files of these numbers, in their order among all, with the same classes."""
        chosen = {self.files[i] for i in numbers}
        return self.keep(lambda path: path in chosen)

    def keep(self, wanted: Callable[[Path], bool]) -> Listing:
        """The files for which `wanted` holds, with the same classes."""
        kept = [i for i, path in enumerate(self.files) if wanted(path)]
        labels = None if self.labels is None else [self.labels[i] for i in kept]
        return Listing([self.files[i] for i in kept], labels, self.classes, self.notes)


def list_own(folder: Path, split: str, held_out: float, otherwise: str, silent: bool = False) -> Listing | None:
    """A person's own images, `data.folder`: those of a split, or None where nothing is held out.

    What was left out of the folder is said, unless `silent`. `ProjectError` where nothing is left to train on.

    Args:
        split, held_out, otherwise: see `list_split`.
    """
    listing = list_split(folder, split, held_out, "data.folder", otherwise)
    if not silent:
        for note in listing.notes:
            print(f"note: {note}", file=sys.stderr)
    if listing.files:
        return listing
    if split == "test":
        return None
    raise ProjectError(f"data.folder: {folder} has no image left to train on; lower data.held_out")


def list_split(folder: Path, split: str, held_out: float, key: str, otherwise: str = "") -> Listing:
    """The training or the held-out images of a folder.

    Where its sub-folders are called train and val or test, those are the two. Elsewhere a share is held out: a file
    belongs to it by the hash of its path below the folder, so that files which come later move no other.

    Args:
        split: "train" or "test".
        held_out: share of the images.
        key, otherwise: see `list_images`.
    """
    folder = folder.expanduser()
    if folder.is_dir():
        names = {path.name.lower(): path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
        trains = [names[name] for name in TRAIN_NAMES if name in names]
        others = [names[name] for name in HELD_OUT_NAMES if name in names]
        if trains and set(names) <= {*TRAIN_NAMES, *HELD_OUT_NAMES}:
            if others:
                return list_images(trains[0] if split == "train" else others[0], key, otherwise)
            folder = trains[0]
    listing = list_images(folder, key, otherwise)
    return listing.keep(lambda path: (place(path, folder) < held_out) == (split == "test"))


def place(path: Path, folder: Path) -> float:
    """A number in [0, 1) that depends on the path below the folder alone."""
    digest = hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def list_images(folder: Path, key: str, otherwise: str = "") -> Listing:
    """Every image file below a folder but hidden ones; the sub-folders of its top are the classes.

    Args:
        key: the setting that names the folder, for messages.
        otherwise: what a person can do instead, for the message that there is no such folder.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ProjectError(
            f"{key}: {folder} is not a folder; put the images there{f', or {otherwise}' if otherwise else ''}"
        )
    found = walk(folder)
    files = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not files:
        raise ProjectError(f"{key}: {folder} has no images ({', '.join(sorted(SUFFIXES))})")
    notes = []
    if len(files) < len(found):
        kinds = Counter(path.suffix.lower() or path.name for path in found if path.suffix.lower() not in SUFFIXES)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        notes.append(f"{folder}: ignored {len(found) - len(files)} files that are no images ({listed})")
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
    classes = tuple(sorted(set(tops) - {""}))
    strays = tops.count("")
    if len(classes) < 2:
        return Listing(files, None, (), tuple(notes))
    if strays > (1 - MOSTLY) * len(files):
        notes.append(f"{folder}: {strays} images lie beside the folders {', '.join(classes[:5])}: no classes")
        return Listing(files, None, (), tuple(notes))
    if strays:
        notes.append(f"{folder}: ignored {strays} images that lie beside the class folders")
    kept = [i for i, top in enumerate(tops) if top]
    return Listing([files[i] for i in kept], [classes.index(tops[i]) for i in kept], classes, tuple(notes))


def walk(folder: Path) -> list[Path]:
    """Every file below a folder, through links as well, but none whose path has a hidden part; sorted."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        found += [Path(root, name) for name in names if name[0] != "."]
    return sorted(path for path in found if path.is_file())
