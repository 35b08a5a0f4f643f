"""The GPU campaign of gnn, rehearsed on a CPU: many seeds at once are what one by one would be, and every part
writes what it should.
"""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from bench.gpu import campaign, gnn
from bench.gpu.gnn_sage import Feed, Learner
from bench.gpu.gnn_seeds import BatchedGCN, Best, diagonal, losses, train_together
from common.config import ConfigError, resolve
from gnn.config import Config
from gnn.core.sparse import SparseFeatures
from gnn.node.minibatch_task import SampledNodeTask
from gnn.node.neighbours import epoch_batch
from gnn.tasks import build_task
from gnn.train import Best as BestOfOne
from gnn.train import start_trial
from tests.helpers import ROOT, status

CPU = torch.device("cpu")
KARATE, SOCIAL = ROOT / "configs/gcn_karate.yaml", ROOT / "configs/sage_social_1m.yaml"


def karate(*words):
    """The club's task, features sparse, and its config."""
    config = resolve(Config, KARATE, ["device=cpu", *words])
    task = build_task(config, CPU)
    task.build(0)
    return task, config


def run(tmp_path, *words):
    """Exit status of the program; results in tmp_path/work/results."""
    return status(gnn.main, [*words, "--tiny", "--work", str(tmp_path / "work")])


def one_alone(task, config, model):
    """`gnn.train`'s loop for one model: losses, step kept, test and validation accuracy with the weights that were
    kept.
    """
    optimizer, best, curve = task.optimizer(model), BestOfOne(), []
    for step in range(1, config.train.steps + 1):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        if step % config.train.validate_every == 0 or step == config.train.steps:
            if best.exhausted(step, config.train.patience):
                continue
            with torch.no_grad():
                best.update(task.validate(model.eval())["criterion"], step, model)
    model.load_state_dict(best.weights)
    with torch.no_grad():
        return curve, best.step, task.test(model.eval())


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float32, ()),
        (torch.float64, ()),
        (torch.float64, ("model.layers=2", "model.hidden=3", "train.validate_every=7")),
        (torch.float64, ("train.patience=3", "train.lr=0.1")),
    ],
    ids=["float32", "float64", "narrow", "patience"],
)
def test_each_of_many_seeds_is_the_one_that_would_be_trained_alone(dtype, words):
    """Copied initial weights, no dropout: the same loss curve, the same step kept, the same accuracies. Penalty,
    Adam and all.
    """
    torch.set_default_dtype(dtype)
    task, config = karate("model.dropout=0", "train.steps=60", "train.weight_decay=0.01", *words)
    alone = [start_trial(task, trial) for trial in range(4)]
    together = BatchedGCN(config.model, 4, task.graph.num_features, task.graph.num_classes)
    with torch.no_grad():
        for i, (weight, bias) in enumerate(zip(together.weights, together.biases)):
            weight.copy_(torch.stack([model.layers[i].weight for model in alone]))
            bias.copy_(torch.stack([model.layers[i].bias for model in alone])[:, None])
    rows, curve = train_together(task, 0, 4, together)
    for trial, (model, row) in enumerate(zip(alone, rows)):
        expected, step, found = one_alone(task, config, model)
        np.testing.assert_allclose(curve[:, trial], expected, atol=1e-5 if dtype == torch.float32 else 1e-10)
        assert (row["step"], row["seed"]) == (step, trial)
        assert row["test_accuracy"] == pytest.approx(found["test_accuracy"])
        assert row["val_accuracy"] == pytest.approx(found["val_accuracy"])
    assert len({tuple(column) for column in curve.T.tolist()}) == 4


def test_a_seed_that_has_ended_keeps_its_weights():
    """Patience 2: what comes three steps after the best one is too late, even if it is better; NaN is never better."""
    model = BatchedGCN(karate()[1].model, 3, 5, 4)
    best = Best(model, 2)
    for step, row in enumerate([(5, 5, math.nan), (6, 6, 2), (6, 4, math.nan), (1, 3, 1)], start=1):
        with torch.no_grad():
            model.biases[0].fill_(step)
        best.update(torch.tensor(row, dtype=torch.float32), step, model)
    best.restore(model)
    assert best.step.tolist() == [1, 4, 4]
    assert model.biases[0][:, 0, 0].tolist() == [1, 4, 4]


def test_dropout_and_initial_weights_are_each_seeds_own():
    """The same weights in all seeds, and dropout: losses differ, and their mean is that of single networks with the
    same weights.
    """
    task, config = karate("model.dropout=0.5", "model.layers=2")
    single = start_trial(task, 0).train()
    together = BatchedGCN(config.model, 400, task.graph.num_features, task.graph.num_classes).train()
    bounds = [weight.abs().max() for weight in together.weights]
    for bound, layer in zip(bounds, single.layers):
        limit = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.98 * limit < bound <= limit
    assert len(together.weights[0][:, 0, 0].unique()) == 400
    with torch.no_grad():
        for i, (weight, bias) in enumerate(zip(together.weights, together.biases)):
            weight.copy_(single.layers[i].weight.expand_as(weight))
            bias.copy_(single.layers[i].bias.expand_as(bias))
        assert isinstance(task.graph.features, SparseFeatures)
        logits = together(diagonal(task.graph.features, 400), diagonal(task.structure.gcn(), 400))
        many = losses(logits, task.graph.train, task.graph.labels[task.graph.train])
        few = torch.stack([task.loss(single, 1) for _ in range(400)])
    assert len(many.unique()) > 390
    error = ((many.var() + few.var()) / 400).sqrt()
    assert abs(many.mean() - few.mean()) < 4 * error
    assert many.std() == pytest.approx(float(few.std()), rel=0.3)


@pytest.mark.slow
def test_spread_over_seeds_is_that_of_the_project():
    """60 seeds of the club together: as gcn_karate.yaml states for `gnn.train`; another chunk has other numbers of
    the same kind.
    """
    task, _ = karate()
    first, curve = train_together(task, 0, 30)
    second, _ = train_together(task, 30, 30)
    accuracy = np.array([[row["test_accuracy"] for row in rows] for rows in (first, second)])
    assert accuracy.mean() == pytest.approx(0.907, abs=0.034)
    assert 0.01 < accuracy.std(ddof=1) < 0.09
    assert not np.array_equal(accuracy[0], accuracy[1])
    assert [row["seed"] for row in second] == list(range(30, 60))
    assert curve[-1].mean() < 0.5 * curve[0].mean()
    assert train_together(task, 0, 30)[0] == first


@pytest.mark.parametrize("word", ["model.layer=gat", "model.norm=batch", "train.grad_clip=1", "data.split=random"])
def test_what_cannot_be_trained_together_is_refused(word):
    task, _ = karate(word, "model.hidden=32", "data.train_per_class=1", "data.val_per_class=1")
    with pytest.raises(ConfigError):
        train_together(task, 0, 2)


@pytest.mark.slow
def test_seeds_part(tmp_path, capsys):
    """Statistics, a row a seed, a picture, and the comparison; a second call trains no seed again, and nothing lands
    in docs/.
    """
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert run(tmp_path, "seeds") == 0
    out = tmp_path / "work/results"
    result = json.loads((out / "seeds_gcn_karate.json").read_text())
    with (out / "seeds_gcn_karate.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = result["metrics"]
    assert result["seeds"] == len(rows) == 24
    assert metrics["test_accuracy"] == pytest.approx(np.mean([float(row["test_accuracy"]) for row in rows]))
    assert (
        metrics["test_accuracy_min"]
        <= metrics["test_accuracy_q05"]
        <= metrics["test_accuracy_q95"]
        <= metrics["test_accuracy_max"]
    )
    assert metrics["test_accuracy_error"] == pytest.approx(metrics["test_accuracy_std"] / 24**0.5)
    assert result["one_by_one"]["cpu"]["seeds_per_second"] > 0
    assert result["facts"]["torch"] == torch.__version__
    with Image.open(out / "seeds_gcn_karate.png") as picture:
        assert picture.size == (800, 450)
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs").rglob("*") if path.is_file()} == before
    assert "24 of 24 seeds" in capsys.readouterr().out


def test_seeds_that_are_there_are_not_trained_again(tmp_path, monkeypatch):
    """Out of time after one chunk: status 75; the same command trains the other chunk only."""
    trained = []

    def fake(task, first, count):
        trained.append((first, count))
        return [
            {"seed": first + i, "step": 1, "test_accuracy": 0.5, "val_accuracy": 0.5} for i in range(count)
        ], torch.zeros(1)

    monkeypatch.setattr(gnn, "train_together", fake)
    monkeypatch.setattr(gnn, "one_by_one", lambda args, device, seconds: None)
    assert run(tmp_path, "seeds", "--minutes", "0") == campaign.UNFINISHED
    assert run(tmp_path, "seeds") == 0
    assert run(tmp_path, "seeds") == 0
    assert trained == [(0, 12), (12, 12)]


@pytest.mark.slow
def test_sage_part(tmp_path):
    """One row, sane; what is there is not measured again; a size for which no time is left is not begun."""
    assert run(tmp_path, "sage") == 0
    path = tmp_path / "work/results/sage.json"
    (row,) = json.loads(path.read_text())["rows"]
    assert row["place"] == "cpu"
    assert row["edges_per_s"] > 0
    assert 0 <= row["waiting"] <= 1
    assert row["edges"] <= row["edges_drawn"] == gnn.TINY_EDGES
    assert all(row[name] > 0 for name in ("sample_ms", "copy_ms", "step_ms", "host_peak_gib"))
    assert row["last_loss"] < row["first_loss"]
    content = path.read_bytes()
    assert run(tmp_path, "sage") == 0
    assert path.read_bytes() == content
    (tmp_path / "work/sage.json").unlink()
    assert run(tmp_path, "sage", "--minutes", "0") == campaign.UNFINISHED
    assert gnn.generation_seconds([{"edges_drawn": 100, "generate_s": 2.0}], 1000) == pytest.approx(30)


def test_a_step_learns_from_the_batch_that_gnn_train_would_make():
    """Whichever thread makes it, and whether features come along or lie on the device: seeds, neighbours, loss."""
    config = resolve(
        Config,
        SOCIAL,
        [
            "device=cpu",
            "synthetic.nodes=600",
            "synthetic.edges=6000",
            "model.dropout=0",
            "train.batch_size=32",
            "sampling.fanouts=[4,4]",
            "synthetic.train_share=0.2",
        ],
    )
    task = build_task(config, CPU)
    assert isinstance(task, SampledNodeTask)
    loss = {}
    for name, gather in (("host", True), ("resident", False)):
        learner, feed = Learner(task, CPU, resident=not gather), Feed(task, 32, 3, gather, pin=False)
        batches = feed.batches(1)
        loss[name] = []
        for step in range(1, 9):  # two epochs and more
            batch = next(batches)
            assert torch.equal(feed.seeds(step), epoch_batch(task.graph.train, 32, task.seed, step))
            x, _, _, labels = task_batch = (
                task.neighbor_batch(step) if task.ahead else (task.start_batches(), task.neighbor_batch(step))[1]
            )
            assert torch.equal(batch.labels, labels)
            assert torch.equal(batch.source if gather else task.graph.features[batch.source], x)
            assert torch.equal(batch.blocks[0][1], task_batch[1][0].pattern.indices)
            loss[name].append(float(learner.step(learner.receive(batch))))
        batches.close()
        feed.close()
    assert loss["host"] == loss["resident"]
    assert loss["host"][-1] < loss["host"][0]
