"""TensorBoard and Weights & Biases: the real clients write, and their files are read back. No network."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest

from common.logging import MetricLog, wandb_id

has_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs: pip install wandb")
has_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="needs: pip install tensorboard"
)
BLOCK, HEADER = 32768, 7  # bytes of LevelDB's log format, in which W&B writes


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, and no words."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(path: Path) -> list[bytes]:
    """The records of a LevelDB log: in blocks of 32 KB, parts of (checksum, length, kind), kinds 1 whole, 2 to 4
    first, middle and last.
    """
    data = path.read_bytes()
    found = []
    part = b""
    place = HEADER  # the file's own
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # too little room for a header: padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        part += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            found.append(part)
            part = b""
    return found


def tracked(folder: Path) -> list[tuple[str, list[dict[str, float]]]]:
    """Of each W&B file below a run folder, oldest first: the run's identity and what was logged."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        name = ""
        lines = []
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            name = record.run.run_id or name
            items = record.history.item
            lines += [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}] if items else []
        found.append((name, lines))
    return found


def test_the_identity_is_random_and_kept(tmp_path):
    names = [wandb_id(folder, fresh=True) for folder in (tmp_path / "a/000", tmp_path / "b/000")]
    assert names[0] != names[1] and all(len(name) == 16 for name in names)
    assert wandb_id(tmp_path / "a/000", fresh=False) == names[0]
    assert wandb_id(tmp_path / "a/000", fresh=True) != names[0], "a run that begins anew is another one"


@has_wandb
def test_wandb_keeps_what_a_run_logs_and_a_resumed_run_goes_on(tmp_path):
    import wandb

    for folder, first, last in (("a", 1, 3), ("a", 4, 5), ("b", 1, 1)):  # two sweeps, the first of which was stopped
        log = MetricLog(tmp_path / folder / "000", first, wandb="tests")
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / step})
        log.close()
    wandb.teardown()
    (begun, lines), (resumed, more) = tracked(tmp_path / "a/000")
    ((other, _),) = tracked(tmp_path / "b/000")
    assert begun == resumed and begun != other
    assert [(line["_step"], line["loss"]) for line in lines + more] == [(step, 1 / step) for step in range(1, 6)]


@has_tensorboard
def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 6), (4, 8)):  # the second resumes after the checkpoint of step 3
        log = MetricLog(tmp_path, first, tensorboard=True)
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / step + first})
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 9))
    assert [event.value for event in events] == pytest.approx([1 / s + (1 if s < 4 else 4) for s in range(1, 9)])


def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        MetricLog(tmp_path, wandb="tests")
