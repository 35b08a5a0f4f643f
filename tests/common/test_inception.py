"""The Inception network up to mixed_7: equal to torch-fidelity's own features, from whole and from folded weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from common.config import Options
from common.errors import ProjectError
from common.judges import inception
from common.judges.inception import TruncatedInception, layer_names, truncated_weights
from diffusion.config import Config
from diffusion.eval import main as evaluate
from tests.helpers import ROOT, status, tiny, train

DATA = ROOT / "data"

EPS = 0.001  # of the network's batch normalisation


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """torch-fidelity's network with random weights, and the file they are in."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # it cannot be built without loading weights from somewhere
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["768"])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # activations neither die nor explode, and folding has work to do
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.8, 1.6)
            module.bias.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture(scope="module")
def folded(whole, tmp_path_factory):
    """The same weights as TensorFlow's layers: batch normalisation folded into weight and bias."""
    state, tensors = whole[0].state_dict(), {}
    for source, target in layer_names().items():
        scale = state[f"{target}.bn.weight"] / (state[f"{target}.bn.running_var"] + EPS).sqrt()  # (C_out,)
        tensors[f"{source}.weight"] = state[f"{target}.conv.weight"] * scale[:, None, None, None]
        tensors[f"{source}.bias"] = state[f"{target}.bn.bias"] - state[f"{target}.bn.running_mean"] * scale
    path = tmp_path_factory.mktemp("folded") / "layers.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def expected(whole, images):
    """torch-fidelity's 768 features, and what its layer Mixed_6d makes of its first branch on the way there."""
    seen = {}
    hook = whole[0].Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: seen.update(map=y))
    features = whole[0](images)[0]
    hook.remove()
    return features, seen["map"][:, :7].flatten(1)


@pytest.mark.parametrize("kind", ["inception768", "inception_spatial"])
@pytest.mark.parametrize("source", ["whole", "folded"])
def test_features_equal_those_of_torch_fidelity(kind, source, whole, folded, images, expected):
    network = TruncatedInception(whole[1] if source == "whole" else folded, kind)
    features, log_probs = network(images)
    wanted = expected[0] if kind == "inception768" else expected[1]
    assert features.shape == ((2, 768) if kind == "inception768" else (2, 2023)) and log_probs is None
    assert wanted.std() > 1e-2, "features that are all alike would prove nothing"
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_names_are_those_of_the_measures(folded):
    assert TruncatedInception(folded, "inception768").name == "fd_inception768"
    assert TruncatedInception(folded.parent, "inception_spatial").name == "sfid"  # a folder that holds the file will do


def test_every_layer_is_loaded(folded):
    """94 convolutions in the whole network; 64 of them stand before mixed_8."""
    network = TruncatedInception(folded, "inception768")
    convolutions = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == len(layer_names())
    assert {name.removeprefix("layers.").removesuffix(".conv") for name in convolutions} == set(layer_names().values())


def test_bf16_is_close(folded, images):
    exact = TruncatedInception(folded, "inception768")(images)[0]
    rough = TruncatedInception(folded, "inception768", torch.bfloat16)(images)[0]
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.05


def test_grey_images_are_repeated_over_the_channels(folded, images):
    grey = images[:, :1]
    network = TruncatedInception(folded, "inception_spatial")
    torch.testing.assert_close(network(grey)[0], network(grey.repeat(1, 3, 1, 1))[0])


def test_trouble_with_weights(folded, tmp_path, monkeypatch):
    with pytest.raises(ProjectError, match="no Inception weights at"):
        TruncatedInception(tmp_path / "nothing.safetensors", "inception768")
    tensors = dict(inception.load_safetensors(folded))
    tensors.pop("mixed_6_tower_conv_1.bias")
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ProjectError, match=r"lacks the Inception layer Mixed_6d\.branch7x7_2"):
        TruncatedInception(tmp_path / "short.safetensors", "inception768")
    (tmp_path / "damaged.safetensors").write_bytes(folded.read_bytes()[:1000])
    with pytest.raises(ProjectError, match="cannot be read"):
        TruncatedInception(tmp_path / "damaged.safetensors", "inception768")

    def absent():
        raise ProjectError("none")

    monkeypatch.setattr(inception, "inception_weights", absent)
    with pytest.raises(ProjectError, match="inception_fid_2015") as caught:
        truncated_weights(tmp_path, "")
    assert "eval.inception_weights" in str(caught.value) and inception.INCEPTION_URL in str(caught.value)


def test_unknown_extractor_is_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"eval\.more_features: vgg is not one of inception"):
        replace(Config().eval, more_features=("vgg",))


def test_evaluation_reports_each_distance_beside_its_floor(folded, tmp_path):
    run = tmp_path / "run"
    words = ["eval.num_samples=8", "eval.num_reference=8", "eval.manifold_samples=0", "eval.neighbours=0"]
    words += ["eval.features=inception_spatial", "eval.more_features=[inception768]", "sample.steps=2"]
    words += [f"eval.inception_weights={folded}", f"data_root={tmp_path}", "eval.feature_precision=bf16"]
    config = tiny(run, "train.steps=2", *words)
    assert train(config) == 0
    assert status(evaluate, config, Options("eval")) == 0
    metrics = json.loads((run / "eval.json").read_text())["metrics"]
    assert set(metrics) == {"sfid", "fd_floor", "fd_inception768", "fd_inception768_floor"}
    assert all(value >= 0 for value in metrics.values())


@pytest.mark.skipif(not (DATA / "inception_fid_2015").is_dir(), reason="no Inception weights under data/")
def test_real_weights_tell_images_from_noise():
    """With the published weights, photographs are nearer to each other than to the same pixels in another order."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    crops = torch.stack(
        [photo[:, y : y + 96, x : x + 96] for photo in photographs for y in (60, 200) for x in (50, 300)]
    )
    noise = crops.flatten(2)[:, :, torch.randperm(96 * 96, generator=torch.Generator().manual_seed(0))].view_as(crops)
    network = TruncatedInception(truncated_weights(DATA, ""), "inception768")
    real, shuffled = network(crops)[0], network(noise)[0]  # (8, 768) each
    within = (real[::2].mean(0) - real[1::2].mean(0)).norm()
    assert within < (real.mean(0) - shuffled.mean(0)).norm()
