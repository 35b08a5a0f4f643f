"""Texts with classes: SST-2, CoLA, or a CSV file of one's own.

sst2/{train,dev,test}.tsv                            sentence, label
cola/in_domain_train.tsv, in_domain_dev.tsv, ...     source, label, the author's mark, sentence
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import ProjectError
from common.files import place_of, write_text
from common.runtime import mix_seed
from lora.config import DataConfig
from lora.data.examples import FEWEST, SPLIT_SEED, Split
from lora.data.rows import Row, hub_rows, read_csv_rows, read_tsv, text_of

HUB = {"sst2": ("nyu-mll/glue", "sst2"), "cola": ("nyu-mll/glue", "cola")}
NAMES = {"sst2": ("negative", "positive"), "cola": ("unacceptable", "acceptable")}


@dataclass(frozen=True)
class Labelled:
    """Texts of one part.

    Attributes:
        ids: of each text, the dataset's or its place.
        labels: of each text, an index into `classes`.
    """

    ids: list[str]
    texts: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def load_labelled(
    config: DataConfig,
    data_root: str,
    split: Split,
    say: Callable[[str], None] = print,
    known: tuple[str, ...] = (),
) -> Labelled:
    """One part of a dataset; empty texts are left out and counted.

    Args:
        known: the classes that a run has learned, in its order; a CSV file may hold no other.

    SST-2 has its own three parts. Of CoLA the public development data, in domain and out of it, is the test (GLUE's
    1,043 sentences), and validation is cut from training. `ProjectError` for what is missing or broken.
    """
    root = Path(data_root)
    if config.dataset == "csv":
        rows, classes = read_csv(config, root, known)
        rows = share(rows, split, config, cut_test=True)
    elif config.dataset == "sst2":
        rows, classes = read_sst2(root / "sst2", split), NAMES["sst2"]
    else:
        rows, classes = read_cola(root / "cola", split), NAMES["cola"]
        rows = rows if split == "test" else share(rows, split, config, cut_test=False)
    if known and classes != known:
        raise ProjectError(
            f"{config.dataset} has the classes {', '.join(classes)}; the run has learned {', '.join(known)}"
        )
    whole = [row for row in rows if row[1].strip()]
    if len(whole) < len(rows):
        say(f"note: {len(rows) - len(whole)} of {len(rows)} {split} texts are empty and left out")
    if not whole:
        raise ProjectError(f"there is nothing in the {split} part of data.dataset={config.dataset}{FEWEST}")
    return Labelled([row[0] for row in whole], [row[1] for row in whole], [row[2] for row in whole], classes)


CLASSES = "classes.json"  # in a run folder
COLUMNS = "; data.text_column and data.label_column say which are meant"
Text = tuple[str, str, int]  # id, text, class


def share(rows: list[Text], split: Split, config: DataConfig, cut_test: bool) -> list[Text]:
    """A part drawn by a seed that is always the same; equal texts stay together."""
    texts = sorted({text for _, text, _ in rows})
    random.Random(mix_seed(SPLIT_SEED, len(texts))).shuffle(texts)
    num_test = max(1, round(config.test * len(texts))) if cut_test else 0
    num_validation = max(1, round(config.validation * len(texts)))
    wanted = {
        "test": set(texts[:num_test]),
        "validation": set(texts[num_test : num_test + num_validation]),
        "train": set(texts[num_test + num_validation :]),
    }[split]
    return [row for row in rows if row[1] in wanted]


def read_sst2(folder: Path, split: Split) -> list[Text]:
    """Sentences of film reviews (Socher et al. 2013)."""
    name = {"train": "train", "validation": "dev", "test": "test"}[split]
    path = folder / f"{name}.tsv"
    if not path.is_file():
        if split == "test":
            raise ProjectError(f"put {path.name} into {folder}: sentence, tab, 0 or 1 (the Hub has no labels of it)")
        return from_glue(hub_rows(*HUB["sst2"], split))
    return [(f"{name}-{i}", text, binary(place, label)) for i, (place, (text, label)) in enumerate(read_tsv(path, 2))]


def read_cola(folder: Path, split: Split) -> list[Text]:
    """Sentences that linguists judged (Warstadt et al. 2019)."""
    names = ["in_domain_dev.tsv", "out_of_domain_dev.tsv"] if split == "test" else ["in_domain_train.tsv"]
    if not all((folder / name).is_file() for name in names):
        return from_glue(hub_rows(*HUB["cola"], "validation" if split == "test" else "train"))
    rows = []
    for name in names:
        for i, (place, (_, label, _, text)) in enumerate(read_tsv(folder / name, 4)):
            rows.append((f"{name.removesuffix('.tsv')}-{i}", text, binary(place, label)))
    return rows


def from_glue(rows: list[Row]) -> list[Text]:
    """GLUE's rows on the Hub."""
    return [(str(row["idx"]), text_of(place, row, "sentence"), int(row["label"])) for place, row in rows]


def binary(place: str, label: str) -> int:
    """0 or 1. `ProjectError` for another label."""
    if label not in ("0", "1"):
        raise ProjectError(f"{place}: the label is {label!r}, not 0 or 1")
    return int(label)


def read_csv(config: DataConfig, root: Path, known: tuple[str, ...]) -> tuple[list[Text], tuple[str, ...]]:
    """A person's own texts; the classes are the known ones, else whatever stands in the column of labels, sorted."""
    path = place_of(config.path, root)
    rows = read_csv_rows(path, (config.text_column, config.label_column), COLUMNS)
    labels = []
    for place, row in rows:
        label = row[config.label_column].strip()
        if not label:
            raise ProjectError(f"{place}: the label is empty")
        if known and label not in known:
            raise ProjectError(f"{place}: the label is {label!r}; the run has learned {', '.join(known)}")
        labels.append(label)
    classes = known or tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ProjectError(f"{path}: {config.label_column} has {len(classes)} different labels, two are needed")
    texts = [
        (str(row.get("id", place.rsplit(", ")[-1])), row[config.text_column], classes.index(label))
        for (place, row), label in zip(rows, labels, strict=True)
    ]
    return texts, classes


# -- the classes of a run ----------------------------------------------------------------------------------------------


def keep_classes(folder: Path, classes: tuple[str, ...], goes_on: bool) -> None:
    """Write the classes of a run into its folder, in the order of the head's outputs. `ProjectError` where a run that
    goes on has learned others: its data have changed.
    """
    before = read_classes(folder)
    if goes_on and before and before != classes:
        raise ProjectError(f"{folder} has learned the classes {', '.join(before)}; the data have {', '.join(classes)}")
    write_text(folder / CLASSES, json.dumps(list(classes)) + "\n")


def read_classes(folder: Path) -> tuple[str, ...]:
    """The classes of a run; none where it is no classifier's."""
    try:
        names = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
