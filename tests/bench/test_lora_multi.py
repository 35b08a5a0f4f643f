"""The comparison of many adapters with peft: equal first, then timed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import lora_multi

pytest.importorskip("peft", reason="bench.lora_multi compares with peft")
ARGUMENTS = ["--tiny", "--adapters", "4", "--rounds", "2", "--tokens", "5", "--new", "3"]


def test_the_program_on_a_tiny_model(capsys, tmp_path):
    lora_multi.main([*ARGUMENTS, "--out", str(tmp_path / "out.json")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["ratio"] > 0
    assert len(result["ratio_iqr"]) == 2
    assert max(result["difference"].values()) < lora_multi.TOLERANCE


def test_nothing_is_timed_where_answers_differ(monkeypatch, capsys):
    make_peer = lora_multi.make_peer

    def wrong(base, adapters):
        peer = make_peer(base, adapters)
        with torch.no_grad():
            for name, parameter in peer.named_parameters():
                if "lora_B.adapter3" in name:
                    parameter *= 1.1
        return peer

    monkeypatch.setattr(lora_multi, "make_peer", wrong)
    with pytest.raises(SystemExit, match="nothing was timed"):
        lora_multi.main(ARGUMENTS)
    assert "round" not in capsys.readouterr().out
