"""The training program on drawn scenes: what it writes, exact resumption, one batch learnt by heart."""

from __future__ import annotations

import json

import pytest
import torch

import clip.train
from clip.contrastive import contrastive_loss
from clip.data import batches, load_splits
from clip.load import load_run
from clip.model import Output
from clip.model.towers import build_towers
from common.config import ConfigError
from common.errors import ProjectError
from tests.clip.tiny import evaluate, tiny, train
from tests.helpers import checkpoint, errors, log, same, stop_in_check, two_processes


def parts(run_dir, step=6):
    return checkpoint(run_dir, step)["parts"]


def test_a_run_writes_what_the_others_read(tmp_path, capsys):
    config = tiny(tmp_path / "run")
    assert train(config) == 0
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss"] > 0
    assert 1 <= lines[0]["scale"] <= 100
    assert "val_r10_t2i" in lines[2] and "val_r10_t2i" not in lines[3]
    assert (tmp_path / "run/model.safetensors").is_file()
    assert evaluate(config) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "run/eval.json").read_text())
    metrics = result["metrics"]
    assert 0 <= metrics["r1_t2i"] <= metrics["r5_t2i"] <= metrics["r10_t2i"] <= 1
    for ending in ("", "_novel", "_novel_only"):
        assert f"pairs_relation{ending}" in metrics and f"pairs_count{ending}" in metrics
    low, high = result["intervals"]["r10_t2i"]
    assert low <= metrics["r10_t2i"] <= high
    for name in ("retrieved", "failures", "similarity"):
        assert (tmp_path / f"run/figures/{name}.png").stat().st_size > 1000
    assert sum(1 for _ in (tmp_path / "run/text_to_image.csv").open()) == 41


STANDARD = [f"model.{tower}_head.norm=standard" for tower in ("image", "text")]


@pytest.mark.parametrize(("stops", "words"), [((2,), STANDARD), ((4, 5), [])])
def test_resumption_is_exact(tmp_path, monkeypatch, stops, words):
    monkeypatch.setattr(clip.train, "MEASURED", 32)
    assert train(tiny(tmp_path / "whole", *words)) == 0
    stop_in_check(monkeypatch, *stops)
    config = tiny(tmp_path / "parts", *words)
    assert train(config) == 143
    for _ in stops[1:]:
        assert train(config, resume=True) == 143
    assert train(config, resume=True) == 0
    for name in ("model", "ema", "optimizer", "locked"):
        assert same(parts(tmp_path / "whole")[name], parts(tmp_path / "parts")[name]), name
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_the_gradient_cache_changes_nothing(tmp_path):
    words = ["precision=fp64", "train.grad_clip=0", "train.eval_every=0"]
    assert train(tiny(tmp_path / "whole", *words)) == 0
    assert train(tiny(tmp_path / "cached", *words, "train.microbatch=8", "model.image.dropout=0")) == 0
    assert train(tiny(tmp_path / "plain", *words, "model.image.dropout=0")) == 0
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("cached", "plain", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)  # dropout does change it: the comparison can fail


def test_two_processes_are_one(tmp_path):
    words = ["precision=fp64", "model.image.dropout=0", "train.eval_every=0", "train.steps=3", *STANDARD]
    config = tiny(tmp_path / "one", *words)
    assert train(config) == 0
    yaml = str(tmp_path / "one/config.yaml")
    two_processes("clip.train", "--config", yaml, f"run_dir={tmp_path}/two")
    one, two = parts(tmp_path / "one", 3)["model"], parts(tmp_path / "two", 3)["model"]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-9)
    assert not torch.equal(one["image_head.0.mean"], torch.zeros_like(one["image_head.0.mean"]))


def test_one_batch_is_learnt_by_heart(tmp_path):
    config = tiny(tmp_path, "model.image.dropout=0", "data.family=1")
    towers = build_towers(config)
    data = batches(load_splits(config).train, towers.tokenizer, towers.preprocess, first_step=1, batch_size=16, seed=0)
    batch = next(data)
    optimizer = torch.optim.AdamW(towers.model.parameters(), lr=3e-3)
    x = towers.preprocess.normalise(batch.images)
    for _ in range(250):
        loss = contrastive_loss(towers.model(x, batch.ids), batch.image_ids, batch.text_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_dry_run_says_what_would_happen(tmp_path, capsys):
    assert train(tiny(tmp_path / "run"), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "64 images, 1.5 epochs" in out and "(16, 3, 64, 64) images and (16, 32) tokens" in out
    assert not (tmp_path / "run").exists()


def test_smoothing_gives_every_column_its_share():
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1) for _ in range(2))
    output = Output(x, y, torch.tensor(1.5, dtype=torch.float64), None)
    logits = output.log_scale.exp() * x @ y.T
    target = torch.full((5, 5), 0.2 / 5, dtype=torch.float64) + 0.8 * torch.eye(5, dtype=torch.float64)
    expected = sum(torch.nn.functional.cross_entropy(z, target) for z in (logits, logits.T)) / 2
    torch.testing.assert_close(contrastive_loss(output, smoothing=0.2), expected)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model.text.vocab_size=70"], "model.text.vocab_size"),
        (["data.flip=true"], "data.flip"),
        (["train.batch_size=18"], "train.batch_size"),
        (["data.views=2"], "data.views"),
        (["data.tokenizer=pretrained"], "data.tokenizer"),
        (["model.image.unlock=1"], "model.image.unlock"),
        (["model.image.kind=pretrained", "model.image.name=timm/x", "model.image.pool=class"], "model.image.pool"),
        (["model.text.kind=pretrained", "data.tokenizer=pretrained"], "model.text.pool"),
        (["model.loss=sigmoid", "train.label_smoothing=0.1"], "train.label_smoothing"),
        (["data.dataset=folder", "data.tokenizer=clip"], "data.folder"),
        (["data.family=3", "data.scenes=64"], "data.scenes"),
        (["data.max_images=5"], "data.max_images"),
    ],
)
def test_settings_that_cannot_be(tmp_path, words, key, capsys):
    try:
        config = tiny(tmp_path / "run", *words)
    except ConfigError as error:
        assert error.key == key
        return
    except Exception as error:
        assert key in str(error)
        return
    assert train(config, dry_run=True) == 2
    assert errors(capsys.readouterr().err)[0].startswith(f"error: {key}: ")


def test_a_run_is_loaded_for_use(tmp_path):
    config = tiny(tmp_path / "run", "train.steps=2")
    assert train(config) == 0
    loaded = load_run(tmp_path / "run", device="cpu")
    pairs = load_splits(config).val
    pixels = torch.stack([torch.from_numpy(pairs.pixels(i, loaded.preprocess, (1.0, False), 0, 0)) for i in range(3)])
    x = loaded.encode_images(pixels)
    y = loaded.encode_texts(["a small red circle", "two large blue stars on black"])
    assert x.shape == (3, 16) and y.shape == (2, 16)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
    ema = parts(tmp_path / "run", 2)["ema"]
    assert torch.equal(loaded.model.log_scale, ema["log_scale"])
    assert len(loaded.encode_texts([])) == 0
    with pytest.raises(ProjectError, match="no run of clip"):
        load_run(tmp_path / "nothing")
