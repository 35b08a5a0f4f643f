"""Graphs from your own files: edges, and if there are any features, labels and splits.

Nodes are what the files call them. Ids may be words or any integers; inside they are numbered 0 to N - 1, and
`Graph.ids` keeps the original ones, which is what predictions are written with. Whatever was decided on the way (gaps
in the ids, ids that count from 1, missing labels ...) is a line in `Graph.notes`.

Legend: N nodes, M lines of an edge list, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ProjectError
from common.files import place_of
from gnn.config import DataConfig
from gnn.core.graph import Graph, build_graph
from gnn.core.sparse import Pattern, SparseFeatures
from gnn.data.tables import ID_NAMES, as_table, read_file

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Features = NDArray[np.float32] | sp.csr_array


class Known(NamedTuple):
    """Something said of nodes: a value for each of `ids`, or for nodes 0, 1, ... where ids is None."""

    ids: np.ndarray | None
    values: np.ndarray | sp.csr_array

    def __len__(self) -> int:  # of values; a NamedTuple would count its fields
        return self.values.shape[0]


class Numbering(NamedTuple):
    """What the nodes are called: `ids` (N,) ascending, so that node i is called ids[i]."""

    ids: np.ndarray

    def of(self, ids: np.ndarray, path: Path) -> NDArray[np.int64]:
        """The numbers of nodes that are called so. `ProjectError` for an unknown name."""
        if self.ids.dtype.kind == "O":
            ids = words(ids)
        elif ids.dtype.kind == "O":
            raise ProjectError(f"{path}: there is no node {ids[0]}; the other files call nodes by integers")
        place = np.searchsorted(self.ids, ids)
        inside = np.minimum(place, len(self.ids) - 1)
        unknown = np.flatnonzero(self.ids[inside] != ids)
        if len(unknown):
            raise ProjectError(f"{path}: there is no node {ids[unknown[0]]} ({len(unknown)} such lines)")
        return inside.astype(np.int64)


def from_files(data: DataConfig, root: Path) -> Graph:
    """The graph that data.edges, data.features, data.labels and data.splits describe.

    Raises:
        ProjectError: a file that cannot be read, or that does not fit the others; names the file and the remedy.
    """
    place = {
        key: place_of(getattr(data, key), root)
        for key in ("edges", "features", "labels", "splits")
        if getattr(data, key)
    }
    notes: list[str] = []
    edges, size = read_edges(place["edges"], data.weights, notes)
    features = read_features(place["features"]) if "features" in place else None
    labels = read_labels(place["labels"]) if "labels" in place else None
    rows = next((known for known in (features, labels) if known is not None and known.ids is None), None)
    if rows is not None:
        numbering = number_rows(edges, len(rows), place, notes)
    else:
        known_ids = [known.ids for known in (features, labels) if known is not None and known.ids is not None]
        numbering = number_names(edges, known_ids, size, notes)
    count = len(numbering.ids)
    numbers = torch.from_numpy(np.stack([numbering.of(end, place["edges"]) for end in edges]))
    say_edges(numbers, notes)
    classes: list[str] = []
    graph = build_graph(
        numbers,
        count,
        None if features is None else place_features(features, numbering, count, place["features"]),
        None if labels is None else place_labels(labels, numbering, count, place["labels"], classes, notes),
        name=place["edges"].name.split(".")[0],
        **(read_splits(place["splits"], numbering) if "splits" in place else {}),
    )
    plain = numbering.ids.dtype.kind == "i" and bool((numbering.ids == np.arange(count)).all())
    return graph.described(None if plain else numbering.ids, tuple(classes), notes)


# -- edges -------------------------------------------------------------------------------------------------------------


def read_edges(path: Path, weights: str, notes: list[str]) -> tuple[np.ndarray, int]:
    """Ids of the two ends of each edge (2, M), integers or words; and N where the file says it, as a matrix does, else
    0.
    """
    content = read_file(path, ("edges", "edge_index"))
    if sp.issparse(content):
        if content.shape[0] != content.shape[1]:
            raise ProjectError(f"{path}: an adjacency matrix is square, this one is {content.shape}")
        check_weights(path, content.data, weights, notes)
        return np.stack([content.row, content.col]).astype(np.int64), content.shape[0]
    if isinstance(content, np.ndarray) and content.dtype.kind == "f":
        raise ProjectError(f"{path}: `edges` must be integers, not {content.dtype}")
    if isinstance(content, np.ndarray) and content.ndim == 2 and content.shape[0] == 2 != content.shape[1]:
        content = content.T
    table = as_table(content)
    if table is None or not len(table.columns) >= 2:
        shape = content.shape if isinstance(content, np.ndarray) else f"{len(table.columns)} column"
        raise ProjectError(f"{path}: an edge list has two columns of node ids, this has the shape {shape}")
    rest = table.columns[2:]
    if rest and str(rest[0][0]).startswith("{"):  # attributes as networkx writes them
        values = np.array([" ".join(map(str, line)) for line in zip(*rest)])
        check_weights(path, values, weights, notes)
    elif len(rest) == 1:
        check_weights(path, rest[0], weights, notes)
    elif rest:
        raise ProjectError(
            f"{path}: an edge list has two columns of node ids and perhaps one of weights, this has "
            f"{len(table.columns)} columns"
        )
    ends = [as_ids(column, path) for column in table.columns[:2]]
    if any(end.dtype.kind == "O" for end in ends):
        ends = [words(end) for end in ends]
    return np.stack(ends), 0


def check_weights(path: Path, values: np.ndarray, weights: str, notes: list[str]) -> None:
    """Edges here have no weights: equal ones say nothing, others are left out only if the config says so."""
    if len(values) == 0 or bool((values == values[0]).all()):
        return
    if weights == "refuse":
        raise ProjectError(
            f"{path}: an edge list has two columns of node ids; the third is taken for weights, and the networks here "
            "use none: data.weights=ignore reads them as plain edges"
        )
    notes.append(f"{path.name}: the weights of the edges are not used")


def as_ids(column: np.ndarray, path: Path) -> np.ndarray:
    """Ids as int64, or as words. `ProjectError` for an empty one or a fraction."""
    if column.dtype.kind in "iu":
        if column.dtype.kind == "u" and len(column) and column.max() > np.iinfo(np.int64).max:
            return words(column)
        return column.astype(np.int64)
    if column.dtype.kind == "f":
        if not np.isfinite(column).all():
            raise ProjectError(f"{path}: line {int(np.flatnonzero(~np.isfinite(column))[0]) + 1} lacks a node id")
        if (column != np.floor(column)).any():
            raise ProjectError(f"{path}: node ids must be integers or words, found {column[column % 1 != 0][0]}")
        return column.astype(np.int64)
    if column.dtype.kind == "b":
        raise ProjectError(f"{path}: node ids must be integers or words, not {column.dtype}")
    missing = np.flatnonzero([not isinstance(item, str | int) for item in column.tolist()])
    if len(missing):
        raise ProjectError(f"{path}: line {int(missing[0]) + 1} lacks a node id")
    return words(column)


def words(ids: np.ndarray) -> np.ndarray:
    """Ids as an array of str objects."""
    return np.array([str(item).strip() for item in ids.tolist()], dtype=object)


def number_rows(edges: np.ndarray, count: int, place: dict[str, Path], notes: list[str]) -> Numbering:
    """The numbering where features or labels have a row for each node and no ids: row i is node i, or node i + 1."""
    if edges.dtype.kind == "O":
        raise ProjectError(
            f"{place['edges']}: nodes are called by words here, so features and labels must say which node a line is "
            f"of: labels as two columns (id, class), features with a first column of ids, headed {ID_NAMES[0]}"
        )
    if edges.size and edges.min() == 1 and edges.max() == count:
        notes.append(f"node ids count from 1 to {count}: the first row of features or labels is that of node 1")
        return Numbering(np.arange(1, count + 1))
    if edges.size and (edges.min() < 0 or edges.max() >= count):
        worst = int(edges.min()) if edges.min() < 0 else int(edges.max())
        rows = "features" if "features" in place else "labels"
        raise ProjectError(
            f"{place['edges']}: an edge names node {worst}, but there are {count} nodes (0 to {count - 1}): as many as "
            f"{rows}; other ids need a column of ids in {rows}"
            if worst >= 0
            else f"{place['edges']}: node id {worst} is negative; ids count from 0"
        )
    return Numbering(np.arange(count))


def number_names(edges: np.ndarray, known: list[np.ndarray], size: int, notes: list[str]) -> Numbering:
    """The numbering where every line says which node it is of: the ids in ascending order."""
    ids = [edges.ravel(), *known]
    if any(part.dtype.kind == "O" for part in ids):
        ids = [words(part) for part in ids]
    every = np.unique(np.concatenate(ids))
    if every.dtype.kind == "O":
        notes.append(f"nodes are called by words: {len(every):,} nodes, numbered in alphabetical order")
        return Numbering(every)
    if size and len(every) and every[0] >= 0 and every[-1] < size:
        return Numbering(np.arange(size))  # a matrix also knows the nodes without edges
    if len(every) and every[0] < 0:
        raise ProjectError(f"node id {int(every[0])} is negative; ids count from 0")
    if len(every) and every[-1] != len(every) - 1:
        gaps = "" if every[-1] - every[0] == len(every) - 1 else " with gaps"
        notes.append(
            f"node ids run from {every[0]} to {every[-1]}{gaps}: {len(every):,} nodes, numbered in ascending order"
        )
    return Numbering(every)


def say_edges(numbers: Tensor, notes: list[str]) -> None:
    """Note what becomes of loops and of the directions of edges."""
    u, v = numbers
    loops = int((u == v).sum())
    if loops:
        notes.append(f"{loops:,} edges from a node to itself are left out")
    size = int(numbers.max()) + 1 if numbers.numel() else 1
    there = (u * size + v)[u != v].unique()
    back = torch.remainder(there, size) * size + torch.div(there, size, rounding_mode="floor")
    mirrored = int(torch.isin(back, there).sum())
    if 0 < mirrored < len(there):
        notes.append(
            f"{len(there) - mirrored:,} of {len(there):,} edges are listed in one direction only: all are read as "
            "undirected"
        )


# -- what is said of the nodes -----------------------------------------------------------------------------------------


def read_features(path: Path) -> Known:
    """Features (N, F) float32, dense or sparse, with ids where the first column holds some."""
    content = read_file(path, ("features", "x"))
    if sp.issparse(content):
        return Known(None, sp.csr_array(content, dtype=np.float32))
    table = as_table(content)
    if table is None:
        raise ProjectError(f"{path}: features have a row a node and a column a feature, this has {content.shape}")
    columns = table.columns
    ids = None
    named = bool(table.names) and table.names[0].lower() in ID_NAMES
    if len(columns) > 1 and (named or columns[0].dtype.kind not in "iufb"):
        ids = as_ids(columns[0], path)
        columns = columns[1:]
    for number, column in enumerate(columns, 1):
        if column.dtype.kind not in "iufb":
            raise ProjectError(f"{path}: column {number} of the features holds words; they must be numbers")
    return Known(ids, np.stack(columns, axis=1).astype(np.float32))


def read_labels(path: Path) -> Known:
    """Classes, numbers or words, (N,): one column in the order of the nodes, or two, (id, class)."""
    content = read_file(path, ("labels", "y"))
    table = as_table(content)
    if table is None or len(table.columns) not in (1, 2):
        shape = content.shape if table is None else f"{len(table.columns)} columns"
        raise ProjectError(
            f"{path}: labels are one column (a class a line, in the order of the nodes) or two (id, class); this has "
            f"{shape}"
        )
    if len(table.columns) == 1:
        return Known(None, table.columns[0])
    return Known(as_ids(table.columns[0], path), table.columns[1])


def spread(known: Known, what: str, numbering: Numbering, count: int, path: Path) -> NDArray[np.int64]:
    """The node of each row. `ProjectError` where there are not as many rows as nodes, or a node has two."""
    if known.ids is None:
        if len(known) != count:
            raise ProjectError(f"{path}: {len(known)} {what} for {count} nodes; there must be one a node")
        return np.arange(count)
    nodes = numbering.of(known.ids, path)
    twice = np.flatnonzero(np.bincount(nodes, minlength=count) > 1)
    if len(twice):
        raise ProjectError(f"{path}: node {numbering.ids[twice[0]]} has more than one line")
    return nodes


def place_features(known: Known, numbering: Numbering, count: int, path: Path) -> Tensor | SparseFeatures:
    """Features in the order of the nodes."""
    nodes = spread(known, "features", numbering, count, path)
    if len(nodes) < count:
        lacking = np.setdiff1d(np.arange(count), nodes)
        raise ProjectError(f"{path}: {len(lacking)} nodes have no features, the first is {numbering.ids[lacking[0]]}")
    order = np.argsort(nodes)
    values = known.values[order]
    if sp.issparse(values):
        values.sum_duplicates()
        pattern = Pattern(torch.from_numpy(values.indptr).long(), torch.from_numpy(values.indices), values.shape)
        return SparseFeatures(pattern, torch.from_numpy(values.data))
    return torch.from_numpy(np.ascontiguousarray(values))


def place_labels(
    known: Known, numbering: Numbering, count: int, path: Path, classes: list[str], notes: list[str]
) -> Tensor:
    """Class of each node int64 (N,), -1 where it is unknown; names of classes that are not just 0, 1, ... go into
    `classes`.
    """
    nodes = spread(known, "labels", numbering, count, path)
    values = known.values
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), -1.0, values)
        if (values % 1 != 0).any():
            raise ProjectError(f"{path}: labels are classes, not measurements: found {values[values % 1 != 0][0]}")
        values = values.astype(np.int64)
    if values.dtype.kind in "iub":
        values = values.astype(np.int64)
        if len(values) and values.min() < -1:
            raise ProjectError(f"{path}: label {values.min()} is negative; classes count from 0, and -1 means unknown")
        known_class = values >= 0
    else:
        known_class = np.array([isinstance(item, str) for item in values.tolist()])
    names, numbers = np.unique(values[known_class], return_inverse=True)
    if names.dtype.kind != "i" or (names != np.arange(len(names))).any():
        classes.extend(str(name) for name in names)
        notes.append("classes: " + ", ".join(f"{name} = {i}" for i, name in enumerate(classes[:20])))
    labels = np.full(count, -1)
    labels[nodes[known_class]] = numbers
    if (labels < 0).any():
        notes.append(f"{int((labels < 0).sum()):,} of {count:,} nodes have no label")
    return torch.from_numpy(labels)


def read_splits(path: Path, numbering: Numbering) -> dict[str, Tensor]:
    """Nodes for training, validation and testing: two columns (id, part), or an npz with train, val and test, each
    ids or a mask (N,).
    """
    if path.suffix == ".npz":
        found = {part: as_nodes(read_file(path, (part,)), part, numbering, path) for part in ("train", "val", "test")}
    else:
        table = as_table(read_file(path, ("splits",)))
        if table is None or len(table.columns) != 2:
            raise ProjectError(f"{path}: a split is two columns (id, part), part being train, val or test")
        parts = np.array([PARTS.get(str(part).strip().lower(), str(part)) for part in table.columns[1].tolist()])
        unknown = [part for part in np.unique(parts).tolist() if part not in PARTS.values()]
        if unknown:
            raise ProjectError(f"{path}: a part is train, val or test, not {unknown[0]}")
        nodes = numbering.of(as_ids(table.columns[0], path), path)
        found = {part: torch.from_numpy(nodes[parts == part]) for part in ("train", "val", "test")}
    for part, ids in found.items():
        if not len(ids):
            raise ProjectError(f"{path}: no node is in the part {part}")
    every, times = torch.cat(list(found.values())).unique(return_counts=True)
    if int(times.max()) > 1:
        raise ProjectError(f"{path}: node {numbering.ids[int(every[times.argmax()])]} is in two parts, or twice in one")
    return found


def as_nodes(values: object, part: str, numbering: Numbering, path: Path) -> Tensor:
    """Node numbers int64 from ids or from a mask (N,)."""
    if not isinstance(values, np.ndarray) or values.ndim != 1:
        raise ProjectError(f"{path}: `{part}` must be a list of node ids, or true or false for each node")
    if values.dtype.kind == "b":
        if len(values) != len(numbering.ids):
            raise ProjectError(f"{path}: `{part}` says yes or no to {len(values)} of {len(numbering.ids)} nodes")
        return torch.from_numpy(np.flatnonzero(values))
    return torch.from_numpy(numbering.of(as_ids(values, path), path))
