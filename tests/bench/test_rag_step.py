"""The comparison of a retriever's training step: equal first, then timed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import rag_step

pytest.importorskip("sentence_transformers", reason="bench.rag_step compares with sentence-transformers")
ARGUMENTS = [
    "--config", "configs/rag_factworld_tiny.yaml", "--rounds", "2", "--batches", "1", "--precision", "fp32",
    "data.entities=60", "train.batch_size=8", "train.chunk=4",
]  # fmt: skip


def test_the_program_on_a_small_world(capsys, tmp_path):
    rag_step.main([*ARGUMENTS, "--out", str(tmp_path / "out.json")])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert set(result["difference"]) == {"ours", "written", "peer"}
    assert result["difference"]["ours"] == 0 < result["difference"]["peer"] < rag_step.TOLERANCE
    assert result["ratio"] > 0 < result["ratio_kernel"]
    assert (result["kernel"], result["questions"], result["chunk"]) == ("fused", 8, 4)


def test_nothing_is_timed_where_gradients_differ(monkeypatch, capsys):
    class Wrong(rag_step.Peer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            with torch.no_grad():
                rag_step.encoder_of(self).embeddings.word_embeddings.weight[20:] *= 1.01

    monkeypatch.setattr(rag_step, "Peer", Wrong)
    with pytest.raises(SystemExit, match="nothing was timed"):
        rag_step.main(ARGUMENTS)
    assert "round" not in capsys.readouterr().out
