"""Files of codes: what an autoencoder makes of images, for another program to learn from or to decode.

An npz archive without pickled objects. Only `codes` must be there:

    codes          float (N, Z)      means of q(z | x), not scaled
    log_variances  float (N, Z)      of q(z | x), where it is one normal distribution
    labels         int (N,)          numbers of `class_names`, text (K,)
    names          text (N,)         the images' files, or index, int (N,), their numbers in the dataset
    scale          float ()          1 / standard deviation of all codes of the training images
    facts          text ()           JSON: which weights made them, of which images

Legend: N images, Z numbers a code, K classes.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ProjectError

NAMES = ("codes", "log_variances", "labels", "class_names", "names", "index", "scale", "facts")


@dataclass(frozen=True)
class Latents:
    """The content of a file; see above. What is not in it is None, or empty."""

    codes: Tensor
    log_variances: Tensor | None = None
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    index: Tensor | None = None
    scale: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.codes)


def read_latents(path: Path) -> Latents:
    """Codes from a file, checked. `ProjectError` says in one line what is wrong with it."""
    arrays = read_arrays(path)
    if "codes" not in arrays:
        raise ProjectError(f"{path} has no array `codes`; give a file that vae.encode has written")
    codes = numbers(path, arrays, "codes", 2)
    if not codes.numel():
        raise ProjectError(f"{path}: codes must be (N, Z) with at least one of each, not {tuple(codes.shape)}")
    count = len(codes)
    log_variances = numbers(path, arrays, "log_variances", 2) if "log_variances" in arrays else None
    if log_variances is not None and log_variances.shape != codes.shape:
        raise ProjectError(f"{path}: log_variances are {tuple(log_variances.shape)}, codes {tuple(codes.shape)}")
    class_names = tuple(map(str, arrays.get("class_names", np.array([])).tolist()))
    labels = integers(path, arrays, "labels", count)
    if labels is not None and not (class_names and 0 <= int(labels.min()) <= int(labels.max()) < len(class_names)):
        raise ProjectError(f"{path}: labels must be numbers of the {len(class_names)} class_names")
    names = tuple(map(str, arrays.get("names", np.array([])).tolist()))
    if names and len(names) != count:
        raise ProjectError(f"{path}: {len(names)} names for {count} codes")
    scale = float(numbers(path, arrays, "scale", 0)) if "scale" in arrays else None
    if scale is not None and scale <= 0:
        raise ProjectError(f"{path}: scale must be positive, not {scale}")
    try:
        facts = json.loads(str(arrays["facts"])) if "facts" in arrays else {}
    except ValueError:
        raise ProjectError(f"{path}: facts are not JSON") from None
    return Latents(
        codes,
        log_variances,
        labels,
        class_names if labels is not None else (),
        names,
        integers(path, arrays, "index", count),
        scale,
        facts if isinstance(facts, dict) else {},
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive that have one of our names."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ProjectError(f"{path} is one array; give an npz archive with an array `codes`")
        with file:
            return {name: file[name] for name in NAMES if name in file.files}
    except FileNotFoundError:
        raise ProjectError(f"no such file: {path}; vae.encode writes such files") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ProjectError(f"{path} cannot be read as an npz archive: {str(error).splitlines()[0]}") from None


def numbers(path: Path, arrays: dict[str, np.ndarray], name: str, dimensions: int) -> Tensor:
    """A floating-point array, in float32 and finite."""
    values = arrays[name]
    if values.ndim != dimensions or values.dtype.kind not in "fiu":
        raise ProjectError(
            f"{path}: {name} must be numbers in {dimensions} dimensions, not {values.dtype} {values.shape}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is found below
        found = torch.from_numpy(values.astype(np.float32))
    bad = int((~torch.isfinite(found)).sum())
    if bad:
        raise ProjectError(f"{path}: {bad} of {found.numel()} numbers in {name} are not finite")
    return found


def integers(path: Path, arrays: dict[str, np.ndarray], name: str, count: int) -> Tensor | None:
    """An array of `count` whole numbers; None where it is not there."""
    if name not in arrays:
        return None
    values = arrays[name]
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise ProjectError(f"{path}: {name} must be {count} whole numbers, not {values.dtype} {values.shape}")
    return torch.from_numpy(values.astype(np.int64))
