"""Training runs in small: what moves, what does not, what a stop or another split of the batch changes (nothing)."""

from __future__ import annotations

import json

import pytest
import torch

from common.checkpoint import Checkpoints
from common.config import ConfigError, Options, load, resolve
from common.logging import read_metrics
from lora.adapters.inject import adapters_of, disabled, inject, parameter_groups
from lora.adapters.layers import LoRALayer
from lora.config import Config
from lora.data import collate
from lora.loss import TuningLoss
from lora.model import hidden_states, set_checkpointing, token_logits
from lora.model.load import load_llama
from lora.settings import AdapterConfig
from lora.tuning import build_optimizer
from tests.helpers import ROOT, same, stop_in_check, two_processes
from tests.lora.small import SETTINGS, config_of, train, write_base
from tests.lora.test_data import some_tokens

CPU = torch.device("cpu")
TIMING = ("tokens_per_second", "labels_per_second", "texts_per_second")


def learned(run_dir, step=4):
    return Checkpoints.load(run_dir / f"checkpoints/{step:08d}.pt")["parts"]["learned"]


def lines(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def test_one_batch_is_learnt_by_heart(base):
    model = load_llama(base, torch.float32, CPU)
    settings = AdapterConfig(rank=16, alpha=32.0)
    inject(model, settings)
    batch = collate([[example] for example in some_tokens(3)])
    objective = TuningLoss(model.train())
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-2, settings))
    losses = []
    for _ in range(120):
        loss = objective(batch) / len(batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 20


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("code", ["ours", "transformers"])
def test_every_b_moves_in_the_first_step(base, tmp_path, checkpointing, code):
    words = [f"train.checkpointing={checkpointing}", f"model.code={code}", "train.steps=1", "train.decay=constant"]
    assert train(base, tmp_path / "run", *words) == 0
    state = learned(tmp_path / "run", 1)
    second = {name: value for name, value in state.items() if name.endswith("lora_B")}
    assert len(second) == 2 * 7
    assert all(value.abs().max() > 0 for value in second.values())
    assert all(value.dtype == torch.float32 for value in state.values())


def test_checkpointing_changes_nothing_but_memory(base):
    gradients = []
    for checkpointing in (False, True):
        model = load_llama(base, torch.float32, CPU)
        inject(model, AdapterConfig(rank=2))
        for layer in adapters_of(model).values():
            torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
        if checkpointing:
            set_checkpointing(model)
        TuningLoss(model.train())(collate([some_tokens(3), some_tokens(2, 1)])).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert same(*gradients)


def test_step_zero_is_the_base(base):
    model = load_llama(base, torch.float32, CPU)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = token_logits(model, hidden_states(model, tokens))
        inject(model, AdapterConfig(rank=4))
        assert torch.equal(token_logits(model, hidden_states(model, tokens)), before)


def test_parts_of_a_batch_add_up_to_the_whole(base, tmp_path):
    """Rows of unequal numbers of labels: a mean of the parts' means would differ."""
    for name, size in (("whole", 0), ("parts", 1), ("uneven", 3)):
        assert train(base, tmp_path / name, f"train.microbatch={size}", "train.lr=0.01", "data.pack=false") == 0
    whole = learned(tmp_path / "whole")
    for name in ("parts", "uneven"):
        for key, value in learned(tmp_path / name).items():
            torch.testing.assert_close(value, whole[key], atol=2e-5, rtol=1e-3, msg=key)
        losses = [row["loss"] for row in lines(tmp_path / name)]
        assert losses == pytest.approx([row["loss"] for row in lines(tmp_path / "whole")], rel=1e-5)


def test_compiled_layers_learn_the_same(base, tmp_path):
    """Layer by layer, and validation, whose shapes are others, is not compiled."""
    for name in ("false", "true"):
        words = [f"compile={name}", "train.lr=0.01", "train.steps=2", "train.validate_every=1"]
        assert train(base, tmp_path / name, *words) == 0
    plain = learned(tmp_path / "false", 2)
    for key, value in learned(tmp_path / "true", 2).items():
        torch.testing.assert_close(value, plain[key], atol=1e-5, rtol=1e-4, msg=key)
    for row, expected in zip(lines(tmp_path / "true"), lines(tmp_path / "false"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(base, tmp_path, monkeypatch):
    words = ["train.steps=6", "adapter.dropout=0.3", "train.lr=0.01"]
    assert train(base, tmp_path / "whole", *words) == 0
    with monkeypatch.context() as context:
        stop_in_check(context, 2)
        assert train(base, tmp_path / "run", *words) == 143
    with monkeypatch.context() as context:
        stop_in_check(context, 4)
        assert train(base, tmp_path / "run", *words, resume=True) == 143
    assert train(base, tmp_path / "run", *words, resume=True) == 0
    a, b = (Checkpoints.load(tmp_path / name / "checkpoints/00000006.pt") for name in ("whole", "run"))
    assert same(a["parts"], b["parts"])
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")


def test_a_checkpoint_holds_no_base_weight(base, trained):
    state = Checkpoints.load(trained / "checkpoints/00000004.pt")["parts"]["learned"]
    assert state
    assert all(".lora_" in name for name in state)
    assert (trained / "checkpoints/00000004.pt").stat().st_size < (base / "model.safetensors").stat().st_size


def test_the_adapter_is_one_that_peft_reads(base, trained):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ours = load_llama(base, torch.float32, CPU)
    inject(ours, AdapterConfig(rank=4))
    for name, value in learned(trained).items():
        ours.get_parameter(name).data.copy_(value)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), trained / "adapter"
    ).eval()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        a = token_logits(ours, hidden_states(ours, tokens))
        torch.testing.assert_close(a, theirs(input_ids=tokens).logits, atol=1e-5, rtol=1e-4)
        with disabled(ours):
            assert not torch.allclose(token_logits(ours, hidden_states(ours, tokens)), a, atol=1e-5)


def test_full_finetuning_writes_a_whole_model(base, tmp_path):
    assert train(base, tmp_path / "run", "train.method=full", "train.lr=0.001") == 0
    before = load_llama(base, torch.float32, CPU)
    after = load_llama(tmp_path / "run/model", torch.float32, CPU)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert not torch.equal(a, b), name


def test_four_bits_learn_too(base, tmp_path):
    assert train(base, tmp_path / "run", "model.quantize=nf4", "train.lr=0.01") == 0
    losses = [row["loss"] for row in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_b_learns_faster_with_lora_plus(base):
    model = load_llama(base, torch.float32, CPU)
    settings = AdapterConfig(rank=2, lora_plus=16.0)
    inject(model, settings)
    config = Config(adapter=settings)
    optimizer = build_optimizer(parameter_groups(model, config.train.lr, settings), config.train)
    assert [group["ratio"] for group in optimizer.param_groups] == [1.0, 16.0]


def test_8_bit_moments_learn_almost_the_same(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    losses = {}
    for name in ("adamw", "adamw8bit"):
        assert train(base, tmp_path / name, f"train.optimizer={name}", "train.lr=0.01", "train.steps=6") == 0
        losses[name] = [row["loss"] for row in lines(tmp_path / name)]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=2e-2)


def test_dropout_is_off_in_evaluation(base):
    model = load_llama(base, torch.float32, CPU)
    inject(model, AdapterConfig(rank=4, dropout=0.5))
    for layer in adapters_of(model).values():
        torch.nn.init.ones_(layer.lora_B)
    tokens = torch.arange(9)[None]
    model.train()
    assert not torch.equal(hidden_states(model, tokens), hidden_states(model, tokens))
    model.eval()
    assert torch.equal(hidden_states(model, tokens), hidden_states(model, tokens))


def test_half_precision_bases_keep_adapters_in_float32(base, tmp_path):
    assert train(base, tmp_path / "run", "precision=bf16", "train.lr=0.01") == 0
    assert all(value.dtype == torch.float32 for value in learned(tmp_path / "run").values())
    losses = [row["loss"] for row in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_validation_is_logged(base, tmp_path):
    assert train(base, tmp_path / "run", "train.validate_every=2") == 0
    assert [row["step"] for row in lines(tmp_path / "run") if "val_loss" in row] == [2, 4]


def test_a_dry_run_loads_no_weights(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora.tuning.base.load_language_model", None)
    assert train(base, tmp_path / "run", dry_run=True) == 0
    out = capsys.readouterr().out
    assert "330 examples to learn from" in out
    assert "memory in GiB" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(base, tmp_path, sharding):
    words = [*SETTINGS, f"model.name={base}", "train.lr=0.01", f"train.sharding={sharding}"]
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    assert train(base, tmp_path / "one", "train.lr=0.01") == 0
    two_processes("lora.train", "--config", str(tmp_path / "c.yaml"), f"run_dir={tmp_path / 'two'}", *words)
    assert (tmp_path / "two/adapter/adapter_config.json").is_file()
    expected = learned(tmp_path / "one")
    for key, value in learned(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-3, msg=key)


def test_a_base_that_changes_is_not_resumed(base, tmp_path, capsys):
    other = write_base(tmp_path / "other", seed=1)
    assert train(base, tmp_path / "run") == 0
    assert train(other, tmp_path / "run", "train.steps=5", resume=True) == 1
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.dataset=json"], "data.path"),
        (["train.method=head"], "train.method"),
        (["train.method=full", "model.quantize=nf4"], "model.quantize"),
        (["train.method=full", "model.dtype=bf16"], "model.dtype"),
        (["data.dataset=sst2", "model.name=pretrain"], "model.name"),
        (["train.sharding=fsdp", "model.quantize=nf4"], "train.sharding"),
        (["train.microbatch=99"], "train.microbatch"),
        (["model.dropout=1"], "model.dropout"),
        (["model.dropout=0.1"], "model.dropout"),  # of a language model, which has none here
        (["data.system=hello"], "data.system"),
        (["generate.beams=4", "generate.temperature=1"], "generate.beams"),
        (["pretrain.kv_heads=3"], "pretrain.kv_heads"),
        (["data.dataset=cola", "eval.shots=3"], "eval.shots"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, key):
    with pytest.raises(ConfigError) as caught:
        resolve(Config, None, words)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["adapter.targets=[nothing]"], 2, "fits no layer"),
        (["model.name=/nowhere/at/all"], 1, "neither a folder"),
        (["data.max_length=8"], 1, "fit"),
        (["data.template=chat"], 2, "no chat template"),
    ],
)
def test_mistakes_are_one_line(base, tmp_path, capsys, words, status, said):
    assert train(base, tmp_path / "run", *words) == status
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_every_config_is_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if "lora.train" in path.read_text())
    assert len(names) == 11
    for name in names:
        config, options = load(Config, "lora", "train", ["--config", f"configs/{name}"])
        assert isinstance(config, Config)
        assert options == Options("train")


def test_words_are_no_settings(monkeypatch, trained):
    _, options = load(Config, "lora", "generate", ["--run", str(trained), "a = b", "x", "seed=3"], words="prompt")
    assert options.words == ("a = b", "x")


def test_layers_are_ours(base, tmp_path):
    """What a run adapts is what `lora/adapters/layers.py` computes."""
    config = config_of(base, tmp_path)
    model = load_llama(base, torch.float32, CPU)
    inject(model, config.adapter)
    assert all(isinstance(layer, LoRALayer) for layer in adapters_of(model).values())
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
