"""Drawn scenes with captions that describe them completely: nothing to download, any number of them, and a true test of
whether words are combined or only collected.

A scene is one to three groups of equal objects, in a row from left to right or in a column from top to bottom, on a
background:

    "two small red circles to the left of a large blue star, on a white background"

Count, size, colour, shape, order and background are all that differs between scenes, and every caption says all of it;
where exactly the objects lie, and shades of colour, are for the network to ignore. A caption can thus be read back into
exactly one scene, and a gallery without equal scenes has one right answer.

Everything is a function of (seed, split, index). The splits:

    train, val, test   share no scene: the colours and shapes that occur in a scene, with its background, decide which
                       split it belongs to, whatever their order, counts and sizes (so do all variants of a scene)
    novel              the first group has a combination of colour and shape (`HELD_OUT`) that occurs in none of those
    novel_only         all groups have one

Johnson et al. 2017     CLEVR: compositional generalisation with held-out attributes     arXiv:1612.06890
Yuksekgonul et al. 2023 Vision-language models behave like bags of words                 arXiv:2210.01936
Thrush et al. 2022      Winoground: the same words, in another order                     arXiv:2204.03162
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip.data.scene_words import BACKGROUNDS, COLOURS, NUMBERS, SHAPES, SIZES, Group, Scene, pick, write

Split = Literal["train", "val", "test", "novel", "novel_only"]
Kind = Literal["base", "relation", "count", "binding"]
SIDE = 64  # pixels
RGB = {
    "red": (220, 30, 35),
    "green": (30, 160, 60),
    "blue": (35, 70, 220),
    "yellow": (245, 215, 30),
    "purple": (125, 40, 165),
    "orange": (245, 125, 20),
    "cyan": (60, 205, 220),
    "pink": (245, 130, 185),
}
GREY_LEVEL = {"black": 12, "grey": 128, "white": 243}
SHADE = 12  # most that a level of colour differs from the table
PIXELS = {"small": 9, "large": 15}  # of an object's side
# A colour and a shape that never occur together in train, val and test; each colour and each shape occurs once.
HELD_OUT = frozenset((colour, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
TRIES = 50  # scenes looked at for each one of a gallery
FAMILY = 20  # scenes of one family in a hard gallery: more than the 10 of Recall@10


class Variant(NamedTuple):
    """A scene of a hard gallery."""

    scene: Scene
    family: int  # scenes of one family have the same colours, shapes and background
    kind: Kind  # how it differs from the family's base


@dataclass(frozen=True)
class Scenes:
    """Scenes 0, 1, 2, ... of a split, made when asked for; as good as a million files.

    seed: of the split; other seeds give other scenes. groups: most groups in a scene, 1 to 3.
    """

    seed: int
    split: Split = "train"
    groups: int = 3

    def scene(self, index: int) -> Scene:
        """What there is to see in image `index`."""
        rng = self._rng(index, "scene")
        while True:
            scene = _sample(rng, self.split, self.groups)
            if belongs(scene, self.split):
                return scene

    def pair(self, index: int, number: int = 0) -> tuple[Tensor, str]:
        """Image `index`, uint8 (3, 64, 64), and its caption `number`."""
        scene = self.scene(index)
        return self.draw(scene, index), self.describe(scene, index, number)

    def draw(self, scene: Scene, index: int) -> Tensor:
        """uint8 (3, 64, 64): any scene, its objects placed as `index` decides."""
        return torch.from_numpy(draw(scene, self._rng(index, "image")))

    def describe(self, scene: Scene, index: int, number: int = 0) -> str:
        """One of the ways to say any scene; `index` and `number`, such as an epoch, decide which."""
        return write(scene, self._rng(index, f"caption {number}"))

    def gallery(self, count: int) -> list[Scene]:
        """The first `count` scenes of the split that are all different."""
        found: dict[Scene, None] = {}
        for index in range(TRIES * count):
            found.setdefault(self.scene(index))
            if len(found) == count:
                return list(found)
        raise ValueError(f"there are hardly {count} scenes of {self.groups} group in {self.split}; take fewer")

    def hard_gallery(self, count: int, family: int = FAMILY) -> list[Variant]:
        """`count` different scenes in families of `family`: what differs within a family is only which group stands
        where, how many there are of each, and which colour, shape and size go together.
        """
        found: dict[Scene, Variant] = {}
        number = 0
        for index in range(TRIES * count):
            base = self.scene(index)
            if len(base.groups) == 1:
                continue  # one group has no order
            members = _family(base, self._rng(index, "family"), family, self.split)
            if len(members) < family or any(scene in found for scene, _ in members):
                continue
            for scene, kind in members:
                found[scene] = Variant(scene, number, kind)
                if len(found) == count:
                    return list(found.values())
            number += 1
        raise ValueError(f"there are no {count} scenes in families of {family} in {self.split}; take fewer of either")

    def family(self, index: int, size: int) -> list[Scene]:
        """Scene `index` and variants of it, in turn in another order, paired otherwise, and in other numbers; at most
        `size`, for a scene of one group has few.
        """
        base = self.scene(index)
        return [scene for scene, _ in _family(base, self._rng(index, "family"), size, self.split)]

    def _rng(self, index: int, purpose: str) -> random.Random:
        # seeded with text, which Python hashes by SHA-512: near seeds and indices give unrelated scenes
        return random.Random(f"{self.seed} {self.split} {self.groups} {index} {purpose}")


def split_of(scene: Scene) -> Split:
    """The split that a scene belongs to; of a hundred sets of ingredients 10 are for test, 5 for val."""
    if any((group.colour, group.shape) in HELD_OUT for group in scene.groups):
        return "novel"
    colours = sorted(group.colour for group in scene.groups)
    shapes = sorted(group.shape for group in scene.groups)
    number = zlib.crc32(" ".join([scene.background, *colours, *shapes]).encode()) % 100
    if number < 10:
        return "test"
    return "val" if number < 15 else "train"


def belongs(scene: Scene, split: Split) -> bool:
    """Whether a scene may be in a split; those of novel_only may be in novel, too."""
    if split == "novel_only":
        return num_held_out(scene) == len(scene.groups)
    return split_of(scene) == split


def num_held_out(scene: Scene) -> int:
    """Groups with a combination that training never shows."""
    return sum((group.colour, group.shape) in HELD_OUT for group in scene.groups)


# -- what there is to see ----------------------------------------------------------------------------------------------


PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
NOVEL = tuple(pair for pair in PAIRS if pair in HELD_OUT)
# few scenes of one group: there are only 1,300 of them
NUM_GROUPS = {1: (1,), 2: (1, 2, 2, 2, 2), 3: (1, 2, 2, 2, 2, 3, 3, 3, 3, 3)}


def _sample(rng: random.Random, split: Split, most_groups: int) -> Scene:
    """Any scene of the kind that the split allows."""
    groups: list[Group] = []
    total = pick(rng, NUM_GROUPS[most_groups])
    while len(groups) < total:
        pairs = SEEN
        if split == "novel_only" or (split == "novel" and not groups):
            pairs = NOVEL
        colour, shape = pick(rng, pairs)
        group = Group(pick(rng, tuple(NUMBERS)), pick(rng, SIZES), colour, shape)
        # equal groups side by side would look like one larger group
        if not any((g.size, g.colour, g.shape) == (group.size, colour, shape) for g in groups):
            groups.append(group)
    if split == "novel":
        groups.insert(int(rng.random() * total), groups.pop(0))  # the new combination may stand anywhere
    layout: Literal["row", "column"] = "row" if total == 1 or rng.random() < 0.5 else "column"
    return Scene(layout, tuple(groups), pick(rng, BACKGROUNDS))


def _family(base: Scene, rng: random.Random, size: int, split: Split) -> list[tuple[Scene, Kind]]:
    """The base and variants of it, in turn of each kind as long as there are any."""
    by_kind: dict[Kind, list[Scene]] = {
        "relation": list(_other_relations(base)),
        "binding": list(_other_bindings(base)),
        "count": list(_other_counts(base)),
    }
    members: dict[Scene, Kind] = {base: "base"}
    for candidates in by_kind.values():
        # sorted by random numbers: `shuffle` may draw otherwise in another version of Python
        order = [rng.random() for _ in candidates]
        candidates[:] = [scene for _, scene in sorted(zip(order, candidates, strict=True))]
    while len(members) < size and any(by_kind.values()):
        for kind, candidates in by_kind.items():
            if candidates and len(members) < size:
                scene = candidates.pop()
                looks = {(group.size, group.colour, group.shape) for group in scene.groups}
                if len(looks) == len(scene.groups) and belongs(scene, split):
                    members.setdefault(scene, kind)
    return list(members.items())


def _other_relations(base: Scene) -> Iterator[Scene]:
    """The same groups in another order, or one above the other instead of side by side."""
    if len(base.groups) == 1:
        return
    for layout in ("row", "column"):
        for groups in itertools.permutations(base.groups):
            yield Scene(layout, groups, base.background)


def _other_counts(base: Scene) -> Iterator[Scene]:
    """The same groups with other numbers of objects."""
    for numbers in itertools.product(NUMBERS, repeat=len(base.groups)):
        groups = tuple(group._replace(number=number) for group, number in zip(base.groups, numbers, strict=True))
        yield base._replace(groups=groups)


def _other_bindings(base: Scene) -> Iterator[Scene]:
    """The same colours, shapes and sizes, paired otherwise: the red circle and the blue star become a blue circle and a
    red star.
    """
    for field in ("colour", "shape", "size"):
        for values in itertools.permutations(getattr(group, field) for group in base.groups):
            groups = tuple(group._replace(**{field: v}) for group, v in zip(base.groups, values, strict=True))
            yield base._replace(groups=groups)


# -- drawing -----------------------------------------------------------------------------------------------------------


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of the square [-1, 1]^2 lie in the shape; y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.9) & (abs(x) <= (y + 1) / 1.9)
    if shape == "diamond":
        return abs(x) / 0.75 + abs(y) <= 1
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95)
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.55)
    if shape == "star":
        # five points: the distance to the edge is a zigzag of the angle
        turn = (np.arctan2(x, -y) / (2 * np.pi) * 5) % 1  # 0 at a tip, 1/2 between two
        return radius <= 1 - 1.16 * np.minimum(turn, 1 - turn)
    assert shape == "heart"  # two circles on a triangle
    lobes = (abs(x) - 0.47) ** 2 + (y + 0.4) ** 2 <= 0.5**2
    point = (y >= -0.4) & (abs(x) <= (0.95 - y) / 1.42)
    return lobes | point


def _stencil(shape: str, side: int, fine: int = 8) -> np.ndarray:
    """How much of each pixel the shape covers: float32 (side, side) in [0, 1]."""
    at = (np.arange(side * fine) + 0.5) / (side * fine) * 2 - 1
    x, y = np.meshgrid(at, at)
    covered = _inside(shape, x, y).reshape(side, fine, side, fine)
    return covered.mean(axis=(1, 3)).astype(np.float32)


STENCILS = {(shape, size): _stencil(shape, PIXELS[size]) for shape in SHAPES for size in SIZES}


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """uint8 (3, 64, 64)."""
    level = GREY_LEVEL[scene.background] + (rng.random() * 2 - 1) * SHADE
    picture = np.full((SIDE, SIDE, 3), level, np.float32)
    for group, corners in zip(scene.groups, place(scene, rng), strict=True):
        stencil = STENCILS[group.shape, group.size][:, :, None]  # (side, side, 1)
        side = len(stencil)
        colour = np.array([part + (rng.random() * 2 - 1) * SHADE for part in RGB[group.colour]], np.float32)
        for x, y in corners:
            patch = picture[y : y + side, x : x + side]  # (side, side, 3)
            patch += stencil * (colour - patch)
    return np.ascontiguousarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8).transpose(2, 0, 1))


def place(scene: Scene, rng: random.Random) -> list[list[tuple[int, int]]]:
    """The upper left corners (x, y) of each group's objects, in pixels.

    Each group has its share of the picture and scatters there without overlap. One object of each lies on a line that
    crosses all shares: groups in a row must not happen to lie one above the other as well, or two captions would be
    true.
    """
    share = SIDE // len(scene.groups)
    line = rng.random()  # where it crosses, as a fraction of the side
    corners = []
    for number, group in enumerate(scene.groups):
        side = PIXELS[group.size]
        # `along` the row or column, and `across` it
        num_along, num_across = share // (side + 1), SIDE // (side + 1)
        cell_along, cell_across = share / num_along, SIDE / num_across
        free = list(range(num_along * num_across))
        first = int(line * num_across) * num_along + int(rng.random() * num_along)
        places = []
        for i in range(group.number):
            cell = first if i == 0 else free[int(rng.random() * len(free))]
            free.remove(cell)
            step_across, step_along = divmod(cell, num_along)
            along = number * share + int(step_along * cell_along + rng.random() * (cell_along - side))
            across = int(step_across * cell_across + rng.random() * (cell_across - side))
            places.append((along, across) if scene.layout == "row" else (across, along))
        corners.append(places)
    return corners
