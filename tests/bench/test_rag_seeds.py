"""Several seeds as one table: means of the right numbers, and only of runs that belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import rag_seeds
from common.config import resolve, to_yaml
from rag.config import Config


def finished(folder: Path, seed: int, metrics: dict[str, float], *settings: str) -> Path:
    folder.mkdir()
    config = resolve(Config, None, [f"seed={seed}", f"run_dir={folder}", *settings])
    (folder / "config.yaml").write_text(to_yaml(config))
    about = {"reader": "a reader", "n": {"questions": 3}, "split": "test", "seconds": 1.0, "seeds": [seed]}
    (folder / "answers.json").write_text(json.dumps({"metrics": metrics, **about}))
    return folder


def test_means_and_deviations(tmp_path, capsys):
    runs = [
        finished(tmp_path / "a", 0, {"em_retrieved": 0.5, "em_retrieved_one_hop": 0.6, "edit_followed": 1.0}),
        finished(tmp_path / "b", 1, {"em_retrieved": 0.7, "em_retrieved_one_hop": 0.8}),
    ]
    rag_seeds.main([*map(str, runs), "--results", str(tmp_path / "out"), "--name", "two"])
    record = json.loads((tmp_path / "out/two.json").read_text())
    assert record["seeds"] == [0, 1] and record["metrics"]["em_retrieved"] == pytest.approx(0.6)
    assert record["metrics"]["em_retrieved_std"] == pytest.approx(0.02**0.5)
    assert "edit_followed" not in record["metrics"], "a number that one run lacks has no mean"
    table = (tmp_path / "out/two.md").read_text()
    assert "| percent | all | one hop |" in table and "| exact match, found | 60.0 ± 14.1 | 70.0 ± 14.1 |" in table
    assert table in capsys.readouterr().out


def test_runs_that_do_not_belong_together(tmp_path, capsys):
    metrics = {"em_retrieved": 0.5}
    first = finished(tmp_path / "a", 0, metrics)
    cases = {
        "answers.json": tmp_path,
        "seeds must differ": finished(tmp_path / "b", 0, metrics),
        "more than their seed": finished(tmp_path / "c", 1, metrics, "reader.passages=1"),
    }
    for message, other in cases.items():
        with pytest.raises(SystemExit):
            rag_seeds.main([str(first), str(other), "--results", str(tmp_path / "out")])
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
