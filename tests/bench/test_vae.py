"""The benchmark refuses networks that differ and ends with its JSON line. Not a measurement: two steps, small."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

pytest.importorskip("pythae")

from bench import vae as bench
from common.config import resolve
from tests.helpers import ROOT
from vae.config import Config

TINY = ["--config", str(ROOT / "configs/vae_mnist.yaml"), "model.hidden=[16]", "train.batch_size=8", "compile=false"]
SHORT = ["--rounds", "1", "--steps", "2", "--program-rounds", "1", "--program-batches", "2"]


@pytest.fixture(autouse=True)
def threads():
    """The benchmark computes on one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ends_with_its_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SHORT, *TINY])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["unit"] == "images per CPU-second"
    assert result["program_images"] == 32
    for key in (
        "ratio",
        "ratio_eager",
        "ratio_fp32",
        "ratio_default",
        "program_ratio",
        "aa_ratio",
        "ours",
        "peer",
        "program_peer",
    ):
        assert math.isfinite(result[key]) and result[key] > 0, key
    assert {"torch", "pythae", "python"} <= result["versions"].keys()


def test_the_two_agree_in_loss_and_gradients() -> None:
    config = resolve(Config, ROOT / "configs/vae_mnist.yaml", [*bench.SETTINGS, *TINY[2:], "run_dir=unused"])
    ours, peer = bench.build_pair(config)
    found = bench.largest_difference(config, ours, peer, bench.make_batch(config, 8))
    assert max(found.values()) <= bench.TOLERANCE
    assert len(bench.in_peer_names(ours, lambda p: p)) == len(list(peer.parameters()))  # every one was compared


@pytest.mark.parametrize("part", ["encoder.layers.1.weight", "encoder.log_var.bias", "decoder.layers.2.bias"])
def test_unequal_networks_are_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_pair(*args: Any) -> tuple:
        ours, peer = pair(*args)
        with torch.no_grad():
            peer.get_parameter(part).view(-1)[0] += 0.1
        return ours, peer

    pair = bench.build_pair
    monkeypatch.setattr(bench, "build_pair", wrong_pair)
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed in spite of a difference"))
    with pytest.raises(SystemExit, match="differ by more than"):
        bench.main([*SHORT, *TINY])


def test_a_warm_up_of_the_divergence_is_a_difference() -> None:
    """The peer has none: with it, the losses are different things."""
    with pytest.raises(SystemExit, match="differ by more than"):
        bench.main([*SHORT, *TINY, "objective.warmup=100"])


def test_summary_of_known_times() -> None:
    times = {
        "ours": [1.0, 2.0, 1.0],
        "again": [1.0, 2.0, 1.5],
        "ours_eager": [1.0, 2.0, 2.5],
        "ours_fp32": [2.0, 3.0, 2.0],
        "peer": [2.0, 3.0, 2.5],
        "peer_default": [3.0, 4.0, 5.0],
    }
    result = bench.summarise(times, images=6)
    assert result["ratio"] == 2.0 and result["ratio_iqr"] == [1.75, 2.0]  # of 2 / 1, 3 / 2 and 2.5 / 1.25
    assert result["ratio_eager"] == 1.5 and result["ratio_fp32"] == 1.0 and result["ratio_default"] == 3.0
    assert result["aa_ratio"] == 1.0 and result["aa_ratio_iqr"] == [1.0, 1.25]
    assert result["ours"] == pytest.approx(6 / 1.25, abs=0.1) and result["peer"] == pytest.approx(6 / 2.5, abs=0.1)
