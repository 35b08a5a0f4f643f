"""NF4 against bitsandbytes, bit for bit; and models that are quantised as they load."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ProjectError
from lora.adapters.inject import adapters_of, inject, merge, parameter_groups, unload, unmerge
from lora.adapters.quantize import (
    NF4,
    Quantized,
    QuantizedLinear,
    byte_levels,
    dequantize,
    dynamic_levels,
    load_quantized,
    nearest,
    nf4_levels,
    quantize,
    quantize_model,
    scale_blocks,
)
from lora.model.files import read_tensors
from lora.settings import AdapterConfig
from tests.lora.tiny import output, randomise, tiny_gpt2, tiny_llama, tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is what our NF4 is compared with").functional


def weights(kind: str, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (96, 320)) -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(kind))
    value = 0.02 * torch.randn(shape, generator=rng)
    if kind == "heavy":
        value = value**3 * 1e4
    elif kind == "tiny":
        value = value * 1e-30
    elif kind == "zeros":
        value[::2] = 0
    elif kind == "levels":  # each number on a level or in the middle between two
        levels = nf4_levels(CPU)
        both = torch.cat([levels, (levels[:-1] + levels[1:]) / 2])
        value = both[torch.randint(len(both), shape, generator=rng)]
    return value.to(dtype)


KINDS = ("normal", "heavy", "tiny", "zeros", "levels")


def test_levels_are_quantiles_of_a_normal_distribution():
    """Appendix E of the paper, with the offset that its authors chose."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1)]).sort().values / above.max()
    torch.testing.assert_close(levels.float(), torch.tensor(NF4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_bitsandbytes(bnb, kind, dtype):
    weight = weights(kind, dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = quantize(weight, double_quant=False)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(dequantize(ours, (96, 320), dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros"])
def test_scales_are_quantised_as_bitsandbytes_does(bnb, kind):
    """Its reference kernel and ours agree on every code. Its compiled kernel for CPUs takes a short cut where a number
    lies near the middle between two levels: about 1 code in 500 differs, and is never the nearer one.
    """
    weight = weights(kind, shape=(320, 576))
    ours = quantize(weight)
    _, plain = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    centred = plain.absmax - plain.absmax.mean()
    reference = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    operation = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, outer = operation.redispatch(reference, centred, bnb.create_dynamic_map(), 256)
    assert torch.equal(ours.scales, codes)
    assert torch.equal(ours.outer, outer)
    assert torch.equal(dynamic_levels(CPU), bnb.create_dynamic_map())

    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.outer, state.state2.absmax)
    other = ours.scales != state.absmax
    assert float(other.float().mean()) < 0.01
    scaled, _ = scale_blocks(centred, 256)
    levels = dynamic_levels(CPU)
    mine, theirs = ((scaled - levels[codes.int()]).abs() for codes in (ours.scales, state.absmax))
    assert bool((mine <= theirs + 1e-7).all())


def test_double_dequantisation_is_that_of_bitsandbytes(bnb):
    weight = weights("normal")
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = Quantized(codes.flatten(), state.absmax, state.state2.absmax, state.offset)
    torch.testing.assert_close(dequantize(parts, (96, 320), torch.float32), bnb.dequantize_4bit(codes, state))


def test_forward_and_backward_of_a_4bit_layer(bnb):
    import bitsandbytes

    linear = nn.Linear(320, 96)
    theirs = bitsandbytes.nn.Linear4bit(320, 96, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    ours = QuantizedLinear.of(linear)
    x = torch.randn(5, 7, 320)
    theirs(x)  # quantises
    state = theirs.weight.quant_state
    assert torch.equal(ours.codes, theirs.weight.data.flatten())
    ours.scales = state.absmax  # which differs in the odd code, see above
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [layer(value) for layer, value in zip((ours, theirs), inputs)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    direction = torch.randn(results[0].shape)
    for result in results:
        (result * direction).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)


def test_gradient_is_that_of_the_dequantised_layer():
    layer = QuantizedLinear.of(nn.Linear(128, 64).double())
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_size_and_error():
    weight = weights("normal", shape=(512, 1024))
    parts = quantize(weight)
    bits = 8 * sum(part.numel() * part.element_size() for part in parts) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    error = (dequantize(parts, (512, 1024), torch.float32) - weight).norm() / weight.norm()
    assert 0.08 < float(error) < 0.1  # 4 bits of a normal distribution
    plain = quantize(weight, double_quant=False)
    more = (dequantize(plain, (512, 1024), torch.float32) - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(float(more), rel=0.01)


@pytest.mark.parametrize("shape", [(3, 5), (7, 9), (1, 64), (65, 1)])
def test_shapes_that_do_not_fill_a_block(shape):
    weight = weights("normal", shape=shape)
    for double_quant in (False, True):
        again = dequantize(quantize(weight, double_quant), shape, torch.float32)
        assert float((again - weight).abs().max()) < 0.16 * float(weight.abs().max())


def test_large_weights_are_done_in_pieces(monkeypatch):
    """Whatever the size of a piece, the result is the same."""
    weight = weights("normal")
    whole = quantize(weight)
    expected = dequantize(whole, (96, 320), torch.float32)
    monkeypatch.setattr("lora.adapters.quantize.CHUNK", 4 * 64)
    assert all(torch.equal(a, b) for a, b in zip(quantize(weight), whole))
    assert torch.equal(dequantize(whole, (96, 320), torch.float32), expected)


def test_ties_go_down():
    levels = torch.tensor([0.0, 1.0])
    assert nearest(torch.tensor([0.49, 0.5, 0.51]), levels).tolist() == [0, 0, 1]


# -- a layer -----------------------------------------------------------------------------------------------------------


def test_nothing_of_full_size_is_kept_for_the_way_back():
    layer = QuantizedLinear.of(nn.Linear(256, 256))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) < 0.6 * 256 * 256
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(2, -1))


def test_a_cast_model_keeps_its_scales():
    layer = QuantizedLinear.of(nn.Linear(128, 64))
    before = layer.dequantize(torch.float32)
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert model[0].outer.dtype == torch.float32
    assert torch.equal(model[0].dequantize(torch.float32), before)
    assert model[0].bias.dtype == torch.bfloat16
    assert model(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16


def test_autocast():
    layer = QuantizedLinear.of(nn.Linear(128, 64))
    x = torch.randn(2, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_state_of_a_quantised_layer_is_saved_and_loaded():
    first, second = QuantizedLinear.of(nn.Linear(128, 64)), QuantizedLinear.of(nn.Linear(128, 64))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dequantize(torch.float32), second.dequantize(torch.float32))


# -- adapters on a quantised base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_a_step_of_qlora(dora):
    model = tiny_llama().train()
    quantised = quantize_model(model)
    assert len(quantised) == 14
    assert type(model.lm_head) is nn.Linear
    x = tokens()
    before = output(model, x)
    assert inject(model, AdapterConfig(rank=4, dora=dora)) == quantised
    assert torch.equal(output(model, x), before)
    codes = model.model.layers[0].self_attn.q_proj.base.codes.clone()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, AdapterConfig()))
    losses = []
    for _ in range(3):
        loss = model(x, labels=x, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(bool(layer.lora_B.any()) for layer in adapters_of(model).values())
    assert torch.equal(model.model.layers[0].self_attn.q_proj.base.codes, codes)


def test_a_quantised_layer_with_its_adapter_is_one_graph():
    """`torch.compile` finds no break in it, and leaves no tensors of its own in our tables."""
    for table in (nf4_levels, byte_levels, dynamic_levels):
        table.cache_clear()
    model = tiny_llama()
    quantize_model(model)
    inject(model, AdapterConfig(rank=4))
    randomise(model)
    layer = model.model.layers[0].mlp
    results = []
    for call in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = call(x)
        y.sum().backward()
        results.append((y, x.grad, layer.up_proj.lora_B.grad.clone()))
        layer.zero_grad()
    for compiled, plain in zip(*results):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("dora", [False, True])
def test_merging_into_a_quantised_base_makes_ordinary_layers(dora):
    model = tiny_llama()
    quantize_model(model)
    inject(model, AdapterConfig(rank=4, dora=dora))
    randomise(model)
    x = tokens()
    before = output(model, x)
    merge(model)
    torch.testing.assert_close(output(model, x), before, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(output(model, x), before)
    merge(model, keep=False)
    unload(model)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    torch.testing.assert_close(output(model, x), before, rtol=1e-4, atol=1e-4)


def test_qpissa_quantises_what_is_left():
    """Without its largest directions a weight is smaller, and so is the error of quantising it."""
    base = tiny_llama()
    x = tokens()
    gaps = {}
    for init in ("default", "pissa"):
        model = copy.deepcopy(base)
        inject(model, AdapterConfig(rank=16, init=init))
        assert len(quantize_model(model)) == 14
        gaps[init] = float((output(model, x) - output(base, x)).norm())
    assert gaps["pissa"] < 0.9 * gaps["default"]
    with pytest.raises(ValueError, match="adapt first, then quantise"):
        quantised = copy.deepcopy(base)
        quantize_model(quantised)
        inject(quantised, AdapterConfig(init="pissa"))


# -- loading -----------------------------------------------------------------------------------------------------------


def from_config(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_equals_quantising_afterwards(tied, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama(tied).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_quantized(from_config(tmp_path), read_tensors(tmp_path), dtype)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    quantize_model(other)
    other = other.to(dtype)
    other.model.rotary_emb = model.model.rotary_emb  # `to` rounds its frequencies
    assert torch.equal(output(model, tokens()), output(other, tokens()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_no_two_weights_are_in_memory_at_once():
    """Every tensor of the checkpoint is gone when the next one comes, and the model is built without any."""
    state = tiny_llama().state_dict()
    alive = []

    def tensors():
        for name, value in state.items():
            assert not any(reference() is not None for reference in alive), name
            copied = value.clone()
            alive.append(weakref.ref(copied.untyped_storage()))
            yield name, copied
            del copied

    def build():
        model = tiny_llama()
        assert all(parameter.is_meta for parameter in model.parameters())
        return model

    model = load_quantized(build, tensors(), torch.bfloat16)
    assert len(alive) == len(state)
    assert output(model, tokens()).isfinite().all()
    assert not next(nn.Linear(2, 2).parameters()).is_meta, "afterwards, modules are built as usual"


def test_what_cannot_be_loaded(tmp_path):
    state = tiny_llama().state_dict()
    lacking = {name: value for name, value in state.items() if "up_proj" not in name and "norm" not in name}
    with pytest.raises(ProjectError, match="lacks 7 tensors"):
        load_quantized(tiny_llama, lacking.items())
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        with pytest.raises(ProjectError, match=r"has shape .* expects"):
            load_quantized(tiny_llama, (state | {name: torch.zeros(3, 3)}).items())
    with pytest.raises(ProjectError, match="nothing to quantise"):
        load_quantized(tiny_gpt2, [])
    with pytest.raises(ProjectError, match="no safetensors"):
        next(read_tensors(tmp_path))
    tiny_llama().save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ProjectError, match="is damaged"):
        next(read_tensors(tmp_path))
