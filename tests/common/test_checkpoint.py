"""Checkpoints under attack: kill -9, flipped bits, cut files, full disks, read-only folders, pickles with a will of
their own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import signal
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.checkpoint import CheckpointError, Checkpoints, export_weights, verify
from common.errors import ProjectError
from common.files import TEMPORARY, atomic_open, sha256, write_text
from tests.helpers import read_only, small_disk


def state_of(step: int, numbers: int = 4000) -> dict:
    """A state that only this step has, so that a mixture of two would show."""
    return {
        "step": step,
        "parts": {"weight": torch.full((numbers,), float(step)), "betas": (0.9, 0.999), "name": "unet"},
    }


def is_state_of(step: int, state: dict) -> bool:
    return (
        state["step"] == step
        and bool((state["parts"]["weight"] == step).all())
        and state["parts"]["betas"] == (0.9, 0.999)
    )


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.stem) for path in checkpoints.list()]


def forge_manifest(path: Path) -> None:
    """Give any file a manifest that is valid for it."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest = {"file": path.name, "step": int(path.stem), "bytes": len(content), "sha256": digest, "best": False}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(manifest | {"manifest_sha256": digest}))
    verify(path)


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    return checkpoints


def test_round_trip(saved):
    assert steps(saved) == [1, 2] and saved.newest_step() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_state_of(2, saved.load_newest())
        assert is_state_of(1, saved.load(saved.path(1)))
    manifest = json.loads(saved.path(2).with_suffix(".json").read_text())
    assert manifest["step"] == 2
    assert manifest["sha256"] == hashlib.sha256(saved.path(2).read_bytes()).hexdigest()


def test_empty_folder(tmp_path):
    assert Checkpoints(tmp_path / "none").load_newest() is None
    assert Checkpoints(tmp_path).newest_step() is None


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(saved):
    path, rng = saved.path(2), random.Random(0)
    content = path.read_bytes()
    for _ in range(200):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            saved.load(path)
    path.write_bytes(content)
    assert is_state_of(2, saved.load(path))


def test_every_truncation_is_noticed(saved):
    path, rng = saved.path(2), random.Random(1)
    content = path.read_bytes()
    for length in [0, 1, len(content) - 1, *(rng.randrange(len(content)) for _ in range(197))]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            saved.load(path)


def test_every_damage_to_the_manifest_is_noticed(saved):
    path, rng = saved.path(2), random.Random(2)
    manifest = path.with_suffix(".json")
    content = manifest.read_bytes()
    for _ in range(200):
        place, bit = rng.randrange(len(content) - 1), rng.randrange(8)
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            saved.load(path)
    for length in range(len(content) - 1):  # only the newline at the end may go
        manifest.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            saved.load(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "manifest of another"])
def test_newest_broken_falls_back_with_one_warning(saved, damage):
    path = saved.path(2)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:100])
    elif damage == "no manifest":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_bytes(saved.path(1).with_suffix(".json").read_bytes())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert is_state_of(1, saved.load_newest())
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_all_broken_gives_nothing_and_a_warning_for_each(saved):
    for step in (1, 2):
        saved.path(step).write_bytes(b"broken")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert saved.load_newest() is None
    assert len(caught) == 2


def test_a_broken_newer_checkpoint_never_costs_a_good_one(tmp_path):
    """A run that fell back to step 10 goes on, and saves steps below the broken one."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(20, state_of(20))
    content = checkpoints.path(20).read_bytes()
    checkpoints.path(20).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for step in (10, 15):
        checkpoints.save(step, state_of(step))
        assert is_state_of(step, checkpoints.load(checkpoints.path(step)))
    checkpoints.save(20, state_of(20))  # the broken one is written anew
    assert is_state_of(20, checkpoints.load_newest())


def test_a_disk_that_cannot_be_read_is_a_broken_checkpoint(saved, monkeypatch):
    read = checkpoint.sha256

    def failing(path):
        if path == saved.path(2):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    with pytest.warns(UserWarning, match="Input/output error"):
        assert is_state_of(1, saved.load_newest())


# -- what must not run -------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("wrapping", ["plain pickle", "torch.save"])
@pytest.mark.parametrize("forged", [False, True])
def test_malicious_pickle_is_not_executed(saved, tmp_path, wrapping, forged):
    mark, path = tmp_path / "executed", saved.path(3)
    if wrapping == "torch.save":
        torch.save({"step": 3, "parts": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(mark)))
    if forged:
        forge_manifest(path)
    with pytest.raises(CheckpointError):
        saved.load(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert is_state_of(2, saved.load_newest())
    # torch may have its own to say
    assert sum("trying the one before" in str(warning.message) for warning in caught) == 1
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))  # noqa: S301 - the trap is a real one
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"x", b"\x80\x04K\x01.", b"PK\x03\x04 not a zip"),
        pytest.param(random.Random(0).randbytes(2000), id="noise"),  # pytest-xdist wants the same name everywhere
        b"\x80\x02j\x01\x00\x00\x00.",  # asks for something that nobody has remembered: a KeyError of torch's
    ],
)
def test_rubbish_with_a_valid_manifest_is_an_error_of_ours(saved, content):
    saved.path(3).write_bytes(content)
    forge_manifest(saved.path(3))
    with pytest.raises(CheckpointError):
        saved.load(saved.path(3))


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_pruning_keeps_last_best_and_every_kth(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=10)
    for step in range(1, 26):
        checkpoints.save(step, state_of(step, 4), best=step in (3, 7))
    assert steps(checkpoints) == [7, 10, 20, 24, 25]
    assert sorted(int(path.stem) for path in tmp_path.glob("*.json")) == [7, 10, 20, 24, 25]
    assert all(is_state_of(step, checkpoints.load(checkpoints.path(step))) for step in steps(checkpoints))


def test_new_is_written_before_old_is_deleted(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, state_of(1))
    unlink, deleted = Path.unlink, []

    def watch(path, missing_ok=False):
        if path.suffix == ".pt" and not path.name.startswith(TEMPORARY) and path.exists():
            deleted.append(path.name)
            verify(checkpoints.path(2))  # the new one is whole at this moment
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watch)
    checkpoints.save(2, state_of(2))
    assert deleted == ["00000001.pt"] and steps(checkpoints) == [2]


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def save_until_killed(folder: Path, first: int, pipe: int) -> None:
    """The body of a child process: save as fast as possible, and tell the parent of each finished save."""
    checkpoints = Checkpoints(folder)
    checkpoints.clean()
    for step in range(first, first + 10_000):
        checkpoints.save(step, state_of(step, 200_000))
        os.write(pipe, b".")


def test_kill_9_at_40_moments(tmp_path):
    rng, interrupted, newest = random.Random(0), 0, 0
    checkpoints = Checkpoints(tmp_path)
    for _ in range(40):
        reader, writer = os.pipe()
        child = os.fork()  # not a new interpreter: 40 times importing PyTorch would take minutes
        if child == 0:
            try:
                save_until_killed(tmp_path, newest + 1, writer)
            finally:
                os._exit(1)
        os.close(writer)
        os.read(reader, 1)  # at least one save
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        finished = newest + 1 + len(os.read(reader, 10_000))
        os.close(reader)

        interrupted += any(tmp_path.glob(f"{TEMPORARY}*")) or any(
            not path.with_suffix(".json").exists() for path in checkpoints.list()
        )
        for path in checkpoints.list():
            if path.with_suffix(".json").exists():
                verify(path)  # a checkpoint that has its manifest is whole
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a data file without manifest
            state = checkpoints.load_newest()
        assert state["step"] >= finished, "a finished save was lost"
        assert is_state_of(state["step"], state)
        newest = state["step"]
        checkpoints.clean()
        assert not any(tmp_path.glob(f"{TEMPORARY}*"))
    assert interrupted >= 5, "hardly any kill hit a save: this test has tested nothing"


def test_interrupted_saves_do_not_pile_up(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.path(step).write_bytes(b"half")
    for step in (4, 5):
        checkpoints.save(step, state_of(step))
    assert steps(checkpoints) == [4, 5]


# -- disks -------------------------------------------------------------------------------------------------------------


def test_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(1, state_of(1))
        for numbers in (1_000_000, 255_000, 100_000):  # too large; too large for its manifest; fits
            if numbers > 200_000:
                with pytest.raises(ProjectError, match=r"cannot write .*00000002\.(pt|json): No space left on device"):
                    checkpoints.save(2, state_of(2, numbers))
                assert not any(folder.glob(f"{TEMPORARY}*")), "the space must be free again"
                assert checkpoints.newest_step() == 1
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a data file without manifest
                    assert is_state_of(1, checkpoints.load_newest())
            else:
                checkpoints.save(2, state_of(2, numbers))
                assert is_state_of(2, checkpoints.load_newest())


def test_read_only_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state_of(1))
    with read_only(tmp_path):
        with pytest.raises(ProjectError, match=r"cannot write .*00000002\.pt"):
            checkpoints.save(2, state_of(2))
        assert is_state_of(1, checkpoints.load_newest())
    assert steps(checkpoints) == [1]


# -- files -------------------------------------------------------------------------------------------------------------


def test_atomic_open_leaves_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "deep/er/file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_open(path) as file:
            file.write(b"new, but")
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_export_weights(tmp_path):
    from safetensors import safe_open

    weights = {"a": torch.randn(3, 4).t(), "b": torch.arange(5)}  # the first is not contiguous
    export_weights(tmp_path / "model.safetensors", weights, {"step": "7"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7" and len(file.metadata()["sha256"]) == 64
        assert all(torch.equal(file.get_tensor(name), weights[name]) for name in weights)


# -- exported weights, bombs -------------------------------------------------------------------------------------------


def test_damage_in_exported_weights_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {"b": torch.randn(40), "a": torch.randn(3, 4).to(torch.bfloat16), "n": torch.tensor(7)}
    checkpoint.export_weights(path, weights, {"step": "3"})
    read, metadata = checkpoint.read_weights(path)
    assert metadata["step"] == "3" and all(torch.equal(read[name], weights[name]) for name in weights)
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        place = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read, metadata = checkpoint.read_weights(path)
        except checkpoint.CheckpointError:
            continue
        # a flipped bit in the name of the hash itself changes neither weight nor note
        assert all(torch.equal(read[name], weights[name]) for name in weights), place
        assert metadata["step"] == "3", place


def test_a_changed_note_beside_exported_weights_is_noticed(tmp_path):
    """The step that they are of, for one; a file whose hash is of the weights alone, as earlier ones, is read."""
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    weights = {"a": torch.randn(3, 4)}
    checkpoint.export_weights(path, weights, {"step": "3"})
    path.write_bytes(path.read_bytes().replace(b'"step":"3"', b'"step":"7"'))
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.read_weights(path)
    save_file(weights, path, {"step": "3", "sha256": checkpoint.weights_hash(weights)})
    assert checkpoint.read_weights(path)[1]["step"] == "3"


def test_weights_of_others_have_no_hash(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert checkpoint.read_weights(tmp_path / "w.safetensors")[0]["w"].tolist() == [1, 1]
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.read_weights(tmp_path / "none.safetensors")


def test_a_bomb_is_not_unpacked(tmp_path):
    """A compressed archive, with a manifest that fits it."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    path = checkpoints.save(1, {"w": torch.zeros(1000, 1000)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    (tmp_path / "bomb").replace(path)
    manifest = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest | {"manifest_sha256": checkpoint._digest(manifest)}))
    with pytest.raises(checkpoint.CheckpointError, match="compressed"):
        checkpoints.load(path)
