"""Weights, checkpoints and configs that are damaged, forged or somebody else's, given to each project's own evaluation:
one line and a status, never a traceback and never a result.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import Checkpoints, _digest, export_weights, read_weights
from common.config import load
from tests.common.runs import PROJECTS, WEIGHTS, trained_run
from tests.helpers import errors, schema_of, status

Damage = Callable[[Path], None]
pytestmark = pytest.mark.filterwarnings("ignore:.*trying the one before")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {project: trained_run(project, tmp_path_factory.mktemp(project)) for project in PROJECTS}


def evaluate(project: str, run: Path) -> int:
    """`python -m <project>.eval --run <run>` in this process; its exit status."""

    def program() -> None:
        main = importlib.import_module(f"{project}.eval").main
        main(*load(schema_of(project), project, "eval", ["--run", str(run)]))

    return status(program)


def refused(project: str, run: Path, capsys: pytest.CaptureFixture[str], expected: int = 1) -> str:
    """The one line that the evaluation ends with."""
    (run / "eval.json").unlink(missing_ok=True)
    assert evaluate(project, run) == expected
    out, err = capsys.readouterr()
    assert out == "", "a result was printed"
    assert not (run / "eval.json").exists()
    (line,) = errors(err)
    assert "--debug" not in line, "an error that nobody has thought of"
    return line


@pytest.mark.parametrize("project", PROJECTS)
def test_whole_runs_are_evaluated(runs, project, capsys):
    """The control: without damage there is a result."""
    assert evaluate(project, runs[project]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["project"] == project


# -- bytes -------------------------------------------------------------------------------------------------------------


def flip(place: float) -> Damage:
    """Flip a bit at this share of the file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(hashlib.shake_256(b"noise").digest(5000))


def huge_header(path: Path) -> None:
    """A safetensors header that says it has 2^62 bytes."""
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def huge_tensor(path: Path) -> None:
    """A safetensors file that declares a tensor of 10^15 numbers and holds none."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10**8, 10**7], "data_offsets": [0, 4 * 10**15]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


BYTES = [*map(flip, (0.0, 0.1, 0.5, 0.9, 1.0)), cut, empty, noise, huge_header, huge_tensor]


@pytest.mark.parametrize("project", PROJECTS)
def test_damaged_bytes(runs, project, tmp_path, capsys):
    for number, damage in enumerate(BYTES):
        run = shutil.copytree(runs[project], tmp_path / str(number))
        path = run / WEIGHTS[project]
        damage(path)
        line = refused(project, run, capsys)
        assert path.name in line or "no whole checkpoint" in line, number


# -- content, with hashes that fit -------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Change the tensors, and what is noted beside them, of a file of weights or of a checkpoint."""
    if path.suffix == ".pt":
        state = Checkpoints.load(path)
        change(state["parts"]["ema"], state)
        path.with_suffix(".json").unlink()
        Checkpoints(path.parent).save(int(path.stem), state)
    else:
        tensors, facts = read_weights(path)
        facts.pop("sha256", None)
        change(tensors, facts)
        export_weights(path, tensors, {name: str(value) for name, value in facts.items()})


def first(tensors: dict[str, torch.Tensor]) -> str:
    """A weight that has two dimensions."""
    return next(name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.ndim == 2)


def another_shape(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    tensors[first(tensors)] = torch.zeros(3, 5)


def a_scalar(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    tensors[first(tensors)] = torch.zeros(())


def one_missing(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    del tensors[first(tensors)]


def one_too_many(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    tensors["model.extra" if "model." in first(tensors) else "extra"] = torch.zeros(2)


def none_at_all(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    tensors.clear()


def unreadable_settings(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    facts["config"] = "model: {"


def settings_of_a_list(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    facts["config"] = "- 1\n- 2\n"


def no_step(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    for name in {"step", "update"} & set(facts):
        facts[name] = "soon"


def no_notes(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    for name in {"step", "update", "seed"} & set(facts):
        del facts[name]


CONTENT = [
    *(another_shape, a_scalar, one_missing, one_too_many, none_at_all),
    *(unreadable_settings, settings_of_a_list, no_step, no_notes),
]


@pytest.mark.parametrize("project", PROJECTS)
def test_forged_content(runs, project, tmp_path, capsys):
    for change in CONTENT:
        run = shutil.copytree(runs[project], tmp_path / change.__name__)
        rewrite(run / WEIGHTS[project], change)
        line = refused(project, run, capsys)
        assert "not" in line or "another" in line or "no policy" in line, line


@pytest.mark.parametrize(
    "forged",
    [{}, {"bytes": 10**18}, {"bytes": "many"}, {"bytes": None, "sha256": 5}, {"step": [1]}],
    ids=["nothing", "huge", "text", "none", "list"],
)
def test_forged_manifest(runs, forged, tmp_path, capsys):
    """Of vae alone, which evaluates checkpoints; the manifest's own hash fits."""
    run = shutil.copytree(runs["vae"], tmp_path / "run")
    path = (run / WEIGHTS["vae"]).with_suffix(".json")
    manifest = {} if not forged else json.loads(path.read_text()) | forged
    manifest.pop("manifest_sha256", None)
    if forged.get("step"):
        manifest["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest | {"manifest_sha256": _digest(manifest)}))
    assert "no whole checkpoint" in refused("vae", run, capsys)


def test_a_view_of_one_number_that_claims_to_be_huge(runs, tmp_path, capsys):
    """A tensor of 10^12 numbers that are all one and the same takes no room in a file; nothing makes room for it."""
    run = shutil.copytree(runs["vae"], tmp_path / "run")

    def widen(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        tensors[first(tensors)] = torch.zeros(1).expand(10**6, 10**6)

    rewrite(run / WEIGHTS["vae"], widen)
    assert "of another model" in refused("vae", run, capsys)


# -- the config --------------------------------------------------------------------------------------------------------


CONFIGS = {
    "bytes": b"\xff\xfe\x00\x01" * 50,
    "nothing": b"",
    "a list": b"- 1\n- 2\n",
    "cut": b"model: {hidden: [1",
    "another type": b"model: 3\n",
    "unknown": b"modle:\n  hidden: 3\n",
    "a tag": b"model: !!python/object/apply:os.system ['true']\n",
    "deep": b"a: " + b"{a: " * 900 + b"1" + b"}" * 900 + b"\n",
}


@pytest.mark.parametrize("project", PROJECTS)
def test_damaged_config(runs, project, tmp_path, capsys):
    for name, data in CONFIGS.items():
        run = shutil.copytree(runs[project], tmp_path / name)
        (run / "config.yaml").write_bytes(data)
        refused(project, run, capsys, expected=2)


HUGE = {"gnn": "model.hidden=200000", "ppo": "model.hidden=[200000,200000]", "vae": "model.hidden=[200000,200000]"}


@pytest.mark.parametrize("project", PROJECTS)
def test_a_model_of_any_declared_size_is_not_built_before_it_is_compared(runs, project, tmp_path, capsys, monkeypatch):
    """160 GB of weights: refused for what the weights are noted to be, not when memory has run out."""

    def never(*sizes: object, **kinds: object) -> None:
        pytest.fail("a network is built")

    run = shutil.copytree(runs[project], tmp_path / "run")
    key, value = HUGE[project].split("=")
    text = (run / "config.yaml").read_text()
    name = key.split(".")[1]
    start = text.index(f"  {name}:")
    stop = next(i for i in range(start + 4, len(text)) if text[i] == "\n" and text[i + 1 : i + 5].strip(" -") != "")
    while text[stop + 1 : stop + 5] == "  - ":
        stop = text.index("\n", stop + 1)
    (run / "config.yaml").write_text(f"{text[:start]}  {name}: {value}{text[stop:]}")
    monkeypatch.setattr(torch.nn.Linear, "__init__", never)
    assert name in refused(project, run, capsys)
