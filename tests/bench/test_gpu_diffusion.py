"""Every part of the diffusion campaign at tiny size, on made-up images in CIFAR-10's format: what it writes, and that
it goes on.

Training and evaluation run in this process instead of one of their own, except once: starting PyTorch costs more than
the work.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu import campaign, diffusion, diffusion_pack, diffusion_speed
from common.checkpoint import Checkpoints
from common.config import Options, load, resolve
from common.errors import ProjectError
from common.judges.classifier import ResNet20
from common.logging import read_metrics
from common.run import Run
from diffusion import eval as diffusion_eval
from diffusion import train as diffusion_train
from diffusion.config import Config
from diffusion.sample import load_model
from tests.helpers import ROOT, python, same, status, stop_in_step

IMAGES = 64  # 8 steps of 8


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's files with 40 random images each, and a ResNet-20 with random weights."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "cifar-10-batches-bin").mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = rng.integers(256, size=(40, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(root / f"cifar-10-batches-bin/{name}.bin")
    (root / "pretrained_resnet_cifar10").mkdir()
    torch.manual_seed(0)
    torch.save({"state_dict": ResNet20().state_dict()}, root / "pretrained_resnet_cifar10/resnet20-random.th")
    return root


STARTED: list[list[str]] = []  # the commands that `in_process` was given


def in_process(command: list[str], seconds: float, **_: object) -> int:
    """Instead of `campaign.run_until`: the same program in this process."""
    if seconds <= 0:
        return campaign.STOPPED
    assert command[:2] == [sys.executable, "-m"]
    STARTED.append(command[2:])
    project, mode = command[2].split(".")
    config, options = load(Config, project, mode, command[3:])
    return status({"train": diffusion_train.train, "eval": diffusion_eval.main}[mode], config, options)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs that the campaign starts run in this process; their command lines."""
    STARTED.clear()
    monkeypatch.setattr(campaign, "run_until", in_process)
    return STARTED


def run(data_root: Path, work: Path, *words: str) -> int:
    """The exit status of one command of the campaign."""
    return status(diffusion.main, [*words, "--tiny", "--device", "cpu", "--work", str(work), f"data_root={data_root}"])


def train(data_root: Path, work: Path, *words: str) -> int:
    return run(data_root, work, "train", "--images", str(IMAGES), *words)


@pytest.fixture(scope="module")
def trained(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --work folder with both objectives trained: edm as a user does it, in processes of their own."""
    work = tmp_path_factory.mktemp("work")
    done = python(
        "-m",
        "bench.gpu.diffusion",
        "train",
        "--tiny",
        "--device",
        "cpu",
        "--images",
        str(IMAGES),
        "--work",
        str(work),
        f"data_root={data_root}",
    )
    assert done.returncode == 0, done.stderr
    assert "train: done" in done.stdout
    with pytest.MonkeyPatch.context() as context:
        context.setattr(campaign, "run_until", in_process)
        assert train(data_root, work, "--objective", "ddpm") == 0
    return work


def test_speed_measures_each_setting_once(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(data_root, tmp_path, "speed", "--seconds", "0.05") == 0
    result = campaign.read_json(tmp_path / "results/speed.json")
    assert [(row["precision"], row["channels_last"], row["compile"], row["batch"]) for row in result["rows"]] == list(
        diffusion_speed.TINY_SETTINGS
    )
    for row in result["rows"]:
        assert "error" not in row and row["images_per_second"] > 0 and row["steps"] >= diffusion_speed.CHUNK
    assert result["train"]["images_per_second"] == max(row["images_per_second"] for row in result["rows"])
    assert result["facts"]["machine"] and result["seconds"] > 0
    monkeypatch.setattr(diffusion_speed, "measure", lambda *args: pytest.fail("measured again"))
    assert run(data_root, tmp_path, "speed", "--seconds", "0.05") == 0
    assert campaign.read_json(tmp_path / "speed.json")["rows"] == result["rows"]


def test_a_setting_that_fails_is_a_row_and_tried_again(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, broken = diffusion_speed.training_step, []

    def training_step(config: Config, *rest: object):
        if config.precision == "fp32" and not broken:
            broken.append(config)
            raise torch.OutOfMemoryError("out of memory")
        return build(config, *rest)

    monkeypatch.setattr(diffusion_speed, "training_step", training_step)
    assert run(data_root, tmp_path, "speed", "--seconds", "0.05") == 0
    rows = campaign.read_json(tmp_path / "results/speed.json")["rows"]
    assert [row.get("error") for row in rows] == [None, "OutOfMemoryError: out of memory"]
    assert run(data_root, tmp_path, "speed", "--seconds", "0.05") == 0
    assert not any("error" in row for row in campaign.read_json(tmp_path / "speed.json")["rows"])


def test_advice_of_known_speeds(tmp_path: Path) -> None:
    args = diffusion.parse(["speed", "--work", str(tmp_path), "--out", str(tmp_path), "--train-seconds", "1000"])
    row = {
        "precision": "bf16",
        "channels_last": True,
        "compile": True,
        "batch": 512,
        "images_per_second": 8000.0,
        "first_steps_seconds": 75.0,
    }
    eager, other = (
        row | {"compile": False, "images_per_second": 5000.0},
        row | {"channels_last": False, "images_per_second": 9000.0},
    )
    result = diffusion_speed.content(
        [eager, row, other, row | {"error": "x", "images_per_second": 1e9}], diffusion.base_config(args), args
    )
    assert result["train"] == {"compile": True, "images_per_second": 8000.0}  # train cannot take another layout
    assert result["fits"]["images"] == 6_080_000  # 0.95 of what two commands, 100 s each lost, leave of 1000 s
    assert "no setting" in diffusion_speed.content([other], diffusion.base_config(args), args)["advice"]


def test_training_ends_at_rate_zero(trained: Path) -> None:
    for objective in ("edm", "ddpm"):
        result = campaign.read_json(trained / f"results/train_{objective}.json")
        assert (
            result["metrics"]["steps"] == result["metrics"]["of"] == IMAGES // 8
            and result["metrics"]["images"] == IMAGES
        )
        assert result["metrics"]["lr"] == 0 and result["config"]["train.decay"] == "cosine" and result["seconds"] > 0
        assert len(read_metrics(trained / f"results/train_{objective}.jsonl")) == IMAGES // 8


def test_the_two_objectives_differ_in_nothing_else(trained: Path) -> None:
    edm, ddpm = (campaign.read_json(trained / f"results/train_{name}.json")["config"] for name in ("edm", "ddpm"))
    paper = resolve(Config, ROOT / "configs/ddpm_cifar.yaml").objective
    assert {key for key in edm if edm[key] != ddpm[key]} == {"objective.kind", "run_dir"}
    assert ddpm["objective.kind"] == paper.kind and ddpm["objective.schedule"] == paper.schedule == "linear"


def test_full_size_schedule(tmp_path: Path) -> None:
    args = diffusion.parse(["train", "--work", str(tmp_path), "--out", str(tmp_path), "--images", "5.0176e6"])
    base, config = diffusion.base_config(args), diffusion.experiment(args, "edm")
    assert base == resolve(Config, ROOT / "configs/edm_cifar_cond.yaml", ["device=auto"])
    assert config.train.steps == 9800 == base.train.steps // 2 and config.train.warmup == base.train.warmup // 2
    assert config.train.ema == pytest.approx(base.train.ema**2)  # half the half-life
    assert not config.compile
    campaign.write_result(
        tmp_path / "speed.json", {"train": {"compile": True, "images_per_second": 5120.0}}, {"command": ""}, 1
    )
    measured = diffusion.experiment(args, "edm")
    assert measured.compile and measured.train.save_every == 1200  # two minutes at ten steps a second


def test_stopped_training_goes_on_as_if_it_had_not_been(
    trained: Path,
    data_root: Path,
    tmp_path: Path,
    here: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as context:
        stop_in_step(context, 3)
        assert train(data_root, tmp_path / "first") == campaign.UNFINISHED
    assert "same command goes on" in capsys.readouterr().out
    assert campaign.read_json(tmp_path / "first/results/train_edm.json")["metrics"]["steps"] == 3
    # no time, nothing started
    assert train(data_root, tmp_path / "first", "--minutes", "0") == campaign.UNFINISHED and len(here) == 1
    moved = (tmp_path / "first").rename(tmp_path / "moved")  # as to another machine
    assert train(data_root, moved) == 0
    states = [Checkpoints(work / "edm/checkpoints").load_newest() for work in (moved, trained)]
    assert same(*(state["parts"] for state in states)) and states[0]["step"] == IMAGES // 8
    assert train(data_root, moved) == 0 and len(here) == 2  # done: nothing to start


def test_another_run_is_not_mixed_with_this_one(trained: Path, data_root: Path, here: list[list[str]]) -> None:
    for words in (["--images", "640"], ["train.lr=1"]):
        outcome = status(
            diffusion.main,
            [
                "train",
                "--images",
                str(IMAGES),
                *words,
                "--tiny",
                "--device",
                "cpu",
                "--work",
                str(trained),
                f"data_root={data_root}",
            ],
        )
        assert str(outcome).startswith("error:") and "was started with other settings" in outcome
    assert not here


@pytest.mark.slow
def test_evaluation(trained: Path, data_root: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data_root, trained, "evaluate", "--minutes", "0") == campaign.UNFINISHED
    assert not list((trained / "results").glob("eval_*"))
    assert run(data_root, trained, "evaluate") == 0
    out = capsys.readouterr().out
    assert "no FID" in out and "by sampler and network evaluations" in out and "by guidance" in out
    for objective in ("edm", "ddpm"):
        result = campaign.read_json(trained / f"results/eval_{objective}.json")
        metrics = result["metrics"]
        assert metrics["steps"] == metrics["of"] == IMAGES // 8 and result["n"] == {
            "fd_resnet20": 50,
            "reference": 200,
            "table": 20,
        }
        assert {
            "fd_resnet20",
            "fd_floor",
            "conditional_accuracy",
            "precision",
            "recall",
            "nearest_train_rms",
        } <= metrics.keys()
        assert all(np.isfinite(value) for key, value in metrics.items() if key != "objective")
        assert not any("nfe" in key or "_w" in key for key in metrics)  # those are the tables' rows
        assert {row["sampler"] for row in result["samplers"]} >= {"heun", "euler", "dpmpp"}
        assert all({"1", "5"} <= row.keys() for row in result["samplers"])
        assert [row["guidance"] for row in result["guidance"]] == ["1", "2"]
        assert "seed 0" in result["samples"] and "heun, 3 steps" in result["samples"] and result["seconds"] > 0
        for picture in ("samples", "neighbours", "samplers"):
            assert 0 < (trained / f"results/{objective}_{picture}.png").stat().st_size <= diffusion.PICTURE_BYTES
    count = len(here)
    shutil.rmtree(trained / "results")
    assert run(data_root, trained, "all", "--images", str(IMAGES), "--seconds", "0.05") == 0
    assert len(here) == count  # all but the speed was there, and is published again
    assert {"speed.json", "train_edm.json", "eval_ddpm.json", "edm_samples.png"} <= {
        path.name for path in (trained / "results").iterdir()
    }


def test_stopped_evaluation_keeps_its_batches(
    trained: Path, data_root: Path, here: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "edm", tmp_path / "edm", ignore=shutil.ignore_patterns("eval*", "figures"))
    draw, batches = diffusion_eval.generate_batch, []

    def generate_batch(model: object, objective: object, config: object, index: int, *rest: object):
        batches.append(index)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGTERM)
        return draw(model, objective, config, index, *rest)

    monkeypatch.setattr(diffusion_eval, "generate_batch", generate_batch)
    words = ["evaluate", "eval.nfe_samples=0", "eval.manifold_samples=0", "eval.neighbours=0"]
    assert run(data_root, tmp_path, *words) == campaign.UNFINISHED
    assert run(data_root, tmp_path, *words) == 0
    assert batches == [0, 1, 1, 2, 3]  # four batches of 16; the one that was cut short again, the first not
    assert campaign.read_json(tmp_path / "results/eval_edm.json")["samplers"] == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_packed_weights_come_back(trained: Path, data_root: Path, tmp_path: Path, dtype: str) -> None:
    size = 20_000 if dtype == "bf16" else 40_000
    assert diffusion_pack.pack(trained / "edm", tmp_path / "packed", dtype, shard_bytes=size)
    files = list((tmp_path / "packed").iterdir())
    assert 3 <= len(files) <= diffusion_pack.FILES and all(path.stat().st_size <= size for path in files)
    assert diffusion_pack.unpack(tmp_path / "edm", tmp_path / "packed")
    state = Checkpoints(trained / "edm/checkpoints").load_newest()
    config = resolve(Config, tmp_path / "edm/config.yaml", ["device=cpu"], str(tmp_path / "edm"))
    model, _, step = load_model(config, Options("eval"), Run(config, Options("eval")))
    assert step == state["step"]
    for name, value in state["parts"]["ema"].items():
        exact = dtype == "fp32" or value.ndim == 1
        assert torch.equal(model.state_dict()[name], value if exact else value.bfloat16().float()), name
    with pytest.raises(ProjectError, match="holds a run already"):
        diffusion_pack.unpack(tmp_path / "edm", tmp_path / "packed")


def test_packing_refuses_what_is_damaged_or_too_large(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="more than 7 files"):
        diffusion_pack.pack(trained / "edm", tmp_path / "packed", "fp32", shard_bytes=1000)
    diffusion_pack.pack(trained / "edm", tmp_path / "packed", shard_bytes=20_000)
    diffusion_pack.pack(trained / "edm", tmp_path / "packed", shard_bytes=60_000)  # fewer shards: the old ones are gone
    assert len(list((tmp_path / "packed").glob("*.bin"))) == 2
    shard = tmp_path / "packed/weights-2-of-2.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ProjectError, match="damaged"):
        diffusion_pack.unpack(tmp_path / "edm", tmp_path / "packed")
    with pytest.raises(ProjectError, match=r"no manifest\.json"):
        diffusion_pack.unpack(tmp_path / "edm", tmp_path / "empty")
    assert not (tmp_path / "edm").exists()


def test_mistakes_are_one_line(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ((["train", "train.learning_rate=1"], 2), (["pack"], 1), (["unpack"], 1)):
        assert run(data_root, tmp_path, *words) == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert "no trained run" in str(run(data_root, tmp_path, "evaluate"))


def test_large_pictures_become_small(tmp_path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(256, size=(342, 342, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > diffusion.PICTURE_BYTES
    diffusion.publish_picture(tmp_path / "a.png", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size <= diffusion.PICTURE_BYTES
    diffusion.publish_picture(tmp_path / "absent.png", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


@pytest.mark.slow
def test_a_rehearsal_leaves_docs_alone(
    trained: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: list[list[str]]
) -> None:
    """From a folder of its own, where docs/ would appear if anything were written there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert train(data_root, tmp_path / "work") == 0
    assert run(data_root, tmp_path / "work", "pack") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "work"}
    assert [path.name for path in (tmp_path / "work/results").glob("train_edm.*")]
