"""Several questions about the same passages, learned in one pass over these.

    passages [1] ... [2] ...   question a, answer a
                               question b, answer b        each branch sees the trunk and itself, never another
                               question c, answer c

Prompts that begin alike are written once, as a trunk, with what differs behind it, as branches. Positions go on from
the trunk in every branch, and the attention mask keeps branches apart: every token sees what it would see in a prompt
of its own, so that the loss is that of separate prompts, at a fraction of the cost: SQuAD has five questions a passage.

Legend: B rows, T tokens of the longest, K last tokens of a row that may be asked for a next one, N tokens of all rows
that are, C width of a state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NONE = -100  # a target that does not count


@dataclass(frozen=True)
class Tree:
    """A trunk and its branches, one behind another.

    Attributes:
        ids: tokens.
        positions: of each, as if its branch followed the trunk directly.
        branches: number of each one's branch from 1; 0 for the trunk.
        targets: what each has to predict; `NONE` where nothing is learned: only answers are.
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    targets: list[int]

    @property
    def keep(self) -> int:
        """Tokens from the first that predicts something to the end."""
        first = next((i for i, target in enumerate(self.targets) if target != NONE), len(self.ids))
        return len(self.ids) - first


@dataclass(frozen=True)
class TreeBatch:
    """Trees of one length, padding before them.

    Attributes:
        ids, positions: int64 (B, T).
        mask: bool (B, 1, T, T), whether a token (third dimension) sees another (fourth).
        targets: int64 (B, K), of the last K tokens.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor


def grow(prompts: list[list[int]], answers: list[list[int]]) -> Tree:
    """A tree of prompts with the answers that follow them."""
    # a branch begins with a token that is no answer's
    size = min(shared(prompts), min(len(prompt) for prompt in prompts) - 1)
    ids = prompts[0][:size]
    positions = list(range(size))
    branches = [0] * size
    targets = [NONE] * size
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        branch = prompt[size:] + answer
        asked = len(prompt) - size - 1  # the prompt's last token predicts the answer's first
        ids += branch
        positions += range(size, size + len(branch))
        branches += [number] * len(branch)
        targets += [NONE] * asked + answer + [NONE]
    return Tree(ids, positions, branches, targets)


def shared(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with alike."""
    shortest = min(rows, key=len)
    return next((i for i, token in enumerate(shortest) if any(row[i] != token for row in rows)), len(shortest))


def collate(trees: list[Tree], pad: int, device: torch.device) -> TreeBatch:
    """A batch of trees."""
    size = max(len(tree.ids) for tree in trees)
    keep = max(tree.keep for tree in trees)

    def rows(name: str, empty: int) -> Tensor:
        each = [getattr(tree, name) for tree in trees]
        return torch.tensor([[empty] * (size - len(row)) + row for row in each], device=device)  # (B, T)

    branches = rows("branches", -1)
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()  # (T, T)
    own = branches.unsqueeze(2) == branches.unsqueeze(1)  # (B, T, T)
    mask = mask & ((branches == 0).unsqueeze(1) | own)
    # padding sees only padding, at least itself: no row of the softmax is empty, and nobody sees what comes of it
    return TreeBatch(rows("ids", pad), rows("positions", 0), mask.unsqueeze(1), rows("targets", NONE)[:, -keep:])


def tree_loss(model: Any, head: nn.Module, batch: TreeBatch) -> Tensor:
    """Cross-entropy of the answers' tokens, mean over all of them: in nats a token.

    Args:
        model: a causal language model, compiled or spread over processes, whatever it is wrapped in.
        head: its output layer, the last thing that its states go through.
    """
    asked = batch.targets != NONE  # (B, K)
    with only(head, asked):
        out = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.targets.shape[1],
        )
    return torch.nn.functional.cross_entropy(out.logits.float(), batch.targets[asked])  # (N, V), (N,)


@contextmanager
def only(head: nn.Module, asked: Tensor) -> Iterator[None]:
    """Within, a model's output layer is given the states of N tokens alone, those that `asked` (B, K) marks among the
    last K, and returns logits (N, V). Questions stand between the answers, and their logits would be a quarter of a
    step's work with a vocabulary of 49,152. What a model does with its logits (scaling, a soft cap) it still does.
    """

    def choose(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (given[0][:, -asked.shape[1] :][asked],)  # (B, T, C) -> (N, C)

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
