"""Datasets of every format: what is read, what is drawn, and what is said about bad data."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip.data import FilePairs, ScenePairs, batches, load_splits, scene_words
from clip.data.batches import order_of
from clip.data.pairs import Crop, draw_numbers
from clip.data.scenes import Scenes
from clip.model.images import Preprocess
from clip.model.tokenizer import WordTokenizer
from common.errors import ProjectError
from tests.clip.tiny import picture, tiny, write_karpathy

PREPROCESS = Preprocess(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOKENIZER = WordTokenizer(scene_words.vocabulary(), 32)


def config_of(root, dataset, *words):
    return tiny(
        root / "run", f"data.dataset={dataset}", "data.tokenizer=clip", f"data_root={root}", "data.family=1", *words
    )


def own(root, text, name="captions.csv", count=4, **words):
    """A folder of a person's images with a table."""
    folder = root / "mine"
    folder.mkdir()
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    (folder / name).write_text(text)
    return config_of(root, "folder", "data.folder=mine", *words.get("settings", []))


TABLE = (
    "image,caption,split\n0.png,a dog,train\n0.png,a brown dog,train\n1.png,a cat,train\n2.png,two,val\n3.png,x,test\n"
)


# -- formats -----------------------------------------------------------------------------------------------------------


def test_karpathys_layout(tmp_path):
    write_karpathy(tmp_path)
    splits = load_splits(config_of(tmp_path, "flickr8k"))
    assert [len(splits.train), len(splits.val), len(splits.test)] == [16, 4, 4]
    assert splits.val.image_name(0) == "004.png"
    assert splits.val.captions(0) == ["picture 4 seen 0 times", "picture 4 seen 1 times"]
    assert splits.notes == () and splits.duplicates == ()


def test_coco_looks_where_its_file_says_and_trains_on_restval(tmp_path):
    folder = write_karpathy(tmp_path, name="coco")
    facts = json.loads((folder / "dataset_coco.json").read_text())
    for image in facts["images"]:
        image["filepath"] = "val2014"
        image["split"] = image["split"].replace("train", "restval")
    (folder / "dataset_coco.json").write_text(json.dumps(facts))
    (folder / "images").rename(folder / "val2014")
    assert len(load_splits(config_of(tmp_path, "coco")).train) == 16


@pytest.mark.parametrize("dataset", ["flickr8k", "folder", "webdataset"])
def test_a_wrong_folder_names_what_was_expected(tmp_path, dataset):
    (tmp_path / dataset).mkdir()
    (tmp_path / dataset / "holiday.doc").write_text("x")
    words = [f"data.folder={dataset}"] if dataset != "flickr8k" else []
    with pytest.raises(ProjectError, match="expected") as error:
        load_splits(config_of(tmp_path, dataset, *words))
    assert {"flickr8k": "dataset_flickr8k.json", "folder": "image,caption", "webdataset": "00000.tar"}[dataset] in str(
        error.value
    )


def test_a_table_of_captions(tmp_path):
    splits = load_splits(own(tmp_path, TABLE))
    assert splits.train.captions(0) == ["a dog", "a brown dog"]
    assert [len(splits.train), len(splits.val), len(splits.test)] == [2, 1, 1]


def test_lines_of_json_without_splits(tmp_path):
    lines = [{"file_name": f"{i}.png", "captions": [f"a {i}", f"b {i}"]} for i in range(40)]
    config = own(tmp_path, "\n".join(map(json.dumps, lines)), "metadata.jsonl", 40, settings=["data.held_out=0.5"])
    splits = load_splits(config)
    names = [[p.image_name(i) for i in range(len(p))] for p in (splits.train, splits.val, splits.test)]
    assert sorted(itertools.chain(*names)) == sorted(f"{i}.png" for i in range(40))
    assert all(len(part) >= 4 for part in names)
    assert splits.train.captions(0) == [f"{k} {names[0][0].removesuffix('.png')}" for k in "ab"]


def test_bad_lines_are_named_and_too_many_stop(tmp_path):
    config = own(tmp_path, TABLE + "1.png,,train\n2.png,a,b,c,d\n3.png,y,holidays\n")
    notes = load_splits(config).notes
    assert (
        "line 7: no caption" in notes[0] and "line 8: more cells" in notes[0] and "line 9: split holidays" in notes[0]
    )
    path = tmp_path / "mine/captions.csv"
    path.write_text(path.read_text() + "3.png,,\n")
    with pytest.raises(ProjectError, match="4 of 9 entries cannot be used"):
        load_splits(config)


def test_a_table_without_a_header_is_told(tmp_path):
    with pytest.raises(ProjectError, match="line 1: expected a header such as image,caption"):
        load_splits(own(tmp_path, "0.png,a dog\n"))


def test_missing_images_are_counted(tmp_path):
    folder = write_karpathy(tmp_path)
    (folder / "images/000.png").unlink()
    splits = load_splits(config_of(tmp_path, "flickr8k"))
    assert len(splits.train) == 15 and "1 images are missing" in splits.notes[0] and "000.png" in splits.notes[0]
    for i in range(1, 4):
        (folder / f"images/{i:03d}.png").unlink()
    with pytest.raises(ProjectError, match="4 of 24 entries"):
        load_splits(config_of(tmp_path, "flickr8k"))


def test_the_same_image_in_two_splits_is_found(tmp_path):
    folder = write_karpathy(tmp_path)
    (folder / "images/000.png").write_bytes((folder / "images/005.png").read_bytes())
    splits = load_splits(config_of(tmp_path, "flickr8k"))
    assert splits.duplicates == (("train/000.png", "test/005.png"),)
    assert "1 images are in two splits" in splits.notes[0]
    (folder / "images/000.png").write_bytes((folder / "images/001.png").read_bytes())  # within a split: no matter
    assert load_splits(config_of(tmp_path, "flickr8k")).duplicates == ()


def test_shards_of_webdataset(tmp_path):
    """Written by the library itself, read image by image in any order."""
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=10, verbose=0) as writer:
        for i in range(30):
            caption = {"json": {"caption": f"number {i}"}} if i % 2 else {"txt": f"number {i}"}
            writer.write({"__key__": f"{i:04d}", "png": picture(i), **caption})
    splits = load_splits(config_of(tmp_path, "webdataset", "data.folder=shards", "data.held_out=0.5"))
    seen = set()
    for pairs in (splits.train, splits.val, splits.test):
        for i in reversed(range(len(pairs))):
            number = int(pairs.captions(i)[0].removeprefix("number "))
            expected = np.asarray(PREPROCESS(picture(number)))
            assert np.array_equal(pairs.pixels(i, PREPROCESS, Crop(), 0, 0), expected)
            seen.add(number)
    assert seen == set(range(30))


def test_a_cut_shard_is_no_end_of_the_world(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ProjectError, match=r"00000.tar cannot be read as an uncompressed tar archive"):
        load_splits(config_of(tmp_path, "webdataset", "data.folder=shards"))
    with tarfile.open(folder / "00000.tar", "w") as archive:
        archive.add(__file__, "readme.py")
    with pytest.raises(ProjectError, match=r"readme has no image"):
        load_splits(config_of(tmp_path, "webdataset", "data.folder=shards"))


# -- images ------------------------------------------------------------------------------------------------------------


def pairs_of(folder: Path, files: list[str]) -> FilePairs:
    captions = [[f"caption {i}"] for i in range(len(files))]
    return FilePairs("test", [folder / name for name in files], files, captions)


def test_every_kind_of_image_is_read(tmp_path):
    """Turned by EXIF, 16 bits, CMYK, transparent: the pixels are what a viewer shows."""
    grey = np.full((8, 8), 128, np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.merge("CMYK", [Image.fromarray(grey * 0)] * 3 + [Image.fromarray(255 - grey)]).save(tmp_path / "print.jpg")
    Image.fromarray(np.dstack([grey * 0] * 4)).save(tmp_path / "clear.png")
    turned = Image.fromarray(np.dstack([np.tile(np.uint8([[255], [0]]), (4, 8))] * 3).repeat(1, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    pairs = pairs_of(tmp_path, ["deep.png", "print.jpg", "clear.png", "turned.png"])
    pixels = [pairs.pixels(i, Preprocess(8, (0, 0, 0), (1, 1, 1)), Crop(), 0, 0) for i in range(4)]
    assert abs(int(pixels[0].mean()) - 128) <= 1
    assert abs(int(pixels[1].mean()) - 128) <= 3
    assert pixels[2].min() == 255  # white behind what is transparent
    assert (pixels[3][:, 0] == pixels[3][:, 1]).all() and not (pixels[3][:, :, 0] == pixels[3][:, :, 1]).any()


def test_broken_images_are_replaced_named_and_counted(tmp_path, capsys):
    files = [f"{i}.png" for i in range(8)]
    for i, name in enumerate(files):
        picture(i).save(tmp_path / name)
    (tmp_path / "2.png").write_bytes(b"no image")
    pairs = pairs_of(tmp_path, files)
    data = batches(pairs, TOKENIZER, PREPROCESS, first_step=1, batch_size=8, seed=0)
    batch = next(data)
    assert sorted(batch.image_ids.tolist()) == [0, 1, 3, 3, 4, 5, 6, 7]  # 3 stands in
    next(data)
    assert capsys.readouterr().err.count("skipping 2.png: not a readable image") == 1
    for i in (3, 4, 5):
        (tmp_path / files[i]).write_bytes(b"")
    with pytest.raises(ProjectError, match="4 of 8 files are not usable images"):
        list(zip(range(3), batches(pairs, TOKENIZER, PREPROCESS, first_step=1, batch_size=8, seed=0)))


# -- what a step sees --------------------------------------------------------------------------------------------------


def test_each_epoch_has_other_captions_and_crops_and_a_resumed_run_the_same(tmp_path):
    write_karpathy(tmp_path, captions=5)
    pairs = load_splits(config_of(tmp_path, "flickr8k")).train

    def some(first_step):
        words = {"batch_size": 8, "seed": 3, "captions": 2, "crop": Crop(0.3, True)}
        data = batches(pairs, TOKENIZER, PREPROCESS, first_step=first_step, **words)
        return [next(data) for _ in range(4)]

    whole = some(1)  # two epochs of two steps
    resumed = some(3)
    assert torch.equal(whole[2].images, resumed[0].images) and torch.equal(whole[2].ids, resumed[0].ids)
    order = [{int(i): image for i, image in zip(b.image_ids, b.images)} for b in whole]
    first = {**order[0], **order[1]}
    second = {**order[2], **order[3]}
    assert first.keys() == second.keys() == set(range(16))
    assert sum(torch.equal(first[i], second[i]) for i in first) <= 1
    assert whole[0].text_ids.tolist() == whole[0].image_ids.repeat_interleave(2).tolist()


def test_captions_are_drawn_without_repetition_as_long_as_there_are_enough():
    assert sorted(draw_numbers(5, 5, 7, 0, 0)) == [0, 1, 2, 3, 4]
    assert sorted(draw_numbers(2, 5, 7, 0, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    drawn = [draw_numbers(5, 1, 7, epoch, 0)[0] for epoch in range(50)]
    assert set(drawn) == {0, 1, 2, 3, 4}


def test_processes_share_a_batch(tmp_path):
    whole = order_of(5, 12, 30, 1)
    parts = [order_of(5, 12, 30, 1, rank, 3) for rank in range(3)]
    assert list(itertools.chain(*(part.numbers for part in parts))) == whole.numbers
    assert list(itertools.chain(*(part.epochs for part in parts))) == whole.epochs


def test_families_stay_together():
    order = order_of(1, 12, 40, 0, family=4).numbers
    assert all(order[i] % 4 == 0 and order[i : i + 4] == list(range(order[i], order[i] + 4)) for i in range(0, 12, 4))
    pairs = ScenePairs(Scenes(0), 40, family=4)
    bases = 0
    for number in range(10):
        scenes = [pairs.scene(number * 4 + k) for k in range(4)]
        assert len(set(scenes)) == 4
        bags = {tuple(sorted(g.shape for g in scene.groups)) + (scene.background,) for scene in scenes}
        bases += len(bags) == 1
    assert bases >= 8  # scenes of one group have too few variants


def test_one_group_is_no_column():
    """It would look like the same group in a row, and one of the two captions would count as a mistake."""
    members = [scene for i in range(10) for scene in Scenes(0, groups=1).family(i, 20)]
    assert {scene.layout for scene in members} == {"row"} and len(members) >= 40


def test_an_image_is_prepared_alike_as_picture_and_as_tensor():
    image = picture(0, 16)  # 24 x 16
    as_picture = PREPROCESS(image)
    as_tensor = PREPROCESS.batch(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None])[0]
    assert torch.equal(as_picture, as_tensor)
    x = PREPROCESS.normalise(as_tensor[None])
    torch.testing.assert_close(x, (as_tensor[None].float() / 255 - 0.5) / 0.5)
