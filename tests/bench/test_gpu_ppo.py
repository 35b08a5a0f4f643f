"""The GPU campaign of ppo, rehearsed on a CPU: every part runs, writes sane results, and goes on where it was
stopped.
"""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

import ppo.train
from bench.gpu import campaign
from bench.gpu import ppo as program
from common.config import Options, resolve
from common.logging import read_metrics
from ppo.config import Config
from ppo.playing.collect import Collector
from tests.helpers import ROOT, status, stop_in_check


def run(work, *words):
    """Exit status of the program; results in work/results."""
    return status(program.main, [*words, "--tiny", "--work", str(work), "--device", "cpu"])


def result(work, name):
    return json.loads((work / f"results/{name}.json").read_text())


@pytest.mark.slow
def test_speed(tmp_path):
    """A row for each number of environments; the shares make up the whole; the program is left as it was, its run
    folder gone.
    """
    before = ppo.train.make_vector, Collector.collect
    assert run(tmp_path, "speed") == 0
    rows = result(tmp_path, "speed")["rows"]
    assert [row["count"] for row in rows] == [2, 4]
    for row in rows:
        assert row["steps_per_s"] > 0
        assert row["environment"] + row["inference"] + row["update"] == pytest.approx(1)
        assert min(row["environment"], row["inference"], row["update"]) > 0
        steps = row["updates"] * 8 * row["count"]
        assert row["steps_per_s"] * row["seconds"] == pytest.approx(steps, abs=row["count"]), (
            "no game ends in so few steps"
        )
    assert (ppo.train.make_vector, Collector.collect) == before
    assert not (tmp_path / "speed").exists()
    content = (tmp_path / "results/speed.json").read_bytes()
    assert run(tmp_path, "speed") == 0, "nothing is measured again"
    assert (tmp_path / "results/speed.json").read_bytes() == content
    assert run(tmp_path, "speed", "--minutes", "0", "--game", "breakout") == campaign.UNFINISHED


@pytest.mark.slow
def test_train_is_planned_once_goes_on_and_is_evaluated(tmp_path, monkeypatch):
    """No time: a plan and status 75. Stopped in its third update; then to its end, as planned; then the measurement,
    and nothing twice.
    """
    assert run(tmp_path, "evaluate") == 1, "nothing to evaluate"
    assert run(tmp_path, "train", "--minutes", "0", "--steps", "80") == campaign.UNFINISHED
    assert result(tmp_path, "train_pong")["finished"] is False
    words = [*json.loads((tmp_path / "pong/plan.json").read_text())["overrides"], f"run_dir={tmp_path / 'pong'}"]
    with monkeypatch.context() as patch:
        stop_in_check(patch, 3)
        config = resolve(Config, ROOT / program.config_path("pong"), words)
        assert status(ppo.train.train, config, Options("train", resume=True)) == 143
    assert (tmp_path / "pong/last.safetensors").exists()
    assert run(tmp_path, "evaluate") == 1, "it has not ended"
    assert run(tmp_path, "train", "--steps", "4000") == 0
    found = result(tmp_path, "train_pong")
    assert found["finished"] is True
    assert found["plan"]["steps"] == found["metrics"]["env_steps"] == 80
    assert [line["step"] for line in read_metrics(tmp_path / "pong/metrics.jsonl")] == [1, 2, 3, 4, 5]
    last = config.train.lr / found["plan"]["updates"]
    assert 0 < found["metrics"]["lr"] <= last * 1.001, "the rate ends one step above zero"
    assert run(tmp_path, "train") == 0, "there is nothing left to do"
    assert run(tmp_path, "evaluate") == 0
    evaluated = result(tmp_path, "eval_pong")
    assert {"return_mean", "return_std", "return_mean_stochastic"} <= set(evaluated["metrics"])
    assert evaluated["n"] == {"episodes": 2}
    assert evaluated["plan"] == found["plan"]
    film = tmp_path / "results/pong_episode.gif"
    assert film.stat().st_size <= program.GIF_BYTES
    with Image.open(film) as picture:
        assert picture.n_frames > 5


@pytest.mark.parametrize("count", [8, 32, 64, 256])
def test_settings_fit_the_config(count):
    """Overrides that the project accepts, and 16 minibatches a rollout from 32 environments on."""
    args = Namespace(tiny=False, device="cpu", overrides=[])
    for game in ("pong", "breakout"):
        config = resolve(Config, ROOT / program.config_path(game), program.settings(args, count))
        assert config.env.count * config.train.rollout // config.train.batch_size == (4 if count == 8 else 16)
        assert config.model.kind == "cnn"


def test_plan_fills_the_time_at_the_measured_speed(tmp_path, monkeypatch):
    """From speed.json where it is of this machine and these settings; else from a measurement."""
    monkeypatch.setattr(program, "measure", lambda args, count, seconds: {"steps_per_s": 100.0})
    words = [
        "train",
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--minutes",
        "9",
        "--envs",
        "32",
    ]
    args = program.parse(words)
    plan = program.make_plan(args, campaign.Budget.of(args))
    assert plan["steps"] == pytest.approx(0.9 * 100 * (540 - program.LEAVE - program.START), abs=32 * 128)
    assert plan["steps"] % (32 * 128) == 0
    (tmp_path / "pong/plan.json").unlink()
    rows = [{"count": 32, "steps_per_s": 20000.0}]
    known = program.conditions(args, program.choose_device("cpu"))
    (tmp_path / "speed.json").write_text(json.dumps({"settings": known, "rows": rows}))
    twice = program.parse([*words, "--commands", "2"])
    plan = program.make_plan(twice, campaign.Budget.of(twice))
    assert plan["steps"] == pytest.approx(0.9 * 20000 * 2 * (540 - program.LEAVE - program.START), rel=0.01)
    assert program.make_plan(args, campaign.Budget.of(args)) == plan
    assert plan["updates"] // int(plan["overrides"][-1].removeprefix("train.save_every=")) == program.SAVES


def test_films_are_made_to_fit(tmp_path):
    """Noise does not compress: the film gets smaller and shorter until it fits; one that fits is left alone."""
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 255, (252, 252), dtype=np.uint8)) for _ in range(24)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=70)
    assert (tmp_path / "film.gif").stat().st_size > 300_000
    for limit in (300_000, 20_000, 10_000_000):
        program.shrink(tmp_path / "film.gif", tmp_path / "small.gif", limit)
        assert 0 < (tmp_path / "small.gif").stat().st_size <= limit
    assert (tmp_path / "small.gif").read_bytes() == (tmp_path / "film.gif").read_bytes()
