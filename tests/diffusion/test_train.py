"""A run that cannot be lost or silently wrong: exact resume, stop signals, NaN, full disks, two processes; and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion.eval
import diffusion.sample
import diffusion.train
from common.checkpoint import Checkpoints
from common.config import Options, flatten, resolve
from common.files import TEMPORARY
from common.logging import read_metrics
from common.run import NonFinite, Run
from diffusion.config import Config, TrainConfig
from diffusion.data import load_images
from diffusion.ema import EMA
from diffusion.train import drop_labels, learning_rate, random_flip
from tests.helpers import DIGITS, ROOT, TINY, python, read_only, small_disk, start_python, status, tiny, train

STEPS = 12  # of a tiny run: three epochs of four steps
TIMING = ("images_per_second",)


def checkpoint(run_dir: Path, step: int = STEPS) -> dict:
    return Checkpoints.load(run_dir / f"checkpoints/{step:08d}.pt")


def log(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run_dir / "metrics.jsonl")]


def same(a: object, b: object) -> bool:
    """Equality to the last bit of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    first, second = checkpoint(a), checkpoint(b)
    for part in ("model", "optimizer", "ema", "sigma_data"):
        assert same(first["parts"][part], second["parts"][part]), part
    assert same(first["rng"], second["rng"])
    assert first["step"] == second["step"] == STEPS
    assert log(a) == log(b)
    assert [line["step"] for line in log(a)] == list(range(1, STEPS + 1))


def stop_in_step(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Send this process a real SIGTERM in the middle of each of these steps."""
    update, waiting = EMA.update, list(steps)

    def update_and_stop(self, model, step):
        update(self, model, step)
        if step in waiting:
            waiting.remove(step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(EMA, "update", update_and_stop)


def errors(text: str) -> list[str]:
    """The error lines of a program; there must be no traceback among them."""
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


# -- exact resume ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny(run_dir)) == 0
    return run_dir


RNG = random.Random(2026)
STOPS = [(RNG.choice([5, 6, 7]),), (8,), tuple(sorted(RNG.sample(range(1, STEPS), 2)))]


@pytest.mark.parametrize("stops", STOPS, ids=["mid-epoch", "epoch boundary", "twice"])
def test_exact_resume(stops, uninterrupted, tmp_path, monkeypatch):
    config = tiny(tmp_path / "run")
    assert config.model.dropout > 0
    stop_in_step(monkeypatch, *stops)
    assert train(config) == 143
    for stop, following in zip(stops, [*stops[1:], None], strict=True):
        assert Checkpoints(tmp_path / "run/checkpoints").newest_step() == stop
        assert train(config, resume=True) == (143 if following else 0)
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Forty images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 10, 12, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / f"{'ab'[i % 2]}/{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_exact_resume_from_files(workers, image_folder, tmp_path, monkeypatch):
    """Decoded by workers: the epoch ends in the middle of step 3 (40 images in batches of 16)."""
    config = tiny(tmp_path / "whole", "data.dataset=folder", f"data.folder={image_folder}", f"data.workers={workers}", "data.max_images=0",
                  "model.image_channels=3", "model.num_classes=2")
    assert train(config) == 0
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    stop_in_step(monkeypatch, 3, 5)
    assert train(config) == 143
    assert train(config, resume=True) == 143
    assert train(config, resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resume_after_a_crash_drops_later_lines(uninterrupted, tmp_path, monkeypatch):
    """A crash leaves metrics of steps after the last checkpoint, and half a line; they are computed again, not logged twice."""
    config = tiny(tmp_path / "run")
    stop_in_step(monkeypatch, 6)
    assert train(config) == 143
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert train(config, resume=True) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_resume_falls_back_from_a_broken_checkpoint(uninterrupted, tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", "train.save_every=4")
    stop_in_step(monkeypatch, 10)
    assert train(config) == 143
    newest = tmp_path / "run/checkpoints/00000010.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="00000010.pt is damaged") as caught:
        assert train(config, resume=True) == 0
    assert len(caught) == 1
    assert_same_run(uninterrupted, tmp_path / "run")


def test_no_whole_checkpoint_left(uninterrupted, tmp_path, capfd, monkeypatch):
    config = tiny(tmp_path / "run")
    stop_in_step(monkeypatch, 2)
    assert train(config) == 143
    (tmp_path / "run/checkpoints/00000002.json").write_text("{}")
    with pytest.warns(UserWarning, match="00000002"):
        assert train(config, resume=True) == 1
    assert "no whole checkpoint" in errors(capfd.readouterr().err)[0]


def test_stale_temporaries_are_removed(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", "train.steps=2")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / f"run/checkpoints/{TEMPORARY}123-00000001.pt").write_bytes(b"half")
    assert train(config) == 0
    assert not list((tmp_path / "run/checkpoints").glob(f"{TEMPORARY}*"))


# -- starting where something is already -------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run stopped after step 3, and its folder."""
    with monkeypatch.context() as context:
        stop_in_step(context, 3)
        assert train(tiny(tmp_path / "run")) == 143
    return tmp_path / "run"


def test_fresh_start_refuses_an_existing_run(stopped, capfd):
    before = (stopped / "metrics.jsonl").read_bytes()
    assert train(tiny(stopped)) == 1
    line, = errors(capfd.readouterr().err)
    assert "step 3" in line and "--resume" in line and "--overwrite" in line
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_overwrite(stopped, uninterrupted):
    (stopped / "left_over.txt").write_text("of the earlier run")
    assert train(tiny(stopped), overwrite=True) == 0
    assert not (stopped / "left_over.txt").exists()
    assert_same_run(uninterrupted, stopped)


@pytest.mark.parametrize("content", [["thesis.txt"], ["config.yaml", "thesis.txt"]])
def test_overwrite_refuses_what_is_not_a_run(tmp_path, capfd, content):
    for name in content:
        (tmp_path / name).write_text("seed: 1")
    assert train(tiny(tmp_path), overwrite=True) == 1
    assert "not a run folder" in errors(capfd.readouterr().err)[0]
    assert all((tmp_path / name).exists() for name in content)


def test_changed_model_refuses_and_shows_the_difference(stopped, capfd):
    files = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert train(tiny(stopped, "model.channels=16", "model.dropout=0.1"), resume=True) == 1
    text = capfd.readouterr().err
    assert len(errors(text)) == 1
    for line in ("- model.channels: 8", "+ model.channels: 16", "- model.dropout: 0.3", "+ model.dropout: 0.1"):
        assert line in text.splitlines()
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == files, "nothing may be touched"


def test_changed_optimisation_is_allowed_with_a_note(stopped, capfd):
    changed = ["train.lr=5e-4", "train.weight_decay=0.25", "train.betas=[0.8,0.95]"]
    assert train(tiny(stopped, *changed), resume=True) == 0
    text = capfd.readouterr().err
    assert "note: train.lr was 0.001, is now 0.0005" in text
    assert "note: train.weight_decay was 0.0, is now 0.25" in text
    group, = checkpoint(stopped)["parts"]["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.25 and tuple(group["betas"]) == (0.8, 0.95)
    assert log(stopped)[3]["lr"] < 5e-4 < log(stopped)[2]["lr"]


def test_damaged_config_of_the_run_is_one_line(stopped, capfd):
    (stopped / "config.yaml").write_text("train: [\n")
    assert train(tiny(stopped), resume=True) == 1
    assert "config.yaml" in errors(capfd.readouterr().err)[0]


# -- stop signals ------------------------------------------------------------------------------------------------------------------


def wait_for(condition, process, seconds: float = 60.0) -> None:
    """Poll until a process has come that far."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_sigterm_to_a_training_process(tmp_path):
    run_dir = tmp_path / "run"
    process = start_python("-m", "diffusion.train", "--config", str(DIGITS), *TINY, f"run_dir={run_dir}", "train.steps=1000000")
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
from diffusion.ema import EMA
EMA.update = lambda *args: (print("in a long step", flush=True), time.sleep(100))
diffusion.train.train(*load(Config, "diffusion"))
"""


def test_second_signal_leaves_at_once(tmp_path):
    process = start_python("-c", SLOW_STEP, "--config", str(DIGITS), *TINY, f"run_dir={tmp_path / 'run'}")
    assert "in a long step" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert any("finishing this step" in line for line in process.stderr)
    time.sleep(0.3)
    assert process.poll() is None, "the first signal must not interrupt the step"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert time.monotonic() - sent < 1
    assert not Checkpoints(tmp_path / "run/checkpoints").list()


# -- NaN ---------------------------------------------------------------------------------------------------------------------------


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
    optimize = Run.optimize

    def spoiled(self, optimizer, loss, clip=0.0):
        if self.step == at:
            optimizer.param_groups[0]["params"][3].grad.view(-1)[0] = float("nan")
        return optimize(self, optimizer, loss, clip)

    monkeypatch.setattr(Run, "optimize", spoiled)


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


@pytest.mark.parametrize("spoil", [spoil_loss, lambda m, at: spoil_loss(m, at, float("inf")), spoil_gradient], ids=["NaN loss", "inf loss", "gradient"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_non_finite_stops_before_the_step(spoil, clip, tmp_path, monkeypatch, weights, capfd):
    spoil(monkeypatch, 7)
    config = tiny(tmp_path / "run", "train.save_every=3", f"train.grad_clip={clip}")
    assert train(config) == 1
    line, = errors(capfd.readouterr().err)
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
    """On a GPU the device itself skips the bad step and all later ones; the host learns of it at the next log line or save.

    The fused AdamW of the CPU honours the same flag, so only the question "is this a GPU" is answered for it here.
    """
    run = Run(tiny(tmp_path / "run"), Options("train"))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    run.device = SimpleNamespace(type="cuda")
    values = []
    for run.step in range(1, 6):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        if run.step == 3 and bad == "gradient":
            model.weight.grad[0, 0] = float("nan")
        run.optimize(optimizer, loss * float("nan") if run.step == 3 and bad == "loss" else loss, 1.0)
        values.append([p.detach().clone() for p in model.parameters()])
    assert not torch.equal(values[0][0], values[1][0])
    assert all(torch.equal(a, b) for later in values[2:] for a, b in zip(later, values[1], strict=True))
    assert int(optimizer.state[model.weight]["step"]) == 2
    for ask in (lambda: run.save(5, model=model), lambda: run.log(5, 1, loss=0.0), lambda: list(run.steps(5, 5))):
        with pytest.raises(NonFinite, match="step 3"):
            ask()
    assert not run.checkpoints.list()


# -- disks -------------------------------------------------------------------------------------------------------------------------


def test_disk_full_while_training(tmp_path, monkeypatch, capfd):
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        config = tiny(disk / "run", "train.save_every=3")
        update = EMA.update

        def update_and_fill(self, model, step):
            update(self, model, step)
            if step == 5:
                free = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes((free.f_bavail - 8) * free.f_bsize))  # leaves room for metrics, not for a checkpoint

        monkeypatch.setattr(EMA, "update", update_and_fill)
        assert train(config) == 1
        line, = errors(capfd.readouterr().err)
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
        line, = errors(capfd.readouterr().err)
        assert "No space left on device" in line
        assert Checkpoints(disk / "run/checkpoints").load_newest()["step"] == 3


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["fresh", "resume", "overwrite"])
def test_read_only_folder(options, stopped, tmp_path, capfd):
    before = {path.relative_to(stopped) for path in stopped.rglob("*")}
    run_dir = stopped if options else tmp_path / "other"
    with read_only(tmp_path):
        assert train(tiny(run_dir), **options) == 1
        line, = errors(capfd.readouterr().err)
        assert "cannot" in line and "ead-only" in line
        assert Checkpoints(stopped / "checkpoints").load_newest()["step"] == 3
    assert {path.relative_to(stopped) for path in stopped.rglob("*")} == before


# -- two processes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [0, 3])
def test_two_processes_equal_one(microbatch, tmp_path):
    words = ["precision=fp64", "model.dropout=0.0", "train.steps=5", "model.multipliers=[1,2]", "model.attention=[4]"]
    result = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "diffusion.train", "--config", str(DIGITS), *TINY,
                    *words, f"train.microbatch={microbatch}", f"run_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two/env.json").read_text())["processes"] == 2
    assert train(tiny(tmp_path / "one", *words)) == 0
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-6, abs=1e-12)
    one, two = (checkpoint(tmp_path / name, 5)["parts"] for name in ("one", "two"))
    for part in ("model", "ema"):
        assert all(value.dtype == torch.float64 for value in one[part].values())
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-6, atol=1e-9, msg=name)
    for mine, other in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(other["exp_avg"], mine["exp_avg"], rtol=1e-6, atol=1e-12)  # the gradients themselves


def test_microbatches_equal_one_batch(tmp_path):
    logs = []
    for size in (0, 5):
        words = ["precision=fp64", "model.dropout=0.0", "train.steps=3", f"train.microbatch={size}"]
        assert train(tiny(tmp_path / str(size), *words)) == 0
        logs.append(log(tmp_path / str(size)))
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_batch_that_cannot_be_shared_out_is_refused(tmp_path, capfd, monkeypatch):
    """Dropping the odd image would make two processes differ from one."""
    monkeypatch.setattr(Run, "steps", lambda self, done, total: setattr(self, "world", 2) or iter([1]))
    assert train(tiny(tmp_path / "run", "train.batch_size=15")) == 2
    assert "15" in errors(capfd.readouterr().err)[0]


# -- what a run leaves behind ------------------------------------------------------------------------------------------------------


def test_run_folder(uninterrupted):
    from safetensors import safe_open

    config = resolve(Config, uninterrupted / "config.yaml", [], str(uninterrupted))
    assert flatten(config) == flatten(tiny(uninterrupted))
    env = json.loads((uninterrupted / "env.json").read_text())
    assert {"command", "commit", "device", "versions", "precision"} <= env.keys()
    assert env["versions"]["torch"] == torch.__version__.split("+")[0] or env["versions"]["torch"] == torch.__version__
    assert set(log(uninterrupted)[0]) == {"step", "loss", "grad_norm", "lr"}
    assert read_metrics(uninterrupted / "metrics.jsonl")[0]["images_per_second"] > 0
    with safe_open(uninterrupted / "model.safetensors", "pt") as file:
        ema = checkpoint(uninterrupted)["parts"]["ema"]
        assert set(file.keys()) == set(ema)
        assert all(torch.equal(file.get_tensor(name), ema[name]) for name in ema)
        assert file.metadata()["step"] == str(STEPS)


def test_steps_cut_a_run_short_and_samples_appear(tmp_path):
    assert train(tiny(tmp_path / "run", "train.steps=2", "train.sample_every=2")) == 0
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2]
    with Image.open(tmp_path / "run/samples/00000002.png") as image:
        assert image.size[0] > 8


def test_finished_run_resumes_to_nothing(uninterrupted, tmp_path):
    import shutil

    shutil.copytree(uninterrupted, tmp_path / "run")
    assert train(tiny(tmp_path / "run"), resume=True) == 0
    assert_same_run(uninterrupted, tmp_path / "run")


def test_other_seed_other_run(uninterrupted, tmp_path):
    assert train(tiny(tmp_path / "run", "seed=1")) == 0
    assert log(tmp_path / "run")[0]["loss"] != log(uninterrupted)[0]["loss"]


def test_dry_run(tmp_path, capsys):
    assert train(tiny(tmp_path / "run"), dry_run=True) == 0
    text = capsys.readouterr().out
    assert "channels: 8" in text and "parameters" in text and "(16, 1, 8, 8)" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("override", "key"), [
    ("model.image_channels=3", "model.image_channels"), ("model.num_classes=7", "model.num_classes"), ("device=cuda:99", "device"),
    ("device=warp", "device"), ("precision=fp16", "precision"), ("sample.sampler=heun", "sample.sampler"), ("sample.steps=5000", "sample.steps"),
])
def test_what_only_the_machine_or_the_data_can_tell(override, key, tmp_path, capfd):
    assert train(tiny(tmp_path / "run", override)) == 2
    line, = errors(capfd.readouterr().err)
    assert line.startswith(f"error: {key}")
    assert not (tmp_path / "run").exists()


def test_learning_rate():
    config = TrainConfig(lr=1.0, steps=100, warmup=5000)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])  # the warm-up is cut to a tenth of a short run
    assert rates[10:] == [1.0] * 90
    linear = [learning_rate(step, dataclasses.replace(config, decay="linear")) for step in range(1, 101)]
    assert linear[9:] == pytest.approx([1 - i / 90 for i in range(91)])
    cosine = [learning_rate(step, dataclasses.replace(config, decay="cosine")) for step in range(1, 101)]
    assert cosine[9] == 1.0 and cosine[54] == pytest.approx(0.5) and cosine[99] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(cosine[9:], cosine[10:], strict=False))
    assert learning_rate(1, dataclasses.replace(config, steps=3)) == 1.0
    long = TrainConfig(lr=2e-4, steps=800_000, warmup=5000)
    assert learning_rate(2500, long) == pytest.approx(1e-4) and learning_rate(5000, long) == learning_rate(800_000, long) == 2e-4


def test_short_run_reaches_its_full_learning_rate(tmp_path):
    assert train(tiny(tmp_path / "run", "train.steps=20", "train.warmup=5000", "train.decay=constant")) == 0
    assert [line["lr"] for line in log(tmp_path / "run")] == [5e-4] + [1e-3] * 19


def test_flip_is_half_of_the_images_and_only_mirrors():
    x = torch.randn(4000, 1, 2, 3)
    flipped = random_flip(x, torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored])
    assert 0.47 < mirrored.float().mean() < 0.53


@pytest.mark.parametrize("flip", [True, False])
def test_flip_only_when_asked(flip, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(diffusion.train, "random_flip", lambda x, rng: calls.append(1) or x)
    assert train(tiny(tmp_path / "run", f"data.flip={flip}", "train.steps=2")) == 0
    assert len(calls) == (2 if flip else 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_label_dropout_share(share, tmp_path):
    config = tiny(tmp_path, f"objective.label_dropout={share}")
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, config, torch.Generator().manual_seed(0))
    null = dropped == 10
    assert float(null.float().mean()) == pytest.approx(share, abs=0.015)
    assert torch.equal(dropped[~null], labels[~null])


def test_unconditional_model_gets_no_labels(tmp_path):
    assert drop_labels(torch.zeros(3, dtype=torch.int64), tiny(tmp_path, "model.num_classes=0"), torch.Generator()) is None
    assert train(tiny(tmp_path / "run", "model.num_classes=0", "train.steps=2", "train.sample_every=1")) == 0


def test_images_fit():
    assert len(load_images(resolve(Config, DIGITS).data, "")) == 1500
    assert ROOT.is_dir() and status(lambda: None) == 0
