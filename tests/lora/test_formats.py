"""Adapters written by us and read by peft, written by peft and read by us; and everything that is not an adapter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ProjectError
from lora.adapters.files import load_adapter, read_adapter, save_adapter
from lora.adapters.inject import adapter_state, adapters_of, inject, merge
from lora.settings import AdapterConfig
from tests.lora.tiny import TinyConv, output, randomise, tiny_gpt2, tiny_llama, tokens, with_peft

peft = pytest.importorskip("peft", reason="peft reads and writes the same files")
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
CASES = {
    "lora": (tiny_llama, tokens(), {}),
    "rslora": (tiny_llama, tokens(), {"rslora": True}),
    "dora": (tiny_llama, tokens(), {"dora": True}),
    "some": (tiny_llama, tokens(), {"targets": ("model.layers.0.*", "layers.1.mlp.up_proj")}),
    "embedding": (tiny_llama, tokens(), {"targets": ("embed_tokens", "q_proj")}),
    "gpt2": (tiny_gpt2, tokens(), {}),
    "convolution": (TinyConv, IMAGES, {"targets": ("conv", "out")}),
    "convolution_dora": (TinyConv, IMAGES, {"targets": ("conv", "out"), "dora": True}),
    "pissa": (tiny_llama, tokens(), {"init": "pissa"}),
    "pissa_rslora": (tiny_llama, tokens(), {"init": "pissa", "rslora": True}),
    "pissa_dora": (tiny_llama, tokens(), {"init": "pissa", "dora": True}),
}


def trained(build, settings, rank=4):
    """A model whose adapters differ from where they started."""
    model = build()
    inject(model, AdapterConfig(rank=rank, alpha=6, **settings))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(case, tmp_path):
    build, x, settings = CASES[case]
    model = trained(build, settings)
    save_adapter(model, tmp_path, "base", "CAUSAL_LM" if build is tiny_llama else None)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(theirs, x), output(build(), x), atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_we_read_ours(case, tmp_path):
    build, x, settings = CASES[case]
    model = trained(build, settings)
    save_adapter(model, tmp_path, "base")
    again = build().eval()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(output(again, x), output(model, x), rtol=1e-5, atol=1e-5)
    if "pissa" not in case:  # which comes back as what it changed
        assert torch.equal(output(again, x), output(model, x))
        assert all(torch.equal(value, adapter_state(again)[name]) for name, value in adapter_state(model).items())


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("pissa")])
def test_we_read_theirs(case, tmp_path):
    build, x, settings = CASES[case]
    _, theirs = with_peft(build(), AdapterConfig(rank=4, alpha=6, **settings))
    theirs.save_pretrained(tmp_path)
    model = build().eval()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, x), output(theirs, x), rtol=1e-5, atol=1e-5)


def test_we_read_pissa_of_theirs(tmp_path):
    """Saved as it is, an adapter of peft's needs the base split once more; peft does so, too."""
    _, theirs = with_peft(tiny_llama(), AdapterConfig(rank=4, alpha=6, init="pissa"), random=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, tokens()), output(theirs, tokens()), rtol=1e-4, atol=1e-4)


def test_ranks_and_alphas_of_single_layers(tmp_path):
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 8},
        alpha_pattern={"v_proj": 3},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(tiny_llama(), settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_llama()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(output(model, tokens()), output(theirs, tokens()), rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours", "base")
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back, tokens()), output(theirs, tokens()), rtol=1e-5, atol=1e-5)


def tiny_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def test_a_head_goes_with_its_adapter_both_ways(tmp_path):
    model = tiny_classifier()
    names = inject(model, AdapterConfig(rank=2, targets=("query", "value"), head=("classifier",)))
    assert len(names) == 4
    randomise(model)
    with torch.no_grad():
        model.classifier.weight += 1
        model.classifier.bias += 1
    save_adapter(model, tmp_path / "ours", "base", "SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(theirs, tokens()), output(model, tokens()), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_classifier()
    saved = load_adapter(again, tmp_path / "theirs")
    assert saved.head == ("classifier",)
    assert again.classifier.weight.requires_grad
    torch.testing.assert_close(output(again, tokens()), output(model, tokens()), rtol=1e-5, atol=1e-5)


def test_a_head_that_was_tied_leaves_the_embedding_alone(tmp_path):
    base = tiny_llama(tied=True)
    model = copy.deepcopy(base)
    inject(model, AdapterConfig(rank=2, targets=("q_proj",), head=("lm_head",)))
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    save_adapter(model, tmp_path, "base")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(output(again, tokens()), output(model, tokens()))


def test_the_base_never_enters_the_file(tmp_path):
    for name, settings in {"lora": {}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}.items():
        model = trained(tiny_llama, settings)
        save_adapter(model, tmp_path / name, "base")
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(".lora_" in key for key in stored)
        numbers = sum(value.numel() for value in adapter_state(model).values())
        assert sum(value.numel() for value in stored.values()) == numbers * (2 if name == "pissa" else 1)
    embedding = trained(tiny_llama, {"targets": ("embed_tokens",)})
    save_adapter(embedding, tmp_path / "embedding", "base")
    assert len(load_file(tmp_path / "embedding/adapter_model.safetensors")) == 2, "peft would add the embedding itself"


def test_target_modules_are_short_where_they_can_be(tmp_path):
    for name, targets, expected in (
        ("all", ("q_proj", "up_proj"), ["q_proj", "up_proj"]),
        ("one", ("layers.0.self_attn.q_proj",), ["model.layers.0.self_attn.q_proj"]),
    ):
        save_adapter(trained(tiny_llama, {"targets": targets}), tmp_path / name, "base")
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"] == expected


def test_a_merged_model_has_nothing_to_save_twice(tmp_path):
    """Merged adapters are still adapters: what is written stays the same."""
    model = trained(tiny_llama, {})
    save_adapter(model, tmp_path / "before", "base")
    merge(model)
    save_adapter(model, tmp_path / "after", "base")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- what is not an adapter for this model -----------------------------------------------------------------------------


def damage(folder, how):
    path = folder / "adapter_model.safetensors"
    config = json.loads((folder / "adapter_config.json").read_text())
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "noise":
        path.write_bytes(b"\xff" * 100)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "pickle":
        path.rename(path.with_name("adapter_model.bin"))
    elif how == "no config":
        (folder / "adapter_config.json").write_text("{")
    elif how == "no B":
        save_file({key: value for key, value in load_file(path).items() if "lora_B" not in key}, path)
    elif how == "nan":
        save_file({key: value * float("nan") for key, value in load_file(path).items()}, path)
    else:
        (folder / "adapter_config.json").write_text(json.dumps(config | how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged"),
        ("noise", "is damaged"),
        ("empty", "is damaged"),
        ("missing", "is missing"),
        ("pickle", "is a pickle"),
        ("no config", "holds no adapter"),
        ("no B", "an A or its B is missing"),
        ("nan", "not finite"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"bias": "all"}, "uses bias of peft"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"init_lora_weights": "olora"}, "started from init_lora_weights=olora"),
    ],
)
def test_damaged_or_foreign_files_end_in_one_line(how, message, tmp_path):
    save_adapter(trained(tiny_llama, {}), tmp_path, "base")
    read_adapter(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ProjectError, match=message) as error:
        read_adapter(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_no_folder():
    with pytest.raises(ProjectError, match="holds no adapter"):
        read_adapter(__import__("pathlib").Path("nowhere"))


def test_an_adapter_for_another_base_is_refused(tmp_path):
    save_adapter(trained(tiny_llama, {}), tmp_path, "some/base")
    wide = tiny_llama(hidden=128)
    state = copy.deepcopy(wide.state_dict())
    with pytest.raises(ProjectError, match=r"another base \(some/base\).*lora_A has shape"):
        load_adapter(wide, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in wide.state_dict().items()), "nothing has changed"
    with pytest.raises(ProjectError, match="this model lacks"):
        load_adapter(tiny_gpt2(), tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight *= 1.5  # same shapes, other weights
    with pytest.raises(ProjectError, match="normalisation weights and biases differ"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, check_base=False)
    assert len(adapters_of(other)) == 14
    load_adapter(tiny_llama().bfloat16(), tmp_path)  # the same base in another precision
