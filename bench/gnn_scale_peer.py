"""The peer of `bench.gnn_scale`: the sampling of `gnn.node.neighbours` in vectorised PyTorch.

Legend: B seed nodes, n nodes of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Blocks = list[tuple[Tensor, Tensor, int]]  # (indptr, indices, num_src) of each, outermost first


def floyd(start: Tensor, degree: Tensor, wide: Tensor, fanout: int) -> Tensor:
    """Places (n', fanout) of distinct random edges of the rows `wide`, all of degree above fanout: Floyd's method,
    all rows at once.
    """
    degree = degree[wide]
    picks = torch.empty(len(wide), fanout, dtype=torch.int64)
    for j in range(fanout):
        top = degree - fanout + j
        draw = (torch.rand(len(wide), dtype=torch.float64) * (top + 1)).long()
        taken = (picks[:, :j] == draw[:, None]).any(dim=1)
        picks[:, j] = torch.where(taken, top, draw)
    return start[wide, None] + picks


def smallest_keys(start: Tensor, degree: Tensor, wide: Tensor, fanout: int) -> Tensor:
    """The same by giving every edge of those rows a random key and sorting: the usual way without a loop."""
    degree, start = degree[wide], start[wide]
    row = torch.repeat_interleave(torch.arange(len(wide)), degree)
    ends = degree.cumsum(0)
    within = torch.arange(len(row)) - (ends - degree)[row]
    # rows stay together, edges within are shuffled
    order = torch.argsort(row + torch.rand(len(row), dtype=torch.float64))
    first = (ends - degree)[:, None] + torch.arange(fanout)
    return start[:, None] + within[order[first]]


class TorchSampler:
    """`gnn.node.neighbours.NeighborSampler` without compiled loops: same blocks, drawn by PyTorch's generator."""

    def __init__(
        self, indptr: Tensor, indices: Tensor, fanouts: tuple[int, ...], method: Callable[..., Tensor]
    ) -> None:
        self.indptr, self.indices, self.fanouts, self.method = indptr, indices, fanouts, method
        self.position = torch.full((len(indptr) - 1,), -1)

    def sample(self, seeds: Tensor, step: int) -> tuple[Blocks, Tensor]:
        """The blocks, and the node numbers."""
        torch.manual_seed(step)
        nodes, blocks = seeds, []
        self.position[nodes] = torch.arange(len(nodes))
        for fanout in self.fanouts:
            start = self.indptr[nodes]
            degree = self.indptr[nodes + 1] - start
            count = degree.clamp(max=fanout)
            columns = torch.arange(fanout)
            places = start[:, None] + columns  # (n, fanout); right for rows of which all is kept
            wide = (degree > fanout).nonzero().flatten()
            places[wide] = self.method(start, degree, wide, fanout)
            met = self.indices[places[columns < count[:, None]]].long()
            new = met[self.position[met] < 0].unique()
            self.position[new] = torch.arange(len(nodes), len(nodes) + len(new))
            nodes = torch.cat([nodes, new])
            blocks.append((F.pad(count.cumsum(0), (1, 0)), self.position[met].int(), len(nodes)))
        self.position[nodes] = -1
        return blocks[::-1], nodes
