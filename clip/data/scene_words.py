"""What a scene is made of, and the ways to say it: every caption names everything that its scene is made of."""

from __future__ import annotations

import random
import re
from typing import Literal, NamedTuple, TypeVar

T = TypeVar("T")

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "grey", "white")


class Group(NamedTuple):
    """Equal objects that lie together."""

    number: int
    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """Groups from left to right in a row, or from top to bottom in a column. A single group is a row."""

    layout: Literal["row", "column"]
    groups: tuple[Group, ...]
    background: str


NUMBERS = {1: ("a", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}

# {A} is the first group (left, or top), {B} the second, {C} the third.
TEMPLATES: dict[tuple[str, int], tuple[str, ...]] = {
    ("row", 1): ("{A}", "only {A}", "a picture of {A}", "{A} and nothing else"),
    ("row", 2): (
        "{A} to the left of {B}",
        "{B} to the right of {A}",
        "{A} left of {B}",
        "{B} right of {A}",
        "on the left {A}, on the right {B}",
        "on the right {B}, on the left {A}",
        "from left to right: {A}, {B}",
        "{A} with {B} on the right side",
    ),
    ("column", 2): (
        "{A} above {B}",
        "{B} below {A}",
        "{A} over {B}",
        "{B} under {A}",
        "at the top {A}, at the bottom {B}",
        "at the bottom {B}, at the top {A}",
        "from top to bottom: {A}, {B}",
        "{A} with {B} on the lower side",
    ),
    ("row", 3): (
        "from left to right: {A}, {B}, {C}",
        "from right to left: {C}, {B}, {A}",
        "on the left {A}, in the middle {B}, on the right {C}",
        "{B} between {A} on the left and {C} on the right",
        "{B} between {C} on the right and {A} on the left",
        "{A} left of {B} left of {C}",
        "{C} right of {B} right of {A}",
    ),
    ("column", 3): (
        "from top to bottom: {A}, {B}, {C}",
        "from bottom to top: {C}, {B}, {A}",
        "at the top {A}, in the middle {B}, at the bottom {C}",
        "{B} between {A} at the top and {C} at the bottom",
        "{B} between {C} at the bottom and {A} at the top",
        "{A} above {B} above {C}",
        "{C} below {B} below {A}",
    ),
}
FRAMES = (
    "{text}, on a {background} background",
    "{text}, on {background}",
    "on a {background} background, {text}",
    "on {background}: {text}",
)


def write(scene: Scene, rng: random.Random) -> str:
    """One of the captions of a scene."""
    phrases = {letter: _phrase(group, rng) for letter, group in zip("ABC", scene.groups, strict=False)}
    text = pick(rng, TEMPLATES[scene.layout, len(scene.groups)]).format(**phrases)
    return pick(rng, FRAMES).format(text=text, background=scene.background)


def vocabulary() -> list[str]:
    """Every word that a caption may contain, in alphabetical order; for `tokenizer.WordTokenizer`."""
    texts = [*FRAMES, *(template for templates in TEMPLATES.values() for template in templates)]
    texts += [*COLOURS, *SHAPES, *PLURALS.values(), *BACKGROUNDS]
    texts += [word for words in (*NUMBERS.values(), *SIZE_WORDS.values()) for word in words]
    places = re.compile(r"\{\w+\}")
    return sorted({word for text in texts for word in re.findall(r"\w+", places.sub(" ", text))})


def _phrase(group: Group, rng: random.Random) -> str:
    number = pick(rng, NUMBERS[group.number])
    size = pick(rng, SIZE_WORDS[group.size])
    shape = group.shape if group.number == 1 else PLURALS[group.shape]
    return f"{number} {size} {group.colour} {shape}"


def pick(rng: random.Random, options: tuple[T, ...]) -> T:
    """One of them, equally likely."""
    return options[int(rng.random() * len(options))]
