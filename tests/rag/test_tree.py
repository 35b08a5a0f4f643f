"""Questions about the same passages, learned in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rag.reader.tree import NONE, collate, grow, tree_loss
from tests.rag import tiny_lm


@pytest.mark.parametrize("make", [tiny_lm.llama, tiny_lm.gpt2])
def test_the_loss_of_a_tree_is_that_of_its_prompts(make):
    model = make().double()
    rng = np.random.default_rng(0)

    def ids(count):
        return [int(i) for i in rng.integers(5, 300, count)]

    trunk = ids(12)
    groups = [
        ([trunk + ids(4), trunk + ids(7), trunk + ids(1)], [ids(3), ids(1), ids(2)]),
        ([ids(6)], [ids(2)]),  # a single prompt
        ([[7, 8, 9], [7, 8, 9]], [[4], [5, 6]]),  # twice the same one
    ]
    apart = []
    for prompts, answers in groups:
        for prompt, answer in zip(prompts, answers):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            apart.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    loss = torch.cat(apart).mean()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights)
    trees = [grow(*group) for group in groups]
    assert len(trees[0].ids) == 12 + (4 + 3) + (7 + 1) + (1 + 2)
    together = tree_loss(model, model.get_output_embeddings(), collate(trees, 0, torch.device("cpu")))
    torch.testing.assert_close(together, loss.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(together, weights), gradients, atol=1e-6, rtol=1e-4)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3), "the model is as it was"


def test_only_answers_are_learned():
    tree = grow([[1, 2, 3, 4], [1, 2, 5, 6]], [[7, 8], [9]])
    assert tree.ids == [1, 2, 3, 4, 7, 8, 5, 6, 9]
    assert tree.positions == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert tree.targets == [NONE, NONE, NONE, 7, 8, NONE, NONE, 9, NONE]
    assert tree.keep == 6
