"""Many small graphs in one: the TU collection (Morris et al. 2020), and batches cut out of it without a loop over
graphs.

All graphs stand in one large graph, one after another and not connected. A batch is again such a graph, made of the
pieces that its ids name. Nothing is padded.

Legend: G graphs, B graphs of a batch, N nodes of all, M nodes of a batch, E entries of the adjacency, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ProjectError
from common.runtime import mix_seed
from gnn.config import Config
from gnn.core.graph import build_graph
from gnn.core.sparse import Structure
from gnn.data.datasets import SPLIT_STREAM, fetch


@dataclass(frozen=True)
class Batch:
    """B graphs as one block-diagonal graph.

    Attributes:
        x: float (M, F). structure: the adjacency (M, M).
        owner: int64 (M,), the graph in the batch that a node belongs to, ascending.
        sizes: int64 (B,), nodes of each graph.
        labels: int64 (B,).
    """

    x: Tensor
    structure: Structure
    owner: Tensor
    sizes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def spans(start: Tensor, count: Tensor) -> Tensor:
    """start_0, start_0 + 1, ... (count_0 of them), start_1, ...: int64 (sum of counts,)."""
    before = count.cumsum(0) - count  # where each span begins in the output
    return torch.repeat_interleave(start - before, count) + torch.arange(int(count.sum()), device=start.device)


class GraphSet:
    """G labelled graphs.

    Args:
        first: int64 (G + 1,): graph g has the nodes first[g] to first[g + 1].
        indptr: int64 (N + 1,), indices: integers (E,): CSR of the symmetric adjacency of all of them.
        features: float32 (N, F). labels: int64 (G,).
    """

    def __init__(
        self, first: Tensor, indptr: Tensor, indices: Tensor, features: Tensor, labels: Tensor, name: str = "graphs"
    ) -> None:
        self.first = first
        self.indptr = indptr
        self.indices = indices.long()
        self.features = features
        self.labels = labels
        self.name = name
        self.num_classes = int(labels.max()) + 1
        self.degree = indptr.diff()  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> GraphSet:
        """On a device, features in the default floating-point type."""
        features = self.features.to(device, torch.get_default_dtype())
        return GraphSet(
            self.first.to(device),
            self.indptr.to(device),
            self.indices.to(device),
            features,
            self.labels.to(device),
            self.name,
        )

    def batch(self, ids: Tensor) -> Batch:
        """The graphs `ids` int64 (B,), in this order; one may occur twice."""
        start = self.first[ids]
        sizes = self.first[ids + 1] - start  # (B,)
        nodes = spans(start, sizes)  # (M,) numbers of the batch's nodes among all N
        owner = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), sizes)
        indptr = F.pad(self.degree[nodes].cumsum(0), (1, 0))  # (M + 1,)
        first_entry = self.indptr[start]
        entries = self.indptr[start + sizes] - first_entry  # (B,)
        shift = sizes.cumsum(0) - sizes - start  # from a node's number among all to its number in the batch
        indices = self.indices[spans(first_entry, entries)] + torch.repeat_interleave(shift, entries)
        return Batch(self.features[nodes], Structure(indptr, indices, symmetric=True), owner, sizes, self.labels[ids])


def join_graphs(
    edges: list[Tensor],
    sizes: list[int],
    features: list[Tensor] | None,
    labels: Tensor,
    max_degree: int = 200,
    name: str = "graphs",
) -> GraphSet:
    """G graphs from lists: edges int (2, M_g) in any order and direction, numbers of nodes, features (N_g, F).

    Without features, a node's is its degree, one-hot; degrees above `max_degree` share one place.
    Raises:
        ProjectError: as `build_graph`, or an empty graph, or an edge that leaves its graph; the message says which.
    """
    for g, (ends, size) in enumerate(zip(edges, sizes, strict=True)):
        if size < 1:
            raise ProjectError(f"{name}: graph {g} has no nodes")
        if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < size:
            raise ProjectError(f"{name}: an edge of graph {g} names a node outside 0 to {size - 1}")
    first = F.pad(torch.tensor(sizes, dtype=torch.int64).cumsum(0), (1, 0))
    shifted = torch.cat([ends.long() + start for ends, start in zip(edges, first[:-1], strict=True)], dim=1)
    whole = build_graph(shifted, int(first[-1]), None if features is None else torch.cat(features).float(), name=name)
    x = whole.features
    if x is None:
        degree = whole.indptr.diff().clamp(max=max_degree)
        x = F.one_hot(degree, int(degree.max()) + 1).float()
    return GraphSet(first, whole.indptr, whole.indices, x, labels, name)


def open_tu(root: Path, name: str) -> Any:
    """The dataset object; downloads and processes what is missing."""
    from torch_geometric.datasets import TUDataset

    return TUDataset(str(root), name)


def load_graphs(config: Config) -> GraphSet:
    """The TU dataset that the config names. Node labels are one-hot features; continuous attributes and edge labels are
    not used.

    Raises:
        ProjectError: files missing and not to be had, or labels that are not classes.
    """
    name = config.data.name
    root = Path(config.data_root) / "TUDataset"
    dataset = fetch(
        lambda: open_tu(root, name),
        f"{name}_A.txt, {name}_graph_indicator.txt, {name}_graph_labels.txt "
        f"(and {name}_node_labels.txt) into {root / name / 'raw'}/",
    )
    items = list(dataset)
    if not items or any(item.y is None or item.y.is_floating_point() or item.y.numel() != 1 for item in items):
        raise ProjectError(f"{name}: graph classification needs one class a graph; this dataset has something else")
    labels = torch.cat([item.y.flatten() for item in items]).long()
    if config.data.shuffle_labels:
        labels = labels[
            torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix_seed(config.seed, SPLIT_STREAM)))
        ]
    features = None if items[0].x is None else [item.x for item in items]
    return join_graphs(
        [item.edge_index for item in items],
        [int(item.num_nodes) for item in items],
        features,
        labels,
        config.graph.max_degree,
        name,
    )


def stratified_folds(labels: Tensor, count: int, seed: int) -> Tensor:
    """A fold 0 ... count - 1 for each label (G,): int64 (G,). Folds and their shares of each class differ by at most
    one graph.

    Each class is shuffled and dealt out, the next class beginning where the last one ended. A function of the seed.
    """
    rng = torch.Generator().manual_seed(mix_seed(seed, SPLIT_STREAM))
    order = torch.randperm(len(labels), generator=rng)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, in random order within a class
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[order] = torch.arange(len(labels)) % count
    return folds
