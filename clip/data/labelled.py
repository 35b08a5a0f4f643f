"""Images with class names, for zero-shot classification and linear probing: CIFAR-10, CIFAR-100, or any folder with a
sub-folder for each class, ImageNet's included.

Legend: B images at once, N images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ProjectError
from common.images import FolderImages, list_split, read_cifar10, read_cifar100
from common.images.formats import Split
from common.images.memory import draw_indices

BATCH = 256
READERS = {"cifar10": read_cifar10, "cifar100": read_cifar100}
WORDNET = re.compile(r"n\d{8}")  # ImageNet's folders are called by numbers


@dataclass(frozen=True)
class Labelled:
    """Images, their classes, and what they are called.

    Attributes:
        classes: the names of the classes, in the order of their numbers.
        labels: int64 (N,). ids: one an image: its number in the dataset, or its path below the folder.
        batches: the usable images once, in order: uint8 (B, 3, H, W), and which they are, int64 (B,).
        notes: what was left out, for a person to read.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    ids: list[str]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def load_labelled(
    data: str,
    split: Split,
    root: Path,
    size: int,
    *,
    workers: int = 0,
    limit: int = 0,
    seed: int = 0,
    share: float = 1.0,
) -> Labelled:
    """Images with classes.

    Args:
        data: cifar10, cifar100, or a folder.
        root: where CIFAR lies, or is downloaded to.
        size: pixels a side that images of a folder are brought to.
        workers: processes that decode.
        limit: images drawn by seed; 0 = all.
        share: of a folder without train/ and val/ or test/, how much belongs to the test split.
    Raises:
        ProjectError: data are missing or damaged, or a folder has no classes.
    """
    if data in READERS:
        memory = READERS[data](root, split, "give a folder of your own as --data")
        assert memory.labels is not None
        chosen = draw_indices(len(memory), limit, seed)
        images = memory.images[chosen]

        def from_memory() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(images), BATCH):
                part = images[start : start + BATCH]
                yield part, torch.arange(start, start + len(part))

        return Labelled(data, memory.class_names, memory.labels[chosen], [str(i) for i in chosen.tolist()], from_memory)
    folder = Path(data).expanduser()
    listing = list_split(folder, split, share, "--data", "give cifar10 or cifar100")
    if listing.labels is None:
        raise ProjectError(f"--data: {folder} has no classes; put the images into one sub-folder for each")
    chosen = draw_indices(len(listing.files), limit, seed)
    if not len(chosen):
        raise ProjectError(f"--data: {folder} has no image in its {split} split; put more images there")
    paths = {listing.files[i] for i in chosen.tolist()}
    part = listing.keep(lambda path: path in paths)
    assert part.labels is not None
    files = FolderImages(folder.name, part, size, workers)
    ids = [path.relative_to(folder).as_posix() for path in part.files]

    def from_files() -> Iterator[tuple[Tensor, Tensor]]:
        return files.in_order(BATCH, torch.device("cpu"))

    return Labelled(folder.resolve().name, part.classes, torch.tensor(part.labels), ids, from_files, part.notes)


def names_for(classes: Sequence[str], file: Path | None = None) -> list[tuple[str, ...]]:
    """What each class is called in a sentence: one name, or several that mean the same.

    Args:
        file: class -> names, as JSON ({"n01440764": ["tench", "Tinca tinca"], ...}) or as lines
            `n01440764 tench, Tinca tinca`, which is how ImageNet's LOC_synset_mapping.txt comes; a class whose name
            has spaces is followed by a tab. Without it, a folder's name is taken, underscores for spaces.
    Raises:
        ProjectError: the file cannot be read or lacks a class, or a name says nothing.
    """
    if file is None:
        numbered = [name for name in classes if WORDNET.fullmatch(name)]
        if numbered:
            raise ProjectError(
                f"the classes are called {numbered[0]} and so on, which no text encoder knows: give --classes with a "
                "file of their names, such as ImageNet's LOC_synset_mapping.txt"
            )
        return [(name.replace("_", " ").strip(),) for name in classes]
    table = _read_names(file)
    missing = [name for name in classes if not table.get(name)]
    if missing:
        raise ProjectError(f"--classes: {file} has no name for {len(missing)} classes, such as {missing[0]}")
    return [table[name] for name in classes]


def _read_names(file: Path) -> dict[str, tuple[str, ...]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix.lower() != ".json":
            rows = [line.strip() for line in text.splitlines() if line.strip()]
            pairs = [row.partition("\t") if "\t" in row else row.partition(" ") for row in rows]
            raw = {key: names.split(",") for key, _, names in pairs}
        else:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError("not an object of classes and names")
            raw = {str(key): [names] if isinstance(names, str) else list(names) for key, names in found.items()}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ProjectError(f"--classes: {file} cannot be read: {str(error).splitlines()[0]}") from None
    return {key: tuple(name.strip() for name in map(str, names) if name.strip()) for key, names in raw.items()}
