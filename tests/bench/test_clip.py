"""The benchmarks of clip refuse models that differ, measure what they say, and end with their JSON line. Not a
measurement: two steps, small.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import clip as bench
from bench import clip_search
from clip.gallery import index as neighbours

pytest.importorskip("open_clip")

SHORT = ["--size", "tiny", "--rounds", "1", "--steps", "1", "--pipeline-batches", "1"]


@pytest.fixture(autouse=True)
def threads():
    """The benchmarks compute on one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of a size for tests."""
    monkeypatch.setattr(bench, "VOCABULARY", 300)
    tiny = bench.SIZES["tiny"]
    small = bench.Size(tiny.batch, tiny.embed_dim, tiny.vision, tiny.text | {"vocab_size": 300})
    monkeypatch.setitem(bench.SIZES, "tiny", small)


def test_ends_with_its_json_line(few_words, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bench.main([*SHORT, "--out", str(tmp_path / "deep/clip.json"), "--data-root", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "deep/clip.json").read_text()) == result
    assert result["unit"] == "pairs per CPU-second"
    for key in ("ratio", "ratio_default", "ratio_fp32", "ratio_padded", "aa_ratio", "ours", "peer", "pipeline_ratio"):
        assert math.isfinite(result[key]) and result[key] > 0, key
    assert result["pipeline_data"] == "scenes"
    assert result["tokens"]["ours"] < result["tokens"]["peer"] == 77
    assert {"torch", "open_clip_torch", "python"} <= result["versions"].keys()


@pytest.mark.parametrize("size", ["tiny", "resnet"])
def test_the_two_agree_in_loss_and_gradients(few_words, size: str) -> None:
    chosen = bench.SIZES["tiny"]
    if size == "resnet":
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
        chosen = bench.Size(4, 32, vision, chosen.text)
    found = bench.largest_difference(*bench.build_pair(chosen), *bench.make_batch(chosen, 4))
    assert max(found.values()) <= bench.TOLERANCE


@pytest.mark.parametrize(
    "part", ["visual.transformer.resblocks.0.mlp.c_fc.bias", "transformer.resblocks.0.ln_1.weight", "logit_scale"]
)
def test_unequal_models_are_not_timed(few_words, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_pair(*args: Any) -> tuple:
        ours, peer = pair(*args)
        with torch.no_grad():
            peer.get_parameter(part).view(-1)[0] += 0.2
        return ours, peer

    pair = bench.build_pair
    monkeypatch.setattr(bench, "build_pair", wrong_pair)
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed in spite of a difference"))
    with pytest.raises(SystemExit, match="differ by more than"):
        bench.main(SHORT)


def test_texts_are_as_long_as_captions() -> None:
    _, ids = bench.make_batch(bench.SIZES["tiny"], 2000)
    lengths = (ids == bench.VOCABULARY - 1).int().argmax(dim=1) + 1
    assert (ids == bench.VOCABULARY - 1).sum(dim=1).eq(1).all()
    assert float(lengths.double().mean()) == pytest.approx(14.1, abs=0.3)
    assert int(lengths.max()) < 42
    assert (ids[torch.arange(77).expand(2000, -1) >= lengths[:, None]] == 0).all()


def test_summary_of_known_times() -> None:
    times = {
        "ours": [1.0, 2.0, 1.0],
        "again": [1.0, 2.0, 1.5],
        "ours_padded": [2.0, 2.0, 2.0],
        "ours_fp32": [2.0, 3.0, 2.0],
        "peer": [2.0, 3.0, 2.5],
        "peer_default": [3.0, 4.0, 5.0],
        "peer_fp32": [4.0, 6.0, 4.0],
    }
    result = bench.summarise(times, pairs=6)
    assert result["ratio"] == 2.0 and result["ratio_iqr"] == [1.75, 2.0]  # of 2 / 1, 3 / 2 and 2.5 / 1.25
    assert result["ratio_padded"] == 1.25 and result["ratio_fp32"] == 2.0 and result["ratio_default"] == 3.0
    assert result["aa_ratio"] == 1.0 and result["aa_ratio_iqr"] == [1.0, 1.25]
    assert result["ours"] == pytest.approx(6 / 1.25, abs=0.1) and result["peer"] == pytest.approx(6 / 2.5, abs=0.1)


# -- search ------------------------------------------------------------------------------------------------------------


def test_search_from_embeddings_to_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    image = clip_search.unit(rng.normal(size=(50, 16)))
    text = clip_search.unit(rng.normal(size=(30, 16)))
    np.savez(tmp_path / "embeddings.npz", image=image, text=text)
    out = tmp_path / "results/search.json"
    argv = ["--embeddings", str(tmp_path / "embeddings.npz"), "--count", "400", "--queries", "20", "--repeats", "1"]
    clip_search.main([*argv, "--out", str(out)])
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert (result["images"], result["real"]) == (400, 50)
    assert result["queries"] == {"count": 20, "real": True}
    assert [line["breadth"] for line in result["hnsw"]["sweep"]] == list(clip_search.BREADTHS)
    assert result["hnsw"]["recall_at_10"] > 0.9
    assert result["hnsw"]["breadth"] == neighbours.SEARCH_BREADTH
    for kind in neighbours.KINDS:
        assert result[kind]["build_seconds"] > 0 and result[kind]["ms_per_query"] > 0
        assert result[kind]["file_mb"] >= 400 * 16 * 4 / 1e6 - 0.1
    assert result["store"]["file_mb"] > 0


def test_synthetic_embeddings_keep_to_their_clusters() -> None:
    data = clip_search.make_vectors([], 5000, 10, 64)
    assert data["images"].shape == (5000, 64) and data["images"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(data["images"], axis=1), 1, atol=1e-5)
    rng = np.random.default_rng(1)
    centre = clip_search.unit(rng.normal(size=(1, 64)))
    cosines = clip_search.around(centre, 2000, rng) @ centre[0]
    assert cosines.mean() == pytest.approx(clip_search.COSINE, abs=0.02)


def test_recall_by_hand() -> None:
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert clip_search.recall(np.array([[4, 3, 9, 1], [5, 6, 7, 8]]), exact) == pytest.approx(7 / 8)


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--count", "5"], ["--embeddings", str(tmp_path / "none.npz")], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            clip_search.parse(argv)
    assert "run clip.eval first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--batch", "1"])
