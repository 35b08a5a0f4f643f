"""What a trained network says, as files for other programs: CSV and npz, with the names that nodes have where they come
from.

Legend: N nodes, K classes, D numbers of an embedding.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from torch import Tensor

from common.files import atomic_open, write_text
from gnn.core.graph import Graph


def write_table(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Columns of equal length as comma-separated values under one header; what is missing stays empty."""
    import pandas as pd  # half a second, which training need not wait for

    text = io.StringIO()
    pd.DataFrame(columns).to_csv(text, index=False, lineterminator="\n", float_format="%.6g")
    write_text(path, text.getvalue())


def class_words(classes: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """What classes int (N,) are called: words, numbers where they have no names, nothing for -1."""
    known = np.array([*(names or map(str, range(int(classes.max(initial=-1)) + 1))), ""], dtype=object)
    return known[classes]


def parts_of(graph: Graph) -> np.ndarray:
    """train, val, test or nothing for each node, (N,)."""
    part = np.full(graph.num_nodes, "", dtype=object)
    for name in ("train", "val", "test"):
        part[getattr(graph, name).cpu().numpy()] = name
    return part


def write_predictions(path: Path, graph: Graph, logits: Tensor) -> None:
    """A line a node: its name, its part of the split, its label, the predicted class of logits (N, K) and how probable
    it is.
    """
    probability, predicted = logits.softmax(dim=1).max(dim=1)
    columns = {"node": graph.names(), "part": parts_of(graph)}
    if graph.labels is not None:
        columns["label"] = class_words(graph.labels.cpu().numpy(), graph.class_names)
    columns["predicted"] = class_words(predicted.cpu().numpy(), graph.class_names)
    columns["probability"] = probability.cpu().numpy()
    write_table(path, columns)


def write_embeddings(path: Path, graph: Graph, embeddings: Tensor) -> None:
    """An npz with `embeddings` float (N, D) and `ids` (N,), what the nodes are called."""
    names = graph.names()
    with atomic_open(path) as file:
        np.savez_compressed(
            file,
            ids=names.astype(str) if names.dtype.kind == "O" else names,
            embeddings=embeddings.cpu().numpy(),
        )
