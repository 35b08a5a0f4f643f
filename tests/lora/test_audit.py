"""What merging costs, by cause."""

from __future__ import annotations

import copy

import pytest
import torch

from common.errors import ProjectError
from lora.adapters.inject import inject, merge
from lora.adapters.quantize import quantize_model
from lora.audit import audit, compare
from lora.settings import AdapterConfig
from tests.lora.tiny import output, randomise, tiny_llama, tokens


def logits(model):
    return output(model, tokens(8)).flatten(0, 1)


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"targets": ("q_proj",)}], ids=["all", "dora", "some"])
def test_adapters_belong_to_the_base_of_their_training(settings):
    """On a 4-bit base the right one to merge into is its dequantised self; on a full one it is the original."""
    full = tiny_llama()
    four = copy.deepcopy(full)
    quantize_model(four)
    for model, right, wrong in (
        (four, "merged_nf4", "merged_original"),
        (full, "merged_original", "merged_nf4"),
    ):
        originals = {name: value.clone() for name, value in full.state_dict().items()}
        adapted = copy.deepcopy(model)
        inject(adapted, AdapterConfig(rank=4, **settings))
        randomise(adapted)
        before = copy.deepcopy(adapted.state_dict())
        gaps = {gap.variant: gap for gap in audit(adapted, logits, originals)}
        assert list(gaps) == ["unmerged", "merged_bf16", "merged_nf4", "merged_original"]
        assert gaps["unmerged"].largest == 0
        assert gaps[right].kl < 1e-8
        assert gaps[wrong].kl > 1e-3
        assert 0 < gaps["merged_bf16"].kl < gaps[wrong].kl
        assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_precision_of_the_model_itself_is_a_row():
    model = tiny_llama().bfloat16()
    inject(model, AdapterConfig(rank=4))
    randomise(model)
    unmerged, merged, *_ = audit(model, logits)
    assert 0 < unmerged.kl < 0.1
    assert 0 < merged.kl < 0.1


def test_qpissa_is_audited_too():
    base = tiny_llama()
    model = copy.deepcopy(base)
    inject(model, AdapterConfig(rank=4, init="pissa"))
    quantize_model(model)
    gaps = {gap.variant: gap.kl for gap in audit(model, logits, base.state_dict())}
    assert gaps["merged_nf4"] < 1e-8 < gaps["merged_original"]


def test_what_an_audit_needs():
    model = tiny_llama()
    quantize_model(model)
    with pytest.raises(ProjectError, match="no adapters"):
        audit(model, logits)
    inject(model, AdapterConfig(rank=4))
    with pytest.raises(ProjectError, match=r"original weights, and model\.layers\.0\.self_attn\.q_proj\.weight"):
        audit(model, logits)
    merge(model)
    with pytest.raises(ProjectError, match="unmerge first"):
        audit(model, logits)


def test_divergence_by_hand():
    reference = torch.tensor([[0.0, 0.0]])
    other = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])
    gap = compare("x", reference, other)
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert gap.kl == pytest.approx(float(expected))
    assert gap.largest == pytest.approx(float(torch.log(torch.tensor(3.0))))
