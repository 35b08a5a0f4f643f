"""What made a result: hashes of settings and weights, and the settings noted beside weights."""

from __future__ import annotations

import dataclasses

from common.config import to_yaml
from common.files import sha256
from common.provenance import config_hash, discard, made_by, output_hashes, trained_otherwise
from gnn.config import Config, ModelConfig

CONFIG = Config()


def test_the_hash_of_a_config_is_that_of_what_decides_a_result():
    moved = dataclasses.replace(CONFIG, run_dir="elsewhere", device="cpu", compile=True, keep_last=5)
    assert config_hash(moved) == config_hash(CONFIG)
    for change in ({"seed": 1}, {"model": ModelConfig(dropout=0.25)}):
        assert config_hash(dataclasses.replace(CONFIG, **change)) != config_hash(CONFIG)


def test_one_hash_for_many_weights():
    """Of one file its own; of several one that depends on each and on their order."""
    assert made_by(CONFIG, ["a"]) == {"config_sha256": config_hash(CONFIG), "weights_sha256": "a"}
    found = {made_by(CONFIG, each)["weights_sha256"] for each in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"])}
    assert len(found) == 4


def test_settings_that_differ_from_those_beside_weights():
    other = dataclasses.replace(CONFIG, seed=3, model=ModelConfig(hidden=8))
    assert trained_otherwise(to_yaml(CONFIG), CONFIG) == ""
    assert trained_otherwise(to_yaml(CONFIG), other) == "trained with seed=0, not 3"
    assert trained_otherwise(to_yaml(CONFIG), other, only=("model.",)) == "trained with model.hidden=16, not 8"
    assert trained_otherwise(to_yaml(CONFIG), other, free=("seed", "model.")) == ""
    assert trained_otherwise("seed: 0\n", dataclasses.replace(other, seed=0)) == "", "what is not noted is passed over"
    assert trained_otherwise("", CONFIG) == "", "files of earlier days have no note"


def test_outputs_are_named_and_discarded(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("a.csv", "b.csv", "figures/c.png", "kept.json"):
        (tmp_path / name).write_text(name)
    patterns = ("*.csv", "figures/*.png", "none.npz")
    assert output_hashes(tmp_path, patterns) == {
        name: sha256(tmp_path / name) for name in ("a.csv", "b.csv", "figures/c.png")
    }
    discard(tmp_path, patterns)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept.json"]
