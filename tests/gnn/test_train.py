"""The training program: seeds, exact resume, processes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import Checkpoints
from common.logging import read_metrics
from common.report import read_run
from gnn.task import Task
from gnn.train import Best
from tests.gnn.helpers import KARATE, config, evaluate, train
from tests.helpers import ROOT, command, environment, program, same, stop_in_check, two_processes

SMALL = ("train.steps=6", "train.seeds=3", "train.log_every=1", "eval.figures=false")


def weights(folder):
    return {path.name: load_file(path) for path in sorted((folder / "models").glob("*.safetensors"))}


def log(folder):
    return [
        {k: v for k, v in line.items() if k != "steps_per_second"} for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three seeds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(config(folder, *SMALL)) == 0
    return folder


def test_each_seed_is_the_run_of_that_seed_alone(whole, tmp_path):
    assert train(config(tmp_path / "run", *SMALL, "train.seeds=1", "seed=2")) == 0
    assert same(weights(tmp_path / "run")["0000.safetensors"], weights(whole)["0002.safetensors"])
    assert not same(weights(whole)["0000.safetensors"], weights(whole)["0001.safetensors"])
    assert [line["step"] for line in log(whole)] == list(range(1, 19))


@pytest.mark.parametrize("steps", [(4,), (6,), (8, 9)], ids=["in a seed", "between seeds", "twice"])
def test_resume_is_exact(steps, whole, tmp_path, monkeypatch):
    """Stopped by a real SIGTERM in the middle of a seed, at its end, and twice in a row: every later number is the
    same.
    """
    stop_in_check(monkeypatch, *steps)
    folder = tmp_path / "run"
    for i in range(len(steps)):
        assert train(config(folder, *SMALL), resume=i > 0) == 143
    assert train(config(folder, *SMALL), resume=True) == 0
    assert same(weights(folder), weights(whole))
    assert log(folder) == log(whole)


@pytest.mark.parametrize("stop", [5, 10], ids=["between validations", "in the second seed"])
def test_a_resumed_log_repeats_the_last_validation(stop, tmp_path, monkeypatch):
    """A line between two validations has the values of the latest one of its seed, also after --resume; a seed's first
    lines have none of the seed before it.
    """
    rare = (*SMALL, "train.validate_every=4")
    assert train(config(tmp_path / "whole", *rare)) == 0
    lines = {line["step"]: line for line in log(tmp_path / "whole")}
    assert "val_loss" not in lines[1] and lines[5]["val_loss"] == lines[4]["val_loss"]
    assert "val_loss" not in lines[7]
    stop_in_check(monkeypatch, stop)
    assert train(config(tmp_path / "run", *rare)) == 143
    assert train(config(tmp_path / "run", *rare), resume=True) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_patience_ends_a_seed_and_keeps_its_best(tmp_path):
    folder = tmp_path / "run"
    assert (
        train(
            config(folder, "train.steps=300", "train.seeds=2", "train.patience=5", "train.log_every=1", "train.lr=0.3")
        )
        == 0
    )
    steps = {line["step"] for line in log(folder)}
    assert 300 not in steps, "the first seed should have ended early with such a learning rate"
    assert 301 in steps, "the second seed starts at its own first step"
    assert len(weights(folder)) == 2


def test_best_weights_are_copies_of_the_lowest_criterion():
    model, best = torch.nn.Linear(2, 2), Best()
    with torch.no_grad():
        for step, criterion in enumerate([float("nan"), 3.0, 1.0, 2.0], 1):
            model.weight.fill_(step)
            best.update(criterion, step, model)
    assert best.step == 3
    assert (best.weights["weight"] == 3).all()
    again = Best()
    again.load_state_dict(best.state_dict())
    assert (again.criterion, again.step) == (1.0, 3)
    assert not best.exhausted(13, 10)
    assert best.exhausted(14, 10)
    assert not best.exhausted(10**6, 0)


def test_nan_in_the_loss_names_the_step(tmp_path, monkeypatch, capsys):
    from gnn.node.task import NodeTask

    loss = NodeTask.loss
    monkeypatch.setattr(
        NodeTask, "loss", lambda self, net, step: loss(self, net, step) * (float("nan") if step == 4 else 1)
    )
    assert train(config(tmp_path / "run", *SMALL)) == 1
    assert "not finite at step 4" in capsys.readouterr().err


def test_two_processes_equal_one(tmp_path):
    """The whole graph is in every process and all draw alike, so more processes change nothing (and gain nothing)."""
    words = ["--config", str(KARATE), "precision=fp64", "device=cpu", *SMALL]
    two_processes("gnn.train", *words, f"run_dir={tmp_path / 'two'}")
    assert command("gnn", "train", *words, f"run_dir={tmp_path / 'one'}") == 0
    for name, parts in weights(tmp_path / "one").items():
        for key, value in parts.items():
            torch.testing.assert_close(weights(tmp_path / "two")[name][key], value, rtol=0, atol=1e-6)


PATIENT = ("train.steps=100000", "train.seeds=2", "train.patience=5", "train.log_every=1", "train.lr=0.3")


def test_processes_stop_together_after_a_seed_has_ended_early(tmp_path):
    """Patience has ended the first seed, its remaining steps do nothing, and one of two processes is told to stop: both
    leave within a step, and the run goes on from there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_dir = tmp_path / "run"
    words = ["-m", "gnn.train", "--config", str(KARATE), "device=cpu", *PATIENT, f"run_dir={run_dir}"]
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        wait_until_quiet(run_dir / "metrics.jsonl")
        assert [process.poll() for process in processes] == [None, None]
        processes[1].send_signal(signal.SIGTERM)  # not the one that writes
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes][1] == 143, said
    last = max(line["step"] for line in log(run_dir))
    saved = Checkpoints(run_dir / "checkpoints", 1).list()
    assert saved, said
    state = Checkpoints.load(max(saved))
    assert last + 5 < state["step"] < 100_000  # in the idle part of the first seed
    assert state["parts"]["kept"]["step"] == last - 5


def wait_until_quiet(path):
    """Until a log has lines and gets no more of them."""
    size, quiet = 0, 0
    for _ in range(2000):
        time.sleep(0.1)
        now = path.stat().st_size if path.exists() else 0
        quiet = quiet + 1 if now == size and now else 0
        size = now
        if quiet == 20:
            return
    pytest.fail(f"{path} does not come to rest")


def test_the_first_process_decides_what_is_kept(tmp_path):
    """Batch norm's running means differ between processes, and so does what they validate; the weights they keep, and
    the step at which patience ends a seed, do not.
    """
    model = ("sampling.kind=neighbors", "model.layer=sage", "model.norm=batch", "model.layers=2")
    training = ("train.batch_size=4", "train.steps=40", "train.patience=3", "train.lr=0.1", "train.seeds=2")
    run_dir = f"run_dir={tmp_path / 'two'}"
    two_processes("gnn.train", "--config", str(KARATE), "device=cpu", *model, *training, run_dir)
    assert len(weights(tmp_path / "two")) == 2


def test_commands_as_a_person_types_them(tmp_path):
    run_dir = f"run_dir={tmp_path / 'run'}"
    dry = program("gnn.train", "--config", "configs/gcn_karate.yaml", "--dry-run")
    assert dry.returncode == 0
    assert "34 nodes, 78 edges" in dry.stdout
    assert "parameters" in dry.stdout
    done = program("gnn.train", "--config", "configs/gcn_karate.yaml", *SMALL, run_dir)
    assert done.returncode == 0, done.stderr
    tested = program("gnn.eval", "--run", str(tmp_path / "run"))
    assert tested.returncode == 0, tested.stderr
    result = json.loads(tested.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "run/eval.json").read_text())
    assert result["project"] == "gnn"
    assert len(result["seeds"]) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer=gcm", "model.layer"),
        ("model.hiden=3", "model.hidden"),
        ("train.lr=fast", "train.lr"),
        ("model.dropout=1.5", "model.dropout"),
        ("precision=bf16", "precision"),
        ("task=nodes", "task"),
        ("data.dataset=tu", "data.name"),
        ("train.seeds=0", "train.seeds"),
        ("task=link sampling.kind=clusters", "sampling.kind"),
        ("data.dataset=files", "data.edges"),
        ("task=graph", "task"),
    ],
)
def test_bad_settings_are_one_line(override, message, capsys):
    assert command("gnn", "train", "--config", str(KARATE), *override.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_evaluation_without_weights_and_with_damaged_ones(tmp_path, capsys):
    made = config(tmp_path / "run", *SMALL)
    assert evaluate(made) == 1
    assert "no trained weights" in capsys.readouterr().err
    assert train(made) == 0
    path = tmp_path / "run/models/0001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert evaluate(made) == 1
    assert str(path) in capsys.readouterr().err
    path.write_bytes(data)
    assert evaluate(config(tmp_path / "run", *SMALL, "model.hidden=8")) == 1
    assert "not the weights of this config's model" in capsys.readouterr().err


def test_evaluation_of_a_run_that_is_not_finished(whole, tmp_path, capsys):
    """The seeds that there are count; the note says how many are missing."""
    folder = tmp_path / "run"
    (folder / "models").mkdir(parents=True)
    os.link(whole / "models/0001.safetensors", folder / "models/0001.safetensors")
    assert evaluate(config(folder, *SMALL)) == 0
    out = capsys.readouterr()
    assert "1 of 3 seeds" in out.err
    assert json.loads(out.out.splitlines()[-1])["seeds"] == [1]


def test_a_task_answers_for_its_seeds():
    task = Task(config(ROOT / "runs/none", "seed=7"), torch.device("cpu"))
    assert [task.seed_of(trial) for trial in range(3)] == [7, 8, 9]


def test_the_report_knows_how_many_steps_all_seeds_have(whole):
    view = read_run(whole)
    assert (view.done, view.total, view.status) == (18, 18, "complete")
