"""Graphs on disk: a folder of plain .npy files and a manifest, opened as memory maps so that a graph may exceed the
memory.

Legend: N nodes, E directed edges, F features.

    manifest.json   format, name, numbers of nodes and classes; shape and dtype of every array
    indptr.npy      int64 (N + 1,)      indices.npy   int32 (E,)
    features.npy    float32 (N, F)      labels.npy    int64 (N,)      train.npy, val.npy, test.npy   int64

Only .npy is read, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import ProjectError
from common.files import write_json

FORMAT = 1
ARRAYS = {
    "indptr": "int64",
    "indices": "int32",
    "features": "float32",
    "labels": "int64",
    "train": "int64",
    "val": "int64",
    "test": "int64",
}
NEEDED = ("indptr", "indices")


def save_arrays(folder: Path, arrays: Mapping[str, NDArray], name: str = "graph", num_classes: int = 0) -> None:
    """Write a graph's arrays to `folder`, the manifest last: a folder without one is unfinished.

    Raises:
        ValueError: an unknown name, or an array of another dtype than the module's table says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.json"
    manifest.unlink(missing_ok=True)
    if missing := [key for key in NEEDED if key not in arrays]:
        raise ValueError(f"a graph needs {' and '.join(missing)}")
    about: dict[str, object] = {}
    for key, array in arrays.items():
        if ARRAYS.get(key) != str(array.dtype):
            raise ValueError(f"{key}: {array.dtype} cannot be stored; a graph has {ARRAYS}")
        np.save(folder / f"{key}.npy", array, allow_pickle=False)
        about[key] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    text = {
        "format": FORMAT,
        "name": name,
        "num_nodes": len(arrays["indptr"]) - 1,
        "num_classes": num_classes,
        "arrays": about,
    }
    write_json(manifest, text)


def open_arrays(folder: Path, in_memory: bool = False) -> tuple[dict[str, NDArray], dict[str, object]]:
    """The arrays of `folder` and its manifest. Memory maps are copy-on-write: writing to one changes no file.

    Raises:
        ProjectError: no finished graph there, or a file that does not match the manifest; the message says which.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = manifest["arrays"]
        if manifest["format"] != FORMAT or not set(NEEDED) <= set(listed) <= set(ARRAYS):
            raise ProjectError(
                f"{path}: not a graph of format {FORMAT}; write it again with gnn.data.storage.save_arrays"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProjectError(
            f"{path}: no graph here, or an unfinished one; write it with gnn.data.storage.save_arrays ({error})"
        ) from None
    arrays = {}
    for key, about in listed.items():
        file = folder / f"{key}.npy"
        try:
            array = np.load(file, mmap_mode=None if in_memory else "c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ProjectError(f"{file} cannot be read: {error}") from None
        if list(array.shape) != about["shape"] or str(array.dtype) != ARRAYS[key]:
            raise ProjectError(
                f"{file} is {array.dtype} {array.shape}, but the manifest says {about['dtype']} {about['shape']}"
            )
        arrays[key] = array.view(np.ndarray)  # compiled loops and PyTorch take a plain array over the same pages
    if arrays["indptr"][0] != 0 or arrays["indptr"][-1] != len(arrays["indices"]):
        raise ProjectError(f"{folder}: indptr does not span indices; the files are of different graphs")
    return arrays, manifest
