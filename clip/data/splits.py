"""The training, validation and test images of a dataset, and what is wrong with them.

flickr8k/ dataset_flickr8k.json  images/*.jpg           Karpathy & Fei-Fei 2015: splits and captions in one file
coco/     dataset_coco.json      train2014/ val2014/    of https://cs.stanford.edu/people/karpathy/deepimagesent/
FOLDER/   captions.csv or .jsonl and images             a person's own
FOLDER/   *.tar                                         WebDataset shards: 000.jpg, 000.txt, 001.jpg, ...
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip.config import Config, DataConfig
from clip.data.pairs import FilePairs, Member, Pairs, ScenePairs, Source
from clip.data.records import SHOWN, Record, refuse_many
from clip.data.scenes import FAMILY, Scenes
from clip.data.tables import read_table
from clip.data.tars import read_shards
from common.errors import ProjectError
from common.files import place_of
from common.images.memory import draw_indices

NAMES = ("train", "val", "test")
OTHERWISE = "; or take configs/clip_scenes.yaml, which needs no download"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


@dataclass(frozen=True)
class Splits:
    """A dataset.

    notes: what was left out or looks wrong, for a person to read. duplicates: (image, image of another split) with the
    same content.
    """

    train: Pairs
    val: Pairs
    test: Pairs
    notes: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, str], ...] = ()

    def named(self, split: str) -> Pairs:
        """train, val or test."""
        found: Pairs = getattr(self, split)
        return found


def load_splits(config: Config) -> Splits:
    """All three splits of the dataset that a config names. `ProjectError` says which files were expected where."""
    data = config.data
    if data.dataset == "scenes":
        return _scenes(config)
    root = Path(config.data_root)
    if data.dataset == "folder":
        records, notes = read_table(place_of(data.folder, root), data.held_out)
    elif data.dataset == "webdataset":
        records, notes = read_shards(place_of(data.folder, root), data.held_out)
    else:
        records, notes = read_karpathy(root / data.dataset, data.dataset)
    return split_records(data, records, notes, config.seed)


def _scenes(config: Config) -> Splits:
    def split(name: Any, count: int) -> ScenePairs:
        scenes = Scenes(config.seed, name, config.data.groups)
        if name == "train":
            return ScenePairs(scenes, count, family=config.data.family)
        if config.data.groups == 1:  # there is nothing to exchange
            return ScenePairs(scenes, count, scenes.gallery(count))
        return ScenePairs(scenes, count, [variant.scene for variant in scenes.hard_gallery(count, min(FAMILY, count))])

    gallery = config.eval.gallery
    return Splits(split("train", config.data.scenes), split("val", gallery), split("test", gallery))


def read_karpathy(folder: Path, name: str) -> tuple[list[Record], list[str]]:
    """Images of a dataset in the layout of Karpathy & Fei-Fei 2015. COCO's `restval` counts as train, as is usual;
    Flickr8k's are in no split.
    """
    path = folder / f"dataset_{name}.json"
    if not path.is_file():
        inside = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise ProjectError(
            f"{name}: expected {path} (from {KARPATHY}) and the images in {folder}/images"
            f"{' or train2014 and val2014' if name == 'coco' else ''}, but found: {inside or 'nothing'}{OTHERWISE}"
        )
    left_out = 0
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        records = []
        for image in images:
            if image["split"] not in NAMES and not (name == "coco" and image["split"] == "restval"):
                left_out += 1
                continue
            place = [folder / part for part in (image.get("filepath", "images"), "images", "")]
            source = next((p / image["filename"] for p in place if (p / image["filename"]).is_file()), None)
            split = "train" if image["split"] == "restval" else image["split"]
            texts = [sentence["raw"] for sentence in image["sentences"]]
            source = source or folder / "images" / image["filename"]
            records.append(Record(source=source, name=image["filename"], texts=texts, split=split))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProjectError(f"{path} is not Karpathy's file of captions: {type(error).__name__} {error}") from None
    return records, [f"{left_out} images are in none of the three splits"] if left_out else []


def split_records(data: DataConfig, records: list[Record], notes: list[str], seed: int) -> Splits:
    """Sort records into splits, without those that cannot be used. `ProjectError` where those are too many, or a
    split is empty.
    """
    usable, more = check_records(records)
    by_split = {name: [record for record in usable if record["split"] == name] for name in NAMES}
    empty = [name for name, chosen in by_split.items() if not chosen]
    if empty:
        raise ProjectError(f"{data.dataset}: no usable image with a caption in {' and '.join(empty)}")
    pairs = {name: _pairs(data.dataset, chosen) for name, chosen in by_split.items()}
    duplicates = find_duplicates(pairs)
    notes = [*notes, *more]
    if duplicates:
        shown = "; ".join(f"{a} = {b}" for a, b in duplicates[:SHOWN])
        notes.append(f"{len(duplicates)} images are in two splits: {shown}{' ...' if len(duplicates) > SHOWN else ''}")
    train = pairs["train"].take(draw_indices(len(pairs["train"]), data.max_images, seed).tolist())
    return Splits(train, pairs["val"], pairs["test"], tuple(notes), tuple(duplicates))


def _pairs(name: str, records: list[Record]) -> FilePairs:
    return FilePairs(name, [r["source"] for r in records], [r["name"] for r in records], [r["texts"] for r in records])


def check_records(records: list[Record]) -> tuple[list[Record], list[str]]:
    """The records with a file and a caption, and notes on the others. `ProjectError` above one percent of those."""
    usable, missing, silent = [], [], []
    for record in records:
        record["texts"] = [text.strip() for text in record["texts"] if isinstance(text, str) and text.strip()]
        if isinstance(record["source"], Path) and not record["source"].is_file():
            missing.append(str(record["source"]))
        elif not record["texts"]:
            silent.append(record["name"])
        else:
            usable.append(record)
    notes = []
    for what, bad in (("images are missing", missing), ("images have no caption", silent)):
        if bad:
            notes.append(f"{len(bad)} {what}: {', '.join(bad[:SHOWN])}{' ...' if len(bad) > SHOWN else ''}")
    refuse_many(len(missing) + len(silent), len(records), "; ".join(notes))
    return usable, notes


# -- the same image in two splits --------------------------------------------------------------------------------------


def find_duplicates(pairs: dict[str, FilePairs]) -> list[tuple[str, str]]:
    """Images of different splits with the same bytes: what was trained on must not be tested on.

    Only files of equal size are opened, and read whole only where their first bytes agree.
    """
    places = [(split, p.names[i], p.sources[i]) for split, p in pairs.items() for i in range(len(p))]
    groups = [list(range(len(places)))]
    for key in (size_of, _head, _digest):
        groups = [part for group in groups for part in _regroup(group, lambda i: key(places[i][2]))]  # noqa: B023
        groups = [group for group in groups if len({places[i][0] for i in group}) > 1]
    found = []
    for group in groups:
        first = places[group[0]]
        other = next(places[i] for i in group if places[i][0] != first[0])
        found.append((f"{first[0]}/{first[1]}", f"{other[0]}/{other[1]}"))
    return found


def _regroup(group: list[int], key: Callable[[int], Any]) -> list[list[int]]:
    parts: dict[Any, list[int]] = defaultdict(list)
    for i in group:
        parts[key(i)].append(i)
    return [part for part in parts.values() if len(part) > 1]


def size_of(source: Source) -> int:
    """Bytes of an image file."""
    return source.size if isinstance(source, Member) else source.stat().st_size


def _head(source: Source) -> bytes:
    return read_bytes(source, 1024)


def _digest(source: Source) -> bytes:
    return hashlib.sha256(read_bytes(source, size_of(source))).digest()


def read_bytes(source: Source, count: int) -> bytes:
    """The first bytes of an image file; empty where it cannot be read."""
    try:
        if isinstance(source, Member):
            with source.archive.open("rb") as file:
                file.seek(source.offset)
                return file.read(min(count, source.size))
        with source.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""
