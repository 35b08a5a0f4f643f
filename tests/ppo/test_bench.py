"""The benchmark refuses networks that differ and ends with its JSON line. Not a measurement: one round of one tiny
update.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("stable_baselines3")

from bench import ppo as bench
from common.config import resolve
from ppo.config import Config
from ppo.learning.backprop import Backprop
from tests.helpers import ROOT

TINY = [
    "--config",
    str(ROOT / "configs/ppo_lunarlander.yaml"),
    "--rounds",
    "1",
    "--updates",
    "1",
    "env.count=2",
    "train.rollout=32",
    "model.hidden=[8,8]",
]


@pytest.fixture(autouse=True)
def threads():
    """The peer is also timed with other numbers of threads than the tests use."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["ppo_cartpole", "ppo_lunarlander", "ppo_lunarlander_continuous", "ppo_acrobot"])
def test_the_two_agree(name, tmp_path):
    config = resolve(Config, ROOT / f"configs/{name}.yaml", [f"run_dir={tmp_path}", "device=cpu"])
    differences = bench.largest_difference(config)
    assert differences.keys() == {"values", "log_prob", "entropy", "gradients", "advantages"}
    assert max(differences.values()) <= bench.TOLERANCE


def test_smoke(tmp_path, capsys):
    bench.main([*TINY, "--out", str(tmp_path / "bench.json")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "bench.json").read_text())
    for key in ("ratio", "ratio_one_thread", "aa_ratio", "ours", "peer", "peer_one_thread"):
        assert math.isfinite(result[key]) and result[key] > 0, key
    assert sum(result["split"].values()) == pytest.approx(1, abs=0.01)
    assert result["rounds"] == 1 and "64 steps" in result["bench"]


def test_what_differs_is_not_timed(monkeypatch):
    gradients = Backprop.gradients

    def wrong(self: Backprop, *args: object) -> tuple:
        found = gradients(self, *args)
        self.weights.grad[7] += 0.01
        return found

    monkeypatch.setattr(Backprop, "gradients", wrong)
    monkeypatch.setattr(bench, "ours", lambda *args: pytest.fail("timed in spite of a difference"))
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench.main(TINY)


def test_summary_of_known_times():
    result = bench.summarise([(1.0, 6.0, 3.0, 1.0), (2.0, 10.0, 6.0, 2.0), (1.0, 9.0, 3.0, 2.0)], steps=300)
    assert result["ratio"] == 6.0 and result["ratio_iqr"] == [5.5, 6.0]  # of 6, 5 and 9 / 1.5
    assert result["ratio_one_thread"] == 3.0 and result["ratio_one_thread_iqr"] == [2.5, 3.0]  # of 3, 3 and 2
    assert result["aa_ratio"] == 1.0 and result["aa_iqr"] == [1.0, 1.5]
    assert (result["ours"], result["peer"], result["peer_one_thread"]) == (200.0, 33.3, 100.0)


def test_what_has_no_equal_is_refused():
    config = resolve(Config, ROOT / "configs/ppo_acrobot.yaml", ["run_dir=unused", "device=cpu", "model.shared=true"])
    with pytest.raises(SystemExit, match="separate networks"):
        bench.make_peer(config)
