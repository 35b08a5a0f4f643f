"""A person's own images: a folder with a table of captions.

    image,caption,split             {"image": "a.jpg", "captions": ["a dog", "a brown dog"]}
    a.jpg,a dog in the snow,train   {"image": "b.jpg", "caption": "a cat"}

The first is a CSV (or captions.txt), the second JSONL. An image may have several lines; `split` may be left out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip.data.records import SHOWN, Record, held_out_split, refuse_many
from common.errors import ProjectError
from common.files import visible

IMAGE_NAMES = ("image", "file_name", "filename", "file", "filepath", "path")
CAPTION_NAMES = ("caption", "captions", "text", "sentence", "title")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "restval": "train"}
PATTERNS = ("*.csv", "*.tsv", "*.jsonl", "captions.txt")


def read_table(folder: Path, held_out: float) -> tuple[list[Record], list[str]]:
    """The images of a folder, and notes on lines that cannot be used. `ProjectError` where there is no table, more than
    one, or too many bad lines.
    """
    path = find_table(folder)
    records: dict[str, Record] = {}
    bad: list[str] = []
    total = refused = 0
    for number, row in rows(path, bad):
        total += 1
        problem = ""
        name = next((row[key] for key in IMAGE_NAMES if row.get(key)), None)
        texts = next((row[key] for key in CAPTION_NAMES if row.get(key)), None)
        split = row.get("split") or ""
        if not isinstance(name, str):
            problem = f"no image ({', '.join(IMAGE_NAMES[:3])})"
        elif not texts:
            problem = f"no caption ({', '.join(CAPTION_NAMES[:3])})"
        elif split and str(split).lower() not in SPLIT_NAMES:
            problem = f"split {split} is none of train, val, test"
        if problem:
            bad.append(f"{path}, line {number}: {problem}")
            refused += 1
            continue
        assert isinstance(name, str)
        where = SPLIT_NAMES[str(split).lower()] if split else held_out_split(name, held_out)
        record = records.setdefault(name, Record(source=place(folder, name), name=name, texts=[], split=where))
        record["texts"] += texts if isinstance(texts, list) else [str(texts)]
    notes = [f"{len(bad)} lines cannot be used: {'; '.join(bad[:SHOWN])}{' ...' if len(bad) > SHOWN else ''}"]
    refuse_many(len(bad), total + len(bad) - refused, notes[0] if bad else f"{path} is empty")
    return list(records.values()), notes if bad else []


def find_table(folder: Path) -> Path:
    """The one table of captions in a folder."""
    if not folder.is_dir():
        raise ProjectError(f"data.folder: {folder} is no folder")
    tables = [path for pattern in PATTERNS for path in visible(folder, pattern)]
    if len(tables) == 1:
        return tables[0]
    found = ", ".join(path.name for path in tables[:4]) or ", ".join(sorted(p.name for p in folder.iterdir())[:4])
    raise ProjectError(
        f"{folder}: expected images and one table of captions, a .csv with columns image,caption or a .jsonl with one "
        f"object a line, but found: {found or 'nothing'}"
    )


def place(folder: Path, name: str) -> Path:
    """Where an image is: below the folder, or in its images/."""
    path = folder / name
    return path if path.is_file() or not (folder / "images" / name).is_file() else folder / "images" / name


def rows(path: Path, bad: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) for each line; those that cannot be read are added to `bad`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProjectError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = "no JSON"
            if isinstance(row, dict):
                yield number, row
            elif row is not None:
                bad.append(f"{path}, line {number}: no JSON object")
        return
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",")
    names = [name.strip().lower() for name in reader.fieldnames or []]
    if not set(names) & set(IMAGE_NAMES) or not set(names) & set(CAPTION_NAMES):
        raise ProjectError(f"{path}, line 1: expected a header such as image,caption but found {','.join(names)[:80]}")
    reader.fieldnames = names
    try:
        for row in reader:
            if None in row:  # more cells than the header has
                bad.append(f"{path}, line {reader.line_num}: more cells than the header; put captions in quotes")
                continue
            yield reader.line_num, row
    except csv.Error as error:
        raise ProjectError(f"{path}, line {reader.line_num}: {error}") from None
