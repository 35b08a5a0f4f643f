"""Published weights from where they lie: files of every kind, folders, the Hub's cache; and what is said otherwise."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clip.model import CLIP
from clip.model.pretrained import build, find_weights, from_pretrained, read_activation
from common.errors import ProjectError

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 9, "vocab_size": 30, "width": 64, "heads": 1, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return open_clip.model.CLIP(16, VIT, TEXT).state_dict()


def embed(model: CLIP) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(torch.randn(3, 3, 32, 32), torch.tensor([[3, 4, 29, 0], [5, 29, 0, 0], [1, 2, 3, 29]]))
    return output.image, output.text


def save(state: dict[str, Tensor], path: Path) -> Path:
    """In the format that the name says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


class Archive(nn.Module):
    """A module that holds nothing but the tensors of a state dict."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if not rest:
                self.register_buffer(first, tensor)
            elif not hasattr(self, first):
                below = {n.partition(".")[2]: t for n, t in state.items() if n.startswith(first + ".")}
                setattr(self, first, Archive(below))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_files_of_every_kind(state, tmp_path) -> None:
    expected = embed(build(state, "gelu"))
    for name in ("a.safetensors", "b.bin", "c.pt"):
        torch.testing.assert_close(embed(from_pretrained(str(save(state, tmp_path / name)), "gelu")), expected)
    # what OpenCLIP writes in training, with several processes
    checkpoint = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    torch.testing.assert_close(embed(from_pretrained(str(tmp_path / "epoch_3.pt"), "gelu")), expected)


def test_openai_archives_are_read_and_use_quick_gelu(state, tmp_path) -> None:
    """Half precision, TorchScript, and three numbers that are no weights."""
    half = {name: tensor.half() for name, tensor in state.items()}
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(9), "vocab_size": torch.tensor(30)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and the files that it wrote are still read
        archive = torch.jit.script(Archive(half | sizes))
    archive.save(str(tmp_path / "ViT.pt"))
    model = from_pretrained(str(tmp_path / "ViT.pt"))
    assert model.config.image.activation == model.config.text.activation == "quick_gelu"
    assert not model.training and model.log_scale.dtype == torch.float32
    torch.testing.assert_close(embed(model), embed(build(half, "quick_gelu")))
    different = embed(build(half, "gelu"))
    assert not torch.allclose(embed(model)[0], different[0], atol=1e-4)


@pytest.mark.parametrize(
    ("file", "facts", "expected"),
    [
        ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, "quick_gelu"),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, "gelu"),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "gelu"),
        ("config.json", {"vision_config": {}}, "quick_gelu"),
        ("config.json", {"vision_config": {"hidden_act": "gelu_pytorch_tanh"}}, "gelu_tanh"),
    ],
)
def test_the_config_beside_the_weights_says_the_activation(state, tmp_path, file, facts, expected) -> None:
    save(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / file).write_text(json.dumps(facts))
    assert from_pretrained(str(tmp_path)).config.image.activation == expected


def test_an_activation_that_nobody_knows_is_refused(state, tmp_path) -> None:
    path = save(state, tmp_path / "weights.safetensors")
    with pytest.raises(ProjectError, match=r"nothing beside .* says whether it was trained with QuickGELU"):
        from_pretrained(str(path))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vision_config": {"hidden_act": "swish"}}))
    with pytest.raises(ProjectError, match="the activation swish is not known"):
        read_activation(config, False, path)


def test_a_folder_of_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 30, "eos_token_id": 29}
    vision = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    more = {"intermediate_size": 96}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text | more, vision_config=vision | more, projection_dim=16)
    peer = transformers.CLIPModel(config).eval()
    peer.save_pretrained(tmp_path)
    model = from_pretrained(str(tmp_path))
    assert model.config.image.activation == "quick_gelu" and model.config.image.mlp_ratio == 0.75
    torch.manual_seed(1)
    images, ids = torch.randn(3, 3, 32, 32), torch.tensor([[3, 4, 29, 0], [5, 29, 0, 0], [1, 2, 3, 29]])
    with torch.no_grad():
        output, expected = model(images, ids), peer(pixel_values=images, input_ids=ids)
    torch.testing.assert_close(output.image, expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.text, expected.text_embeds, atol=1e-5, rtol=1e-5)


def test_the_hub(state, tmp_path, monkeypatch) -> None:
    """The first file of the list that the repository has; whatever the Hub cannot give is one line."""
    import huggingface_hub

    save(state, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))

    asked: list[str] = []
    reachable = True

    def download(repository: str, name: str, local_files_only: bool) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        asked.append(name)
        if not reachable:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        if repository != "laion/CLIP" or not (tmp_path / name).is_file():
            raise OSError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights("laion/CLIP")[0].name == "open_clip_pytorch_model.bin"
    assert from_pretrained("laion/CLIP").config.image.activation == "gelu"
    with pytest.raises(ProjectError, match="no weights other/CLIP: neither"):
        from_pretrained("other/CLIP")
    # a Hub that does not answer is asked once, for each time the library waits half a minute
    reachable = False
    asked.clear()
    with pytest.raises(ProjectError, match=r"download https://huggingface\.co/laion/CLIP to a folder"):
        from_pretrained("laion/CLIP")
    assert len(asked) == 1


def test_what_the_cache_has_needs_no_network(state, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    save(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch32_clip_224"}))  # timm's

    def cached(repository: str, name: str, local_files_only: bool) -> str:
        if not (tmp_path / name).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError("neither in the cache nor to be reached")
        assert local_files_only
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert find_weights("laion/CLIP") == (tmp_path / "model.safetensors", tmp_path / "config.json")
    # the config that the cache happens to have says nothing of the activation, and nothing is made up
    with pytest.raises(ProjectError, match="says whether it was trained with QuickGELU"):
        from_pretrained("laion/CLIP")


def test_what_is_no_clip_is_refused_in_one_line(state, tmp_path) -> None:
    with pytest.raises(ProjectError, match="no weights nowhere: neither a file nor a folder"):
        from_pretrained("nowhere")
    with pytest.raises(ProjectError, match="holds none of open_clip_model"):
        from_pretrained(str(tmp_path))
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"not weights")
    with pytest.raises(ProjectError, match=r"damaged\.pt cannot be read"):
        from_pretrained(str(damaged), "gelu")
    missing = {name: tensor for name, tensor in state.items() if "ln_post.bias" not in name}
    for other in (missing, state | {"extra.weight": torch.zeros(3)}, {"conv.weight": torch.zeros(3)}, {}):
        path = save(other, tmp_path / "other.pt")
        with pytest.raises(ProjectError, match=r"other\.pt do not hold a CLIP that is known here"):
            from_pretrained(str(path), "gelu")


def test_pickled_code_is_not_run(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ProjectError, match="cannot be read"):
        from_pretrained(str(tmp_path / "trap.pt"), "gelu")
    assert not (tmp_path / "run").exists()


def test_a_sigmoid_model_keeps_its_bias(state) -> None:
    model = build(state | {"logit_bias": torch.tensor([-9.5])}, "gelu")
    assert model.config.loss == "sigmoid" and model.bias.item() == -9.5
