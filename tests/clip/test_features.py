"""Features of locked towers: computed once, equal to computing them anew, and never taken for those of other data."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torchvision

import clip.train
from clip.config import Config, HeadConfig
from clip.data import load_splits
from clip.data.features import FOLDER, Rows, cache_features
from clip.data.pairs import Crop
from clip.embed import embed
from clip.load import load_run
from clip.model.dual_encoder import normalise
from clip.model.heads import build_head, start_from_classes
from clip.model.towers import build_towers
from clip.train import optimizer_groups
from common.checkpoint import Checkpoints
from common.config import ConfigError, resolve
from common.errors import ProjectError
from tests.clip.tiny import evaluate, open_run, train, write_karpathy
from tests.helpers import checkpoint, log, same, stop_in_check

LIT = [
    "data.dataset=flickr8k",
    "data.tokenizer=pretrained",
    "data.workers=0",
    "data.captions=2",
    "data.views=3",
    "data.flip=true",
    "data.crop=0.5",
    "model.embed_dim=8",
    "model.image.kind=pretrained",
    "model.image.name=torchvision/resnet18",
    "model.image.weights=random",
    "model.image.image_size=32",
    "model.image.unlock=0",
    "model.image.pool=mean_max",
    "model.text.kind=pretrained",
    "model.text.context=10",
    "model.text.pool=mean",
    "train.batch_size=8",
    "train.steps=4",
    "train.log_every=1",
    "train.save_every=100",
    "train.eval_every=2",
    "precision=fp32",
    "device=cpu",
]


@pytest.fixture
def lit(tmp_path, bert):
    """A config of locked towers on a small dataset."""
    write_karpathy(tmp_path)

    def make(*words, name="run"):
        settings = [f"data_root={tmp_path}", f"run_dir={tmp_path}/{name}", f"model.text.name={bert}"]
        return resolve(Config, None, [*LIT, *settings, *words])

    return make


def opened(config, views=1):
    towers = build_towers(config)
    pairs = load_splits(config).train
    return cache_features(pairs, towers, config, open_run(config), views), pairs, towers


@pytest.mark.parametrize(
    ("image", "text"), [(["unlock=0"], ["unlock=0"]), (["unlock=1"], ["unlock=1"]), (["pool=attention", "grid=1"], [])]
)
def test_cached_features_are_those_of_the_tower(lit, image, text):
    config = lit(*(f"model.image.{word}" for word in image), *(f"model.text.{word}" for word in text))
    features, pairs, towers = opened(config, views=2)
    pixels = [torch.from_numpy(pairs.pixels(i, towers.preprocess, Crop(), 0, 0).copy()) for i in range(16)]
    with torch.no_grad():
        direct = towers.image_base(towers.preprocess.normalise(torch.stack(pixels)))
        mirrored = towers.image_base(towers.preprocess.normalise(torch.stack(pixels).flip(-1)))
    torch.testing.assert_close(features.images[0].take(list(range(16))), direct, atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(features.images[1].take(list(range(16))), mirrored, atol=2e-2, rtol=2e-3)
    towers.model.eval()
    captions = [text for texts in pairs.texts for text in texts]
    with torch.no_grad():
        expected = towers.model.encode_text(towers.text_base(towers.tokenizer(captions)))
        ours = towers.model.encode_text(features.take_texts(list(range(32))))
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def test_batches_of_features_hold_what_belongs_together(lit):
    config = lit()
    features, _, towers = opened(config, views=3)
    batch = next(features.batches(config, towers.tokenizer, 1))
    assert batch.images.shape == (8, 1024) and batch.ids.shape == (16, 16)
    assert batch.text_ids.tolist() == batch.image_ids.repeat_interleave(2).tolist()
    for row, i in zip(batch.images, batch.image_ids.tolist(), strict=True):
        assert any(torch.equal(row, view.take([i])[0]) for view in features.images)
    for row, i in zip(batch.ids, batch.text_ids.tolist(), strict=True):
        assert any(torch.equal(row, features.take_texts([2 * i + k])[0]) for k in range(2))
    halves = [next(features.batches(config, towers.tokenizer, 1, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half.images for half in halves]), batch.images)


def test_what_is_there_is_not_computed_again(lit, monkeypatch):
    config = lit()
    first, _, _ = opened(config)
    root = first.pairs.sources[0].parents[2] / FOLDER
    folders = {path.name for path in root.iterdir()}

    def refuse(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr("clip.data.features._image_maker", lambda *args: refuse)
    monkeypatch.setattr("clip.data.features._text_maker", lambda *args: refuse)
    again, _, _ = opened(config)
    assert torch.equal(again.images[0].take([3]), first.images[0].take([3]))
    part = next(root.glob("*/00000000.npy"))
    part.unlink()  # as an interruption before it leaves it
    with pytest.raises(AssertionError, match="computed again"):
        opened(config)
    monkeypatch.undo()
    opened(config)
    assert part.is_file() and {path.name for path in root.iterdir()} == folders


@pytest.mark.parametrize("word", ["model.image.image_size=64", "model.image.pool=mean", "model.text.context=9"])
def test_other_settings_are_other_features(lit, word):
    first, _, _ = opened(lit())
    root = first.pairs.sources[0].parents[2] / FOLDER
    before = len(list(root.iterdir()))
    opened(lit(word))
    assert len(list(root.iterdir())) == before + 1


def test_another_image_of_the_same_name_is_another(lit):
    first, pairs, _ = opened(lit())
    pairs.sources[0].write_bytes(pairs.sources[1].read_bytes())
    second, _, _ = opened(lit())
    assert not torch.equal(first.images[0].take([0]), second.images[0].take([0]))
    assert torch.equal(second.images[0].take([0]), second.images[0].take([1]))


def test_images_that_cannot_be_read_are_left_out(lit, capsys):
    config = lit()
    load_splits(config).train.sources[5].write_bytes(b"rubbish")
    features, _, towers = opened(config, views=2)
    assert features.usable == [i for i in range(16) if i != 5] and len(features) == 15
    found = embed(features, towers, config, open_run(config))
    assert len(found.image) == 15 and len(found.text) == 30 and found.numbers == features.usable
    assert "skipping 007.png" in capsys.readouterr().err  # the sixth that is for training


def test_ragged_rows_are_padded(tmp_path):
    np.save(tmp_path / "00000000.npy", np.arange(12, dtype=np.float16).reshape(6, 2))
    np.save(tmp_path / "00000000_lengths.npy", np.array([1, 3, 2]))
    taken = Rows(tmp_path, 3).take([2, 1])
    assert taken.tolist() == [[[8, 9, 1], [10, 11, 1], [0, 0, 0]], [[2, 3, 1], [4, 5, 1], [6, 7, 1]]]


def test_a_run_on_features_trains_resumes_and_is_measured(lit, tmp_path, monkeypatch, capsys):
    words = ["model.image.unlock=1", "model.text.unlock=1"]
    assert train(lit(*words, name="whole")) == 0
    stop_in_check(monkeypatch, 3)
    parts = lit(*words, name="parts")
    assert train(parts) == 143
    assert train(parts, resume=True) == 0
    for part in ("model", "optimizer", "ema"):
        first, second = (checkpoint(tmp_path / name, 4)["parts"][part] for name in ("whole", "parts"))
        assert same(first, second), part
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert evaluate(lit(*words, name="whole")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["n"] == {"images": 4, "captions": 8}
    # live and from cached features, the same embedding
    loaded = load_run(tmp_path / "whole", device="cpu")
    with np.load(tmp_path / "whole/embeddings.npz") as saved:
        pairs = load_splits(parts).test
        pixels = torch.from_numpy(np.stack([pairs.pixels(i, loaded.preprocess, Crop(), 0, 0) for i in range(4)]))
        np.testing.assert_allclose(loaded.encode_images(pixels).numpy(), saved["image"], atol=2e-3)
        np.testing.assert_allclose(loaded.encode_texts(saved["captions"].tolist()).numpy(), saved["text"], atol=2e-3)


CLASSES = ["model.start_heads=classes", "model.embed_dim=16"] + [
    f"model.{tower}_head.{word}" for tower in ("image", "text") for word in ("kind=residual", "norm=standard")
]


@pytest.mark.parametrize("kind", ["linear", "residual"])
def test_heads_begin_with_the_classes_of_the_classifier(kind):
    torch.manual_seed(0)
    image_head, text_head = (build_head(HeadConfig(kind=kind, norm="standard"), width, 12).eval() for width in (20, 6))
    classifier = torch.randn(9, 10)  # the first 10 of the 20 features of an image are means
    names = torch.randn(9, 6) + 3
    means = 0.1 * classifier @ torch.randn(10, 10).abs() + 5
    image_head[0].measure(torch.cat([means, torch.randn(9, 10)], dim=1))
    text_head[0].measure(names)
    linear = image_head[1] if kind == "linear" else image_head[1].linear
    before = linear.weight.norm()
    start_from_classes(image_head, text_head, classifier, names)
    torch.testing.assert_close(linear.weight.norm(), before)
    # what the heads compute is the classifier's scores, over the names
    features = torch.randn(50, 20)
    scores = (features[:, :10] - means.mean(dim=0)) @ (classifier - classifier.mean(dim=0)).T
    wanted = normalise(scores @ (names - names.mean(dim=0))) @ normalise(names - names.mean(dim=0)).T
    found = normalise(image_head(features)) @ normalise(text_head(names)).T
    # a deviation is measured LEAST_DEVIATION too large, so that nothing is divided by zero
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0)


def test_a_run_begins_with_the_classes_and_a_resumed_one_does_not(lit, tmp_path, monkeypatch):
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    words = [*CLASSES, f"model.image.weights={tmp_path}/resnet18.pth", "train.steps=2"]
    given = []
    real = clip.train.start_from_classes
    monkeypatch.setattr(clip.train, "start_from_classes", lambda *args: (given.append(args[2:]), real(*args)))
    stop_in_check(monkeypatch, 1)
    assert train(lit(*words)) == 143
    ((classifier, names),) = given
    assert torch.equal(classifier, network.fc.weight)
    assert len(names) == 1000 and len(names.unique(dim=0)) > 1
    assert train(lit(*words), resume=True) == 0
    assert len(given) == 1


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.text_head.norm=layer", "model.start_heads: classes needs model.text_head.norm=standard"),
        ("model.image_head.kind=mlp", "model.start_heads: classes needs model.image_head.kind linear or residual"),
        ("model.image.weights=random", "model.start_heads: classes needs a trained image tower"),
        ("model.embed_dim=4", "model.embed_dim: must be at least the text tower's width"),
        ("model.image.name=torchvision/squeezenet1_0", "model.start_heads: classes needs a network that ends in a"),
    ],
)
def test_what_cannot_begin_with_classes_is_refused(lit, tmp_path, word, key):
    names = {"torchvision/squeezenet1_0": torchvision.models.squeezenet1_0}
    network = names.get(word.partition("=")[2], torchvision.models.resnet18)()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=key):
        build_towers(lit(*CLASSES, f"model.image.weights={tmp_path}/weights.pth", word))


def test_other_locked_weights_are_refused(lit, tmp_path):
    assert train(lit("train.steps=1")) == 0
    state = Checkpoints.load(tmp_path / "run/checkpoints/00000001.pt")
    state["parts"]["locked"]["sha256"] = "0" * 64
    Checkpoints(tmp_path / "run/checkpoints").save(2, {**state, "step": 2})
    with pytest.raises(ProjectError, match="not those that this run was trained with"):
        load_run(tmp_path / "run", device="cpu")


def test_pretrained_layers_learn_at_their_own_rate(lit):
    config = lit("model.image.unlock=1", "model.text.unlock=1", "train.tower_lr=0.25")
    model = build_towers(config).model
    groups = optimizer_groups(model, config)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(1 for _ in model.parameters())
    for name, parameter in model.named_parameters():
        old = ".stages." in name or ".layers." in name
        assert scale[id(parameter)] == (0.25 if old else 1.0), name


def test_what_would_do_nothing_is_refused(lit):
    """A locked tower sees only what was cached: with one view there is no mirror image."""
    with pytest.raises(ConfigError, match=r"data.views: must be at least 3"):
        lit("data.views=2")


def test_own_towers_beside_locked_ones(lit, tmp_path):
    """A locked image tower with an own text tower, and the reverse, as the paper compares them."""
    config = lit("model.text.unlock=-1", "train.steps=2")
    assert train(config) == 0
    flipped = lit("model.image.unlock=-1", "data.views=1", "train.steps=1", name="second")
    assert train(flipped) == 0
    with pytest.raises(ConfigError, match=r"data.views"):
        dataclasses.replace(config, model=flipped.model)
