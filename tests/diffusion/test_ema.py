"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.ema import EMA


def closed_form(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The average after all updates as one weighted sum of w_0 (the initial weights), w_1, ..., w_N.

    w_n is taken in with 1 - d_n and shrunk by every later d_m; w_0 is shrunk by all of them.
    """
    d = [min(decay, (1 + n) / (10 + n)) for n in range(1, len(weights))]  # d_1 ... d_N
    total = torch.zeros_like(weights[0])
    for n, weight in enumerate(weights):
        share = 1.0 if n == 0 else 1 - d[n - 1]
        for later in d[n:]:
            share *= later
        total += share * weight
    return total


@pytest.mark.parametrize(("decay", "updates"), [(0.9999, 50), (0.5, 50), (0.9, 200), (0.999, 1)])
def test_closed_form_with_warm_up(decay, updates):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay)
    history = [model.weight.detach().clone()]
    for step in range(1, updates + 1):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        history.append(model.weight.detach().clone())
        ema.update(model, step)
    torch.testing.assert_close(ema.model.weight, closed_form(history, decay), rtol=1e-12, atol=1e-14)


def test_warm_up_forgets_the_initial_weights():
    """After 100 updates of constant weights 1, from 0, a decay of 0.9999 alone would leave 99 percent of the start."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9999)
    nn.init.ones_(model.weight)
    for step in range(1, 101):
        ema.update(model, step)
    assert float(ema.model.weight) > 0.999


def test_decay_zero_copies():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.0)
    for step in (1, 2):
        nn.init.normal_(model.weight)
        ema.update(model, step)
        assert torch.equal(ema.model.weight, model.weight)


def test_buffers_are_copied_and_nothing_is_shared():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.99)
    before = ema.model[0].weight.clone()
    model(torch.randn(8, 3))
    nn.init.normal_(model[0].weight)
    assert torch.equal(ema.model[0].weight, before)
    ema.update(model, 1)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert int(ema.model[1].num_batches_tracked) == 1
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_state_round_trip():
    model = nn.Linear(3, 2)
    ema, other = EMA(model, 0.9), EMA(nn.Linear(3, 2), 0.9)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), other.model.parameters(), strict=True))
