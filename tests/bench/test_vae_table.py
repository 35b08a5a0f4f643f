"""The table on dSprites: what its cells share, what it keeps, and its estimate of the total correlation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vae.eval
import vae.train
from bench import vae_table
from common.config import Options, resolve
from tests.bench.programs import run_here
from tests.helpers import ROOT
from vae.config import Config, ObjectiveConfig
from vae.model import Gaussian


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that the table starts, each run in this process."""

    def evaluate(config: Config, options: Options) -> None:
        vae.eval.main(config, options)  # whatever a test has put there since

    programs = {"train": vae.train.train, "eval": evaluate}
    names = run_here(monkeypatch, "vae", Config, programs)
    # the scores and the pictures have tests of their own, and take longer than the rest
    monkeypatch.setattr(
        vae.eval, "score_codes", lambda *_: dict.fromkeys(("mig", "dci", "sap", "factor_vae_score"), 0.5)
    )
    monkeypatch.setattr(vae.eval, "draw_figures", lambda *_: None)
    return names


def test_a_cell_is_run_once_for_each_config(tmp_path: Path, started: list[str]) -> None:
    arguments = ["--tiny", "--seeds", "1", "--only", "beta-TCVAE, beta 3", "--runs", str(tmp_path)]
    vae_table.main(arguments)
    vae_table.main(arguments)
    assert started == ["train", "eval"]
    (record,) = json.loads((tmp_path / "dsprites.json").read_text())
    assert record["cell"] == "beta-TCVAE, beta 3" and record["seed"] == 0
    assert record["bins"] == 20 and record["test_images"] == 200 and record["train_images"] == 64
    assert record["train_cpu_seconds"] == 1.5
    assert all(math.isfinite(record[name]) for name in vae_table.COLUMNS)
    assert "| beta-TCVAE, beta 3 | 1 |" in (tmp_path / "dsprites.md").read_text()
    vae_table.main([*arguments, "train.lr=0.01"])  # another config: the old result is not its own
    assert started == ["train", "eval"] * 2


def test_a_stopped_cell_goes_on(tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tiny", "--seeds", "1", "--only", "VAE", "--runs", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(vae.eval, "main", lambda *_: None)  # stopped before its end
        patch.setattr(vae_table, "total_correlation", lambda config: math.nan)
        with pytest.raises(KeyError):  # no eval.json
            vae_table.main(arguments)
    vae_table.main(arguments)
    (record,) = json.loads((tmp_path / "dsprites.json").read_text())
    assert record["train_cpu_seconds"] is None  # only its last part was timed


def test_only_the_objective_differs_between_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    configs = [resolve(Config, Path(cell.config), list(cell.overrides)) for cell in vae_table.CELLS]
    assert len({cell.folder for cell in vae_table.CELLS}) == len(vae_table.CELLS)
    assert len({config.objective for config in configs}) == len(configs)
    assert len({replace(config, objective=ObjectiveConfig()) for config in configs}) == 1


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_total_correlation_of_a_known_code(correlation: float) -> None:
    """Means from a normal distribution, each with the same variance: so is q(z), and KL = -log(1 - r^2) / 2."""
    rng = torch.Generator().manual_seed(0)
    variance = 0.25
    first = torch.randn(20_000, generator=rng)
    second = correlation * first + math.sqrt(1 - correlation**2) * torch.randn(20_000, generator=rng)
    mean = torch.stack([first, second], 1)  # (N, 2)
    posterior = Gaussian(mean, torch.full_like(mean, math.log(variance)))
    z = posterior.sample(torch.randn(mean.shape, generator=rng))[:2000]
    expected = -0.5 * math.log(1 - (correlation / (1 + variance)) ** 2)
    assert vae_table.estimate_total_correlation(posterior, z) == pytest.approx(expected, abs=0.03)


def test_table_of_known_records() -> None:
    shared = dict.fromkeys(vae_table.COLUMNS, 1.0) | {"bins": 20, "test_images": 9, "train_images": 7, "images_seen": 5}
    records = [
        shared | {"cell": "VAE", "seed": 0, "mig": 0.1, "train_cpu_seconds": 10.0},
        shared | {"cell": "VAE", "seed": 1, "mig": 0.2, "train_cpu_seconds": None},
    ]
    text = vae_table.table(records)
    row = next(line for line in text.splitlines() if line.startswith("| VAE |"))
    assert row.startswith("| VAE | 2 | 0.150 ± 0.071 | 1.000 ± 0.000 |") and row.endswith("| 10 |")
    assert "Seeds 0, 1." in text and "20 bins" in text and "9 test images" in text
