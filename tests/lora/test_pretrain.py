"""The small base that is trained from nothing, by itself and as a part of a run."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from common.config import Options, load
from common.errors import ProjectError
from common.files import sha256
from lora import DEMO
from lora.config import Config
from lora.data.slots import pretraining_text
from lora.model import load_tokenizer
from lora.model.load import load_llama
from lora.pretrain import load_texts, main, next_token_loss, rate, train_tokenizer
from tests.helpers import ROOT, same, status
from tests.lora.small import call, train

TINY = [
    "pretrain.sentences=60",
    "pretrain.vocab_size=300",
    "pretrain.width=16",
    "pretrain.layers=1",
    "pretrain.heads=2",
    "pretrain.mlp_width=24",
    "pretrain.context=32",
    "pretrain.batch_size=4",
    "pretrain.steps=6",
    "precision=fp32",
    "device=cpu",
]


def pretrain(*words: str) -> int:
    argv = ["--config", str(ROOT / "configs/lora_tiny.yaml"), *TINY, *words]
    config, options = load(Config, "lora", "pretrain", argv, short={"out": "pretrain.out"}, takes="config")
    return status(main, config, options)


def test_a_base_of_ones_own_text(tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(f"The {i}th day was long." for i in range(60)))
    out = tmp_path / "base"
    assert pretrain(f"--out={out}", f"pretrain.text={text}", f"run_dir={tmp_path / 'run'}") == 0
    assert str(out) in capsys.readouterr().out
    model = load_llama(out, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(out)
    ids = tokenizer("The 7th day was long.")["input_ids"]
    assert len(ids) < 20
    assert tokenizer.decode(ids) == "The 7th day was long."
    assert model(torch.tensor([ids])).isfinite().all()
    assert pretrain(f"--out={out}", f"run_dir={tmp_path / 'run'}") == 1
    assert "holds a model already" in capsys.readouterr().err


def test_the_loss_falls_and_a_seed_is_a_model(tmp_path):
    for name in ("a", "b"):
        assert pretrain(f"--out={tmp_path / name}", f"run_dir={tmp_path / 'run'}", "pretrain.steps=25") == 0
    assert pretrain(f"--out={tmp_path / 'c'}", f"run_dir={tmp_path / 'run'}", "pretrain.steps=1") == 0
    assert same(load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors"))
    assert sha256(tmp_path / "a/tokenizer.json") == sha256(tmp_path / "b/tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "a")
    window = torch.tensor([tokenizer(" ".join(pretraining_text(8, 5)))["input_ids"][:120]])
    losses = [next_token_loss(load_llama(tmp_path / n, torch.float32, torch.device("cpu")), window) for n in ("a", "c")]
    assert losses[0] < losses[1] - 0.5


def test_no_text_is_unknown_to_the_tokenizer():
    tokenizer = train_tokenizer(["plain words only"], 300)
    text = "Füchse \U0001f98a\n\tund mehr"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_a_run_trains_its_base_once(tmp_path, capsys):
    words = ["model.name=pretrain", *TINY, "train.steps=2"]
    run_dir = tmp_path / "run"
    assert train("pretrain", run_dir, *words) == 0
    first = sha256(run_dir / "base/model.safetensors")
    assert train("pretrain", run_dir, *words, "train.steps=3", resume=True) == 0
    assert sha256(run_dir / "base/model.safetensors") == first
    assert capsys.readouterr().err.count("pretraining step 6 of 6") == 1
    assert call("eval", run_dir, "eval.generate=false") == 0


def test_a_new_base_is_not_deleted_with_an_earlier_run(tmp_path):
    words = ["model.name=pretrain", *TINY, "train.steps=2"]
    run_dir = tmp_path / "run"
    assert train("pretrain", run_dir, *words) == 0
    first = sha256(run_dir / "base/model.safetensors")
    assert train("pretrain", run_dir, *words, "seed=5", overwrite=True) == 0
    assert sha256(run_dir / "base/model.safetensors") != first
    assert call("eval", run_dir, "eval.generate=false") == 0


def test_a_run_stopped_while_its_base_is_made_goes_on(tmp_path, monkeypatch):
    words = ["model.name=pretrain", *TINY, "train.steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr("lora.train.pretrain_base", stop_at_once)
        assert train("pretrain", tmp_path / "run", *words) != 0
    assert train("pretrain", tmp_path / "run", *words, resume=True) == 0


def stop_at_once(*args):
    raise ProjectError("stopped")


def test_too_little_text_and_a_missing_file(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("few")
    assert pretrain(f"--out={tmp_path / 'x'}", f"pretrain.text={tmp_path / 'short.txt'}", "run_dir=x") == 2
    assert pretrain(f"--out={tmp_path / 'x'}", f"pretrain.text={tmp_path / 'none.txt'}", "run_dir=x") == 1
    err = capsys.readouterr().err
    assert "fewer than a row" in err
    assert "cannot be read" in err
    assert not (tmp_path / "x").exists()


def test_text_is_cut_into_paragraphs(tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n\n\n three \n")
    config = Config().pretrain.__class__(text=str(tmp_path / "t.txt"))
    assert load_texts(config, "", 0) == ["one\ntwo", "three"]


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100) for step in range(1, 101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 4
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_the_demo_is_one_of_our_configs():
    config, options = load(Config, "lora", "train", ["--config", str(ROOT / DEMO.config)])
    assert config.model.name == "pretrain"
    assert options == Options("train")
    assert DEMO.seconds <= 75
