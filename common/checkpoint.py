"""Checkpoints that are whole or are not used.

A checkpoint is two files: `<step>.pt`, written by `torch.save`, and `<step>.json`, its manifest with the SHA-256 of the
first, written last. A checkpoint without a manifest is an interrupted save; one whose hash differs is damaged. Either
is passed over with one warning and the newest whole one is used. (`torch.load` alone notices hardly any flipped bit: a
zip archive's CRC is not checked when tensors are read.)
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.errors import ProjectError, first_line
from common.files import TEMPORARY, atomic_open, sha256, sync_folder, write_text

UNFIT = (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError)  # what foreign states make us raise


class CheckpointError(ProjectError):
    """A checkpoint is missing, damaged, or does not fit."""


class Checkpoints:
    """The `checkpoints/` folder of one run.

    Args:
        folder: where the files are.
        keep_last: number of newest checkpoints to keep, beside the best one.
        keep_every: also keep every checkpoint whose step is a multiple of this; 0 = none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last = max(1, keep_last)
        self.keep_every = keep_every

    def clean(self) -> None:
        """Delete what an interrupted save left behind. Call it when a run starts, while nobody else writes here."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)

    def save(self, step: int, state: dict[str, Any], best: bool = False) -> Path:
        """Write the state after `step` updates, then delete what is no longer to be kept.

        Args:
            state: nested dicts, lists, numbers, strings and tensors; nothing that needs pickle to rebuild.
            best: whether this is the best checkpoint so far; the newest so marked is kept.
        """
        path = self.path(step)
        if path.exists() and _is_whole(path):  # the same step of a resumed run: the same state
            return path
        with atomic_open(path) as file:
            _manifest(path).unlink(missing_ok=True)  # never an old manifest beside new bytes
            writer = _HashingWriter(file)
            try:
                torch.save(state, writer)  # type: ignore[arg-type]  # it writes and flushes, and needs no more
            except RuntimeError as error:  # torch reports a failed write() in its own words
                raise writer.error or error from None
        manifest = {
            "file": path.name,
            "step": step,
            "bytes": writer.count,
            "sha256": writer.digest.hexdigest(),
            "best": best,
            "torch": torch.__version__,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        try:
            write_text(_manifest(path), json.dumps(manifest | {"manifest_sha256": _digest(manifest)}, indent=2) + "\n")
        except ProjectError:
            path.unlink(missing_ok=True)  # of no use without a manifest, and in the way where the disk is full
            raise
        self._prune(step)
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, or None. One warning for each newer one that is broken."""
        for path in reversed(self.list()):
            try:
                return self.load(path)
            except CheckpointError as error:
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
        return None

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        """Verify a checkpoint against its manifest and read it onto the CPU. `CheckpointError` where it is not
        whole.
        """
        verify(path)
        refuse_compressed(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of rubbish torch's reader raises whatever it comes upon, a KeyError for one
            reason = first_line(error)
            raise CheckpointError(f"checkpoint {path} cannot be read as plain tensors: {reason}") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"checkpoint {path} holds a {type(state).__name__} and no run")
        return state

    def list(self) -> list[Path]:
        """All checkpoint files, oldest first, whole or not."""
        return sorted((p for p in self.folder.glob("*.pt") if p.stem.isdecimal()), key=lambda p: int(p.stem))

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or would be."""
        return self.folder / f"{step:08d}.pt"

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint that has a manifest, without reading it; for messages."""
        steps = [int(p.stem) for p in self.list() if _manifest(p).exists()]
        return steps[-1] if steps else None

    def _prune(self, newest: int) -> None:
        # a later one is broken: the run fell back to before it
        older = [p for p in self.list() if int(p.stem) <= newest]
        whole = [p for p in older if _manifest(p).exists()]
        best = [p for p in whole if _read_manifest(p).get("best")]
        keep = {*whole[-self.keep_last :], *best[-1:]}
        keep |= {p for p in whole if self.keep_every and int(p.stem) % self.keep_every == 0}
        for path in older:
            if path not in keep:
                _manifest(path).unlink(missing_ok=True)  # manifest first: what is left is plainly not whole
                path.unlink(missing_ok=True)
        sync_folder(self.folder)


def load_chosen(folder: Path, name: str) -> dict[str, Any]:
    """The state that a program other than training starts from. `CheckpointError` where there is none.

    Args:
        folder: `checkpoints/` of a run.
        name: what `--checkpoint` says: nothing for the newest whole one, the name of a file in the folder, or a path.
    """
    chosen = Path(name)
    if chosen.name == name:  # a bare name is one of this run's; a path is taken as it stands
        chosen = folder / chosen
    state = Checkpoints.load(chosen) if name else Checkpoints(folder).load_newest()
    if state is None:
        raise CheckpointError(f"no whole checkpoint in {folder}; train first, or give another --run")
    return state


def verify(path: Path) -> None:
    """Check a checkpoint against its manifest; `CheckpointError` says what is wrong."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if not _manifest(path).is_file():
        raise CheckpointError(
            f"checkpoint {path} has no manifest {_manifest(path).name}: its save was interrupted, or it is not ours"
        )
    manifest = _read_manifest(path)
    if manifest.pop("manifest_sha256", None) != _digest(manifest):
        raise CheckpointError(f"manifest {_manifest(path)} is damaged")
    try:
        whole = path.stat().st_size == manifest.get("bytes") and sha256(path) == manifest.get("sha256")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if not whole:
        raise CheckpointError(f"checkpoint {path} is damaged: its content does not match its SHA-256")


def refuse_compressed(path: Path) -> None:
    """`CheckpointError` for an archive that unpacks to more than it is: ours hold plain bytes, a bomb does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return  # what it is instead, `torch.load` will say
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"checkpoint {path} is compressed, which ours never are: {unpacked:,} bytes in it")


def export_weights(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write inference weights as safetensors, atomically, with the SHA-256 of them and of the metadata among the
    metadata.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_open(path) as file:
        file.write(save(plain, metadata | {"sha256": weights_hash(plain, metadata)}))


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights and metadata that `export_weights` wrote. `CheckpointError` for a file that is missing or damaged;
    one without a hash, as others write them, is taken as it is.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {path} cannot be read: {str(error).splitlines()[0]}") from None
    expected = metadata.get("sha256")
    about = {name: text for name, text in metadata.items() if name != "sha256"}
    # the second is of files written before the hash took the metadata in
    if expected not in (None, weights_hash(weights, about), weights_hash(weights)):
        raise CheckpointError(f"weights {path} are damaged: their content does not match their SHA-256")
    return weights, metadata


def weights_hash(weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of the names; and over what is noted beside
    them.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    if metadata:
        digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def _manifest(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_manifest(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


class _HashingWriter:
    """A file for `torch.save` that hashes what passes and remembers the real reason of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.count = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()
