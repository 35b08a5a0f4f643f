"""Train, evaluate and sample as a person would: the files that appear, the last line of stdout, and being stopped
halfway.
"""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from PIL import Image

import common.judges.features
import diffusion.eval
import diffusion.sample
from common.checkpoint import Checkpoints, read_weights
from common.config import Options, load
from common.run import Run
from diffusion.config import Config
from tests.helpers import DIGITS, TINY, errors, program, status, stop_in_step, tiny, train

QUICK = [
    "eval.num_samples=24",
    "eval.manifold_samples=20",
    "eval.neighbours=2",
    "sample.batch_size=8",
    "sample.steps=3",
]  # three batches


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, made by the command line, and the data folder in which evaluations keep their classifier."""
    folder = tmp_path_factory.mktemp("programs")
    result = program(
        "diffusion.train",
        "--config",
        str(DIGITS),
        *TINY,
        "train.steps=2",
        "train.sample_every=2",
        f"run_dir={folder / 'run'}",
        f"data_root={folder / 'data'}",
    )
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stderr and result.stdout == ""
    return folder / "run"


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of that run, to do anything with."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def evaluate(run_dir, *overrides: str, checkpoint: str = "") -> int:
    config, _ = load(Config, "diffusion", "eval", ["--run", str(run_dir), *QUICK, *overrides])
    return status(diffusion.eval.main, config, Options("eval", checkpoint=str(checkpoint)))


def draw(run_dir, *overrides: str, checkpoint: str = "") -> int:
    config, _ = load(Config, "diffusion", "sample", ["--run", str(run_dir), *QUICK, *overrides])
    return status(diffusion.sample.main, config, Options("sample", checkpoint=str(checkpoint)))


def test_training_leaves_everything(trained):
    for name in (
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "model.safetensors",
        "samples/00000002.png",
        "checkpoints/00000002.pt",
        "checkpoints/00000002.json",
    ):
        assert (trained / name).stat().st_size > 0
    assert "diffusion.train" in json.loads((trained / "env.json").read_text())["command"]


def test_evaluation(run_dir, capsys):
    assert evaluate(run_dir) == 0
    captured = capsys.readouterr()
    result = json.loads((run_dir / "eval.json").read_text())
    assert json.loads(captured.out.splitlines()[-1]) == result
    assert {"project", "config", "checkpoint_step", "metrics", "n", "seeds", "seconds"} <= result.keys()
    assert (result["project"], result["config"], result["checkpoint_step"], result["seeds"]) == (
        "diffusion",
        "run",
        2,
        [0],
    )
    metrics = result["metrics"]
    assert {
        "fd_digits",
        "fd_floor",
        "conditional_accuracy",
        "classifier_test_accuracy",
        "precision",
        "recall",
    } <= metrics.keys()
    assert all(isinstance(value, int | float) for value in metrics.values()) and "fid" not in metrics
    assert 0 < metrics["fd_floor"] < metrics["fd_digits"], "two steps of training cannot be as good as real images"
    assert result["n"]["fd_digits"] == 24 and result["n"]["reference"] == 64
    assert all(name in captured.out for name in ("fd_digits", "fd_floor"))
    assert not (run_dir / "eval_samples").exists()
    with Image.open(run_dir / "figures/samples.png") as image:
        image.verify()


def test_real_images_are_looked_at_once(run_dir, capsys, monkeypatch):
    assert evaluate(run_dir) == 0
    first = json.loads((run_dir / "eval.json").read_text())["metrics"]

    def refuse(*_args, **_kwargs):
        raise AssertionError("statistics of training and held-out images are in the cache")

    monkeypatch.setattr(common.judges.features, "extract", refuse)  # generated images go by diffusion.eval's own name
    assert evaluate(run_dir) == 0
    assert json.loads((run_dir / "eval.json").read_text())["metrics"] == first


def test_every_output_says_what_made_it(run_dir):
    """eval.json and the tables name config and weights; what an earlier evaluation with tables left goes."""
    table = ("eval.nfe_samples=8", "eval.nfe_table=[1]", "eval.guidance_table=[1]")
    assert evaluate(run_dir, *table) == 0
    first = json.loads((run_dir / "eval.json").read_text())
    marks = {key: first[key] for key in ("config_sha256", "weights_sha256")}
    for name in ("samplers", "guidance"):
        assert marks.items() <= json.loads((run_dir / f"figures/{name}.json").read_text()).items()
    assert evaluate(run_dir) == 0
    second = json.loads((run_dir / "eval.json").read_text())
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["config_sha256"] != first["config_sha256"]
    assert {path.stem for path in (run_dir / "figures").iterdir()} == {"samples", "neighbours"}


def test_weights_of_a_stopped_run_say_so(run_dir, tmp_path, monkeypatch, capsys):
    """In the metadata of the file, in eval.json, in the table and in a note."""
    folder = tmp_path / "stopped"
    stop_in_step(monkeypatch, 3)
    assert train(tiny(folder)) == 143
    facts = read_weights(folder / "model.safetensors")[1]
    assert (facts["step"], facts["total_steps"]) == ("3", "12")
    capsys.readouterr()
    assert evaluate(folder) == 0
    said = capsys.readouterr()
    assert "the weights are of step 3 of 12: no finished training" in said.err
    assert "after 3 of 12 steps" in said.out
    result = json.loads(said.out.splitlines()[-1])
    assert (result["checkpoint_step"], result["total_steps"]) == (3, 12)
    assert evaluate(run_dir) == 0
    assert "no finished training" not in capsys.readouterr().err


@pytest.mark.parametrize("word", ["objective.kind=edm", "objective.schedule=linear", "model.groups=2"])
def test_weights_of_another_objective_are_refused(word, run_dir, capfd):
    """No shape betrays them; their samples would be reported as this config's."""
    assert evaluate(run_dir, word) == 1
    (line,) = errors(capfd.readouterr().err)
    assert f"trained with {word.split('=')[0]}=" in line
    assert not (run_dir / "eval.json").exists()


def test_sampling_as_a_process(run_dir):
    result = program("diffusion.sample", "--run", str(run_dir), "sample.guidance=2", "sample.steps=3", "sample.count=8")
    assert result.returncode == 0, result.stderr
    names = {path.name.split("_")[0]: path for path in (run_dir / "figures").iterdir()}
    assert names.keys() == {"grid", "interpolation", "filmstrip", "denoising"}
    for path in names.values():
        with Image.open(path) as image:
            assert image.format == ("GIF" if path.suffix == ".gif" else "PNG")
            assert path.suffix != ".gif" or image.n_frames in (3, 4)  # Pillow writes two equal frames as one


def stop_at_call(monkeypatch: pytest.MonkeyPatch, module, number: int) -> list[int]:
    """Send this process a real SIGTERM in the second sampling step of the `number`-th batch; returns the batches
    drawn, as they come.
    """
    drawn, original = [], module.generate_batch

    def batch(model, objective, config, index, *args, **kwargs):
        drawn.append(index)
        if len(drawn) == number:
            forward = type(model).forward
            calls = []

            def stop(self, *inputs):
                calls.append(1)
                assert len(calls) <= 2, "more than one step after the signal"
                if len(calls) == 2:
                    signal.raise_signal(signal.SIGTERM)
                return forward(self, *inputs)

            with monkeypatch.context() as context:
                context.setattr(type(model), "forward", stop)
                return original(model, objective, config, index, *args, **kwargs)
        return original(model, objective, config, index, *args, **kwargs)

    monkeypatch.setattr(module, "generate_batch", batch)
    return drawn


def test_stopped_evaluation_goes_on_from_its_batches(run_dir, tmp_path, capsys, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "whole")
    assert evaluate(tmp_path / "whole") == 0
    expected = json.loads((tmp_path / "whole/eval.json").read_text())
    with monkeypatch.context() as context:
        stop_at_call(context, diffusion.eval, 3)
        assert evaluate(run_dir) == 143
    assert not (run_dir / "eval.json").exists()
    assert len(list((run_dir / "eval_samples").rglob("*.npy"))) == 2
    with monkeypatch.context() as context:
        drawn = stop_at_call(context, diffusion.eval, -1)
        assert evaluate(run_dir) == 0
    assert drawn == [2], "the kept batches were drawn again"
    assert json.loads((run_dir / "eval.json").read_text())["metrics"] == expected["metrics"]


def test_other_settings_do_not_use_kept_batches(run_dir, capsys, monkeypatch):
    with monkeypatch.context() as context:
        stop_at_call(context, diffusion.eval, 3)
        assert evaluate(run_dir) == 143
    drawn = stop_at_call(monkeypatch, diffusion.eval, -1)
    assert evaluate(run_dir, "sample.guidance=2") == 0
    assert drawn == [0, 1, 2]


def test_stopped_sampling(run_dir, monkeypatch):
    stop_at_call(monkeypatch, diffusion.sample, 1)
    assert draw(run_dir) == 143
    assert not list((run_dir / "figures").glob("*"))


@pytest.mark.parametrize("program", [evaluate, draw])
def test_explicit_checkpoint(program, run_dir, tmp_path, capfd):
    path = run_dir / "checkpoints/00000002.pt"
    if program is draw:
        assert program(run_dir, checkpoint="00000002.pt") == 0
    elsewhere = tmp_path / "elsewhere/00000002.pt"  # the same name in another folder is not the one in this run
    assert program(run_dir, checkpoint=elsewhere) == 1
    assert str(elsewhere) in errors(capfd.readouterr().err)[0]
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 4]) + content[501:])
    for checkpoint in ("00000002.pt", path):
        assert program(run_dir, checkpoint=checkpoint) == 1
        (line,) = errors(capfd.readouterr().err)
        assert "00000002.pt is damaged" in line
    assert not (run_dir / "eval.json").exists()


@pytest.mark.parametrize("program", [evaluate, draw])
def test_nothing_to_load_or_wrong_settings(program, run_dir, capfd):
    assert program(run_dir, "model.channels=16") == 1
    assert "another model" in errors(capfd.readouterr().err)[0]
    with pytest.raises(SystemExit) as stopped:
        program(run_dir, "sample.steps=5000")
    assert stopped.value.code == 2
    assert "sample.steps" in errors(capfd.readouterr().err)[0]
    Checkpoints(run_dir / "checkpoints").path(2).unlink()
    assert program(run_dir) == 1
    assert "no whole checkpoint" in errors(capfd.readouterr().err)[0]


def test_a_checkpoint_of_something_else(run_dir, capfd):
    Checkpoints(run_dir / "checkpoints").save(3, {"step": 3, "weights": torch.zeros(2)})
    assert draw(run_dir) == 1
    assert len(errors(capfd.readouterr().err)) == 1


def test_sampling_repeats_itself(run_dir):
    config, options = load(
        Config, "diffusion", "sample", ["--run", str(run_dir), "sample.steps=3", "sample.batch_size=4"]
    )
    images = []
    for _ in range(2):
        with Run(config, options) as run:
            model, objective, step = diffusion.sample.load_model(config, options, run)
            assert step == 2
            images.append(diffusion.sample.generate(model, objective, config, 6, torch.arange(6), 0, run))
    assert torch.equal(*images)
    assert images[0].dtype == torch.uint8 and images[0].shape == (6, 1, 8, 8)
