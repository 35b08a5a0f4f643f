"""A linear probe separates what can be separated, chooses its regularisation without the test images, and looks at the
features that it says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip import probe
from clip.data.labelled import load_labelled
from clip.model.published import load_published
from common.errors import ProjectError
from tests.clip.colours import Colours, chosen, picture
from tests.clip.published import VIT, publish


def clusters(count: int, noise: float, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Features around one of a few points in ten dimensions, and which; the scales of the dimensions differ wildly."""
    centres = np.random.default_rng(0).normal(size=(classes, 10))
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    x = (centres[y] + noise * rng.normal(size=(count, 10))) * 10.0 ** np.arange(-4, 6)
    return x.astype(np.float32), y.astype(np.int64)


def test_clusters_are_told_apart() -> None:
    found = probe.fit(clusters(90, 0.2, 1), clusters(60, 0.2, 2))
    assert found.top1 > 0.95
    assert found.top5 == 1
    assert found.converged
    assert len(found.tried) == len(probe.STRENGTHS) + 2


def test_two_classes_and_labels_with_gaps() -> None:
    x, y = clusters(60, 0.1, 1, classes=2)
    other_x, other_y = clusters(40, 0.1, 2, classes=2)
    assert probe.fit((x, 7 * y + 2), (other_x, 7 * other_y + 2)).top1 == 1


def test_regularisation_is_chosen_without_the_test_images() -> None:
    """With other test images, even with wrong labels, the choice is the same; and it is the best of those tried."""
    train = clusters(90, 1.5, 1)
    x, y = clusters(60, 1.5, 2)
    first, second = probe.fit(train, (x, y)), probe.fit(train, (x[::-1], (y + 1) % 3))
    assert (first.strength, first.tried) == (second.strength, second.tried)
    assert first.tried[first.strength] == max(first.tried.values())
    assert first.top1 > second.top1


def test_noise_teaches_nothing() -> None:
    rng = np.random.default_rng(0)
    noise = [(rng.normal(size=(n, 10)).astype(np.float32), np.arange(n) % 3) for n in (150, 600)]
    assert 0.25 < probe.fit(noise[0], noise[1]).top1 < 0.42


def test_too_little_to_learn_from() -> None:
    x, y = clusters(9, 0.1, 1)
    with pytest.raises(ProjectError, match="at least two classes with two training images"):
        probe.fit((x[:4], y[:4]), (x, y))
    with pytest.raises(ProjectError, match="at least two classes"):
        probe.fit((x[::3], y[::3]), (x, y))


def test_a_folder(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        for name, colour in (("red", (200, 50, 50)), ("blue", (50, 50, 200))):
            for i in range(count):
                shade = tuple(int(c + rng.integers(-30, 31)) for c in colour)
                picture(tmp_path / f"data/{split}/{name}/{i}.png", shade)
    monkeypatch.setattr(probe, "load_chosen", chosen(Colours()))
    argv = ["--run", "r", "--data", str(tmp_path / "data"), "--features", "embedding", "--workers", "0"]
    probe.main(probe.parse([*argv, "--out", str(tmp_path / "out")]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["metrics"] == {"probe_top1": 1, "probe_top5": 1}
    assert result["n"] == {"train": 16, "test": 10, "features": 3}
    assert json.loads((tmp_path / "out/data.json").read_text()) == result


def test_a_folder_without_splits_is_split_by_name(tmp_path: Path) -> None:
    for i in range(60):
        picture(tmp_path / f"data/{'a' if i % 2 else 'b'}/{i}.png", "red")
    sides = {}
    for split in ("train", "test"):
        sides[split] = set(load_labelled(str(tmp_path / "data"), split, tmp_path, 8, share=probe.HELD_OUT).ids)
    assert not sides["train"] & sides["test"]
    assert len(sides["train"] | sides["test"]) == 60
    assert 4 <= len(sides["test"]) <= 22


def test_the_towers_features_are_those_before_the_projection(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    publish(tmp_path / "w")
    loaded = load_published(str(tmp_path / "w"), root=tmp_path, device="cpu")
    for i in range(6):
        picture(tmp_path / f"data/{'a' if i % 2 else 'b'}/{i}.png", (40 * i, 100, 200 - 30 * i), (40, 50))
    data = load_labelled(str(tmp_path / "data"), "test", tmp_path, loaded.preprocess.size)
    features, labels = probe.encode(loaded, data, "tower")
    assert features.shape == (6, VIT["width"])
    embeddings, _ = probe.encode(loaded, data, "embedding")
    assert embeddings.shape == (6, 16)
    projected = torch.from_numpy(features) @ loaded.model.image_head.weight.T
    torch.testing.assert_close(
        torch.nn.functional.normalize(projected, dim=1), torch.from_numpy(embeddings), atol=0.02, rtol=0.02
    )
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
