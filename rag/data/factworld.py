"""A world that nobody has read about: people, places and works with made-up names, described in passages, and
questions about them.

What a language model knows is of no use here, and neither is what it saw in training: names are made of syllables, and
questions for testing are about people, places and works that no training question mentions, in words that no training
question uses; so are those for validation, in words of their own. What remains is finding the right passage and reading
it. Since the world is a function of its seed, any fact can be changed and its passage written anew in the same words,
which shows whether an answer comes from there.

Every entity belongs to one split for good, and facts link entities of one split only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from common.runtime import mix_seed
from rag.config import DataConfig
from rag.data import factwords as words
from rag.data.corpus import Collection, Passage, Passages, Question
from rag.data.factwords import Wordings
from rag.data.wordings import QUESTIONS, STATEMENTS, TWO_HOPS

SHARES = {"person": 0.5, "place": 0.2, "work": 0.3}
TEST = 0.2  # share of the entities
NEW_STATEMENTS = 1 / 3  # share of the sentences about entities for validation and test that are worded as no others are
NAME_STREAM, FACT_STREAM, TEXT_STREAM, QUESTION_STREAM, EDIT_STREAM = range(7_200_001, 7_200_006)


@dataclass
class Entity:
    """Somebody or something with facts.

    Attributes:
        number: its place among all.
        facts: relation -> value; of a relation to another entity, that one's name.
    """

    number: int
    kind: str
    name: str
    split: str
    facts: dict[str, str] = field(default_factory=dict)


@dataclass
class World:
    """All entities of a world, and what its passages say of them."""

    seed: int
    entities: list[Entity]
    by_name: dict[str, Entity]

    def passage(self, entity: Entity, part: int, facts: dict[str, str] | None = None) -> Passage:
        """One passage about an entity: its sentences' wording and order depend on the world's seed and the entity
        alone, so that with other `facts` it says other things in the same words.
        """
        rng = np.random.default_rng(mix_seed(self.seed, TEXT_STREAM, entity.number, part))
        relations = list(words.PARTS[entity.kind][part])
        rng.shuffle(relations)
        told = entity.facts if facts is None else facts
        sentences = []
        for place, relation in enumerate(relations):
            templates = STATEMENTS[relation]
            # a third of what is said about entities for choosing and testing is said as no other passage says it
            new = entity.split != "train" and rng.random() < NEW_STATEMENTS
            sentence = words.worded(templates.of(entity.split if new else "train"), rng)
            subject = entity.name if place == 0 else words.again(entity.kind, entity.name, rng)
            sentences.append(capital(sentence.format(s=subject, v=told[relation])))
        sentences.insert(int(rng.integers(1, len(sentences) + 1)), str(rng.choice(words.FILLERS[entity.kind])))
        return Passage(f"{entity.kind}-{entity.number}-{part}", " ".join(sentences), entity.name, entity.name)

    def passages(self) -> list[Passage]:
        """Every passage about every entity."""
        return [self.passage(item, part) for item in self.entities for part in range(len(words.PARTS[item.kind]))]

    def source(self, entity: Entity, relation: str) -> str:
        """Id of the passage that states a fact."""
        part = next(i for i, relations in enumerate(words.PARTS[entity.kind]) if relation in relations)
        return f"{entity.kind}-{entity.number}-{part}"

    def edited(self, question: Question) -> tuple[Passage, str]:
        """The passage that a question's answer stands in, with another answer in it, and that answer."""
        number, relation = map(str, question.id.split("/")[1:3])
        entity = self.entities[int(number)]
        rng = np.random.default_rng(mix_seed(self.seed, EDIT_STREAM, entity.number))
        old = entity.facts[relation]
        choices = [value for value in self.values(relation) if value != old]
        new = str(choices[int(rng.integers(0, len(choices)))])
        part = int(self.source(entity, relation).rsplit("-", 1)[1])
        return self.passage(entity, part, entity.facts | {relation: new}), new

    def values(self, relation: str) -> list[str]:
        """What the answer to a question about this relation may be."""
        return sorted({item.facts[relation] for item in self.entities if relation in item.facts})


def capital(sentence: str) -> str:
    """With a large first letter."""
    return sentence[0].upper() + sentence[1:]


def make_world(config: DataConfig) -> World:
    """The world of a seed: entities with unique names, each in a split, and facts that link those of one split."""
    rng = np.random.default_rng(mix_seed(config.world, NAME_STREAM))
    entities: list[Entity] = []
    taken: set[str] = set()
    for kind, share in SHARES.items():
        count = round(share * config.entities)
        tested = round(TEST * count)
        chosen = max(1, round(config.validation * count))
        for i in range(count):
            split = "test" if i < tested else "validation" if i < tested + chosen else "train"
            name = words.new_name(kind, rng, taken)
            entities.append(Entity(len(entities), kind, name, split))
    world = World(config.world, entities, {item.name: item for item in entities})
    for item in entities:
        give_facts(world, item)
    return world


def give_facts(world: World, item: Entity) -> None:
    """Draw every fact of an entity."""
    rng = np.random.default_rng(mix_seed(world.seed, FACT_STREAM, item.number))
    for part in words.PARTS[item.kind]:
        for relation in part:
            target = words.LINKS.get(relation)
            if target is None:
                item.facts[relation] = words.draw_value(relation, rng)
            else:
                others = [e for e in world.entities if e.kind == target and e.split == item.split and e is not item]
                item.facts[relation] = others[int(rng.integers(0, len(others)))].name


def ask(world: World, item: Entity) -> list[Question]:
    """Every question about an entity: of one fact, and of a fact of what one of its facts names."""
    rng = np.random.default_rng(mix_seed(world.seed, QUESTION_STREAM, item.number))

    def worded(templates: Wordings) -> str:
        return capital(words.worded(templates.of(item.split), rng).format(s=item.name))

    questions = []
    for relation, templates in QUESTIONS.items():
        if relation in item.facts:
            gold = {world.source(item, relation): 1}
            questions.append(
                Question(
                    f"{item.split}/{item.number}/{relation}",
                    worded(templates),
                    (item.facts[relation],),
                    gold,
                    item.name,
                    "one_hop",
                )
            )
    for (first, second), wordings in TWO_HOPS.items():
        if first in item.facts:
            between = world.by_name[item.facts[first]]
            gold = {world.source(item, first): 1, world.source(between, second): 1}
            questions.append(
                Question(
                    f"{item.split}/{between.number}/{second}/{item.number}/{first}",
                    worded(wordings),
                    (between.facts[second],),
                    gold,
                    item.name,
                    "two_hop",
                )
            )
    return questions


def load(config: DataConfig) -> Collection:
    """The collection: passages about every entity, questions by split."""
    world = make_world(config)
    asked: dict[str, list[Question]] = {"train": [], "validation": [], "test": []}
    for item in world.entities:
        asked[item.split] += ask(world, item)
    passages = Passages(world.passages())
    return Collection("factworld", passages, asked["train"], asked["validation"], asked["test"], complete=True)
