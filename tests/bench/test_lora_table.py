"""The table of adapters: a run a cell, once for each config; full finetuning counts all numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora.eval
import lora.train
from bench import lora_picture, lora_table
from common.config import resolve
from lora.config import Config
from tests.bench.programs import run_here
from tests.helpers import ROOT
from tests.lora.small import SETTINGS, write_base


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The programs that a small table starts, each run in this process."""
    names = run_here(monkeypatch, "lora", Config, {"train": lora.train.train, "eval": lora.eval.main})
    small = lora_table.Table(
        "configs/lora_tiny.yaml",
        (f"model.name={write_base(tmp_path / 'base')}", *SETTINGS, "train.validate_every=4", "eval.base=false"),
        {"rank 2": ("adapter.rank=2",), "full": ("train.method=full",)},
        {"bleu": "BLEU"},
        7,
        "val_loss",
        "Made here.",
    )
    monkeypatch.setitem(lora_table.TABLES, "small", small)
    return names


def test_a_cell_is_run_once_for_each_config(tmp_path: Path, started: list[str]) -> None:
    arguments = ["small", "--runs", str(tmp_path), "--results", str(tmp_path)]
    lora_table.main(arguments)
    lora_table.main(arguments)
    assert started == ["train", "eval", "train", "eval"]
    low, full = json.loads((tmp_path / "small.json").read_text())
    assert (low["row"], full["row"], low["seed"]) == ("rank 2", "full", 7)
    assert full["learned_numbers"] > 10 * low["learned_numbers"] > 0
    assert low["validation"] > 0
    lora_table.main([*arguments, "--only", "rank 2", "train.lr=0.01"])  # another config: the old result is not its own
    assert started == ["train", "eval"] * 3
    rows = (tmp_path / "small.md").read_text().splitlines()
    assert rows[0].startswith("| | BLEU |") and rows[2].startswith("| rank 2 | ") and rows[3].startswith("| full | ")


def test_an_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lora_table.main(["sst2", "--only", "rank 3"])
    assert "no row 'rank 3'" in capsys.readouterr().err


def test_every_row_is_a_config_of_its_own() -> None:
    for table in lora_table.TABLES.values():
        configs = [resolve(Config, ROOT / table.config, [*table.settings, *row]) for row in table.rows.values()]
        assert len({str(config) for config in configs}) == len(table.rows)
        assert len({lora_table.folder_of(row, Path()) for row in table.rows}) == len(table.rows)


def test_the_picture_is_of_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means and deviations in percent, and a picture with a panel a table; without a table, what makes one."""
    with pytest.raises(SystemExit, match="no table"):
        lora_picture.draw(tmp_path)
    rows = [
        ("rank 2", 10, 0.5),
        ("rank 2", 10, 0.7),
        ("rank 8", 40, 0.8),
        ("DoRA, rank 8", 44, 0.9),
        ("full", 900, 1.0),
    ]
    records = [{"row": row, "learned_numbers": count, "accuracy": value} for row, count, value in rows]
    (tmp_path / "sst2.json").write_text(json.dumps(records))
    points = lora_picture.read_points(tmp_path / "sst2.json", "accuracy")
    assert (
        points["rank 2"] == (10, pytest.approx(60), pytest.approx(14.142, abs=1e-3)) and points["full"].deviation == 0
    )
    lora_picture.main(["--results", str(tmp_path)])
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG") and "ranks.png" in capsys.readouterr().out
