"""The ladder of locked-image tuning: every rung is a valid config, and what is finished is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import clip_ladder
from clip.config import Config
from common.config import resolve
from tests.helpers import ROOT


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Trainings that the ladder starts: each only writes what a log ends with."""
    monkeypatch.chdir(ROOT)
    runs: list[list[str]] = []

    def command(arguments: list[str]) -> None:
        config = resolve(Config, Path(arguments[3]), arguments[4:])
        assert config.train.eval_every == config.train.steps
        values = {f"val_{name}": 0.1 * (len(runs) + 1) for name in clip_ladder.COLUMNS}
        folder = Path(config.run_dir)
        folder.mkdir(parents=True)
        lines = [{"step": 1, "loss": 2.0}, {"step": config.train.steps, "loss": 1.0, **values}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(arguments)

    monkeypatch.setattr(clip_ladder, "command", command)
    return runs


@pytest.mark.parametrize("name", clip_ladder.RUNGS)
def test_every_rung_is_a_config_of_its_own(name: str) -> None:
    config = resolve(Config, ROOT / clip_ladder.CONFIG, clip_ladder.RUNGS[name])
    base = resolve(Config, ROOT / clip_ladder.CONFIG, clip_ladder.RUNGS[clip_ladder.BASE])
    assert (config == base) == (name == clip_ladder.BASE)
    images = config.train.steps * config.train.batch_size
    assert name == "60 epochs" or abs(images / clip_ladder.IMAGES - clip_ladder.EPOCHS) < 0.05


def test_the_long_rung_is_the_config_as_it_is() -> None:
    config = resolve(Config, ROOT / clip_ladder.CONFIG, clip_ladder.RUNGS["60 epochs"])
    plain = resolve(Config, ROOT / clip_ladder.CONFIG)
    assert (config.train.steps, config.train.batch_size) == (plain.train.steps, plain.train.batch_size)


def test_a_rung_is_run_once_for_each_config(tmp_path: Path, started: list[list[str]]) -> None:
    arguments = ["--only", "linear heads", "--seeds", "2", "--runs", str(tmp_path), "--results", str(tmp_path)]
    clip_ladder.main(arguments)
    clip_ladder.main(arguments)
    assert len(started) == 2
    records = json.loads((tmp_path / "ladder.json").read_text())
    assert [record["seed"] for record in records] == [1000, 1001]
    assert [record["r10_mean"] for record in records] == pytest.approx([0.1, 0.2])
    assert "| linear heads | 15.0 ± 7.1 | 15.0, 15.0, 15.0 |" in (tmp_path / "ladder.md").read_text()
    clip_ladder.main([*arguments, "train.lr=0.002"])
    assert len(started) == 4
