"""`Run` alone, without a project: what a loop may rely on."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path

import pytest
import torch

from common.checkpoint import Checkpoints
from common.config import BaseConfig, ConfigError, Options
from common.errors import ProjectError
from common.finite import NonFinite
from common.logging import MetricLog, read_metrics
from common.run import Run
from common.signals import Stopped
from tests.helpers import start_python


def start(tmp_path, *flags: str, **settings) -> Run:
    config = BaseConfig(**({"run_dir": str(tmp_path / "run"), "device": "cpu", "precision": "fp32"} | settings))
    return Run.start(config, Options("train", **dict.fromkeys(flags, True)))


def test_a_new_folder_holds_config_and_environment(tmp_path):
    with start(tmp_path, seed=3) as run:
        run.begin()
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
        assert run.checkpoints.list(), "the earlier run is there until this one begins"
        run.begin()
        assert not run.checkpoints.list()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").touch()
    with pytest.raises(ProjectError, match="not a run folder"):
        start(tmp_path, "overwrite", run_dir=str(tmp_path / "precious"))
    assert (tmp_path / "precious/thesis.txt").exists()


def test_changes_on_resume_are_said(tmp_path, capfd):
    with start(tmp_path) as run:
        run.save(1, number=1)
    with start(tmp_path, "resume", seed=9, keep_last=5) as run:
        run.resume()
        assert "seed: 0" in (tmp_path / "run/config.yaml").read_text(), "nothing has been done with the new settings"
        run.begin()
    assert "seed: 9" in (tmp_path / "run/config.yaml").read_text()
    err = capfd.readouterr().err
    assert "note: seed was 0, is now 9" in err and "keep_last" not in err


# -- one owner ---------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from common.config import BaseConfig, Options
from common.run import Run
run = Run.start(BaseConfig(run_dir=sys.argv[1], device="cpu", precision="fp32"), Options("train"))
run.resume()
run.save(1, number=1)
print("mine", flush=True)
time.sleep(100)
"""


@pytest.fixture
def owned(tmp_path):
    """A folder that another process trains in."""
    process = start_python("-c", OWNER, str(tmp_path / "run"))
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", ["resume", "overwrite", None])
def test_a_folder_has_one_owner(owned, tmp_path, flag):
    before = contents(tmp_path / "run")
    with pytest.raises(ProjectError, match=f"in use by process {owned.pid} on "):
        start(tmp_path, *([flag] if flag else []))
    assert contents(tmp_path / "run") == before
    Run(BaseConfig(run_dir=str(tmp_path / "run"), device="cpu", precision="fp32"), Options("eval"))  # a reader may


def test_the_lock_dies_with_its_process(owned, tmp_path):
    owned.kill()
    owned.wait()
    with start(tmp_path, "resume") as run:
        assert run.resume() == 1


def test_forked_workers_do_not_hold_the_lock(tmp_path):
    """A data worker that outlives a killed training must not keep the folder from the next one."""
    code = OWNER.replace("time.sleep(100)", "import os; os.fork() or time.sleep(100)")
    process = start_python("-c", code, str(tmp_path / "run"))
    assert process.stdout.readline() == "mine\n"
    assert process.wait(timeout=60) == 0
    with start(tmp_path, "resume"):
        pass
    process.stdout.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capfd):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with start(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capfd.readouterr().err


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_the_log_is_on_the_disk_before_the_checkpoint_that_follows_it(tmp_path, monkeypatch):
    """After a power cut a resumed run finds every line up to its checkpoint."""
    order = []
    flush, save = MetricLog.flush, Checkpoints.save
    monkeypatch.setattr(MetricLog, "flush", lambda self: (order.append("log"), flush(self)))
    monkeypatch.setattr(Checkpoints, "save", lambda self, *words: (order.append("checkpoint"), save(self, *words)))
    with start(tmp_path) as run:
        for step in run.steps(0, 2):
            run.log(step, 1, loss=1.0)
            run.save(step, number=1)
    assert order == ["log", "checkpoint"] * 2


def test_a_refused_resume_changes_nothing(tmp_path):
    with start(tmp_path) as run:
        run.begin()
        run.log_file.write(1, {"loss": 1.0})
        run.save(1, model=torch.nn.Linear(2, 1))
    before = contents(tmp_path / "run")
    with pytest.raises(ProjectError, match="model does not fit"), start(tmp_path, "resume", seed=5) as run:
        run.resume(model=torch.nn.Linear(3, 1))
    assert contents(tmp_path / "run") == before


def test_a_first_save_that_was_cut_is_no_dead_end(tmp_path):
    with start(tmp_path) as run:
        run.begin()
    (tmp_path / "run/checkpoints/00000002.pt").write_bytes(b"half")
    for flags in ((), ("resume",)):
        with start(tmp_path, *flags) as run:
            assert run.resume() == 0
    with start(tmp_path, "resume") as run:
        run.resume()
        run.save(2, number=1)
    with start(tmp_path, "resume") as run:
        assert run.resume() == 2


def test_nothing_to_resume_is_said(tmp_path, capfd):
    with start(tmp_path, "resume") as run:
        assert run.resume() == 0
    assert f"nothing to resume in {tmp_path / 'run'}: starting at step 1" in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["*", "*.pt"])
def test_lost_checkpoints_are_not_a_fresh_start(tmp_path, lost):
    with start(tmp_path) as run:
        run.resume()
        run.save(3, number=1)
    for path in (tmp_path / "run/checkpoints").glob(lost):
        path.unlink()
    with start(tmp_path, "resume") as run, pytest.raises(ProjectError, match=r"are gone from .* --overwrite"):
        run.resume()


def test_env_json_keeps_earlier_processes(tmp_path):
    for flags in ((), ("resume",), ("resume",)):
        with start(tmp_path, *flags) as run:
            run.resume()
            run.save(run.step + 1, number=1)
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert env["first_saved"] == 1 and env["command"] and [entry["device"] for entry in env["earlier"]] == ["cpu"] * 2
    assert all("earlier" not in entry for entry in env["earlier"])


def test_other_circumstances_of_a_resumed_run_are_said(tmp_path, capfd, monkeypatch):
    """Other threads, processes or precision change last digits; equal ones are no note."""
    for flags in ((), ("resume",)):
        with start(tmp_path, *flags) as run:
            run.resume()
            run.save(run.step + 1, number=1)
    assert "note:" not in capfd.readouterr().err
    env = json.loads((tmp_path / "run/env.json").read_text())
    other = {"processes": 2, "threads": env["threads"] + 3, "precision": "float16"}
    (tmp_path / "run/env.json").write_text(json.dumps(env | other))
    with start(tmp_path, "resume") as run:
        run.resume()
        run.begin()
    said = capfd.readouterr().err
    assert "note: processes was 2, is now 1" in said
    assert f"note: threads was {env['threads'] + 3}, is now {env['threads']}" in said
    assert f"note: precision was float16, is now {env['precision']}" in said


def test_temporaries_anywhere_are_removed_at_the_start(tmp_path):
    with start(tmp_path) as run:
        run.resume()
        run.save(1, number=1)
    (tmp_path / "run/models").mkdir()
    for name in ("models/.tmp-9-0000.safetensors", ".tmp-9-eval.json", "checkpoints/.tmp-9-00000002.pt"):
        (tmp_path / "run" / name).write_bytes(b"half")
    with start(tmp_path, "resume") as run:
        run.begin()
        assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_overwrite_says_what_it_deletes(tmp_path, capfd):
    with start(tmp_path) as run:
        run.resume()
        run.save(7, number=1)
    with start(tmp_path, "overwrite") as run:
        run.begin()
        assert f"deleting the run in {tmp_path / 'run'}, at step 7" in capfd.readouterr().err


def test_weights_that_an_update_ruined_are_not_saved(tmp_path):
    model = torch.nn.Linear(2, 1)
    with start(tmp_path) as run:
        run.resume()
        run.save(1, model=model)
        with torch.no_grad():
            model.weight[0, 1] = float("nan")  # as after a step with a rate of 1e39
        with pytest.raises(NonFinite, match=r"weight is not finite after step 2; .* \(step 1\)"):
            run.save(2, model=model)
    assert [path.stem for path in run.checkpoints.list()] == ["00000001"]
