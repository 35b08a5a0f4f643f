"""Graphs from your own files: edge list, features and labels as CSV, text, npy or npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from common.errors import ProjectError
from gnn.config import DataConfig
from gnn.core.graph import Graph, build_graph


def from_files(data: DataConfig, root: Path) -> Graph:
    """Your own edge list, features and labels: CSV or whitespace-separated text (lines that begin with # are
    comments), or npz.
    """
    edges = read_array(root / data.edges, "edges", np.int64)
    if edges.ndim != 2 or 2 not in edges.shape:
        raise ProjectError(
            f"{root / data.edges}: an edge list has two columns of node ids, this has the shape {edges.shape}"
        )
    edges = edges.T if edges.shape[1] == 2 else edges  # (2, M)
    features = read_array(root / data.features, "features", np.float32) if data.features else None
    labels = read_array(root / data.labels, "labels", np.int64).reshape(-1) if data.labels else None
    return build_graph(
        torch.from_numpy(np.ascontiguousarray(edges)),
        None,
        None if features is None else torch.from_numpy(np.atleast_2d(features)),
        None if labels is None else torch.from_numpy(labels),
        name=Path(data.edges).stem,
    )


def read_array(path: Path, key: str, dtype: type) -> np.ndarray:
    """A table of numbers from an npz (array `key`), npy, CSV or text file. `ProjectError` naming the file and the
    line or array.
    """
    if not path.is_file():
        raise ProjectError(f"{path}: no such file; data.{key} is relative to data_root")
    try:
        if path.suffix in (".npz", ".npy"):
            loaded = np.load(path, allow_pickle=False)
            if path.suffix == ".npz" and key not in loaded:
                raise ProjectError(f"{path}: has no array `{key}`, only {', '.join(loaded.files)}")
            array = loaded[key] if path.suffix == ".npz" else loaded
            if dtype is np.int64 and not np.issubdtype(array.dtype, np.integer):
                raise ProjectError(f"{path}: `{key}` must be integers, not {array.dtype}")
            return np.asarray(array, dtype=dtype)
        with path.open(encoding="utf-8") as file:
            first = next((line for line in file if line.strip() and not line.startswith("#")), "")
        return np.loadtxt(
            path, dtype=dtype, delimiter="," if "," in first else None, comments="#", ndmin=1 if key == "labels" else 2
        )
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ProjectError(f"{path}: {str(error).splitlines()[0]}") from None
