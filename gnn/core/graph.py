"""A graph in memory, and the one place where edges from outside are checked.

Five classes of this package hold edges, each for one purpose. `Graph` (here) is the data: edges, features, labels and
splits of one undirected graph, as it was read. `Structure` (sparse.py) is what layers take: who hears from whom, with
its normalisations kept, destinations and sources possibly different nodes. `Pattern` (sparse.py) is below that: the
places of a sparse matrix's entries, with its transpose, which every product and its backward pass need. `Block`
(node/neighbours.py) is a sampled piece of a graph: the edges of one layer in local numbers, from which a Structure is
made. `Csr` (community/metrics.py) is a graph as NumPy arrays with weights, for the compiled loops of community search.

Legend: N nodes, E entries of the adjacency (both directions of each edge), F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.errors import ProjectError
from gnn.core.sparse import SparseFeatures, Structure

SPARSE_BELOW = 0.1  # share of non-zeros under which features are kept sparse


def no_nodes() -> Tensor:
    """An empty list of node ids."""
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Graph:
    """An undirected graph without self-loops and repeated edges, and what is known of its nodes.

    Attributes:
        indptr: int64 (N + 1,), indices: int32 (E,): CSR of the symmetric adjacency, neighbours ascending.
        features: (N, F), dense or sparse; None where there are none.
        labels: int64 (N,), -1 = unknown; None where there are none.
        train, val, test: int64 node ids.
        ids: what the nodes are called where they come from, (N,) integers or words; None = 0 to N - 1.
        class_names: what the classes are called; empty = 0 to K - 1.
        notes: what was decided when the graph was read, a line each.
    """

    indptr: Tensor
    indices: Tensor
    features: Tensor | SparseFeatures | None = None
    labels: Tensor | None = None
    num_classes: int = 0
    train: Tensor = field(default_factory=no_nodes)
    val: Tensor = field(default_factory=no_nodes)
    test: Tensor = field(default_factory=no_nodes)
    name: str = "graph"
    ids: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        """Undirected edges, each counted once."""
        return len(self.indices) // 2

    @property
    def num_features(self) -> int:
        return 0 if self.features is None else self.features.shape[1]

    def edges(self) -> Tensor:
        """int64 (2, E): row (destination) and column (source) of each entry; each edge in both directions."""
        rows = torch.repeat_interleave(torch.arange(self.num_nodes, device=self.indptr.device), self.indptr.diff())
        return torch.stack([rows, self.indices.long()])

    def structure(self) -> Structure:
        """The adjacency as layers take it. Each call makes a new one: keep it, it caches the normalisations."""
        return Structure(self.indptr, self.indices, symmetric=True)

    def described(self, ids: np.ndarray | None, class_names: tuple[str, ...], notes: Iterable[str]) -> Graph:
        """The same graph with what its nodes and classes are called, and further notes."""
        return dataclasses.replace(self, ids=ids, class_names=class_names, notes=(*self.notes, *notes))

    def names(self) -> np.ndarray:
        """What each node is called, (N,)."""
        return np.arange(self.num_nodes) if self.ids is None else self.ids

    def to(self, device: torch.device | str) -> Graph:
        """On a device, features in the default floating-point type."""
        moved = {name: getattr(self, name).to(device) for name in ("indptr", "indices", "train", "val", "test")}
        moved["labels"] = None if self.labels is None else self.labels.to(device)
        moved["features"] = None if self.features is None else self.features.to(device, torch.get_default_dtype())
        return dataclasses.replace(self, **moved)


def build_graph(
    edges: Tensor,
    num_nodes: int | None = None,
    features: Tensor | SparseFeatures | None = None,
    labels: Tensor | None = None,
    num_classes: int | None = None,
    name: str = "graph",
    **splits: Tensor,
) -> Graph:
    """A graph from edges int (2, M) in any order and direction; repeated edges and self-loops are dropped.

    Args:
        num_nodes: default the number of feature rows or labels, else one more than the largest id.
        num_classes: default one more than the largest label.
        splits: train, val, test: int64 node ids.
    Raises:
        ProjectError: an empty graph, an edge that names a missing node or a negative id, features that are not finite,
            or a number of features, labels or split nodes that does not fit.
    """
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ProjectError(f"{name}: edges must be two rows of node ids, got an array of shape {tuple(edges.shape)}")
    if edges.is_floating_point() or edges.dtype == torch.bool:
        raise ProjectError(f"{name}: node ids must be integers, not {edges.dtype}")
    edges = edges.long()
    counted = ""
    if num_nodes is None:
        known = {word: len(part) for word, part in (("features", features), ("labels", labels)) if part is not None}
        counted = next((f": as many as {word}" for word in known), "")
        num_nodes = next(iter(known.values())) if known else int(edges.max()) + 1 if edges.numel() else 0
    if num_nodes < 1:
        raise ProjectError(f"{name}: the graph is empty: no nodes, no edges")
    if edges.numel() and int(edges.min()) < 0:
        raise ProjectError(f"{name}: node id {int(edges.min())} is negative; ids count from 0")
    if edges.numel() and int(edges.max()) >= num_nodes:
        raise ProjectError(
            f"{name}: an edge names node {int(edges.max())}, "
            f"but there are {num_nodes} nodes (0 to {num_nodes - 1}){counted}"
        )
    check_nodes(num_nodes, features, labels, splits, name)
    indptr, indices = to_csr(edges, num_nodes)
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if labels is not None and len(labels) else 0
    return Graph(indptr, indices, features, labels, num_classes, name=name, **splits)


def check_nodes(
    num_nodes: int,
    features: Tensor | SparseFeatures | None,
    labels: Tensor | None,
    splits: dict[str, Tensor],
    name: str,
) -> None:
    """`ProjectError` where what is said of the nodes does not fit their number, or is not finite."""
    for what, part in (("features", features), ("labels", labels)):
        if part is not None and len(part) != num_nodes:
            raise ProjectError(f"{name}: {len(part)} {what} for {num_nodes} nodes; there must be one a node")
    values = features.values if isinstance(features, SparseFeatures) else features
    if values is not None and not bool(torch.isfinite(values).all()):
        rows = features.pattern.rows if isinstance(features, SparseFeatures) else torch.arange(num_nodes)
        broken = ~torch.isfinite(values) if values.ndim == 1 else ~torch.isfinite(values).all(dim=1)
        raise ProjectError(f"{name}: the features of node {int(rows[broken.nonzero()[0, 0]])} hold NaN or infinity")
    if labels is not None and len(labels) and int(labels.min()) < -1:
        raise ProjectError(f"{name}: label {int(labels.min())} is negative; classes count from 0, and -1 means unknown")
    for part, ids in splits.items():
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_nodes:
            raise ProjectError(f"{name}: the {part} split names nodes outside 0 to {num_nodes - 1}")


def to_csr(edges: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Both directions of edges int64 (2, M), sorted, each once, without loops: indptr int64 (N + 1,), indices int32
    (E,).
    """
    u, v = edges[:, edges[0] != edges[1]]
    keys = torch.cat([u * num_nodes + v, v * num_nodes + u]).unique()
    rows = torch.div(keys, num_nodes, rounding_mode="floor")
    indptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=num_nodes), 0, out=indptr[1:])
    return indptr, (keys - rows * num_nodes).int()


def choose_storage(x: Tensor, storage: str = "auto") -> Tensor | SparseFeatures:
    """Features dense or sparse, whichever is asked for or cheaper."""
    if storage == "auto":
        storage = "sparse" if x.count_nonzero() < SPARSE_BELOW * x.numel() else "dense"
    return SparseFeatures.from_dense(x) if storage == "sparse" else x


def normalize_rows(x: Tensor | SparseFeatures) -> Tensor | SparseFeatures:
    """Rows of x (N, F) divided by their sum; rows that sum to zero stay."""
    if isinstance(x, SparseFeatures):
        sums = torch.zeros(x.shape[0]).index_add(0, x.pattern.rows, x.values)
        return x.scale_rows(1 / torch.where(sums == 0, 1.0, sums))
    total = x.sum(dim=1, keepdim=True)
    return x / torch.where(total == 0, 1.0, total)


def are_counts(x: Tensor) -> bool:
    """Whether features could be counts of something: whole numbers, none below zero."""
    return bool((x >= 0).all()) and bool((x == x.floor()).all())
