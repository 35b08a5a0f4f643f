"""Rows of JSON, JSONL, CSV and TSV files, with the place of each, so that a bad one can be named; and of the Hub."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import ProjectError, first_line
from common.files import write_text

Row = tuple[str, dict[str, Any]]  # "train.jsonl, line 7" and what stands there


def lines_of_stdin(kind: str) -> list[str]:
    """A prompt or a text, as `kind` has it, a line. `ProjectError` where there is none."""
    lines = [] if sys.stdin.isatty() else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise ProjectError(f"no {kind}: give one on the command line, or lines of them on stdin")
    return lines


def write_json_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_rows(path: Path) -> list[Row]:
    """The objects of a JSON list or of a JSONL file. `ProjectError` names the line that is none."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProjectError(f"{path} is not JSON: {first_line(error)}") from None
        named = [(f"{path}, item {number}", item) for number, item in enumerate(items, 1)]
    else:
        named = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: texts may hold other line ends
            if line.strip():
                try:
                    named.append((f"{path}, line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise ProjectError(f"{path}, line {number}: not JSON: {first_line(error)}") from None
    for place, item in named:
        if not isinstance(item, dict):
            raise ProjectError(f"{place}: an object with named columns is needed, not {type(item).__name__}")
    return named


def read_csv_rows(path: Path, columns: tuple[str, ...], remedy: str = "") -> list[Row]:
    """The rows of a CSV file whose first line names its columns. `ProjectError` for uneven rows, and for missing
    columns, with what a person can do about it.
    """
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns if name not in (reader.fieldnames or [])]
        if lacking:
            raise ProjectError(
                f"{path} has no column {lacking[0]}; there are: {', '.join(reader.fieldnames or [])}{remedy}"
            )
        rows = []
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ProjectError(f"{place}: {len(reader.fieldnames or [])} columns are needed")
                rows.append((place, dict(row)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ProjectError(f"{path}, line {reader.line_num}: {first_line(error)}") from None
    return rows


def read_tsv(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """The fields of each line of a tab-separated file without quotes. `ProjectError` for another number of them."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            fields = line.rstrip("\r").split("\t")
            if len(fields) != columns:
                raise ProjectError(f"{path}, line {number}: {columns} columns are needed, {len(fields)} are there")
            yield f"{path}, line {number}", fields


def read_text(path: Path) -> str:
    """A whole text file; `ProjectError` for one that is none."""
    with open_text(path) as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ProjectError(f"{path} is not UTF-8 text: {first_line(error)}") from None


def open_text(path: Path, newline: str | None = None) -> Any:
    """The file, or a `ProjectError` in one line."""
    try:
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise ProjectError(f"{path} cannot be read: {error.strerror}") from None


def text_of(place: str, row: dict[str, Any], column: str, optional: bool = False, remedy: str = "") -> str:
    """One column as text. `ProjectError` where it is no text, or missing, with what a person can do about it."""
    value = row.get(column)
    if value is None and optional:
        return ""
    if value is None:
        raise ProjectError(f"{place}: there is no {column!r}, only {', '.join(map(repr, row))}{remedy}")
    if not isinstance(value, str):
        raise ProjectError(f"{place}: {column!r} is {type(value).__name__}, not text")
    return value


def hub_rows(name: str, part: str | None, split: str) -> list[Row]:
    """The rows of a dataset on the Hub, or in its cache. `ProjectError` where there is none."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ProjectError(f"{name} comes from the Hugging Face Hub: pip install datasets") from None
    try:
        rows = load_dataset(name, part, split=split)
    except Exception as error:  # no network, no such dataset, no such split: each with a class of its own
        raise ProjectError(
            f"the dataset {name} is not to be had from the Hugging Face Hub: {first_line(error)}; put a file on this "
            "machine and name it, or train configs/lora_tiny.yaml, which needs no download"
        ) from None
    return [(f"{name} {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]
