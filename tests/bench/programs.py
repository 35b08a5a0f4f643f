"""Programs that a table of runs starts, run in this process instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import cells
from common.config import BaseConfig, load
from tests.helpers import ROOT


def run_here(
    monkeypatch: pytest.MonkeyPatch, project: str, schema: type[BaseConfig], programs: dict[str, Callable[..., None]]
) -> list[str]:
    """Let `bench.cells` call `programs` by name; the names of those it has called, as they come."""
    monkeypatch.chdir(ROOT)
    names: list[str] = []

    def command(arguments: list[str], threads: int) -> float:
        program, rest = arguments[1].removeprefix(f"{project}."), arguments[2:]
        names.append(program)
        programs[program](*load(schema, project, program, rest))
        return 1.5

    monkeypatch.setattr(cells, "command", command)
    return names
