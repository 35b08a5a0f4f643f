"""The towers by themselves: which token is pooled, what dropout drops, what decays, and the temperature."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from clip.config import HeadConfig, ImageConfig, ModelConfig, TextConfig
from clip.model import CLIP, parameter_groups
from clip.model.heads import Standard, build_head
from clip.model.image_encoder import drop_patches
from clip.model.text_encoder import TextEncoder
from clip.model.tokenizer import trim
from clip.model.transformer import attend
from common.config import ConfigError
from tests.clip import small

END = small.TEXT.vocab_size - 1


def encoder(**changes: object) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(dataclasses.replace(small.TEXT, **changes)).double()


def test_the_end_of_text_is_pooled_wherever_it_stands() -> None:
    """What follows it has no effect, be it padding, other words or another end of text; what precedes it has."""
    net = encoder()
    ids = torch.tensor([[18, 3, 4, END, 0, 0, 0, 0]])
    features = net(ids)
    for rest in ([5, 6, 7, 8], [END] * 4, [18, 18, END, 2]):
        torch.testing.assert_close(net(torch.tensor([[18, 3, 4, END, *rest]])), features)
    assert not torch.allclose(net(torch.tensor([[18, 3, 5, END, 0, 0, 0, 0]])), features)
    # moved by one, it is another text
    assert not torch.allclose(net(torch.tensor([[18, 3, 4, 4, END, 0, 0, 0]])), features)


def test_a_trimmed_batch_gives_the_same() -> None:
    net = encoder()
    _, ids, *_ = small.batch(2)
    ids = ids[:1].repeat(3, 1)
    ids[1, 1] = 5
    short = trim(ids, END)
    assert short.shape[1] == 3 < ids.shape[1]
    torch.testing.assert_close(net(short), net(ids))
    assert torch.equal(trim(small.batch(2)[1], END), small.batch(2)[1]), "a full text stays whole"


def test_last_sees_the_whole_context() -> None:
    net = encoder(causal=False, pool="last")
    ids = torch.tensor([[18, 3, 4, END, 0, 0, 0, 0]])
    other = torch.tensor([[18, 3, 4, END, 0, 0, 5, 0]])
    assert not torch.allclose(net(ids), net(other))
    with pytest.raises(ValueError, match="whole context of 8"):
        net(ids[:, :4])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        encoder()(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"images \(3, 16, 16\), not \(3, 32, 32\)"):
        small.build().encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be the tower's width 16"):
        small.build(image_head=HeadConfig(kind="none"))


def test_a_residual_head_begins_as_its_linear_map_and_learns_both() -> None:
    torch.manual_seed(0)
    head = build_head(HeadConfig(kind="residual", hidden=8, dropout=0.5), 6, 4).eval()
    x = torch.randn(5, 6)
    torch.testing.assert_close(head(x), head.linear(x))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):  # in the first step the hidden layer has no gradient: what is behind it is zero
        optimizer.zero_grad()
        head(x).square().sum().backward()
        optimizer.step()
    assert all(float(p.grad.abs().sum()) > 0 for p in head.parameters())
    assert not torch.allclose(head(x), head.linear(x))


def test_standard_features_have_mean_zero_and_deviation_one() -> None:
    """But for a channel that never says anything, which stays at zero."""
    torch.manual_seed(0)
    x = torch.randn(500, 6) * torch.tensor([0.1, 1, 10, 100, 1, 0]) + torch.tensor([5.0, 0, 0, -300, 2, 7])
    part = Standard(6)
    assert torch.equal(part(x), x)
    part.measure(x)
    torch.testing.assert_close(part(x).mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    expected = torch.tensor([1.0, 1, 1, 1, 1, 0])
    torch.testing.assert_close(part(x).std(dim=0, correction=0), expected, atol=0.02, rtol=0)
    head = build_head(HeadConfig(norm="standard"), 6, 4)
    assert isinstance(head, torch.nn.Sequential) and isinstance(head[0], Standard)
    assert set(part.state_dict()) == {"mean", "deviation"}


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        (ImageConfig, {"image_size": 225}, "image_size"),
        (ImageConfig, {"width": 100}, "width"),
        (ImageConfig, {"kind": "resnet", "width": 64, "heads": 32, "patch_dropout": 0.5}, "kind"),
        (ImageConfig, {"kind": "resnet", "width": 64, "stages": (3, 4)}, "stages"),
        (ImageConfig, {"kind": "resnet", "width": 64, "heads": 5}, "heads"),
        (TextConfig, {"causal": False}, "pool"),
        (TextConfig, {"context": 1}, "context"),
        (ModelConfig, {"text_head": HeadConfig(dropout=0.1)}, r"model\.text_head\.dropout"),
        (ModelConfig, {"temperature": 0.001}, "temperature"),
    ],
)
def test_configs_that_cannot_work_are_refused(section: type, changes: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        section(**changes)


# -- patch dropout -----------------------------------------------------------------------------------------------------


def test_patch_dropout_keeps_a_random_subset() -> None:
    tokens = torch.arange(3 * 10.0).view(3, 10, 1)
    torch.manual_seed(0)
    counts = torch.zeros(30)
    for _ in range(400):
        kept = drop_patches(tokens, 0.6)
        assert kept.shape == (3, 4, 1)
        for row in range(3):
            values = kept[row, :, 0]
            assert len(values.unique()) == 4 and ((values // 10) == row).all()
            counts[values.long()] += 1
    assert ((counts / 400 - 0.4).abs() < 0.1).all(), "each patch is kept equally often"
    assert drop_patches(tokens, 0.99).shape == (3, 1, 1), "one patch always stays"


def test_patch_dropout_is_for_training_and_spares_the_class_token(monkeypatch) -> None:
    """Patches already carry their positions when some are dropped: their order no longer matters."""
    seen = []

    def reversed_patches(tokens: torch.Tensor, share: float) -> torch.Tensor:
        seen.append((tokens.shape[1], share))
        return tokens.flip(1)

    monkeypatch.setattr("clip.model.image_encoder.drop_patches", reversed_patches)
    images = small.batch(2)[0]
    whole = small.build()
    model = small.build(image=dataclasses.replace(small.IMAGE, patch_dropout=0.5))
    torch.testing.assert_close(model.eval().encode_image(images), whole.encode_image(images))
    assert not seen
    torch.testing.assert_close(model.train().encode_image(images), whole.encode_image(images))
    assert seen == [(16, 0.5)], "16 patches, without the class token"


# -- optimisation ------------------------------------------------------------------------------------------------------


def test_the_temperature_starts_as_in_the_papers() -> None:
    assert small.build().log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert small.build().bias is None
    sigmoid = small.build(loss="sigmoid")
    assert sigmoid.log_scale.item() == pytest.approx(math.log(10)) and sigmoid.bias.item() == -10
    assert small.build(temperature=0.5).log_scale.exp().item() == pytest.approx(2)


@pytest.mark.parametrize(("value", "expected"), [(-0.5, 0.0), (9.0, math.log(100)), (2.5, 2.5)])
def test_the_temperature_is_clamped_in_place(value: float, expected: float) -> None:
    model = small.build()
    before = model.log_scale
    with torch.no_grad():
        model.log_scale.fill_(value)
    model.clamp_scale()
    assert model.log_scale is before and before.requires_grad
    assert before.item() == pytest.approx(expected)


def test_only_matrices_decay() -> None:
    for image in (small.IMAGE, small.RESNET):
        model = small.build(small.with_dropout(), image=image, loss="sigmoid")
        decayed, plain = parameter_groups(model, 0.2)
        assert decayed["weight_decay"] == 0.2 and plain["weight_decay"] == 0
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        never = [names[id(parameter)] for parameter in plain["params"]]
        assert {"log_scale", "bias"} <= set(never)
        norms = [name for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.BatchNorm2d)]
        gains = {f"{name}.weight" for name in norms}
        assert gains <= set(never)
        assert all(name in gains or name.endswith(("bias", "log_scale", "class_token")) for name in never), never
        always = [names[id(parameter)] for parameter in decayed["params"]]
        assert all("bias" not in name for name in always), always
        assert len(never) + len(always) == len(names)


def test_a_locked_tower_is_not_trained() -> None:
    model = small.build()
    model.image_encoder.requires_grad_(False)
    trained = {id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in model.image_encoder.parameters()}
    assert id(model.image_head.weight) in trained


def test_other_towers_can_be_put_in() -> None:
    class Tower(torch.nn.Flatten):
        width = 12

    model = CLIP(small.CONFIG, image_encoder=Tower())
    assert model.encode_image(torch.randn(5, 3, 2, 2)).shape == (5, 8)


def test_embeddings_are_of_length_one_in_float32() -> None:
    model = small.build().float()
    images, ids, *_ = small.batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images.float(), ids)
    assert output.image.dtype == output.text.dtype == torch.float32
    torch.testing.assert_close(output.image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(output.text.norm(dim=1), torch.ones(3))


def test_one_batch_is_learned_by_heart_within_a_moment() -> None:
    from clip.contrastive import contrastive_loss

    model = small.build().float()
    images, ids, *_ = small.batch(8)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    started = time.process_time()
    for _ in range(60):
        optimizer.zero_grad()
        loss = contrastive_loss(model(images.float(), ids))
        loss.backward()
        optimizer.step()
        model.clamp_scale()
    assert loss.item() < 0.05
    assert time.process_time() - started < 20


@pytest.mark.parametrize(("queries", "causal"), [(9, False), (9, True), (1, False)])
def test_attention_in_bf16_on_a_cpu_is_the_same_function(queries: int, causal: bool) -> None:
    """There the formula is written out, because the fused kernel is slow: against that kernel in float64, values and
    all gradients, to the eight bits that bf16 has.
    """
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, rows, 16).bfloat16().double().requires_grad_() for rows in (queries, 9, 9)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    weight = torch.randn(2, 3, queries, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=causal)
    (expected * weight).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*rounded, causal)
    assert found.dtype == torch.bfloat16
    (found * weight).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)
    for ours, theirs in zip(rounded, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=0.06, rtol=0.03)
