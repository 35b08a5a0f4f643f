"""`Run` alone, without a project: what a loop may rely on."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from common.config import BaseConfig, ConfigError, Options
from common.errors import ProjectError
from common.finite import NonFinite
from common.logging import read_metrics
from common.run import Run
from common.signals import Stopped


def start(tmp_path, *flags: str, **settings) -> Run:
    config = BaseConfig(**({"run_dir": str(tmp_path / "run"), "device": "cpu", "precision": "fp32"} | settings))
    return Run.start(config, Options("train", **dict.fromkeys(flags, True)))


def test_a_new_folder_holds_config_and_environment(tmp_path):
    with start(tmp_path, seed=3) as run:
        assert (run.rank, run.world, run.is_main, run.device.type) == (0, 1, True, "cpu")
    assert "seed: 3" in (tmp_path / "run/config.yaml").read_text()
    assert json.loads((tmp_path / "run/env.json").read_text())["precision"] == "float32"


def test_steps_count_and_seed_every_step(tmp_path):
    run = start(tmp_path)
    drawn = {step: torch.rand(3) for step in run.steps(0, 4)}
    assert list(drawn) == [1, 2, 3, 4]
    again = {step: torch.rand(3) for step in run.steps(2, 4)}  # the same numbers, whatever was drawn before
    assert list(again) == [3, 4] and all(torch.equal(again[step], drawn[step]) for step in again)


def test_generator_depends_on_seed_and_numbers_alone(tmp_path):
    run, other = start(tmp_path), start(tmp_path / "other", seed=1)
    first, same, unlike = (torch.rand(4, generator=run.generator(*n)) for n in ((5, 1), (5, 1), (1, 5)))
    assert torch.equal(first, same) and not torch.equal(first, unlike)
    assert not torch.equal(first, torch.rand(4, generator=other.generator(5, 1)))


def test_due(tmp_path):
    run = start(tmp_path)
    run.total = 10
    assert [step for step in range(1, 11) if run.due(step, 4)] == [4, 8, 10]
    assert not any(run.due(step, 0) for step in range(1, 11))


def test_shard_wants_equal_shares(tmp_path):
    run = start(tmp_path)
    run.world, run.rank = 3, 1
    assert run.shard(torch.arange(6)).tolist() == [2, 3]
    with pytest.raises(ConfigError, match="divisible"):
        run.shard(torch.arange(7))


def test_log_writes_numbers_and_rates_only_when_due(tmp_path):
    with start(tmp_path) as run:
        run.resume()
        for step in run.steps(0, 5):
            run.log(step, 2, {"images": 8}, loss=torch.tensor(step / 2))
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0), (4, 2.0), (5, 2.5)]
    assert all(line["images_per_second"] > 0 for line in lines)


def test_clipping_and_the_norm_before_it(tmp_path):
    run = start(tmp_path)
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = weight.square().sum() / 2
    loss.backward()
    assert float(run.check_gradients(optimizer, loss, clip=1.0)) == pytest.approx(5)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_stops_before_the_update(tmp_path, bad):
    run = start(tmp_path)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.sum().backward()
    run.step = 7
    with pytest.raises(NonFinite, match="step 7"):
        run.check_gradients(optimizer, torch.tensor(bad))
    with pytest.raises(NonFinite):
        run.save(7, weight=weight.detach())
    assert not run.checkpoints.list()


def test_a_stop_signal_ends_the_loop_once_it_has_saved(tmp_path):
    seen = []
    with pytest.raises(SystemExit) as stop, start(tmp_path) as run:
        for step in run.steps(0, 10):
            seen.append(step)
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            if run.save_due(step, 100):
                run.save(step, number=step)
    assert seen == [1, 2, 3] and stop.value.code == 143
    assert [path.stem for path in run.checkpoints.list()] == ["00000003"]


def test_track_and_interruptible(tmp_path):
    run, done = start(tmp_path), []
    run.signals.received = "SIGINT"
    with run.interruptible():
        done += run.track(range(3))
    assert done == []
    with pytest.raises(Stopped):
        list(run.track(range(3)))


def test_save_and_resume_parts(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with start(tmp_path) as run:
        run.resume()
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        run.save(4, model=model, optimizer=optimizer)
    other = torch.nn.Linear(2, 1)
    slower = torch.optim.Adam(other.parameters(), lr=0.01)
    with start(tmp_path, "resume") as run:
        assert run.resume(model=other, optimizer=slower) == 4
    assert torch.equal(other.weight, model.weight)
    assert slower.param_groups[0]["lr"] == 0.01, "the config decides about the learning rate"
    assert torch.equal(slower.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    with start(tmp_path, "resume") as run, pytest.raises(ProjectError, match="model does not fit"):
        run.resume(model=torch.nn.Linear(3, 1))


def test_an_earlier_run_is_not_written_over(tmp_path):
    with start(tmp_path) as run:
        run.save(1, number=1)
    with pytest.raises(ProjectError, match="--resume to go on, --overwrite to delete it"):
        start(tmp_path)
    with start(tmp_path, "overwrite") as run:
        assert not run.checkpoints.list()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").touch()
    with pytest.raises(ProjectError, match="not a run folder"):
        start(tmp_path, "overwrite", run_dir=str(tmp_path / "precious"))
    assert (tmp_path / "precious/thesis.txt").exists()


def test_changes_on_resume_are_said(tmp_path, capfd):
    with start(tmp_path) as run:
        run.save(1, number=1)
    with start(tmp_path, "resume", seed=9, keep_last=5):
        pass
    err = capfd.readouterr().err
    assert "note: seed was 0, is now 9" in err and "keep_last" not in err
