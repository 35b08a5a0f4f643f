"""WebDataset shards: uncompressed tar archives in which the files of one example share a name.

    00000.tar:  000000.jpg  000000.txt  000001.jpg  000001.json ...

The library that gave the format its name streams archives from front to back. Here the place of every image is noted
first, so that any image can be read at any time: the order is shuffled over all shards, and a resumed run goes on at
the very image where it stopped, as with files in a folder.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from clip.data.pairs import Member
from clip.data.records import SHOWN, Record, held_out_split, refuse_many
from common.errors import ProjectError
from common.files import visible
from common.images.reading import SUFFIXES

KEYS = ("caption", "text", "title", "alt")  # of a .json beside an image


def read_shards(folder: Path, held_out: float) -> tuple[list[Record], list[str]]:
    """Every image of the folder's shards with its caption, and notes on what is wrong with some. `ProjectError` where
    there are no shards, or one is not to be read.
    """
    shards = visible(folder, "*.tar") if folder.is_dir() else []
    if not shards:
        packed = visible(folder, "*.tar.gz") if folder.is_dir() else []
        hint = "; unpack the .gz first: nothing can be read from its middle" if packed else ""
        raise ProjectError(f"{folder}: expected shards such as 00000.tar with 000.jpg and 000.txt in them{hint}")
    records: list[Record] = []
    lonely: list[str] = []
    for shard in shards:
        for key, image, texts in examples(shard):
            if image is None:
                lonely.append(f"{shard.name}/{key} has no image")
                continue
            name = f"{shard.stem}/{image.name}"
            split = held_out_split(name, held_out)
            records.append(Record(source=image, name=name, texts=texts, split=split))
    shown = "; ".join(lonely[:SHOWN])
    refuse_many(len(lonely), len(records) + len(lonely), shown or "no image in any shard")
    return records, [f"{len(lonely)} examples cannot be used: {shown}"] if lonely else []


def examples(shard: Path) -> Iterator[tuple[str, Member | None, list[str]]]:
    """(key, image, captions) of each example of an archive, whose files stand together."""
    key = ""
    image: Member | None = None
    texts: list[str] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for item in archive:
                if not item.isfile():
                    continue
                stem, _, kind = item.name.rpartition("/")[2].partition(".")
                here = f"{item.name.rpartition('/')[0]}/{stem}"
                if here != key and key:
                    yield key, image, texts
                    image, texts = None, []
                key = here
                suffix = f".{kind.lower()}"
                if suffix in SUFFIXES:
                    image = Member(shard, item.name, item.offset_data, item.size)
                elif suffix in (".txt", ".json") and not texts:
                    texts = captions_in(archive.extractfile(item), suffix)
    except (tarfile.TarError, OSError) as error:
        raise ProjectError(f"{shard} cannot be read as an uncompressed tar archive: {error}") from None
    if key:
        yield key, image, texts


def captions_in(file: IO[bytes] | None, suffix: str) -> list[str]:
    """The caption of a .txt, or of a .json; none where it cannot be read."""
    text = b"" if file is None else file.read()
    try:
        if suffix == ".txt":
            return [text.decode("utf-8")]
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found: object = next((facts[key] for key in KEYS if facts.get(key)), []) if isinstance(facts, dict) else []
    return found if isinstance(found, list) else [str(found)]
