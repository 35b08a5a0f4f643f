"""Images, each with one or more captions: from files, from archives, or drawn.

Everything is a function of (seed, epoch, index), so that a resumed run, or one with other numbers of processes, sees
the same crops and captions.

Legend: S pixels of a side, K captions of an image in a step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from clip.data.scene_words import Scene
from clip.data.scenes import Scenes
from clip.model.images import Preprocess, random_crop
from common.images.reading import decode_image, open_image, square
from common.runtime import mix_seed

CAPTION_STREAM, CROP_STREAM = 8_000_009, 8_000_011  # keep the generators of captions and of crops apart


class Crop(NamedTuple):
    """How a training image is varied. `smallest`: share of the area that a random crop keeps at least; 1 = the centre
    square. `flip`: mirror half of the images.
    """

    smallest: float = 1.0
    flip: bool = False


NO_CROP = Crop()


class Pairs(Protocol):
    """What training and evaluation need of a dataset."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def image_name(self, index: int) -> str: ...
    def captions(self, index: int) -> list[str]: ...  # all of them, for evaluation
    def draw_captions(self, index: int, epoch: int, count: int, seed: int) -> list[str]: ...
    def pixels(self, index: int, preprocess: Preprocess, crop: Crop, epoch: int, seed: int) -> np.ndarray: ...


class Member(NamedTuple):
    """A file within an uncompressed tar archive."""

    archive: Path
    name: str
    offset: int
    size: int


Source = Path | Member


class FilePairs:
    """Images from files or archives.

    Attributes:
        sources, names: of each image where it is, and what it is called in reports.
        texts: the captions of each image, at least one.
    """

    def __init__(self, name: str, sources: list[Source], names: list[str], texts: list[list[str]]) -> None:
        assert len(sources) == len(names) == len(texts)
        self.name = name
        self.sources = sources
        self.names = names
        self.texts = texts

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, chosen: Sequence[int]) -> FilePairs:
        """Some of the images."""
        return FilePairs(
            self.name,
            [self.sources[i] for i in chosen],
            [self.names[i] for i in chosen],
            [self.texts[i] for i in chosen],
        )

    def image_name(self, index: int) -> str:
        """As the dataset calls it."""
        return self.names[index]

    def captions(self, index: int) -> list[str]:
        """All captions of an image."""
        return self.texts[index]

    def draw_captions(self, index: int, epoch: int, count: int, seed: int) -> list[str]:
        """`count` captions of an image, none twice as long as there are enough."""
        texts = self.texts[index]
        return [texts[i] for i in draw_numbers(len(texts), count, index, epoch, seed)]

    def pixels(self, index: int, preprocess: Preprocess, crop: Crop, epoch: int, seed: int) -> np.ndarray:
        """uint8 (3, S, S). OSError or ValueError for a file that cannot be used."""
        image = read_source(self.sources[index])
        return vary(image, preprocess.size, crop, lambda: random_of(seed, CROP_STREAM, epoch, index))


class ScenePairs:
    """Drawn scenes. chosen: those of a gallery; None = the endless row of the split, of which `count` make an epoch.

    family: so many neighbours in that row are variants of one scene; see data.family.
    """

    def __init__(self, scenes: Scenes, count: int, chosen: list[Scene] | None = None, family: int = 1) -> None:
        self.name = "scenes"
        self.scenes = scenes
        self.count = count if chosen is None else len(chosen)
        self.chosen = chosen
        self.family = family
        self._last: tuple[int, list[Scene]] | None = None

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """What there is to see. The last family is remembered: its other members follow, and captions their images."""
        if self.chosen is not None:
            return self.chosen[index]
        number, member = divmod(index, self.family)
        if self._last is None or self._last[0] != number:
            self._last = (number, self.scenes.family(number, self.family))
        members = self._last[1]
        # a family that is too small is filled up with scenes from behind the row
        return members[member] if member < len(members) else self.scenes.scene(self.count + index)

    def image_name(self, index: int) -> str:
        """Its number in the split or the gallery."""
        return f"{self.scenes.split}_{index:05d}"

    def captions(self, index: int) -> list[str]:
        """One way to say it."""
        return [self.scenes.describe(self.scene(index), index)]

    def draw_captions(self, index: int, epoch: int, count: int, seed: int) -> list[str]:
        """`count` ways to say it; `seed` is that of the scenes already."""
        scene = self.scene(index)
        return [self.scenes.describe(scene, index, epoch * count + i) for i in range(count)]

    def pixels(self, index: int, preprocess: Preprocess, crop: Crop, epoch: int, seed: int) -> np.ndarray:
        """uint8 (3, S, S). Scenes are drawn at 64 pixels, as they are."""
        drawn = self.scenes.draw(self.scene(index), index).numpy()
        if drawn.shape[-1] == preprocess.size:
            return drawn
        return square(Image.fromarray(drawn.transpose(1, 2, 0)), preprocess.size)


def vary(image: Image.Image, size: int, crop: Crop, rng: Callable[[], np.random.Generator]) -> np.ndarray:
    """uint8 (3, size, size): cropped and mirrored as `crop` allows. `rng` is asked only when there is something to
    draw.
    """
    if crop == NO_CROP:
        return square(image, size)
    random = rng()
    pixels = square(image, size) if crop.smallest == 1 else random_crop(image, size, crop.smallest, random)
    return pixels[:, :, ::-1] if crop.flip and random.random() < 0.5 else pixels


def read_source(source: Source) -> Image.Image:
    """The image in RGB. OSError or ValueError where it cannot be used."""
    if isinstance(source, Path):
        return open_image(source)
    with source.archive.open("rb") as file:
        file.seek(source.offset)
        data = file.read(source.size)
    if len(data) < source.size:
        raise ValueError(f"the archive ends within {source.name}")
    return decode_image(io.BytesIO(data))


def draw_numbers(available: int, count: int, index: int, epoch: int, seed: int) -> list[int]:
    """`count` of the numbers below `available`, none twice as long as there are enough."""
    if available == 1:
        return [0] * count
    order = random_of(seed, CAPTION_STREAM, epoch, index).permutation(available)
    return [int(order[i % available]) for i in range(count)]


def random_of(*numbers: int) -> np.random.Generator:
    """A generator that depends on these numbers only."""
    return np.random.default_rng(mix_seed(*numbers))
