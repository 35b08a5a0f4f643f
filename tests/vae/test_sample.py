"""Many images from the prior: the same ones however they are divided, interrupted or continued, and never beside those
of other weights.
"""

from __future__ import annotations

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import vae.sample
from common.checkpoint import Checkpoints
from common.config import resolve
from common.runtime import mix_seed
from tests.helpers import errors, python, start_python
from tests.vae.tiny import MODELS, call, train
from vae.config import Config
from vae.figures import to_bytes
from vae.load import build_model
from vae.sample import SAMPLE_STREAM


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sample") / "run"
    assert train(run_dir) == 0
    return run_dir


def pngs(folder):
    """Every image of a folder by its name."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_an_image_is_a_function_of_seed_and_number(trained, tmp_path):
    """Against the equation: decode(prior noise of (seed, i)), one image at a time."""
    assert call("sample", trained, "--out", str(tmp_path / "a"), "--count", "5", "sample.batch_size=2") == 0
    images = pngs(tmp_path / "a")
    assert list(images) == [f"{i:08d}.png" for i in range(5)]
    state = Checkpoints(trained / "checkpoints").load_newest()
    config = resolve(Config, trained / "config.yaml")
    model = build_model(config).eval()
    model.load_state_dict(state["parts"]["ema"])
    for i, image in enumerate(images.values()):
        noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(mix_seed(0, SAMPLE_STREAM, i)))
        expected = to_bytes(model.likelihood.mean(model.decode(noise)))[0, 0].detach().numpy()
        assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_another_number_changes_nothing(trained, tmp_path):
    words = ["sample.batch_size=4", "sample.shard=3"]
    assert call("sample", trained, "--out", str(tmp_path / "a"), "--count=7", *words) == 0
    assert call("sample", trained, "--out", str(tmp_path / "b"), "--count=11", *words) == 0
    few = pngs(tmp_path / "a")
    many = pngs(tmp_path / "b")
    assert len(many) == 11
    assert same(few, {name: many[name] for name in few})
    assert call("sample", trained, "--out", str(tmp_path / "a"), "--count=11", *words) == 0, "more of the same"
    assert same(pngs(tmp_path / "a"), many)
    assert len({image.tobytes() for image in many.values()}) == 11
    other = tmp_path / "c"
    assert call("sample", trained, "--out", str(other), "--count=7", "sample.batch_size=3", "sample.shard=5") == 0
    for name, image in pngs(other).items():
        assert np.abs(image.astype(int) - few[name].astype(int)).max() <= 1
    assert call("sample", trained, "--out", str(tmp_path / "d"), "--count=7", "seed=1", *words) == 0
    assert not same(pngs(tmp_path / "d"), few)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pixels", ["mean", "draw"])
def test_npz_and_png_agree(model, pixels, tmp_path):
    assert train(tmp_path / "run", *MODELS[model]) == 0
    words = ["sample.count=7", "sample.shard=4", "sample.batch_size=3", f"sample.pixels={pixels}"]
    assert call("sample", tmp_path / "run", *words) == 0
    assert call("sample", tmp_path / "run", "--out", str(tmp_path / "npz"), "sample.format=npz", *words) == 0
    shards = sorted((tmp_path / "npz").glob("*.npz"))
    assert [path.name for path in shards] == ["images-00000.npz", "images-00001.npz"]
    images = np.concatenate([np.load(path, allow_pickle=False)["images"] for path in shards])
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8
    assert np.array_equal(images[..., 0], np.stack(list(pngs(tmp_path / "run/generated").values())))
    if pixels == "draw" and model == "mlp":
        assert set(np.unique(images)) == {0, 255}, "a draw from a Bernoulli likelihood is black and white"


def test_temperature_zero_is_one_image(trained, tmp_path):
    assert call("sample", trained, "--out", str(tmp_path), "--count=3", "sample.temperature=0") == 0
    assert len({image.tobytes() for image in pngs(tmp_path).values()}) == 1


def interrupted(monkeypatch, after: int):
    """A stop signal in the middle of a block."""
    draw = vae.sample.draw
    count = 0

    def draw_and_stop(*args):
        nonlocal count
        count += 1
        if count == after:
            signal.raise_signal(signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(vae.sample, "draw", draw_and_stop)


@pytest.mark.parametrize("form", ["png", "npz"])
def test_interruption(trained, tmp_path, monkeypatch, form, capsys):
    words = ["--count=14", "sample.batch_size=2", "sample.shard=4", f"sample.format={form}"]
    assert call("sample", trained, "--out", str(tmp_path / "whole"), *words) == 0
    with monkeypatch.context() as context:
        interrupted(context, 4)
        assert call("sample", trained, "--out", str(tmp_path / "cut"), *words) == 143
    manifest = json.loads((tmp_path / "cut/manifest.json").read_text())
    assert list(manifest["shards"]) == ["0"]
    drawn = []
    original = vae.sample.draw
    monkeypatch.setattr(vae.sample, "draw", lambda *args: drawn.append(args[2]) or original(*args))
    capsys.readouterr()
    assert call("sample", trained, "--out", str(tmp_path / "cut"), *words) == 0
    assert drawn == [4, 6, 8, 10, 12], "the first shard is kept"
    assert "1 of 4 shards were there before" in capsys.readouterr().err
    for path in (tmp_path / "whole").glob(f"*.{form}"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "cut").iterdir()}


def test_damaged_shards_are_made_anew(trained, tmp_path, monkeypatch):
    words = ["--out", str(tmp_path), "--count=6", "sample.batch_size=2", "sample.shard=2"]
    assert call("sample", trained, *words) == 0
    before = pngs(tmp_path)
    (tmp_path / "00000000.png").unlink()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "00000005.png")
    drawn = []
    original = vae.sample.draw
    monkeypatch.setattr(vae.sample, "draw", lambda *args: drawn.append(args[2]) or original(*args))
    assert call("sample", trained, *words) == 0
    assert drawn == [0, 4]
    assert same(pngs(tmp_path), before)


def test_other_weights_are_refused(trained, tmp_path, capsys):
    """And other settings; nothing is changed by that."""
    words = ["--out", str(tmp_path / "out"), "--count=3"]
    assert call("sample", trained, *words) == 0
    assert train(tmp_path / "other", "seed=5") == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    for run, more in ((tmp_path / "other", "seed=0"), (trained, "sample.temperature=0.5"), (trained, "seed=3")):
        assert call("sample", run, *words, more) == 1
        (line,) = errors(capsys.readouterr().err)
        assert "is of other weights or settings" in line
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_folder_with_something_else_in_it(trained, tmp_path, capsys):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    assert call("sample", trained, "--out", str(tmp_path)) == 1
    assert "is not empty" in errors(capsys.readouterr().err)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]
    assert call("sample", trained, "--out", str(tmp_path / "holiday.png")) == 1
    assert "is not a folder" in errors(capsys.readouterr().err)[0]


def test_no_checkpoint(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert call("sample", tmp_path / "run") == 1
    assert "no whole checkpoint" in errors(capsys.readouterr().err)[0]


def test_as_a_process(trained, tmp_path):
    """The command of the README, and a stop by SIGTERM that the same command goes on from."""
    words = ["-m", "vae.sample", "--run", str(trained), "--out", str(tmp_path / "out")]
    result = python(*words, "--count", "-3")
    assert result.returncode == 2 and "sample.count: must be at least 1" in result.stderr
    more = ["--count", "200000", "sample.batch_size=10", "sample.shard=20"]
    process = start_python(*words, *more)
    until = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.png"))) < 60 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in text
    done = json.loads((tmp_path / "out/manifest.json").read_text())["shards"]
    assert len(done) >= 2
    assert call("sample", trained, "--out", str(tmp_path / "out"), "--count=60", *more[2:]) == 0
