"""The benchmark refuses unequal networks and ends with its JSON line. Not a measurement: one round, tiny networks."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("diffusers")

from bench import diffusion as bench

ARGUMENTS = ["--size", "tiny", "--rounds", "1", "--threads", "1", "--device", "cpu"]


def test_smoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.measure_memory  # for real once: each measurement is a process that imports everything again
    monkeypatch.setattr(bench, "measure_memory", lambda name, argv: measure(name, argv) if name == "ours" else 1.0)
    bench.main([*ARGUMENTS, "--precision", "bf16"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["unit"] == "images/s" and result["size"] == "tiny" and result["precision"] == "bf16"
    for key in ("ratio", "aa_ratio", "ours", "peer", "memory_ratio"):
        assert math.isfinite(result[key]) and result[key] > 0, key
    assert {"torch", "diffusers", "python"} <= result["versions"].keys()


def test_unequal_networks_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_pair(*args: object) -> tuple:
        ours, peer = pair(*args)
        with torch.no_grad():
            ours.middle.blocks[1].conv1.weight[0, 0, 0, 0] += 0.1
        return ours, peer

    pair = bench.build_pair
    monkeypatch.setattr(bench, "build_pair", wrong_pair)
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed in spite of a difference"))
    with pytest.raises(SystemExit, match="differ by more than"):
        bench.main(ARGUMENTS)


def test_summary_of_known_times() -> None:
    times = {
        "ours": [1.0, 2.0, 1.0],
        "again": [1.0, 2.0, 1.5],
        "peer": [3.0, 4.0, 5.0],
        "peer_channels_last": [2.0, 3.0, 2.5],
    }
    result = bench.summarise(times, batch_size=6)
    assert result["peer_format"] == "peer_channels_last"  # the faster of the two
    assert result["ratio"] == 2.0 and result["ratio_iqr"] == [1.75, 2.0]  # of 2 / 1, 3 / 2 and 2.5 / 1.25
    assert result["aa_ratio"] == 1.0 and result["aa_iqr"] == [1.0, 1.25]
    assert result["ours"] == pytest.approx(6 / 1.25) and result["peer"] == pytest.approx(6 / 2.5, abs=1e-3)
