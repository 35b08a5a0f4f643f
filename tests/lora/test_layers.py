"""Our adapters against peft's with the same numbers, and the traps of low-rank finetuning."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from common.config import ConfigError
from common.errors import ProjectError
from lora.adapters.inject import (
    adapter_state,
    adapters_of,
    disabled,
    inject,
    load_adapter_state,
    merge,
    parameter_groups,
    unload,
    unmerge,
)
from lora.adapters.targets import find_targets
from lora.settings import AdapterConfig
from tests.lora.tiny import TinyConv, output, peft_parameters, randomise, tiny_gpt2, tiny_llama, tokens, with_peft

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
ATTENTION = ("q_proj", "v_proj")
CASES = {
    "lora": (tiny_llama, tokens(), {}),
    "rslora": (tiny_llama, tokens(), {"rslora": True}),
    "dora": (tiny_llama, tokens(), {"dora": True}),
    "rsdora": (tiny_llama, tokens(), {"dora": True, "rslora": True}),
    "embedding": (tiny_llama, tokens(), {"targets": ("embed_tokens", "q_proj")}),
    "embedding_dora": (tiny_llama, tokens(), {"targets": ("embed_tokens", "q_proj"), "dora": True}),
    "gpt2": (tiny_gpt2, tokens(), {}),
    "gpt2_dora": (tiny_gpt2, tokens(), {"dora": True}),
    "convolution": (TinyConv, IMAGES, {"targets": ("conv", "out")}),
    "convolution_dora": (TinyConv, IMAGES, {"targets": ("conv", "out"), "dora": True}),
}
peft = pytest.importorskip("peft", reason="peft is what our adapters are compared with")


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_as_in_peft(case):
    build, x, settings = CASES[case]
    base = build()
    ours, theirs = with_peft(base, AdapterConfig(rank=4, alpha=8, **settings))
    mine, other = output(ours, x), output(theirs, x)
    assert gap(mine, other) < 1e-6
    assert gap(mine, output(base, x)) > 1e-2, "the adapters do something"
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4))
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    own = dict(ours.named_parameters())
    pairs = peft_parameters(ours, theirs)
    assert set(pairs) == {name for name, parameter in own.items() if parameter.requires_grad}
    for name, parameter in pairs.items():
        assert gap(own[name].grad, parameter.grad.view_as(own[name])) < 1e-5, name  # sums in another order
    assert all(parameter.grad is None for parameter in own.values() if not parameter.requires_grad)


@pytest.mark.parametrize("case", ["lora", "dora", "embedding", "embedding_dora", "gpt2", "convolution"])
def test_gradients_in_double_precision(case):
    """1e-6 and far below, where rounding does not hide a difference."""
    build, x, settings = CASES[case]
    x = x.double() if x.is_floating_point() else x
    ours, theirs = with_peft(build().double(), AdapterConfig(rank=4, alpha=8, **settings))
    own = dict(ours.named_parameters())
    for name, parameter in peft_parameters(ours, theirs).items():  # peft's are float32 beside a float64 base
        parameter.data = own[name].detach().clone().view(parameter.shape)
    mine, other = output(ours, x), output(theirs, x)
    assert gap(mine, other) < 1e-12
    mine.square().sum().backward()
    other.square().sum().backward()
    for name, parameter in peft_parameters(ours, theirs).items():
        assert gap(own[name].grad, parameter.grad.view_as(own[name])) < 1e-12, name


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_as_in_peft(case):
    build, x, settings = CASES[case]
    ours, theirs = with_peft(build(), AdapterConfig(rank=4, alpha=8, **settings))
    before = output(ours, x)
    names = list(adapters_of(ours))
    merge(ours)
    unload(ours)
    merged = theirs.merge_and_unload()
    assert {type(module).__name__ for module in ours.modules()} == {
        type(module).__name__ for module in merged.modules()
    }
    for name in names:
        assert gap(ours.get_submodule(name).weight, merged.get_submodule(name).weight) < 1e-6
    assert gap(output(ours, x), before) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_pissa_as_in_peft(dora):
    """The same split of each weight, the same function at first, and the same gradients."""
    base = tiny_llama()
    ours, theirs = with_peft(base, AdapterConfig(rank=4, alpha=8, init="pissa", dora=dora), random=False)
    x = tokens()
    assert gap(output(ours, x), output(base, x)) < 1e-5
    for name, layer in adapters_of(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        assert gap(layer.base.weight, other.base_layer.weight) < 1e-5
        assert gap(layer.lora_B @ layer.lora_A, other.lora_B["default"].weight @ other.lora_A["default"].weight) < 1e-5
        assert torch.linalg.matrix_rank(base.get_submodule(name).weight - layer.base.weight, rtol=1e-4) == 4
    with torch.no_grad():
        for name, parameter in peft_parameters(ours, theirs).items():
            parameter.copy_(dict(ours.named_parameters())[name])
        for name, layer in adapters_of(ours).items():
            theirs.base_model.model.get_submodule(name).base_layer.weight.copy_(layer.base.weight)
    output(ours, x).square().sum().backward()
    output(theirs, x).square().sum().backward()
    for name, parameter in peft_parameters(ours, theirs).items():
        assert gap(dict(ours.named_parameters())[name].grad, parameter.grad) < 1e-5, name
    with disabled(ours):
        assert gap(output(ours, x), output(base, x)) < 1e-5


def test_fast_pissa_finds_the_same_subspace():
    """A randomised SVD, whatever the global generator's state, leaves nearly as little as the exact one."""
    rests = []
    for iterations in (0, 16, 16):
        torch.manual_seed(len(rests))
        model = tiny_llama()
        inject(model, AdapterConfig(rank=4, init="pissa", pissa_iterations=iterations))
        rests.append(adapters_of(model)["model.layers.0.self_attn.q_proj"].base.weight)
    assert torch.equal(rests[1], rests[2])
    assert float(rests[1].norm() / rests[0].norm()) == pytest.approx(1, abs=1e-3)


def test_rates_of_lora_plus_as_in_peft():
    from peft.optimizers import create_loraplus_optimizer

    config = AdapterConfig(rank=4, lora_plus=16.0)
    ours, theirs = with_peft(tiny_llama(), config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    own = {
        id(parameter): group["lr"] for group in parameter_groups(ours, 1e-3, config) for parameter in group["params"]
    }
    parameters = dict(ours.named_parameters())
    for name, parameter in peft_parameters(ours, theirs).items():
        assert own[id(parameters[name])] == pytest.approx(rates[id(parameter)]), name
    assert sorted(set(own.values())) == pytest.approx([1e-3, 16e-3])


# -- step 0 and step 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_step_0_is_the_base_to_the_last_bit(case, dtype):
    build, x, settings = CASES[case]
    base = build().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    ours = copy.deepcopy(base)
    inject(ours, AdapterConfig(rank=4, dropout=0.5, **settings))
    assert torch.equal(output(ours.train(), x), output(base, x))
    assert {parameter.dtype for parameter in ours.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dora", [False, True])
def test_every_b_moves_in_the_first_step(dora):
    """Also with gradient checkpointing, which must not cut the frozen base off from the loss."""
    model = tiny_llama()
    inject(model, AdapterConfig(rank=4, dora=dora))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, AdapterConfig()))
    x = tokens()
    model(x, labels=x, use_cache=False).loss.backward()
    optimizer.step()
    after = model.state_dict()
    for name in adapters_of(model):
        moved = (after[f"{name}.lora_B"] != before[f"{name}.lora_B"]).float().mean()
        assert moved > 0.9, name
        assert torch.equal(after[f"{name}.base.weight"], before[f"{name}.base.weight"])


def test_one_batch_is_learned():
    model = tiny_llama().train()
    config = AdapterConfig(rank=8, lora_plus=4.0)
    inject(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, config))
    x = tokens()
    losses = []
    for _ in range(60):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 4
    assert losses[-1] < 0.5


def test_adapters_in_float32_under_a_scaler():
    """Gradients in half precision could not be unscaled: `GradScaler` raises on them."""
    model = tiny_llama().half().train()
    inject(model, AdapterConfig(rank=4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-2, AdapterConfig()))
    scaler.scale(model(tokens()).logits.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(bool(layer.lora_B.any()) for layer in adapters_of(model).values())


def test_dropout_is_of_the_adapter_alone_and_off_in_eval():
    model = tiny_llama()
    x = tokens()
    inject(model, AdapterConfig(rank=4, dropout=0.5))
    randomise(model)
    model.eval()
    assert torch.equal(output(model, x), output(model, x))
    kept = output(model, x)
    model.train()
    assert not torch.equal(output(model, x), output(model, x))
    with disabled(model):
        assert torch.equal(output(model, x), output(tiny_llama(), x)), "the frozen path sees its input whole"
    model.eval()
    assert torch.equal(output(model, x), kept)


def test_first_a_is_a_function_of_the_seed():
    states = []
    for seed in (0, 0, 1):
        model = tiny_llama()
        torch.manual_seed(len(states))
        inject(model, AdapterConfig(), seed)
        states.append(adapter_state(model))
    name = "model.layers.0.mlp.up_proj.lora_A"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    bound = states[0][name].shape[1] ** -0.5
    assert 0.9 * bound < float(states[0][name].abs().max()) <= bound


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"init": "pissa"}], ids=["lora", "dora", "pissa"])
def test_merge_and_unmerge(settings):
    model = tiny_llama().bfloat16()
    inject(model, AdapterConfig(rank=4, **settings))
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    merge(model)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ProjectError, match="twice"):
        merge(model)
    with pytest.raises(ProjectError, match="twice"):
        adapters_of(model)["model.layers.0.self_attn.q_proj"].merge()
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ProjectError, match="nothing to unmerge"):
        unmerge(model)
    merge(model, keep=False)
    with pytest.raises(ProjectError, match="keep=False"):
        unmerge(model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_weights_are_refused_or_untied(target, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tied=True)
    inject(model, AdapterConfig(rank=4, targets=(target, "q_proj")))
    randomise(model)
    x = tokens()
    before = output(model, x)
    with pytest.raises(ProjectError, match=rf"{target} shares its weight"):
        merge(model)
    assert not any(layer.merged for layer in adapters_of(model).values()), "all or none"
    merge(model, untie=True)
    assert gap(output(model, x), before) < 1e-5
    unload(model)
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"], "readers would tie them again"
    assert gap(output(AutoModelForCausalLM.from_pretrained(tmp_path), x), before) < 1e-5


def test_ties_elsewhere_do_not_matter():
    model = tiny_llama(tied=True)
    inject(model, AdapterConfig(rank=4))
    merge(model)
    unload(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pissa_adapters_cannot_just_be_dropped():
    model = tiny_llama()
    inject(model, AdapterConfig(rank=4, init="pissa"))
    with pytest.raises(ProjectError, match="principal part"):
        unload(model)


# -- which layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_all_linear_are_those_of_peft(build):
    settings = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = peft.get_peft_model(build(), settings).base_model.model
    expected = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    assert find_targets(build(), AdapterConfig()) == expected
    assert not any("lm_head" in name for name in expected)


def test_targets_by_name_and_pattern():
    model = tiny_llama()
    assert find_targets(model, AdapterConfig(targets=("mlp.up_proj",))) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
    first = find_targets(model, AdapterConfig(targets=("model.layers.0.*",)))
    assert len(first) == 7
    assert all(name.startswith("model.layers.0.") for name in first)
    assert find_targets(model, AdapterConfig(targets=("lm_head",))) == ["lm_head"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qproj", "'qproj' fits no layer; did you mean q_proj?"),
        ("input_layernorm", "names only LlamaRMSNorm"),
        ("proj", "2 x q_proj (Linear)"),
        ("model.layers.9.*", "fits no layer"),
    ],
)
def test_a_target_that_fits_nothing_lists_what_there_is(target, message):
    model = tiny_llama()
    with pytest.raises(ConfigError) as error:
        inject(model, AdapterConfig(targets=("q_proj", target)))
    assert message in str(error.value)
    assert "down_proj" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing has changed"


def test_layers_that_cannot_be_adapted():
    attention = nn.MultiheadAttention(8, 2)  # reads the weight of its last layer without calling that layer
    with pytest.raises(ConfigError, match="names only NonDynamicallyQuantizableLinear"):
        inject(attention, AdapterConfig(targets=("out_proj",)))
    with pytest.raises(ConfigError, match="names only Conv2d"):
        inject(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), AdapterConfig(targets=("0",)))
    with pytest.raises(ConfigError, match="pissa needs linear layers"):
        inject(TinyConv(), AdapterConfig(targets=("conv",), init="pissa"))
    with pytest.raises(ConfigError, match="at most 4"):
        inject(TinyConv(), AdapterConfig(targets=("out",), init="pissa"))
    model = tiny_llama()
    inject(model, AdapterConfig())
    with pytest.raises(ProjectError, match="adapters already"):
        inject(model, AdapterConfig())
    with pytest.raises(ProjectError, match="no adapters"):
        adapters_of(tiny_llama())


def test_a_head_learns_in_full():
    model = TinyConv()
    inject(model, AdapterConfig(rank=2, targets=("conv",), head=("out",)))
    assert set(adapter_state(model)) == {"conv.lora_A", "conv.lora_B", "out.weight", "out.bias"}
    with pytest.raises(ConfigError, match="names 0 modules"):
        inject(TinyConv(), AdapterConfig(targets=("conv",), head=("classifier",)))


def test_state_of_adapters_alone():
    first, second = tiny_llama(), tiny_llama()
    for model in (first, second):
        inject(model, AdapterConfig(rank=4))
    randomise(first)
    load_adapter_state(second, adapter_state(first))
    assert torch.equal(output(first, tokens()), output(second, tokens()))
    other = tiny_llama()
    inject(other, AdapterConfig(rank=8))
    with pytest.raises(ProjectError, match="does not fit"):
        load_adapter_state(other, adapter_state(first))


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"dropout": 1.0}, {"pissa_iterations": 4}, {"lora_plus": 0.0}],
)
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match=rf"adapter\.{next(iter(settings))}"):
        AdapterConfig(**settings)


def test_a_compiled_or_cast_layer_keeps_its_kind():
    """`copy_with` makes a layer of the same class, whose other settings are shared."""
    model = TinyConv()
    inject(model, AdapterConfig(rank=2, targets=("conv",)))
    randomise(model)
    conv = model.conv.base
    merge(model)
    assert type(model.conv.base) is nn.Conv2d
    assert model.conv.base.stride == conv.stride
    assert model.conv.base.bias is conv.bias
    assert model.conv.base.weight is not conv.weight
