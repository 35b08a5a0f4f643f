"""`--overwrite` deletes an earlier run once the new one has been opened, and not before."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.common.runs import CONFIGS, train
from tests.helpers import errors


def earlier_run(folder: Path) -> dict[str, bytes]:
    """What stands for a run of yesterday; its content."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 7\n")
    (folder / "checkpoints/00000009.pt").write_bytes(b"hours of work")
    (folder / "checkpoints/00000009.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 9}\n')
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def refused(project: str, folder: Path, before: dict[str, bytes], capsys, *overrides: str) -> str:
    assert train(project, folder, *overrides, overwrite=True) == 1
    out = capsys.readouterr()
    assert "deleting" not in out.err
    assert contents(folder) == before
    (line,) = errors(out.err)
    return line


@pytest.mark.parametrize("project", CONFIGS)
def test_a_run_that_cannot_be_opened_deletes_nothing(project, tmp_path, monkeypatch, capsys):
    """Every project makes its optimizer after its data and its model."""
    before = earlier_run(tmp_path / "run")
    with monkeypatch.context() as context:

        def fail(*words: object, **kinds: object) -> None:
            raise MemoryError

        context.setattr(torch.optim.Optimizer, "__init__", fail)
        assert "out of memory" in refused(project, tmp_path / "run", before, capsys)
    assert train(project, tmp_path / "run", overwrite=True) == 0
    assert "deleting the run in" in capsys.readouterr().err
    assert "checkpoints/00000009.pt" not in contents(tmp_path / "run")


def too_many_files(*words: object, **kinds: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def test_environments_that_cannot_be_started(tmp_path, monkeypatch, capsys):
    before = earlier_run(tmp_path / "run")
    monkeypatch.setattr("ppo.environments.registry.AsyncVectorEnv", too_many_files)
    assert "env.count" in refused("ppo", tmp_path / "run", before, capsys, "env.backend=processes")


@pytest.mark.parametrize("project", ["diffusion", "vae"])
def test_processes_that_decode_cannot_be_started(project, tmp_path, monkeypatch, capsys):
    for i in range(60):
        pixels = np.full((8, 8), i, np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    before = earlier_run(tmp_path / "run")
    settings = [f"data.folder={tmp_path / 'images'}", "data.dataset=folder", "data.grey=true", "data.workers=2"]
    settings += ["data.max_images=0", "model.num_classes=0"] if project == "diffusion" else ["data.max_images=0"]
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", too_many_files)
    assert "data.workers" in refused(project, tmp_path / "run", before, capsys, *settings)


@pytest.mark.parametrize(("setting", "package"), [("tensorboard=true", "tensorboard"), ("wandb=mine", "wandb")])
def test_trackers_that_are_not_there(setting, package, tmp_path, monkeypatch, capsys):
    module = "torch.utils.tensorboard" if package == "tensorboard" else package
    monkeypatch.setitem(sys.modules, module, None)
    before = earlier_run(tmp_path / "run")
    assert f"pip install {package}" in refused("gnn", tmp_path / "run", before, capsys, setting)
