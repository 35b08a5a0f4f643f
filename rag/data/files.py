"""Reading datasets line by line, with a message that names file, line and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import ProjectError


def find(path: Path, remedy: str) -> Path:
    """The path of a file that must be there; `ProjectError` with what to do where it is not."""
    if not path.is_file():
        raise ProjectError(
            f"{path} is missing: {remedy}; configs/rag_factworld.yaml needs no download (data.dataset=factworld)"
        )
    return path


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line; empty lines are passed over."""
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    item = json.loads(line)
                    if not isinstance(item, dict):
                        raise ProjectError(f"{path}, line {number}: is no JSON object")
                    yield item
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
            raise ProjectError(f"{path}, near line {number + 1}: {error}") from None


def read_table(path: Path, columns: int, header: int = 0) -> Iterator[list[str]]:
    """The rows of a file of tab-separated values, each with at least so many."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                cells = line.rstrip("\r\n").split("\t")
                if number <= header or not line.strip():
                    continue
                if len(cells) < columns:
                    raise ProjectError(f"{path}, line {number}: has {len(cells)} columns, not {columns}")
                yield cells
    except UnicodeDecodeError as error:
        raise ProjectError(f"{path} is not UTF-8: {error}") from None
