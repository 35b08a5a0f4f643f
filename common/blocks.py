"""The layers of a transformer, found and compiled one by one."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: the members of its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def compile_blocks(model: nn.Module) -> None:
    """Compile each layer for itself, in place. They are equal, so that the compiler works once where it would unroll
    all of them for the whole model; names of parameters stay.
    """
    for block in blocks_of(model):
        block.compile()
