"""Tables as people have them: text with any usual separator, headers and comments, packed or not; arrays of NumPy;
sparse matrices of SciPy and MatrixMarket. What they mean is decided in files.py.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import scipy.sparse as sp

from common.errors import ProjectError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMMENTS = ("#", "%")
ID_NAMES = ("id", "ids", "node", "nodes", "node_id", "nodeid", "name", "vertex")
HEADER_NAMES = {
    *ID_NAMES,
    *("source", "target", "src", "dst", "from", "to", "u", "v", "weight"),
    *("label", "labels", "class", "y", "split", "part", "set"),
}
MISSING = ("", "nan", "NaN", "NA", "N/A", "?", "null", "None", "none")
DAMAGED = (ValueError, OSError, EOFError, KeyError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class Table(NamedTuple):
    """Columns of equal length, each of integers, floating-point numbers or words; and their names, if it has any."""

    columns: list[np.ndarray]
    names: tuple[str, ...] = ()


def read_file(path: Path, keys: tuple[str, ...]) -> Table | np.ndarray | sp.coo_array:
    """What a file holds, by its ending: .npz (one of the arrays `keys`, or a sparse matrix of SciPy), .npy, .mtx, or a
    table of text.

    Raises:
        ProjectError: missing, empty, cut short or damaged; names the file and what is wrong with it.
    """
    if not path.is_file():
        raise ProjectError(f"{path}: no such file; data.{keys[0]} is relative to data_root")
    try:
        if path.suffix == ".npz":
            return _from_npz(path, keys)
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if ".mtx" in path.suffixes:
            from scipy.io import mmread

            return sp.coo_array(mmread(path))
        return _from_text(path)
    except ProjectError:
        raise
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProjectError(f"{path}: cannot be read: empty, cut short or of another kind ({reason})") from None


def _from_npz(path: Path, keys: tuple[str, ...]) -> np.ndarray | sp.coo_array:
    with np.load(path, allow_pickle=False) as loaded:
        found = next((key for key in keys if key in loaded), None)
        if found is not None:
            return loaded[found]
        if "format" not in loaded:
            raise ProjectError(f"{path}: has no array `{keys[0]}`, only {', '.join(loaded.files) or 'nothing'}")
    return sp.coo_array(sp.load_npz(path))


def _open(path: Path) -> TextIO:
    """Text, unpacked, without a byte order mark."""
    opener = OPENERS.get(path.suffix)
    if opener is None:
        return path.open(encoding="utf-8-sig")
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8-sig")


def _data_lines(file: TextIO) -> Iterator[str]:
    """Lines that are neither empty nor comments."""
    for line in file:
        if line.strip() and not line.startswith(COMMENTS):
            yield line.strip()


def _from_text(path: Path) -> Table:
    import pandas as pd

    with _open(path) as file:
        lines = _data_lines(file)
        first = next(lines, "")
        second = next(lines, "")
    if not first:
        raise ProjectError(f"{path}: is empty")
    separator = next((mark for mark in (",", ";", "\t") if mark in first), None)
    names = tuple(_fields(first, separator))
    header = _is_header(names, _fields(second, separator))
    with _open(path) as file:
        frame = pd.read_csv(
            io.StringIO("\n".join(_data_lines(file))),
            sep=separator or r"\s+",
            header=0 if header else None,
            keep_default_na=False,
            na_values=list(MISSING),
            skipinitialspace=True,
            index_col=False,
            low_memory=False,
        )
    return Table([frame[name].to_numpy() for name in frame.columns], names if header else ())


def _fields(line: str, separator: str | None) -> list[str]:
    return [field.strip().strip('"') for field in line.split(separator)]


def _is_header(first: tuple[str, ...], second: list[str]) -> bool:
    """Whether the first line names the columns: words where the second has numbers, or names that columns usually
    have.
    """
    if any(not _is_number(a) and _is_number(b) for a, b in zip(first, second)):
        return True
    return all(field.lower() in HEADER_NAMES for field in first)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def as_table(content: Any) -> Table | None:
    """An array of one or two dimensions as a table of its columns; None for everything else."""
    if isinstance(content, Table):
        return content
    if isinstance(content, np.ndarray) and content.ndim == 1:
        return Table([content])
    if isinstance(content, np.ndarray) and content.ndim == 2:
        return Table(list(content.T))
    return None
