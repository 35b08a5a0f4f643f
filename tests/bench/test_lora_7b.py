"""The 7B measurement on a small shape: it loads in 4 bits, takes a step, and says what it took."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import lora_7b
from tests.helpers import ROOT


def test_a_small_shape_is_quantised_and_takes_a_step(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    lora_7b.main(["--tiny", "--out", str(tmp_path / "result.json"), "data.max_length=64", "precision=fp32"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["memory_before"] <= result["memory_loaded"] <= result["memory_step"]
    assert result["loss"] == pytest.approx(math.log(lora_7b.TINY_SHAPE.vocab_size), rel=0.1)
    assert result["parameters"] == sum(value.numel() for _, value in lora_7b.random_weights(lora_7b.TINY_SHAPE))


def test_several_steps_of_several_rows(monkeypatch, capsys):
    """The loss of rows that are learned falls, and the rate counts the tokens of every row."""
    monkeypatch.chdir(ROOT)
    settings = ["data.max_length=32", "precision=fp32", "train.batch_size=2", "train.lr=5e-3"]
    lora_7b.main(["--tiny", "--steps", "12", *settings])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"] < 0.95 * math.log(lora_7b.TINY_SHAPE.vocab_size)
    assert result["tokens_per_second"] == pytest.approx(2 * 32 / result["seconds_step"], rel=0.1)


def test_weights_are_drawn_one_at_a_time():
    """Nothing is kept of one weight when the next is asked for, and their numbers do not depend on what was done."""
    found = dict(lora_7b.random_weights(lora_7b.TINY_SHAPE))
    for name, weight in lora_7b.random_weights(lora_7b.TINY_SHAPE):
        assert torch.equal(weight, found[name]) and weight.dtype == torch.bfloat16
        if weight.ndim == 2:
            assert float(weight.float().std()) == pytest.approx(lora_7b.DEVIATION, rel=0.05)
