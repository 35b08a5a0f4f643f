"""Stop signals, numbers that are not finite, full and read-only disks: nothing is lost, and one line says what
happened.
"""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import diffusion.train
from common.checkpoint import Checkpoints
from common.config import Options
from common.ema import EMA
from common.files import TEMPORARY
from common.finite import NonFinite
from common.logging import read_metrics
from common.run import Run
from tests.helpers import DIGITS, STEPS, TINY, errors, log, read_only, small_disk, start_python, tiny, train

# -- stop signals ------------------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds: float = 200.0) -> None:
    """Poll until a process has come that far."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_sigterm_to_a_training_process(tmp_path):
    run_dir = tmp_path / "run"
    process = start_python(
        "-m", "diffusion.train", "--config", str(DIGITS), *TINY, f"run_dir={run_dir}", "train.steps=1000000"
    )
    wait_for(lambda: len(read_metrics(run_dir / "metrics.jsonl")) > 3, process)
    process.send_signal(signal.SIGTERM)
    sent = len(read_metrics(run_dir / "metrics.jsonl"))
    _, text = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "SIGTERM" in text and "--resume" in text and not errors(text)
    last = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert last - sent < 200  # steps of 3 ms; the moment of sending is not that of receiving
    assert Checkpoints(run_dir / "checkpoints").newest_step() == last
    assert Checkpoints(run_dir / "checkpoints").load_newest()["step"] == last


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_the_very_step_it_arrived_in(name, tmp_path, monkeypatch):
    update = EMA.update

    def update_and_stop(self, model, step):
        update(self, model, step)
        if step == 5:
            signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr(EMA, "update", update_and_stop)
    assert train(tiny(tmp_path / "run")) == 128 + signal.Signals[name]
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert Checkpoints(tmp_path / "run/checkpoints").newest_step() == 5


def test_signal_while_sampling_in_training(tmp_path, monkeypatch):
    """Drawing samples is cut short, the step's checkpoint is not."""

    def draw(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    original = diffusion.train.generate
    monkeypatch.setattr(diffusion.train, "generate", draw)
    assert train(tiny(tmp_path / "run", "train.sample_every=4")) == 143
    assert Checkpoints(tmp_path / "run/checkpoints").newest_step() == 4
    assert not list((tmp_path / "run").glob("samples/*"))


SLOW_STEP = """
import time
from common.config import load
from diffusion.config import Config
import diffusion.train
from common.ema import EMA
EMA.update = lambda *args: (print("in a long step", flush=True), time.sleep(100))
diffusion.train.train(*load(Config, "diffusion"))
"""


@pytest.mark.xdist_group("timing")
def test_second_signal_leaves_at_once(tmp_path):
    process = start_python("-c", SLOW_STEP, "--config", str(DIGITS), *TINY, f"run_dir={tmp_path / 'run'}")
    assert "in a long step" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert any("finishing this step" in line for line in process.stderr)
    time.sleep(1.0)  # longer than signals.SAME_REQUEST, within which a second signal counts as the same wish
    assert process.poll() is None, "the first signal must not interrupt the step"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert time.monotonic() - sent < 1
    assert not Checkpoints(tmp_path / "run/checkpoints").list()


# -- NaN ---------------------------------------------------------------------------------------------------------------


def spoil_loss(monkeypatch: pytest.MonkeyPatch, at: int, value: float = float("nan")) -> None:
    """Make the loss of the `at`-th step not finite."""
    from diffusion.objectives import DDPM

    loss, calls = DDPM.loss, []

    def spoiled(self, *args):
        calls.append(1)
        return loss(self, *args) * (value if len(calls) == at else 1.0)

    monkeypatch.setattr(DDPM, "loss", spoiled)


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make one gradient entry of the `at`-th step NaN, while the loss stays finite."""
    check = Run.check_gradients

    def spoiled(self, optimizer, loss, clip=0.0):
        if self.step == at:
            optimizer.param_groups[0]["params"][3].grad.view(-1)[0] = float("nan")
        return check(self, optimizer, loss, clip)

    monkeypatch.setattr(Run, "check_gradients", spoiled)


@pytest.fixture
def weights(monkeypatch):
    """The live model and EMA of the next training run, and their values after each step."""
    seen = SimpleNamespace(model=None, after={})
    update = EMA.update

    def watch(self, model, step):
        update(self, model, step)
        seen.model, seen.ema = model, self.model
        seen.after[step] = [p.detach().clone() for net in (model, self.model) for p in net.parameters()]

    monkeypatch.setattr(EMA, "update", watch)
    return seen


@pytest.mark.parametrize(("bad", "clip"), [("nan", 1.0), ("inf", 1.0), ("gradient", 1.0), ("gradient", 0.0)])
def test_non_finite_stops_before_the_step(bad, clip, tmp_path, monkeypatch, weights, capfd):
    if bad == "gradient":
        spoil_gradient(monkeypatch, 7)
    else:
        spoil_loss(monkeypatch, 7, float(bad))
    config = tiny(tmp_path / "run", "train.save_every=3", f"train.grad_clip={clip}")
    assert train(config) == 1
    (line,) = errors(capfd.readouterr().err)
    assert "step 7" in line and "00000006.pt" in line and "not finite" in line
    assert max(weights.after) == 6
    now = [p.detach() for net in (weights.model, weights.ema) for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(now, weights.after[6], strict=True))
    assert Checkpoints(tmp_path / "run/checkpoints").newest_step() == 6
    assert [step["step"] for step in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_non_finite_before_any_checkpoint(tmp_path, monkeypatch, capfd):
    spoil_loss(monkeypatch, 1)
    assert train(tiny(tmp_path / "run")) == 1
    assert "step 1" in (line := errors(capfd.readouterr().err)[0]) and "no checkpoint yet" in line
    assert not Checkpoints(tmp_path / "run/checkpoints").list()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_deferred_stop_of_a_fused_optimizer(bad, tmp_path):
    """On a GPU the device itself skips the bad step and all later ones; the host learns of it at the next log line or
    save.

    The fused AdamW of the CPU honours the same flag, so only the question "is this a GPU" is answered for it here.
    """
    run = Run(tiny(tmp_path / "run"), Options("train"))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    run.device = run.finite.device = SimpleNamespace(type="cuda")
    values = []
    for run.step in range(1, 6):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        if run.step == 3 and bad == "gradient":
            model.weight.grad[0, 0] = float("nan")
        run.check_gradients(optimizer, loss * float("nan") if run.step == 3 and bad == "loss" else loss, 1.0)
        optimizer.step()
        values.append([p.detach().clone() for p in model.parameters()])
    assert not torch.equal(values[0][0], values[1][0])
    assert all(torch.equal(a, b) for later in values[2:] for a, b in zip(later, values[1], strict=True))
    assert int(optimizer.state[model.weight]["step"]) == 2
    for ask in (lambda: run.save(5, model=model), lambda: run.log(5, 1, loss=0.0), lambda: list(run.steps(5, 5))):
        with pytest.raises(NonFinite, match="step 3"):
            ask()
    assert not run.checkpoints.list()


# -- disks -------------------------------------------------------------------------------------------------------------


def test_disk_full_while_training(tmp_path, monkeypatch, capfd):
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        config = tiny(disk / "run", "train.save_every=3")
        update = EMA.update

        def update_and_fill(self, model, step):
            update(self, model, step)
            if step == 5:
                free = os.statvfs(disk)
                # leaves room for metrics, not for a checkpoint
                (disk / "filler").write_bytes(bytes((free.f_bavail - 8) * free.f_bsize))

        monkeypatch.setattr(EMA, "update", update_and_fill)
        assert train(config) == 1
        (line,) = errors(capfd.readouterr().err)
        assert "00000006.pt" in line and "No space left on device" in line
        assert Checkpoints(disk / "run/checkpoints").load_newest()["step"] == 3
        assert not list((disk / "run/checkpoints").glob(f"{TEMPORARY}*"))
        (disk / "filler").unlink()
        monkeypatch.setattr(EMA, "update", update)
        assert train(config, resume=True) == 0  # and it goes on once there is room
        assert Checkpoints(disk / "run/checkpoints").load_newest()["step"] == STEPS


def test_disk_full_for_metrics(tmp_path, monkeypatch, capfd):
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        config = tiny(disk / "run", "train.save_every=3", "train.steps=1000")
        update = EMA.update

        def update_and_fill(self, model, step):
            update(self, model, step)
            if step == 4:
                free = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))

        monkeypatch.setattr(EMA, "update", update_and_fill)
        assert train(config) == 1
        (line,) = errors(capfd.readouterr().err)
        assert "No space left on device" in line
        assert Checkpoints(disk / "run/checkpoints").load_newest()["step"] == 3


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["fresh", "resume", "overwrite"])
def test_read_only_folder(options, stopped, tmp_path, capfd):
    before = {path.relative_to(stopped) for path in stopped.rglob("*")}
    run_dir = stopped if options else tmp_path / "other"
    with read_only(tmp_path):
        assert train(tiny(run_dir), **options) == 1
        (line,) = errors(capfd.readouterr().err)
        assert "cannot" in line and "ead-only" in line
        assert Checkpoints(stopped / "checkpoints").load_newest()["step"] == 3
    assert {path.relative_to(stopped) for path in stopped.rglob("*")} == before
