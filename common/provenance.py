"""What made a result: hashes of the settings and the weights, kept with every output, so that none is taken for
another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from common.config import FREE_KEYS, UNREADABLE, UNUSABLE, BaseConfig, flatten, to_yaml
from common.errors import ProjectError
from common.files import sha256, visible


def config_hash(config: BaseConfig) -> str:
    """SHA-256 over the settings that decide a result: all but folders, devices, and what is kept or shown."""
    settings = {key: value for key, value in flatten(config).items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def made_by(config: BaseConfig, weights: Iterable[str]) -> dict[str, str]:
    """`config_sha256` and `weights_sha256` for an output: of the config, and of the hashes of all weights that it
    speaks of; of a single one, its own.
    """
    each = list(weights)
    joined = each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()
    return {"config_sha256": config_hash(config), "weights_sha256": joined}


def trained_otherwise(noted: str, config: BaseConfig, only: tuple[str, ...] = ("",), free: tuple[str, ...] = ()) -> str:
    """What a config that is noted beside weights says otherwise than `config`: `trained with model.groups=4, not 8`,
    of the first such setting; empty where they agree.

    Args:
        noted: YAML text, as `to_yaml` writes it; a setting that it does not have is passed over. Text that is none of
            that says nothing of how anything was trained, which is a difference, too.
        only, free: how the names of settings begin that are compared, and of those among them that may differ.
    """
    try:
        before = OmegaConf.create(noted)
    except (*UNUSABLE, *UNREADABLE):
        before = None
    if not isinstance(before, DictConfig):
        return "trained with settings that cannot be read"
    now = OmegaConf.create(to_yaml(config))
    for key in flatten(config):
        old = OmegaConf.select(before, key)
        new = OmegaConf.select(now, key)
        if old is not None and old != new and key.startswith(only) and not key.startswith(free):
            return f"trained with {key}={old}, not {new}"
    return ""


def discard(folder: Path, patterns: Iterable[str]) -> None:
    """Delete what an earlier evaluation left in a run folder: it speaks of other weights or settings."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                path.unlink()
            except OSError as error:
                raise ProjectError(f"cannot replace {path}: {error.strerror}") from None


def output_hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """File -> SHA-256 of the outputs that are there, for `eval.json`: a table of numbers has no room for it itself."""
    paths = [path for pattern in patterns for path in visible(folder, pattern)]
    return {str(path.relative_to(folder)): sha256(path) for path in paths}
