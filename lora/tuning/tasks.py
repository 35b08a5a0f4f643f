"""The two tasks behind one interface: answers to learn, or classes to tell apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from common.run import Run
from common.runtime import mix_seed
from lora.config import Config
from lora.data import Batches, Example, Labelled, Tokens, encode, load_examples, load_labelled
from lora.data.examples import Split
from lora.data.texts import TextBatches
from lora.metrics.losses import class_scores, mean_loss

VALIDATION_STREAM = 5_000_012  # keeps the random numbers of the drawn validation examples apart
Say = Callable[[str], None]


class Instructions:
    """Prompts and the answers to learn."""

    classes: tuple[str, ...] = ()

    def __init__(self, config: Config, say: Say) -> None:
        self.config = config
        self.say = say
        self.examples = draw(self.load("train"), config.data.max_examples, config.seed)

    def __len__(self) -> int:
        return len(self.examples)

    def load(self, split: Split) -> list[Example]:
        """One part of the data."""
        return load_examples(self.config.data, self.config.data_root, split, self.say)

    def batches(self, tokenizer: Any) -> Any:  # as Classes has it
        """What the training loop draws from."""
        tokens = encode(self.examples, self.config.data, tokenizer)
        settings = self.config
        return Batches(tokens, settings.data.max_length, settings.data.pack, settings.train.batch_size, settings.seed)

    def validate(self, model: Any, tokenizer: Any, run: Run) -> dict[str, float]:
        """The mean loss of the labels of some validation examples: what choices are made on."""
        loss = mean_loss(model, self.held_out(tokenizer), self.config.eval.batch_size, run)
        return {"val_loss": loss}

    def held_out(self, tokenizer: Any) -> list[Tokens]:
        """Validation examples, drawn by seed, that fit."""
        examples = draw(self.load("validation"), self.config.train.validate_examples, self.config.seed)
        tokens = encode(examples, self.config.data, tokenizer)
        return [item for item in tokens if len(item) <= self.config.data.max_length]


class Classes:
    """Texts and their classes."""

    def __init__(self, config: Config, say: Say) -> None:
        self.config = config
        self.say = say
        self.labelled = self.load("train")
        self.classes = self.labelled.classes

    def __len__(self) -> int:
        return len(self.labelled)

    def load(self, split: Split) -> Labelled:
        """One part of the data."""
        return load_labelled(self.config.data, self.config.data_root, split, self.say)

    def batches(self, tokenizer: Any) -> Any:  # as Instructions has it
        """What the training loop draws from."""
        return TextBatches(self.labelled, tokenizer, self.config)

    def validate(self, model: Any, tokenizer: Any, run: Run) -> dict[str, float]:
        """Loss and accuracy of some validation texts: what choices are made on."""
        part = self.load("validation")
        chosen = draw(range(len(part)), self.config.train.validate_examples, self.config.seed)
        loss, predicted = class_scores(
            model, [part.texts[i] for i in chosen], [part.labels[i] for i in chosen], tokenizer, self.config, run
        )
        right = sum(int(a == part.labels[i]) for a, i in zip(predicted, chosen, strict=True))
        return {"val_loss": loss, "val_accuracy": right / len(chosen)}


Source = Instructions | Classes


def load_source(config: Config, say: Say) -> Source:
    """The task that a config describes, its training data read. `ProjectError` where data are missing or broken."""
    return Classes(config, say) if config.classifies else Instructions(config, say)


def draw(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """So many of them, drawn by seed, in their order; all for 0."""
    if not count or count >= len(items):
        return list(items)
    chosen = random.Random(mix_seed(seed, VALIDATION_STREAM)).sample(range(len(items)), count)
    return [items[i] for i in sorted(chosen)]
