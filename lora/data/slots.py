"""Text and a task made here, so that something can be trained without a download.

The text tells of eating places in short sentences; a small language model learns to write such. The task is to turn
slots into a sentence, `name: Red Fox | food: French | area: harbour`: the model knows all the words, and has never seen
that they can be asked for. Places of the test have names that no example for training has.
"""

from __future__ import annotations

import random

from common.runtime import mix_seed

COLOURS = ("Red", "Blue", "Green", "Golden", "Silver", "Old", "Little", "Happy", "Quiet", "Wild", "Brave", "Lazy")
ANIMALS = ("Fox", "Owl", "Bear", "Lion", "Swan", "Hare", "Wolf", "Crane", "Otter", "Horse", "Badger", "Raven")
KINDS = ("pub", "restaurant", "cafe", "bar")
FOODS = ("French", "Italian", "Indian", "Greek", "Thai", "Spanish")
AREAS = ("harbour", "market", "river", "station", "park", "castle")
PRICES = ("cheap", "dear", "fair")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
SEED = 71  # of what is always the same: which names are for the test, which slots a place has


def pretraining_text(count: int, seed: int) -> list[str]:
    """So many paragraphs: of two to four sentences about one place, or a list of words that is said again.

    The lists teach to look back for what was said. A model of this size that has not learnt that cannot be taught it
    by an adapter either, and would answer with any name.
    """
    rng = random.Random(mix_seed(seed, count))
    return [repeated(rng) if number % 2 else paragraph(rng) for number in range(count)]


def repeated(rng: random.Random) -> str:
    """Some words in any order, and the same once more."""
    words = rng.sample((*COLOURS, *ANIMALS, *KINDS, *FOODS, *AREAS, *PRICES, *PEOPLE), rng.randint(4, 9))
    return f"{', '.join(words)}. Again: {', '.join(words)}."


def paragraph(rng: random.Random) -> str:
    """What somebody has to tell of a place."""
    name = f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
    kind, food, area, price = (rng.choice(words) for words in (KINDS, FOODS, AREAS, PRICES))
    person, friend = rng.sample(PEOPLE, 2)
    first = rng.choice(
        (
            f"{name} is a {kind} near the {area}.",
            f"Near the {area} there is a {kind} called {name}.",
            f"{person} went to {name}, a {kind} near the {area}.",
            f"{person} and {friend} met at the {kind} {name}.",
        )
    )
    others = [
        f"{name} serves {food} food.",
        f"It serves {food} food.",
        f"{person} likes the {food} food at {name}.",
        f"The prices at {name} are {price}.",
        f"The {kind} is near the {area}.",
        f"{friend} says that {name} is {price}.",
        f"{person} told {friend} of {name}.",
        f"At {name} the food is {food} and the prices are {price}.",
    ]
    return " ".join([first, *rng.sample(others, rng.randint(1, 3))])


def slot_examples(split: str) -> list:  # type: ignore[type-arg]  # of Example, which is defined where this is imported
    """The task's examples of one part: three sets of slots for each name."""
    from lora.data.examples import Example

    names = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    random.Random(SEED).shuffle(names)
    part = {"test": names[:20], "validation": names[20:34], "train": names[34:]}[split]
    examples = []
    for name in part:
        for number in range(3):
            rng = random.Random(mix_seed(SEED, names.index(name), number))
            prompt, sentence = slots(name, rng)
            examples.append(Example(f"{split}-{name}-{number}", prompt, sentence, references=(sentence,)))
    return examples


def slots(name: str, rng: random.Random) -> tuple[str, str]:
    """Some slots of a place, and the one sentence or two that say them."""
    kind, food, area, price = (rng.choice(words) for words in (KINDS, FOODS, AREAS, PRICES))
    asked = rng.sample(("food", "area", "price"), rng.randint(1, 3))
    shown = [f"name: {name}", f"kind: {kind}"]
    sentence = f"{name} is a {kind}"
    if "area" in asked:
        shown.append(f"area: {area}")
        sentence += f" near the {area}"
    sentence += "."
    if "food" in asked:
        shown.append(f"food: {food}")
        sentence += f" It serves {food} food."
    if "price" in asked:
        shown.append(f"price: {price}")
        sentence += f" The prices are {price}."
    return " | ".join(shown), sentence
