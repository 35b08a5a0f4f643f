"""Classifiers made of words: the vectors, the accuracy, the readers of datasets, names and sentences, the program; and
published weights from the command line.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip import search, zero_shot
from clip.data.labelled import load_labelled, names_for
from clip.model.published import home_of, load_published
from clip.zero_shot import TEMPLATES, class_weights, measure, read_templates
from common.errors import ProjectError
from common.images import read_cifar100
from common.images.formats import CIFAR_NAMES
from tests.clip.colours import Colours, chosen, picture
from tests.clip.published import TEXT, VIT, publish

SHADES = {"red": (230, 30, 20), "green": (40, 220, 10), "dark_blue": (10, 20, 90)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of each colour; one red one looks green."""
    for name, (r, g, b) in SHADES.items():
        for i in range(4):
            picture(tmp_path / f"colours/{name}/{i}.png", (r + i, g + i, b + i))
    picture(tmp_path / "colours/red/3.png", (20, 240, 20))
    return tmp_path / "colours"


def test_class_weights_are_the_mean_of_normalised_sentences() -> None:
    """Against the definition, written out; a class of two names has twice as many sentences."""
    torch.manual_seed(0)
    table: dict[str, torch.Tensor] = {}

    def encode(texts: list[str]) -> torch.Tensor:
        for text in texts:
            table[text] = torch.nn.functional.normalize(torch.randn(6), dim=0)
        return torch.stack([table[text] for text in texts])

    names = [("tench", "Tinca tinca"), ("great white shark",), ("{odd}",)]
    weights = class_weights(encode, names, ("a photo of a {}.", "the {}"))
    assert set(table) == {
        "a photo of a tench.", "the tench", "a photo of a Tinca tinca.", "the Tinca tinca",
        "a photo of a great white shark.", "the great white shark", "a photo of a {odd}.", "the {odd}",
    }  # fmt: skip
    for row, each in zip(weights, names, strict=True):
        total = sum(table[t.replace("{}", name)] for name in each for t in ("a photo of a {}.", "the {}"))
        torch.testing.assert_close(row, total / total.norm())


def test_many_classes_are_embedded_in_parts(monkeypatch: Any) -> None:
    names = [(f"thing {i}",) for i in range(7)]
    whole = class_weights(Colours().encode_texts, names, TEMPLATES["objects"])
    monkeypatch.setattr(zero_shot, "CHUNK", 3)
    torch.testing.assert_close(class_weights(Colours().encode_texts, names, TEMPLATES["objects"]), whole)


def test_accuracy_by_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 8, generator=rng)
    labels = torch.randint(0, 7, (300,), generator=rng)  # no image of the last class
    index = torch.randperm(300, generator=rng)[:200]  # the others could not be read
    found = measure(scores, index, labels, [f"c{i}" for i in range(8)])
    order = scores.argsort(dim=1, descending=True)
    own = labels[index]
    assert found.top1 == pytest.approx(float((order[:, 0] == own).double().mean()))
    assert found.top5 == pytest.approx(float((order[:, :5] == own[:, None]).any(1).double().mean()))
    assert list(found.per_class) == [f"c{i}" for i in range(7)]
    assert found.per_class["c3"] == pytest.approx(float((order[own == 3, 0] == 3).double().mean()))
    assert torch.equal(found.best, order[:, :5])


def test_a_model_that_tells_nothing_apart_is_never_right() -> None:
    found = measure(torch.zeros(4, 3), torch.arange(4), torch.tensor([0, 0, 1, 2]), ["a", "b", "c"])
    assert found.top1 == 0
    assert found.top5 == 1  # of three


def run(model: Colours, capsys: Any, monkeypatch: Any, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(zero_shot, "load_chosen", chosen(model))
    zero_shot.main(zero_shot.parse(["--run", "runs/x", "--workers", "0", *words]))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_folder(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    (folder / "green/broken.png").write_text("no")
    result = run(Colours(), capsys, monkeypatch, "--data", str(folder), "--out", str(out))
    assert result["n"] == {"images": 12, "classes": 3, "templates": 8}
    assert result["metrics"] == {
        "zero_shot_top1": pytest.approx(11 / 12),
        "zero_shot_top5": 1,
        "zero_shot_mean_per_class": pytest.approx(11 / 12),
    }
    assert result["per_class"] == {"dark_blue": 1, "green": 1, "red": 0.75}
    assert json.loads((out / "colours.json").read_text()) == result
    with (out / "colours.csv").open(newline="") as file:
        lines = {line["image"]: line for line in csv.DictReader(file)}
    assert len(lines) == 12
    wrong = lines["red/3.png"]
    assert (wrong["class"], wrong["guess_1"]) == ("red", "green")
    assert float(wrong["score_1"]) >= float(wrong["score_2"])
    assert "green/broken.png" not in lines


def test_names_from_a_file_decide(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The folders are called by numbers, as ImageNet's are."""
    for number, name in enumerate(sorted(SHADES)):
        (folder / name).rename(folder / f"n0000000{number}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(Colours(), capsys, monkeypatch, "--data", str(folder))
    assert stopped.value.code == 1
    assert "give --classes" in capsys.readouterr().err
    names = tmp_path / "mapping.txt"
    names.write_text("n00000000 navy blue, blue\nn00000001 green\nn00000002 red, scarlet\nn99999999 other\n")
    result = run(Colours(), capsys, monkeypatch, "--data", str(folder), "--classes", str(names), "--templates", "name")
    assert result["metrics"]["zero_shot_top1"] == pytest.approx(11 / 12)
    assert (tmp_path / "runs/x/zero_shot/colours.csv").is_file()
    names.write_text("n00000000 red\nn00000001 blue\nn00000002 green\n")
    result = run(Colours(), capsys, monkeypatch, "--data", str(folder), "--classes", str(names), "--templates", "name")
    assert result["metrics"]["zero_shot_top1"] == pytest.approx(1 / 12)


def test_files_of_names(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"a b": ["one", "two"], "c": "three"}))
    assert names_for(["c", "a b"], path) == [("three",), ("one", "two")]
    lines = tmp_path / "names.txt"
    lines.write_text("a b\tone, two\n\nc\tthree\n")
    assert names_for(["c", "a b"], lines) == [("three",), ("one", "two")]
    assert names_for(["golden_retriever", "cat"]) == [("golden retriever",), ("cat",)]
    for content in ("[1, 2]", "{", '{"c": 5}'):
        path.write_text(content)
        with pytest.raises(ProjectError, match=r"cannot be read"):
            names_for(["c"], path)
    with pytest.raises(ProjectError, match="no name for 1 classes, such as d"):
        names_for(["c", "d"], lines)
    with pytest.raises(ProjectError, match="cannot be read"):
        names_for(["c"], tmp_path / "nowhere.txt")


def test_files_of_sentences(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\n a {} at night \nthe {}\n")
    assert read_templates(str(path), "cifar10") == ("a {} at night", "the {}")
    assert read_templates(None, "cifar100") == TEMPLATES["small"]
    assert read_templates(None, "/some/folder") == TEMPLATES["objects"]
    for content, words in (("a photo\n", "has 'a photo'"), ("{} and {}\n", "needs one {}"), ("# none\n", "is empty")):
        path.write_text(content)
        with pytest.raises(ProjectError, match=words):
            read_templates(str(path), "cifar10")
    with pytest.raises(ProjectError, match="is neither name, photo, objects, small nor a text file"):
        read_templates("phto", "cifar10")
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)


def write_cifar100(root: Path, count: int = 12) -> np.ndarray:
    """A dataset of a few images in CIFAR-100's format; returns its test records."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (count, 3074), dtype=np.uint8)
    records[:, 0] %= 20
    records[:, 1] = np.arange(count) * 9 % 100
    for name in ("train.bin", "test.bin"):
        records.tofile(folder / name)
    (folder / "fine_label_names.txt").write_text("\n".join(f"kind_{i}" for i in range(100)) + "\n")
    return records


def test_cifar100_is_read_as_it_is_published(tmp_path: Path) -> None:
    records = write_cifar100(tmp_path)
    data = read_cifar100(tmp_path, "test")
    assert data.images.shape == (12, 3, 32, 32)
    assert data.labels is not None and data.labels.tolist() == records[:, 1].tolist()
    assert data.class_names[9] == "kind 9"
    assert data.images[3, 2, 1, 0] == records[3, 2 + 2 * 1024 + 32]  # blue, second row
    drawn = load_labelled("cifar100", "test", tmp_path, 32, limit=5, seed=3)
    assert drawn.labels.tolist() == [int(records[int(i), 1]) for i in drawn.ids]
    assert len(set(drawn.ids)) == 5
    (tmp_path / "cifar-100-binary/test.bin").write_bytes(b"x" * 3000)
    with pytest.raises(ProjectError, match="multiple of 3074 bytes"):
        read_cifar100(tmp_path, "test")


def test_cifar10_by_name(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    records = np.zeros((4, 3073), np.uint8)
    records[:, 0] = (0, 3, 3, 8)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    records.tofile(tmp_path / "cifar-10-batches-bin/test_batch.bin")
    out = ["--data-root", str(tmp_path), "--out", str(tmp_path)]
    result = run(Colours(), capsys, monkeypatch, "--data", "cifar10", *out)
    assert result["per_class"].keys() == {"airplane", "cat", "ship"}
    assert result["n"] == {"images": 4, "classes": len(CIFAR_NAMES), "templates": len(TEMPLATES["small"])}
    assert run(Colours(), capsys, monkeypatch, "--data", "cifar10", "--limit", "2", *out)["n"]["images"] == 2


def test_folders_that_have_no_classes(tmp_path: Path) -> None:
    picture(tmp_path / "flat/a.png", "red")
    with pytest.raises(ProjectError, match="has no classes"):
        load_labelled(str(tmp_path / "flat"), "test", tmp_path, 8)
    with pytest.raises(ProjectError, match="is not a folder"):
        load_labelled(str(tmp_path / "nowhere"), "test", tmp_path, 8)


def test_folders_that_say_which_images_are_for_training(folder: Path) -> None:
    for name in SHADES:
        picture(folder / f"up/train/{name}/a.png", "red")
        picture(folder / f"up/val/{name}/b.png", "red")
    assert load_labelled(str(folder / "up"), "test", folder, 8).ids == [f"val/{name}/b.png" for name in sorted(SHADES)]
    assert load_labelled(str(folder / "up"), "train", folder, 8).ids == [
        f"train/{name}/a.png" for name in sorted(SHADES)
    ]


# -- published weights, without a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("published")
    publish(folder, quick_gelu=True)
    return folder


def test_published_weights_embed_as_their_own_library_does(weights: Path, tmp_path: Path) -> None:
    """The same image and the same text through OpenCLIP; in float32."""
    import open_clip
    from PIL import Image
    from safetensors.torch import load_file

    peer = open_clip.model.CLIP(16, VIT, TEXT, quick_gelu=True).eval()
    peer.load_state_dict(load_file(weights / "open_clip_model.safetensors"))
    loaded = load_published(str(weights), root=tmp_path, device="cpu")
    assert loaded.config.model.image.activation == "quick_gelu"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    pixels = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        expected = peer.encode_image(pixels[None], normalize=True)
        words = peer.encode_text(loaded.tokenizer(["a dog in the snow"]), normalize=True)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, precision="fp32"))
    torch.testing.assert_close(loaded.encode_images([image]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_texts(["a dog in the snow"]), words, atol=1e-5, rtol=1e-5)


def test_zero_shot_with_published_weights(weights: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = [
        "--weights",
        str(weights),
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "o"),
        "--data-root",
        str(tmp_path),
    ]
    zero_shot.main(zero_shot.parse([*words, "--workers", "0"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["config"] == str(weights)
    assert 0 <= result["metrics"]["zero_shot_top1"] <= 1
    assert result["n"]["images"] == 12


def test_search_with_published_weights(weights: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "i/index.sqlite"
    words = ["--images", str(folder), "--index", str(place), "--data-root", str(tmp_path), "--json"]
    like = str(folder / "green/1.png")
    search.main(search.parse(["--weights", str(weights), *words, "a dog", "--like", like]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"]["embedded"] == 12
    best = result["queries"][1]["results"][0]
    assert best["path"] == "green/1.png"
    assert best["score"] == pytest.approx(1, abs=0.01)
    # a file alone does not say its activation
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((weights / "open_clip_model.safetensors").read_bytes())
    argv = ["--weights", str(alone), *words, "a dog", "--vocabulary", str(weights / "merges.txt")]
    with pytest.raises(SystemExit):
        search.main(search.parse(argv))
    assert "QuickGELU" in capsys.readouterr().err
    # the same weights with another activation are still the same weights, and the same index
    search.main(search.parse([*argv, "--activation", "quick_gelu"]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"]["embedded"] == 0


def test_a_vocabulary_is_looked_for_beside_the_weights_and_below_the_data(weights: Path, tmp_path: Path) -> None:
    alone = tmp_path / "w"
    alone.mkdir()
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        (alone / name).write_bytes((weights / name).read_bytes())
    with pytest.raises(ProjectError, match=r"vocabulary is missing at .*clip_tokenizer"):
        load_published(str(alone), root=tmp_path, device="cpu")
    (tmp_path / "clip_tokenizer").mkdir()
    (tmp_path / "clip_tokenizer/merges.txt").write_bytes((weights / "merges.txt").read_bytes())
    assert load_published(str(alone), root=tmp_path, device="cpu").tokenizer.vocab_size == 49_408


def test_where_results_go_without_a_run() -> None:
    args = zero_shot.parse(["--weights", "openai/ViT-B-32", "--data", "cifar10"])
    assert home_of(args) == Path("runs/openai_ViT-B-32")
