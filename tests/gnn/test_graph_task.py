"""Cross-validation of whole graphs: splits, both protocols from files to eval.json, resume, two processes, canaries."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import ConfigError, Options
from common.errors import ProjectError
from gnn.config import Config, DataConfig, GraphConfig, ModelConfig, TrainConfig
from gnn.eval import main as evaluate
from gnn.train import train
from gnn.whole_graph.task import GraphTask, best_common_epoch
from tests.helpers import ROOT, two_processes

DATA = Path(os.environ.get("DATA_ROOT") or ROOT / "data")


def write_tu(root: Path, count: int = 40, labelled: bool = True) -> None:
    """A collection in the TU format: rings (class 0) and paths (class 1) of 5 to 9 nodes."""
    raw = root / "TUDataset/TOY/raw"
    raw.mkdir(parents=True)
    edges, owner, labels, kinds, first = [], [], [], [], 1
    for g in range(count):
        n = 5 + g % 5
        pairs = [(first + i, first + (i + 1) % n) for i in range(n if g % 2 == 0 else n - 1)]
        edges += [f"{a}, {b}" for u, v in pairs for a, b in ((u, v), (v, u))]
        owner += [str(g + 1)] * n
        kinds += ["0"] * (n - 1) + ["1"]
        labels.append(str(g % 2))
        first += n
    files = {"A": edges, "graph_indicator": owner, "graph_labels": labels} | (
        {"node_labels": kinds} if labelled else {}
    )
    for name, lines in files.items():
        (raw / f"TOY_{name}.txt").write_text("\n".join(lines) + "\n")


def toy(tmp_path: Path, **sections: object) -> Config:
    """The config of a few seconds' run on the toy collection."""
    if not (tmp_path / "TUDataset").exists():
        write_tu(tmp_path)
    parts = {
        "data": DataConfig(dataset="tu", name="TOY"),
        "graph": GraphConfig(folds=3, protocol="honest", validation=0.25),
        "model": ModelConfig(layer="gin", hidden=8, layers=2, norm="batch", dropout=0.0),
        "train": TrainConfig(steps=6, batch_size=8, weight_decay=0.0, validate_every=2, log_every=2),
    }
    return Config(
        task="graph", run_dir=str(tmp_path / "run"), data_root=str(tmp_path), device="cpu", **(parts | sections)
    )


def result_of(config: Config) -> dict:
    return json.loads((Path(config.run_dir) / "eval.json").read_text())


@pytest.mark.parametrize("protocol", ["honest", "gin"])
def test_splits(tmp_path, protocol):
    config = toy(tmp_path, graph=GraphConfig(folds=4, protocol=protocol), train=TrainConfig(seeds=2, log_every=1))
    task = GraphTask(config, torch.device("cpu"))
    assert task.num_trials == 8 and len(task.whole) == 40
    for repetition in (0, 1):
        held = []
        for f in range(4):
            train_ids, val, test = task.split(4 * repetition + f)
            # complete, and so disjoint
            assert sorted([*train_ids.tolist(), *val.tolist(), *test.tolist()]) == list(range(40))
            assert len(val) == (0 if protocol == "gin" else 3)
            held += test.tolist()
        assert sorted(held) == list(range(40))
    assert task.split(0)[2].tolist() != task.split(4)[2].tolist()  # another repetition, other folds


def test_features_are_node_labels_or_degrees(tmp_path):
    assert GraphTask(toy(tmp_path), torch.device("cpu")).whole.features.shape[1] == 2
    write_tu(tmp_path / "plain", labelled=False)
    config = dataclasses.replace(toy(tmp_path), data_root=str(tmp_path / "plain"))
    task = GraphTask(config, torch.device("cpu"))
    assert torch.equal(task.whole.features.argmax(dim=1), task.whole.degree)


def test_honest_training_never_sees_the_held_out_fold(tmp_path):
    """With other labels on the held-out graphs, every trained weight is bit for bit the same."""
    weights = []
    for flip in (False, True):
        config = toy(tmp_path, model=ModelConfig(layer="gin", hidden=8, layers=2, norm="batch"))
        task = GraphTask(config, torch.device("cpu"))
        torch.manual_seed(0)
        _, _, test = task.split(0)
        if flip:
            fixed = task.split  # the folds are those of the true labels
            splits = [fixed(t) for t in range(3)]
            task.split = lambda trial, splits=splits: splits[trial]
            task.graphs.labels[test] = 1 - task.graphs.labels[test]
        model = task.build(0)
        optimizer = task.optimizer(model)
        for step in range(1, 6):
            torch.manual_seed(step)
            optimizer.zero_grad()
            task.loss(model.train(), step).backward()
            optimizer.step()
            with torch.no_grad():
                criterion = task.validate(model.eval())["criterion"]
        weights.append([*model.state_dict().values(), torch.tensor(criterion)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("by", ["loss", "accuracy"])
def test_what_chooses_the_weights(tmp_path, by):
    """One network is right more often, the other less often but with a lower loss."""
    task = GraphTask(toy(tmp_path, graph=GraphConfig(folds=2, choose_by=by)), torch.device("cpu"))
    task.build(0)
    sign = torch.nn.functional.one_hot(task.held.labels, 2) * 2.0 - 1
    often, sure = sign * 0.1, sign * 5
    often[0] *= -200  # sure and wrong
    sure[:2] *= -0.02  # wrong, hardly
    found = {
        name: task.validate(lambda batch, logits=logits: logits) for name, logits in (("often", often), ("sure", sure))
    }
    assert (
        found["often"]["val_accuracy"] > found["sure"]["val_accuracy"]
        and found["often"]["val_loss"] > found["sure"]["val_loss"]
    )
    assert min(found, key=lambda name: found[name]["criterion"]) == ("sure" if by == "loss" else "often")


def test_honest_run(tmp_path):
    """From files to eval.json: rings and paths differ in their edges alone, so GIN learns what counts of labels
    cannot tell.
    """
    config = toy(tmp_path, train=TrainConfig(steps=60, batch_size=16, weight_decay=0.0, validate_every=5, log_every=5))
    train(config, Options("train"))
    evaluate(config, Options("eval"))
    metrics = result_of(config)["metrics"]
    assert metrics["test_accuracy"] > 0.9 > metrics["test_accuracy_label_counts"]
    assert {"test_accuracy_std", "test_macro_f1", "val_accuracy", "test_accuracy_majority"} <= set(metrics)
    assert not any("best_epoch" in name for name in metrics)
    assert sorted(p.name for p in (tmp_path / "run/figures").iterdir()) == [
        "confusion.png",
        "curves.png",
        "embedding.png",
        "folds.png",
    ]


def test_gin_protocol(tmp_path):
    """The reported figure is the log's best common step; that of the last step is what the kept weights give."""
    config = toy(
        tmp_path,
        graph=GraphConfig(folds=3, protocol="gin"),
        train=TrainConfig(steps=8, batch_size=8, seeds=2, lr=0.003, validate_every=2, log_every=2),
    )
    train(config, Options("train"))
    evaluate(dataclasses.replace(config, eval=dataclasses.replace(config.eval, figures=False)), Options("eval"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    table = np.array([line["val_accuracy"] for line in lines]).reshape(2, 3, 4)  # repetition, fold, validation
    metrics = result_of(config)["metrics"]
    assert metrics["cv_accuracy_best_epoch"] == pytest.approx(table.mean(axis=1).max(axis=1).mean(), abs=1e-9)
    assert metrics["cv_accuracy_last_epoch"] == pytest.approx(table[:, :, -1].mean(), abs=1e-9)
    assert metrics["cv_accuracy_best_epoch"] >= metrics["cv_accuracy_last_epoch"]
    assert "test_accuracy" not in metrics


def test_the_best_common_epoch():
    logged = {0: {1: 0.5, 2: 0.9, 3: 0.7}, 1: {1: 0.9, 2: 0.5, 3: 0.8}, 2: {1: 1.0, 2: 0.0, 3: 0.0}}
    assert best_common_epoch(logged, 0, 2) == {0: 0.7, 1: 0.8}
    assert best_common_epoch(logged, 1, 2) == {2: 1.0}
    with pytest.raises(ProjectError, match="no validation step"):
        best_common_epoch({0: {1: 0.5}, 1: {2: 0.5}}, 0, 2)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": TrainConfig(steps=10, log_every=2)}, "train.log_every"),
        ({"train": TrainConfig(steps=9, log_every=2, validate_every=2)}, "train.steps"),
        ({"train": TrainConfig(steps=10, log_every=1, patience=3)}, "train.patience"),
    ],
)
def test_gin_protocol_needs_common_epochs(tmp_path, sections, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        GraphTask(toy(tmp_path, graph=GraphConfig(protocol="gin"), **sections), torch.device("cpu"))


def test_too_many_folds_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"graph\.folds.*only 20 graphs"):
        GraphTask(toy(tmp_path, graph=GraphConfig(folds=30)), torch.device("cpu"))
    raw = tmp_path / "TUDataset/TOY/raw/TOY_graph_labels.txt"
    raw.write_text("0.25\n" * 40)
    for file in (tmp_path / "TUDataset/TOY/processed").iterdir():
        file.unlink()
    with pytest.raises(ProjectError):
        GraphTask(toy(tmp_path), torch.device("cpu"))


def test_resumed_run_is_the_same_run(tmp_path):
    """Stopped in the middle of the second fold: every weight and every log line is as without the stop."""
    whole = toy(tmp_path, train=TrainConfig(steps=6, batch_size=8, validate_every=2, log_every=2, save_every=9))
    train(whole, Options("train"))
    cut = dataclasses.replace(whole, run_dir=str(tmp_path / "cut"))
    train(cut, Options("train"))
    for checkpoint in sorted((tmp_path / "cut/checkpoints").iterdir()):
        if "18" in checkpoint.name:
            checkpoint.unlink()
    for file in ("0001", "0002"):
        (tmp_path / f"cut/models/{file}.safetensors").unlink()
    train(cut, Options("train", resume=True))
    for t in range(3):
        a, b = (load_file(tmp_path / f"{name}/models/{t:04d}.safetensors") for name in ("run", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if "per_second" not in k and k != "time"}
            for line in (tmp_path / f"{name}/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("run", "cut")
    ]
    assert logs[0] == logs[1]


def test_two_processes(tmp_path):
    """Each takes half of every batch. Without batch norm, whose statistics are each process's own, the run is that
    of one process.
    """
    train(
        toy(
            tmp_path,
            graph=GraphConfig(folds=2),
            model=ModelConfig(layer="gin", hidden=8, dropout=0.0),
            train=TrainConfig(steps=4, batch_size=8, validate_every=2, log_every=2),
        ),
        Options("train"),
    )
    (tmp_path / "empty.yaml").write_text("seed: 0\n")
    settings = ["task=graph", "data.dataset=tu", "data.name=TOY", "graph.folds=2", "model.layer=gin", "model.hidden=8"]
    settings += ["model.dropout=0", "train.steps=4", "train.batch_size=8", "train.validate_every=2", "device=cpu"]
    settings += ["train.log_every=2", f"data_root={tmp_path}", f"run_dir={tmp_path / 'two'}"]
    two_processes("gnn.train", "--config", str(tmp_path / "empty.yaml"), *settings)
    for trial in ("0000", "0001"):
        one, two = (load_file(tmp_path / f"{name}/models/{trial}.safetensors") for name in ("run", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


# -- canaries ----------------------------------------------------------------------------------------------------------


def mutag(tmp_path: Path, **data: bool) -> GraphTask:
    """MUTAG with a small network, five folds."""
    if not (DATA / "TUDataset/MUTAG/raw/MUTAG_A.txt").is_file():
        pytest.skip("data/TUDataset/MUTAG is not there")
    config = toy(
        tmp_path,
        data=DataConfig(dataset="tu", name="MUTAG", **data),
        graph=GraphConfig(folds=5, readout_norm=True),
        model=ModelConfig(layer="gin", hidden=16, layers=2, norm="batch", dropout=0.5),
        train=TrainConfig(batch_size=32),
    )
    return GraphTask(dataclasses.replace(config, data_root=str(DATA)), torch.device("cpu"))


def cross_validated(task: GraphTask, steps: int) -> float:
    """Mean accuracy on the held-out folds of the weights chosen by the validation loss."""
    found = []
    for trial in range(task.num_trials):
        torch.manual_seed(trial)
        model = task.build(trial)
        optimizer, best = torch.optim.Adam(model.parameters(), lr=0.01), (np.inf, 0.0)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            task.loss(model.train(), step).backward()
            optimizer.step()
            if step % 10 == 0:
                with torch.no_grad():
                    best = min(best, (task.validate(model.eval())["criterion"], task.test(model)["test_accuracy"]))
        found.append(best[1])
    return float(np.mean(found))


def test_mutag_is_read_and_learned_but_not_from_shuffled_labels(tmp_path):
    task = mutag(tmp_path)
    assert (
        len(task.whole) == 188
        and task.whole.features.shape[1] == 7
        and torch.bincount(task.whole.labels).tolist() == [63, 125]
    )
    assert 0.78 < cross_validated(task, 100) < 0.95
    shuffled = cross_validated(mutag(tmp_path, shuffle_labels=True), 100)
    assert 0.53 < shuffled < 0.75, "about the majority's share, .665"
