"""Which links are known, which are to be guessed: edge splits for link prediction, without leaks.

Four mistakes make link prediction look better than it is; each is ruled out here by how the data is kept.

1. An edge is two entries of the adjacency. If one lands in the training part and its mirror in the test part, the
   answer has been seen. Every pair is therefore kept once, as (u, v) with u < v, and split in that form.
2. A training negative must not be looked up in the test part: "not a training edge" is all that training may know.
   Validation and test negatives exclude all edges.
3. Evaluation negatives are drawn once from a seed, not anew for each model or epoch.
4. Uniform negatives are far away from each other and easy. The second set of negatives shares an end with the positive
   and is ranked by heuristics, the hardest first (Li et al. 2023, "Evaluating graph neural networks for link
   prediction: current pitfalls and new benchmarking", HeaRT). Both are reported; negatives.py draws them.

Legend: N nodes, M undirected edges. Pairs are int64 (2, M) on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EdgeSplit:
    """Disjoint sets of canonical pairs (u < v), int64 (2, M_part), each in ascending order."""

    num_nodes: int
    train: Tensor
    val: Tensor
    test: Tensor

    @property
    def all(self) -> Tensor:
        """The edges of all parts, int64 (2, M): what evaluation negatives must avoid."""
        return canonical(torch.cat([self.train, self.val, self.test], 1), self.num_nodes)

    @property
    def message_edges(self) -> Tensor:
        """Training edges in both directions, int64 (2, 2 M_train): the only ones that a model may pass messages
        along.
        """
        return torch.cat([self.train, self.train.flip(0)], 1)


def canonical(edges: Tensor, num_nodes: int) -> Tensor:
    """Distinct pairs u < v of integer `edges` (2, M), whatever their direction, ascending; self-loops are dropped.
    int64 (2, M').

    ValueError for another shape or for a node outside 0 .. num_nodes - 1.
    """
    if edges.ndim != 2 or len(edges) != 2:
        raise ValueError(f"edges must have shape (2, M), got {tuple(edges.shape)}")
    edges = edges.detach().cpu().long()
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < num_nodes:
        raise ValueError(
            f"edges name nodes {int(edges.min())} to {int(edges.max())}, but the graph has nodes 0 to {num_nodes - 1}"
        )
    low = edges.min(0).values
    high = edges.max(0).values
    keep = low != high
    key = torch.unique(low[keep] * num_nodes + high[keep])  # sorted
    return torch.stack([key // max(1, num_nodes), key % max(1, num_nodes)])


def split_edges(
    edges: Tensor, num_nodes: int, val_share: float = 0.05, test_share: float = 0.1, seed: int = 0
) -> EdgeSplit:
    """A random split of undirected edges; shares are of the undirected edges, rounded down, and training keeps the
    rest.

    Args: `edges` (2, M) in one or both directions. The same seed gives the same split; a share of 0 gives an empty
    part. ValueError where a share is negative or no edge is left to train on.
    """
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise ValueError(
            f"val_share {val_share} and test_share {test_share} must not be negative, and leave some edges to train on"
        )
    pairs = canonical(edges, num_nodes)
    count = pairs.shape[1]
    if not count:
        raise ValueError("the graph has no edges to split: link prediction needs some")
    num_val, num_test = int(val_share * count), int(test_share * count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    val, test, train = order[:num_val], order[num_val : num_val + num_test], order[num_val + num_test :]
    return EdgeSplit(num_nodes, *(pairs[:, part.sort().values] for part in (train, val, test)))
