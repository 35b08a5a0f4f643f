"""The report of many runs, of damaged ones and of traps: a page that stays small, whole and private."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.report import page
from common.report.__main__ import main
from common.report.page import build
from common.report.pictures import MAX_PICTURE, WIDEST, embed, smaller

SECRET = "hunter2"


def make_run(folder: Path, steps: int = 3, when: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  steps: 3\n")
    (folder / "env.json").write_text('{"device": "cpu", "total_steps": 3}')
    (folder / "eval.json").write_text('{"project": "abacus", "metrics": {"elbo": 1.5}, "seconds": 2.0}')
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {1 / s}}}\n' for s in range(1, steps + 1)))
    if when:
        os.utime(folder / "metrics.jsonl", (when, when))
    return folder


def noise(path: Path, side: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def text_of(*runs: Path, **options) -> str:
    return build(list(runs), runs[0].parent / "report.html", **options).read_text(encoding="utf-8")


def test_the_newest_of_many_runs(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / f"run{i}", when=1e9 + (i * 37) % 5) for i in range(5)]  # newest: 2, then 4
    text = text_of(*runs, most=2)
    assert "the newest of 5 runs" in text and "2 runs" in text
    assert text.index("run2") < text.index("run4") and not any(f"run{i}" in text for i in (0, 1, 3))
    assert "the newest of" not in text_of(*runs, most=5)
    monkeypatch.setattr(sys, "argv", ["report", *map(str, runs), "--out", str(tmp_path / "r.html"), "--most", "1"])
    main()
    assert "the newest of 5 runs" in (tmp_path / "r.html").read_text()
    assert page.MOST_RUNS <= 50


def test_a_curve_is_small(tmp_path):
    """Two versions of each curve of each run: they were most of a page of 48 MB."""
    assert len(text_of(make_run(tmp_path / "run", steps=5000))) < 100_000


def test_large_pictures_are_made_smaller(tmp_path):
    large = noise(tmp_path / "run/figures/large.png", 1500)
    assert large.stat().st_size > MAX_PICTURE
    picture = embed(large)
    assert picture.source.startswith("data:image/webp") and (picture.width, picture.height) == (1500, 1500)
    assert len(picture.source) < large.stat().st_size / 2
    assert len(smaller(Image.new("RGB", (5000, 10)))) < 10_000
    assert max(Image.open(large).size) > WIDEST


def test_pictures_have_a_common_limit(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    for step in range(1, 5):
        noise(run / f"samples/{step:08d}.png", 40)
    monkeypatch.setattr(page, "MAX_PAGE", 30_000)
    text = text_of(run)
    assert "Step 4" in text and "Step 1" not in text and "pictures, for which the page has no room" in text


HUGE = "9" * 400
DEEP = '{"a":' * 900 + "1" + "}" * 900


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("env.json", '{"total_steps": "many"}'),
        ("env.json", '{"total_steps": [3]}'),
        ("env.json", '{"total_steps": NaN}'),
        ("env.json", f'{{"total_steps": {HUGE}}}'),
        ("env.json", '{"total_steps": 1e999, "device_name": {"a": [1, {"b": null}]}}'),
        ("env.json", f'{{"total_steps": {"9" * 5000}}}'),
        ("env.json", DEEP),
        ("env.json", json.dumps({"versions": DEEP[:4000] * 100})),
        ("eval.json", f'{{"metrics": {{"elbo": {HUGE}, "auc": Infinity, "x": -1e999}}, "seconds": NaN}}'),
        ("eval.json", '{"metrics": [1, 2], "seconds": "long", "project": {"a": 1}, "config": [1]}'),
        ("eval.json", f'{{"seconds": {HUGE}, "n": {DEEP}}}'),
        (
            "metrics.jsonl",
            f'{{"step": {HUGE}, "loss": 1.0}}\n{{"step": 2, "loss": {HUGE}}}\n{{"step": 3, "loss": 1e308}}\n',
        ),
        ("metrics.jsonl", f'{{"step": 1, "loss": {DEEP}}}\n{{"step": 2, "loss": 0.5}}\n'),
        ("config.yaml", "train: {steps: !!int abc}"),
        ("config.yaml", f"train: {{steps: {HUGE}}}"),
        ("config.yaml", "[" * 900 + "]" * 900),
        ("../demo.json", '{"broken": [{"stage": "train", "status": 1, "seconds": "long"}]}'),
    ],
)
def test_a_bad_number_costs_a_line(name, content, tmp_path):
    whole = make_run(tmp_path / "whole")
    broken = make_run(tmp_path / "broken")
    (broken / name).write_text(content)
    text = text_of(whole, broken)
    assert text.count("<section") == 3 and len(text) < 500_000
    assert "everything, for it cannot be read" not in text


def test_a_run_that_nobody_thought_of_costs_its_part(tmp_path, monkeypatch):
    whole = make_run(tmp_path / "whole")
    read = page.read_run

    def fail(folder):
        if folder.name == "odd":
            raise ZeroDivisionError("odd")
        return read(folder)

    monkeypatch.setattr(page, "read_run", fail)
    text = text_of(whole, make_run(tmp_path / "odd"))
    assert "everything, for it cannot be read (ZeroDivisionError: odd)" in text and "abacus" in text


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "eval.json", "metrics.jsonl"])
def test_a_link_out_of_the_folder_is_not_followed(name, tmp_path):
    run = make_run(tmp_path / "runs/run")
    (tmp_path / "secret").write_text(json.dumps({"step": 1, SECRET: 7, "metrics": {SECRET: 7}}))
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "secret")
    text = text_of(run)
    assert SECRET not in text.lower() and f"{name}, which is a link out of the run folder" in text


@pytest.mark.parametrize("whole_folder", [False, True])
def test_nor_is_a_linked_picture(whole_folder, tmp_path):
    run = make_run(tmp_path / "runs/run")
    private = noise(tmp_path / "private/face.png", 20)
    if whole_folder:
        (run / "figures").symlink_to(private.parent)
    else:
        (run / "figures").mkdir()
        (run / "figures/face.png").symlink_to(private)
    text = text_of(run)
    assert "figures/face.png, which is a link out of the run folder" in text and "data:image/png" not in text


def test_a_run_folder_may_be_a_link_itself(tmp_path):
    make_run(tmp_path / "disk/run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/run").symlink_to(tmp_path / "disk/run")
    assert "link out of" not in text_of(tmp_path / "runs/run")
