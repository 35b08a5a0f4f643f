"""Files whose names begin with a dot are nobody's data: unfinished ones, an editor's, a file server's."""

from __future__ import annotations

import pytest

from common import projects
from common.checkpoint import Checkpoints
from common.config import BaseConfig, Options, list_configs
from common.errors import ProjectError
from common.files import visible
from common.judges.inception import TruncatedInception
from common.provenance import output_hashes
from common.run import Run


def test_visible(tmp_path):
    for name in ("b.json", "a.json", ".tmp-9-c.json", ".hidden.json"):
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in visible(tmp_path, "*.json")] == ["a.json", "b.json"]
    assert visible(tmp_path / "absent", "*") == []


def test_the_lock_of_an_editor_beside_the_configs(tmp_path):
    """Emacs leaves a link to nowhere beside a file that is being changed."""
    (tmp_path / ".#mine.yaml").symlink_to("somebody@somewhere.1234")
    (tmp_path / "mine.yaml").write_text("# python -m diffusion.train --config mine.yaml\nseed: 1\n")
    assert list_configs("diffusion", tmp_path) == [str(tmp_path / "mine.yaml")]


def test_hidden_folders_are_no_projects(tmp_path, monkeypatch):
    for name in (".cache", "abacus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "train.py").touch()
    monkeypatch.setattr(projects, "ROOT", tmp_path)
    assert projects.find_projects() == ["abacus"]


def test_a_hidden_manifest_is_no_lost_run(tmp_path):
    config = BaseConfig(run_dir=str(tmp_path / "run"), device="cpu", precision="fp32")
    with Run.start(config, Options("train")) as run:
        run.begin()
    (tmp_path / "run/checkpoints/.00000005.json").write_text("{}")
    with Run.start(config, Options("train", resume=True)) as run:
        assert run.resume() == 0


@pytest.mark.parametrize("name", ["model.safetensors", "models/0000.safetensors", "eval.json"])
def test_a_result_that_was_cut_short_is_none(name, tmp_path):
    """The rest of an interrupted export must not stand in the way of the run that starts anew."""
    half = tmp_path / "run" / name
    half = half.with_name(f".tmp-9-{half.name}")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    with Run.start(BaseConfig(run_dir=str(tmp_path / "run"), device="cpu", precision="fp32"), Options("train")) as run:
        run.begin()
        assert not half.exists()
    half.write_bytes(b"half")
    assert output_hashes(tmp_path / "run", ["*", "models/*"]).keys() <= {"config.yaml", "env.json", "metrics.jsonl"}


def test_names_that_only_look_like_steps(tmp_path):
    (tmp_path / "²³.pt").touch()
    assert Checkpoints(tmp_path).list() == []


def test_a_temporary_that_is_a_folder_stays(tmp_path):
    config = BaseConfig(run_dir=str(tmp_path / "run"), device="cpu", precision="fp32")
    (tmp_path / "run/.tmp-mine").mkdir(parents=True)
    (tmp_path / "run/.tmp-mine/.tmp-1-x").touch()
    with Run.start(config, Options("train")) as run:
        run.begin()
        assert [path.name for path in (tmp_path / "run").rglob(".tmp-*")] == [".tmp-mine"]


def test_weights_that_came_only_half(tmp_path):
    (tmp_path / ".tmp-9-inception.safetensors").write_bytes(b"half")
    with pytest.raises(ProjectError, match="no Inception weights at"):
        TruncatedInception(tmp_path, "inception768")
