"""Eight tasks: what is made of classification data, and that an adapter is trained once for each config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import lora_many
from common.config import resolve, to_yaml
from common.errors import ProjectError
from lora.config import Config
from tests.helpers import ROOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A little of two datasets."""
    root = tmp_path / "data"
    (root / "sst2").mkdir(parents=True)
    for name, text in (("train", "a fine film\t1\na dull one\t0\n"), ("dev", "so so\t0\n"), ("test", "great\t1\n")):
        (root / "sst2" / f"{name}.tsv").write_text(text)
    (root / "pubmedqa").mkdir()
    paper = {"QUESTION": "Does it help?", "CONTEXTS": ["It may.", "It did."], "final_decision": "maybe"}
    (root / "pubmedqa" / "ori_pqal.json").write_text(json.dumps({"1": paper}))
    return root


def test_classes_become_words(data: Path) -> None:
    rows = lora_many.MADE["sst2"](str(data))
    assert [row["output"] for row in rows] == ["yes", "no", "yes"]
    assert rows[0]["instruction"] == "Does the reviewer like the film?\na fine film"
    assert lora_many.MADE["pubmedqa"](str(data)) == [
        {"instruction": "Does it help?", "input": "It may. It did.", "output": "maybe"}
    ]


def test_missing_papers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="put ori_pqal"):
        lora_many.MADE["pubmedqa"](str(tmp_path))


def test_an_adapter_is_trained_once_for_each_config(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA_ROOT", str(data))
    monkeypatch.setattr(lora_many, "TASKS", {"e2e": lora_many.TASKS["e2e"], "sst2": []})
    started: list[str] = []

    def command(arguments: list[str], threads: int) -> float:
        program, rest = arguments[1], arguments[2:]
        if program == "lora.train":
            words = [word for word in rest if "=" in word]
            config = resolve(Config, Path(lora_many.CONFIG), words)
            started.append(Path(config.run_dir).name)
            (Path(config.run_dir) / "adapter").mkdir(parents=True, exist_ok=True)
            (Path(config.run_dir) / "config.yaml").write_text(to_yaml(config))
        else:
            started.append(program)
            folder = Path(rest[1])
            (folder / "routing.json").write_text(json.dumps({"metrics": {"routing_accuracy": 1.0}}))
            (folder / "routing.csv").write_text("prompts_of,number\ne2e,10\n")
        return 1.0

    monkeypatch.setattr(lora_many, "command", command)
    arguments = ["--tiny", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    lora_many.main(arguments)
    lora_many.main(arguments)
    assert started == ["e2e", "sst2", "lora.many", "lora.many"]
    lora_many.main([*arguments, "train.lr=0.5"])  # another config
    assert started[4:] == ["e2e", "sst2", "lora.many"]
    result = json.loads((tmp_path / "results" / "many.json").read_text())
    assert result["metrics"]["routing_accuracy"] == 1.0 and result["routes"][1] == "e2e,10"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
