"""The loss without all logits against transformers' loss with them."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import ConfigError
from lora.adapters.inject import inject
from lora.data import Batches, collate
from lora.loss import TuningLoss, chunked_cross_entropy, torch_cross_entropy
from lora.metrics.losses import example_losses
from lora.model import Llama, initialise
from lora.model.load import load_llama
from lora.settings import AdapterConfig
from tests.lora.small import SHAPE
from tests.lora.test_data import some_tokens
from tests.lora.test_llama import peer

CPU = torch.device("cpu")


def pieces(count=50, width=16, vocab=37, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(count, width, dtype=torch.float64, generator=rng, requires_grad=True)
    labels = torch.randint(0, vocab, (count,), generator=rng)
    head = nn.Linear(width, vocab, dtype=torch.float64)
    return states, head, labels


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_give_the_same_loss_and_gradients(chunk, frozen):
    states, head, labels = pieces()
    head.requires_grad_(not frozen)
    expected = F.cross_entropy(head(states), labels, reduction="sum")
    learning = [states] if frozen else [states, *head.parameters()]
    wanted = torch.autograd.grad(expected * 0.37, learning)
    loss = chunked_cross_entropy(states, head, labels, chunk)
    found = torch.autograd.grad(loss * 0.37, learning)
    torch.testing.assert_close(loss.double(), expected, atol=1e-3, rtol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_head_with_an_adapter_learns_through_chunks():
    model = nn.Sequential(nn.Linear(16, 37, dtype=torch.float64))
    inject(model, AdapterConfig(rank=2, targets=("0",)))
    nn.init.normal_(model[0].lora_B)
    states, _, labels = pieces()
    expected = F.cross_entropy(model[0](states), labels, reduction="sum")
    wanted = torch.autograd.grad(expected, [states, model[0].lora_A, model[0].lora_B])
    found = torch.autograd.grad(
        chunked_cross_entropy(states, model[0], labels, 8), [states, model[0].lora_A, model[0].lora_B]
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_few_logits_exist_at_once():
    """Neither forward nor backward pass has a tensor of as many numbers as there are logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.numbers = max(Largest.numbers, result.numel())
            return result

    states = torch.randn(64, 8, requires_grad=True)
    head = nn.Linear(8, 1000).requires_grad_(False)
    labels = torch.randint(0, 1000, (64,))
    with Largest():
        chunked_cross_entropy(states, head, labels, 4).backward()
    assert 4000 <= Largest.numbers < 2 * 4000 + 64 * 8 + 8000


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no F.linear_cross_entropy")
def test_pytorchs_own_function_gives_the_same():
    states, head, labels = pieces()
    states, head = states.float().detach().requires_grad_(), head.float().requires_grad_(False)
    expected = F.cross_entropy(head(states), labels, reduction="sum")
    loss = torch_cross_entropy(states, head, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, states)[0], torch.autograd.grad(expected, states)[0], atol=1e-5, rtol=1e-5
    )


def test_an_older_pytorch_is_told(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(ConfigError, match="choose chunked"):
        torch_cross_entropy(*pieces())


@pytest.mark.parametrize("method", ["chunked", "torch", "full"])
def test_loss_equals_that_of_transformers(method):
    """ForCausalLMLoss shifts labels itself and leaves -100 out; its mean is over what remains."""
    if method == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no F.linear_cross_entropy")
    ours = Llama(SHAPE)
    initialise(ours, 0)
    theirs = peer(SHAPE, ours)
    ours.requires_grad_(False)
    rows = [[example] for example in some_tokens(6)]
    batch = collate(rows)
    labels = torch.full_like(batch.tokens, -100)
    for r, (example,) in enumerate(rows):
        labels[r, len(example.prompt) : len(example)] = torch.tensor(example.answer)
    expected = theirs(input_ids=batch.tokens, labels=labels).loss
    loss = TuningLoss(ours, method, 5)(batch) / len(batch.labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_packed_loss_equals_unpacked(base):
    model = load_llama(base, torch.float32, CPU)
    examples = some_tokens(12)
    packed = Batches(examples, 64, True, 4, 0)
    objective = TuningLoss(model)
    rows = [[packed.kept[i] for i in row] for row in packed.rows]
    together = objective(packed.collate(rows))
    apart = objective(collate([[example] for example in examples]))
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-5)


def test_losses_of_examples_are_those_of_each_alone(base):
    class FakeRun:
        device = CPU

        def track(self, items):
            return items

        autocast = contextlib.nullcontext

    model = load_llama(base, torch.float32, CPU)
    examples = some_tokens(7)
    sums, counts = example_losses(model, examples, 3, FakeRun())
    for i, example in enumerate(examples):
        alone = TuningLoss(model)(collate([[example]]))
        torch.testing.assert_close(sums[i].float(), alone, atol=1e-4, rtol=1e-5)
        assert counts[i] == len(example.answer)
