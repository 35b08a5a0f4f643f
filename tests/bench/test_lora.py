"""The comparison of a training step with peft: equal first, then timed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import lora

pytest.importorskip("peft", reason="bench.lora compares with peft")
ARGUMENTS = ["--tiny", "--rounds", "1", "--rank", "2", "--new", "4"]


def test_the_program_on_a_tiny_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "memory_of", lambda side, argv: {"ours": 1.0, "peer": 2.0}[side])
    lora.main([*ARGUMENTS, "--out", str(tmp_path / "out.json")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["memory_ratio"] == 0.5
    assert max(result["difference"].values()) < lora.TOLERANCE
    assert all(result[name] > 0 for name in ("ratio", "ratio_packed", "ratio_write", "ours", "peer"))


def test_nothing_is_timed_where_gradients_differ(monkeypatch, capsys):
    copy = lora.copy_adapters

    def wrong(ours, peer):
        copy(ours, peer)
        with torch.no_grad():
            peer.learning[3] *= 1.1

    monkeypatch.setattr(lora, "copy_adapters", wrong)
    with pytest.raises(SystemExit, match="nothing was timed"):
        lora.main(ARGUMENTS)
    assert "round" not in capsys.readouterr().out


def test_memory_is_that_of_a_process(capsys):
    lora.main([*ARGUMENTS, "--memory-of", "ours"])
    assert 0.05 < json.loads(capsys.readouterr().out.strip().splitlines()[-1]) < 8
