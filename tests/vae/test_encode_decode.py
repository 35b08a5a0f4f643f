"""Images to codes and back: what comes back is the reconstruction, a person's files keep their names, the decoder runs
without this project, and bad files end in one line.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vae.encode
from common.checkpoint import Checkpoints, read_weights
from common.config import resolve
from common.images import read_digits
from common.latents import Latents, read_latents
from common.program import load_program
from tests.helpers import ROOT, environment, errors, program, same
from tests.vae.tiny import MODELS, call, train
from vae.config import Config
from vae.data import load_images
from vae.decode import png_names, unique
from vae.figures import to_bytes
from vae.images import expected
from vae.load import build_model


@pytest.fixture(scope="module", params=list(MODELS))
def encoded(request, tmp_path_factory):
    """The folder of a run whose images are encoded."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    assert train(run_dir, *MODELS[request.param]) == 0
    assert call("encode", run_dir, "encode.batch_size=7") == 0
    return run_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same for the simplest model."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert train(run_dir) == 0
    assert call("encode", run_dir) == 0
    return run_dir


def model_of(run_dir):
    config = resolve(Config, run_dir / "config.yaml")
    model = build_model(config).eval()
    model.load_state_dict(Checkpoints(run_dir / "checkpoints").load_newest()["parts"]["ema"])
    return model, config


@torch.no_grad()
def reconstruct(model, x):
    """The expected image at the mean of q(z | x)."""
    return model.likelihood.mean(model.decode(model.codes(x)))


def near(a, b):
    """Equal but for the rounding of a grey value, which batches of other sizes may change."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_round_trip(encoded, tmp_path):
    """decode(encode(x)) is the reconstruction, from the program's decoder and from the exported one."""
    model, config = model_of(encoded)
    for split in ("train", "test"):
        path = encoded / f"latents/{split}.npz"
        images = load_images(config.data, config.data_root, split)
        latents = read_latents(path)
        assert len(latents) == len(images) and torch.equal(latents.labels, images.labels)
        assert latents.class_names == images.class_names
        assert torch.equal(latents.index, torch.arange(len(images)))
        right = to_bytes(reconstruct(model, expected(images.images, config)))
        with torch.no_grad():
            exported = load_program(encoded / "latents/decoder.safetensors")(latents.codes)
        assert near(to_bytes(exported), right)
    out = tmp_path / "npz"
    assert call("decode", encoded, "--latents", str(path), "--out", str(out), "decode.format=npz") == 0
    with np.load(out / "images.npz", allow_pickle=False) as file:
        assert near(file["images"], right.permute(0, 2, 3, 1))
        assert np.array_equal(file["labels"], images.labels)
        assert list(file["class_names"]) == list(images.class_names)


def test_codes_are_the_posterior(encoded):
    """Means, and log variances where q(z | x) is one normal distribution."""
    model, config = model_of(encoded)
    x = expected(load_images(config.data, config.data_root).images, config)
    latents = read_latents(encoded / "latents/train.npz")
    with torch.no_grad():
        assert torch.allclose(latents.codes, model.codes(x), atol=1e-5)
        if config.model.kind == "ladder":
            assert latents.log_variances is None
        else:
            assert torch.allclose(latents.log_variances, model.infer(x).log_variance, atol=1e-5)


def test_scale(encoded):
    """1 / standard deviation over all codes of the training images (Rombach et al. 2022, appendix G), in every file."""
    train_codes = read_latents(encoded / "latents/train.npz")
    expected_scale = 1 / float(train_codes.codes.double().std(correction=0))
    assert train_codes.scale == pytest.approx(expected_scale, rel=1e-6)
    assert read_latents(encoded / "latents/test.npz").scale == pytest.approx(expected_scale, rel=1e-6)


def test_the_scale_of_a_single_split(plain, tmp_path):
    assert call("encode", plain, "--out", str(tmp_path), "encode.split=test") == 0
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["test.npz"]
    scale = read_latents(plain / "latents/train.npz").scale
    assert read_latents(tmp_path / "test.npz").scale == pytest.approx(scale, rel=1e-6)


def test_the_decoder_runs_without_the_project(encoded, tmp_path):
    """In a process that cannot import vae: only `common/program.py`, PyTorch and safetensors."""
    model, _ = model_of(encoded)
    z = torch.randn(5, model.size)
    with torch.no_grad():
        save_file({"z": z, "x": model.likelihood.mean(model.decode(z))}, tmp_path / "case")
    code = f"""
import sys
for name in ("vae", "diffusion", "tests"):
    sys.modules[name] = None
from safetensors.torch import load_file
from common.program import load_program
program = load_program({str(encoded / "latents/decoder.safetensors")!r})
case = load_file({str(tmp_path / "case")!r})
for count in (5, 1):
    difference = (program(case["z"][:count]) - case["x"][:count]).abs().max()
    assert difference < 1e-5, difference
assert program.facts["latents"] == str(case["z"].shape[1]) and program.output_shape == (1, 8, 8)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def pictures(tmp_path):
    """Odd files: 16 bits, transparent, turned by EXIF, colour, one that is broken; two of one name."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    grey = read_digits("test").images[0, 0].numpy().repeat(2, 0).repeat(2, 1)  # (16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey).save(folder / "plain.png")
    Image.fromarray(np.stack([grey] * 3, 2)).save(folder / "sub/colour.png")
    Image.fromarray(np.stack([grey, np.full_like(grey, 255)], 2), "LA").save(folder / "sub/alpha.png")
    turned = Image.fromarray(np.rot90(grey).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise
    turned.save(folder / "turned.png", exif=exif)
    Image.fromarray(grey).save(folder / "plain.bmp")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    return folder


def test_a_folder_of_ones_own(plain, pictures, tmp_path, capsys):
    assert call("encode", plain, f"encode.folder={pictures}", "encode.batch_size=3", "data.workers=0") == 0
    assert "skipping" in capsys.readouterr().err
    path = plain / "latents/pictures.npz"
    latents = read_latents(path)
    assert latents.names == ("deep.png", "plain.bmp", "plain.png", "sub/alpha.png", "sub/colour.png", "turned.png")
    assert torch.allclose(latents.codes, latents.codes[:1].expand(6, -1), atol=1e-5), "they show one image"
    assert latents.scale == read_latents(plain / "latents/train.npz").scale
    assert latents.facts["data"]["dataset"] == "folder"
    assert call("decode", plain, "--latents", str(path), "--out", str(tmp_path / "out")) == 0
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["deep.png", "plain-2.png", "plain.png", "sub/alpha.png", "sub/colour.png", "turned.png"]
    first = np.asarray(Image.open(tmp_path / "out/deep.png"))
    assert first.shape == (8, 8) and near(first, np.asarray(Image.open(tmp_path / "out/sub/alpha.png")))


def test_file_names():
    assert unique(["a.png", "A.png", "b.png", "a.png"]) == ["a.png", "A-2.png", "b.png", "a-3.png"]
    for name in ("../a.png", "/etc/a.png", "a/../../b.png", "..", "a\\b.png"):
        with pytest.raises(Exception, match="cannot be the name"):
            png_names(Latents(torch.zeros(1, 2), names=(name,)))


def test_interruption_leaves_nothing_half(plain, tmp_path, monkeypatch):
    encode = vae.encode.encode
    count = 0

    def encode_and_stop(*args):
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGTERM)
        return encode(*args)

    monkeypatch.setattr(vae.encode, "encode", encode_and_stop)
    words = ["--out", str(tmp_path / "out"), "encode.batch_size=8"]
    assert call("encode", plain, *words) == 143
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"manifest.json", "decoder.safetensors", ".lock"}
    monkeypatch.setattr(vae.encode, "encode", encode)
    assert call("encode", plain, *words) == 0
    whole = tmp_path / "whole"
    assert call("encode", plain, "--out", str(whole), "encode.batch_size=8") == 0
    for name in ("train.npz", "test.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    # safetensors writes its metadata in any order
    assert same(*(read_weights(folder / "decoder.safetensors") for folder in (tmp_path / "out", whole)))


def test_codes_of_other_weights_are_refused(plain, tmp_path, capsys):
    assert train(tmp_path / "run", "seed=4") == 0
    capsys.readouterr()
    latents = str(plain / "latents/test.npz")
    assert call("decode", tmp_path / "run", "--latents", latents) == 1
    assert "made by other weights (run at step 2)" in errors(capsys.readouterr().err)[0]
    assert call("encode", tmp_path / "run", "--out", str(plain / "latents")) == 1
    assert "is of other weights or settings" in errors(capsys.readouterr().err)[0]
    assert train(tmp_path / "larger", "model.latents=4") == 0
    capsys.readouterr()
    assert call("decode", tmp_path / "larger", "--latents", latents) == 1
    assert "codes of 3 numbers, this run's model of 4" in errors(capsys.readouterr().err)[0]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "no array `codes`"),
        ({"codes": np.zeros((4, 3, 1))}, "must be numbers in 2 dimensions"),
        ({"codes": np.zeros((0, 3))}, "at least one of each"),
        ({"codes": np.array([["a", "b", "c"]])}, "must be numbers"),
        ({"codes": np.full((2, 3), np.nan)}, "6 of 6 numbers in codes are not finite"),
        ({"codes": np.full((2, 3), 1e300)}, "not finite"),
        ({"codes": np.zeros((2, 3)), "log_variances": np.zeros((2, 2))}, r"log_variances are \(2, 2\)"),
        ({"codes": np.zeros((2, 3)), "names": np.array(["a"])}, "1 names for 2 codes"),
        ({"codes": np.zeros((2, 3)), "labels": np.array([0, 5]), "class_names": np.array(["a"])}, "labels must be"),
        ({"codes": np.zeros((2, 3)), "labels": np.array([0.5, 1.0])}, "whole numbers"),
        ({"codes": np.zeros((2, 3)), "scale": np.array(-1.0)}, "scale must be positive"),
        ({"codes": np.zeros((2, 3)), "facts": np.array("{")}, "not JSON"),
        ({"codes": np.array([object()])}, "cannot be read"),
    ],
)
def test_bad_files(plain, tmp_path, capsys, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    assert call("decode", plain, "--latents", str(tmp_path / "bad.npz"), "--out", str(tmp_path / "out")) == 1
    (line,) = errors(capsys.readouterr().err)
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_archives(plain, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("codes")
    np.save(tmp_path / "array.npy", np.zeros((2, 3)))
    shutil.copy(plain / "latents/test.npz", tmp_path / "cut.npz")
    with (tmp_path / "cut.npz").open("r+b") as file:
        file.truncate(2000)
    for name in ("text.npz", "array.npy", "cut.npz", "absent.npz"):
        assert call("decode", plain, "--latents", str(tmp_path / name)) == 1
        assert len(errors(capsys.readouterr().err)) == 1


def test_latents_are_needed(plain, capsys):
    assert call("decode", plain) == 2
    assert "--latents FILE.npz" in errors(capsys.readouterr().err)[0]


def test_as_processes(plain, tmp_path):
    """The commands of the README; a foreign archive with nothing but codes is decoded as well."""
    out = tmp_path / "codes"
    result = program("vae.encode", "--run", str(plain), "--out", str(out), "encode.split=test")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["scale"] > 0 and manifest["key"]["latents"] == 3
    np.savez(tmp_path / "own.npz", codes=np.zeros((2, 3)))
    words = [
        "vae.decode",
        "--run",
        str(plain),
        "--latents",
        str(tmp_path / "own.npz"),
        "--out",
        str(tmp_path / "o"),
    ]
    result = program(*words)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "o").glob("*.png")} == {"00000000.png", "00000001.png"}
