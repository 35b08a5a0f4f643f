"""Folders of images as people have them: any mode, strays, links, splits, bad files, and processes that die."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ProjectError
from common.images import FolderImages, MemoryImages, list_images
from common.images.reading import read_image
from diffusion.config import DataConfig
from diffusion.data import load_images
from tests.helpers import python

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


# -- folders of images -------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, classes: str = "ab") -> None:
    for i, pixels in enumerate(RNG.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)):
        path = folder / classes[i % len(classes)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def open_folder(root: Path, workers: int = 0, **options) -> FolderImages:
    settings = {"folder": str(root), "image_size": 4, "workers": workers, "held_out": 0.0, **options}
    return load_images(DataConfig(dataset="folder", **settings), "")


BAD = {
    "a/zz_corrupt.png": b"\x89PNG\r\n\x1a\n" + b"not really" * 9,
    "a/zz_empty.png": b"",
    "b/zz_gif.gif": b"GIF89a and no more",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """396 good images, and four files that cannot be used: exactly one percent."""
    folder = tmp_path_factory.mktemp("mixed")
    write_images(folder, 396)
    for name, content in BAD.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(folder / "b/zz_dot.png")
    (folder / ".hidden").write_bytes(b"not counted")
    (folder / "b/captions.txt").write_bytes(b"no image, and no bad one")
    return folder


def test_bad_files_are_named_once_and_skipped(mixed, capfd):
    images = open_folder(mixed)
    assert len(images) == 400
    batches = list(itertools.islice(images.batches(1, 50, 0, CPU), 24))  # three epochs
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 4
    for name in [*BAD, "b/zz_dot.png"]:
        assert sum(str(mixed / name) in line for line in lines) == 1
    assert all((pixels.flatten(1) > 0).any(1).all() for pixels, _ in batches), "a black stand-in got into a batch"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_make_no_difference(mixed, capfd):
    none, two = (list(itertools.islice(open_folder(mixed, workers).batches(5, 64, 0, CPU), 8)) for workers in (0, 2))
    for (a, a_labels), (b, b_labels) in zip(none, two, strict=True):
        assert torch.equal(a, b) and torch.equal(a_labels, b_labels)


@pytest.mark.parametrize("batch", [1, 50, 100])
def test_more_than_one_percent_bad_aborts(batch, tmp_path, capfd):
    """Of the whole folder, not of a batch; three bad files are forgiven in any folder."""
    write_images(tmp_path, 96)
    for extra in ("a/zz_1.png", "a/zz_2.png", "b/zz_3.png"):
        (tmp_path / extra).write_bytes(b"")
    for pixels, _ in itertools.islice(open_folder(tmp_path).batches(1, batch, 0, CPU), 99 // batch + 1):
        assert (pixels.flatten(1) > 0).any(1).all()
    assert capfd.readouterr().err.count("skipping") == 3
    (tmp_path / "b/zz_4.png").write_bytes(b"")
    with pytest.raises(ProjectError, match="4 of 100 files"):
        list(itertools.islice(open_folder(tmp_path).batches(1, batch, 0, CPU), 100 // batch + 1))
    assert capfd.readouterr().err.count("skipping") == 4


def test_labels_follow_the_sub_folders(tmp_path):
    for name, value in (("cat", 10), ("dog", 200), ("eel", 90)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new("RGB", (6, 6), (value,) * 3).save(tmp_path / name / "deeper/1.png")
    images = open_folder(tmp_path)
    assert images.class_names == ("cat", "dog", "eel")
    data = images.draw(0)
    assert data.labels.tolist() == [0, 1, 2] and data.images[:, 0, 0, 0].tolist() == [10, 200, 90]


@pytest.mark.parametrize("layout", [["1.png", "2.png"], ["only/1.png", "only/2.png"], ["a/1.png", "2.png"]])
def test_no_labels_without_classes(layout, tmp_path):
    for name in layout:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 6)).save(tmp_path / name)
    images = open_folder(tmp_path)
    assert images.class_names == () and images.draw(0).labels is None
    assert next(images.batches(1, 2, 0, CPU))[1] is None


def test_centre_crop_and_modes(tmp_path):
    wide = np.zeros((8, 16), dtype=np.uint8)
    wide[:, 4:12] = 255  # the middle square is white, the sides are black
    Image.fromarray(wide).save(tmp_path / "grey.png")
    Image.fromarray(wide).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(wide.T.copy()).convert("RGBA").save(tmp_path / "tall.png")
    assert bool((open_folder(tmp_path).draw(0).images == 255).all())


def test_max_images_of_a_folder(tmp_path):
    write_images(tmp_path, 10)
    assert len(open_folder(tmp_path, max_images=4)) == 4


def test_folder_that_is_not_there(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ProjectError, match=r"data\.folder"):
            list_images(folder, "data.folder")


# -- image modes -------------------------------------------------------------------------------------------------------


def pixel(path: Path, grey: bool = False) -> list[int]:
    """The colour of an image of one colour, as training sees it."""
    pixels = read_image(path, 4, grey=grey)
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def test_sixteen_bits_and_floats_are_scaled(tmp_path):
    """Half of the range is half of the brightness in every mode; Pillow alone gives white or black."""
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "16.tif")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.int32)).save(tmp_path / "32.tif")
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray(np.full((8, 8), 127.6, dtype=np.float32)).save(tmp_path / "bytes.tif")
    for path in sorted(tmp_path.iterdir()):
        assert pixel(path) == [128] * 3, path.name
        assert pixel(path, grey=True) == [128], path.name


@pytest.mark.parametrize("value", [-1.0, 300.0, np.nan])
def test_numbers_of_unknown_range_are_refused(value, tmp_path):
    Image.fromarray(np.full((8, 8), value, dtype=np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match="floating-point pixels outside"):
        read_image(tmp_path / "image.tif", 4)


def test_transparency_shows_white_and_not_the_hidden_colour(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "hidden.png")
    assert pixel(tmp_path / "hidden.png") == [255, 255, 255]
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "opaque.png")
    assert pixel(tmp_path / "opaque.png") == [255, 0, 0]
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert pixel(tmp_path / "palette.png") == [255, 255, 255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    assert pixel(tmp_path / "print.jpg")[0] > 230 and max(pixel(tmp_path / "print.jpg")[1:]) < 30


def test_images_are_turned_as_they_were_held(tmp_path):
    """A camera held sideways writes the picture as its sensor saw it, and a note (Exif orientation 6) to turn it."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # light above in the file: to the right once it is turned by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    seen = read_image(tmp_path / "turned.png", 8)[0]
    assert (seen[:, 4:] == 255).all() and (seen[:, :4] == 0).all()


# -- what people's folders look like -----------------------------------------------------------------------------------


def test_strays_beside_class_folders_do_not_remove_the_labels(tmp_path, capsys):
    write_images(tmp_path, 20)
    Image.new("RGB", (6, 6)).save(tmp_path / "cover.png")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a/captions.txt").write_text("a dog")
    images = open_folder(tmp_path)
    assert images.class_names == ("a", "b") and len(images) == 20
    said = capsys.readouterr().err
    assert "ignored 1 images that lie beside the class folders" in said
    assert "ignored 2 files that are no images" in said and ".db" in said and ".txt" in said


def test_many_images_beside_folders_mean_no_classes_and_it_is_said(tmp_path, capsys):
    write_images(tmp_path, 4)
    for i in range(4):
        Image.new("RGB", (6, 6)).save(tmp_path / f"{i}.png")
    images = open_folder(tmp_path)
    assert images.class_names == () and len(images) == 8
    assert "no classes" in capsys.readouterr().err


def test_a_class_may_be_a_link_and_links_may_lead_in_circles(tmp_path):
    write_images(tmp_path / "elsewhere", 6, "c")
    write_images(tmp_path / "data", 6)
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere/c")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    images = open_folder(tmp_path / "data")
    assert images.class_names == ("a", "b", "c") and images.labels.bincount().tolist() == [3, 3, 6]


def test_a_class_without_an_image_is_none(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("x")
    assert open_folder(tmp_path).class_names == ("a", "b")


def test_train_and_val_are_the_two_splits_and_no_classes(tmp_path):
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "val", 4)
    config = DataConfig(dataset="folder", folder=str(tmp_path), image_size=4, workers=0)
    train, test = load_images(config, ""), load_images(config, "", "test")
    assert (len(train), len(test)) == (20, 4)
    assert train.class_names == test.class_names == ("a", "b")


def test_a_share_is_held_out_and_stays_so_when_files_are_added(tmp_path):
    write_images(tmp_path, 200)
    config = DataConfig(dataset="folder", folder=str(tmp_path), image_size=4, workers=0, held_out=0.2)

    def parts() -> tuple[set[Path], set[Path]]:
        return set(load_images(config, "").files), set(load_images(config, "", "test").files)

    train, test = parts()
    assert not train & test and len(train | test) == 200 and 20 <= len(test) <= 60
    Image.new("RGB", (6, 6)).save(tmp_path / "a/000a.png")
    later_train, later_test = parts()
    assert train <= later_train and test <= later_test
    none = dataclasses.replace(config, held_out=0.0)
    assert load_images(none, "", "test") is None and len(load_images(none, "")) == 201


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "pictures", 4)
    config = DataConfig(dataset="folder", folder="~/pictures", workers=0, held_out=0.0)
    assert len(load_images(config, str(tmp_path / "data"))) == 4, "and is not looked for below data_root"


def test_samples_of_a_folder_are_drawn_and_no_prefix(tmp_path):
    """Dark images come first in the order of paths: a prefix would know nothing of the light ones."""
    for i in range(60):
        Image.new("RGB", (6, 6), (255 if i >= 40 else 0,) * 3).save(tmp_path / f"{i:03d}.png")
    whole = open_folder(tmp_path)
    assert 2 < int((whole.draw(30).images[:, 0, 0, 0] == 255).sum()) < 20
    assert torch.equal(whole.draw(30).images, whole.draw(30).images)
    some = open_folder(tmp_path, max_images=30)
    assert len(some) == 30 and 2 < sum(int(path.stem) >= 40 for path in some.files) < 20
    memory = MemoryImages("m", torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1), torch.arange(60))
    drawn = memory.draw(20)
    assert torch.equal(drawn.images.flatten().long(), drawn.labels) and int(drawn.labels.max()) > 40
    assert len(memory.draw(0)) == 60 and len(memory.draw(100)) == 60


def test_grey_folders_stay_one_channel(tmp_path):
    write_images(tmp_path, 4)
    images = open_folder(tmp_path, grey=True)
    assert images.shape == (1, 4, 4) and next(images.batches(1, 2, 0, CPU))[0].shape == (2, 1, 4, 4)


LOADING = """
import multiprocessing
import torch
from diffusion.config import DataConfig
from diffusion.data import load_images
images = load_images(DataConfig(dataset="folder", folder={folder!r}, image_size=4, workers=2), "")
batches = images.batches(1, 4, 0, torch.device("cpu"))
next(batches)
"""


def test_an_error_ends_a_run_with_workers_at_once(tmp_path):
    """Workers ignore the polite signals, so an exit that waits for them would never end."""
    write_images(tmp_path, 40)
    code = LOADING.format(folder=str(tmp_path)) + 'raise RuntimeError("something else went wrong")\n'
    done = python("-c", code)
    assert done.returncode == 1 and "something else went wrong" in done.stderr


def test_a_killed_worker_ends_the_run_at_once(tmp_path):
    write_images(tmp_path, 40)
    kill = "multiprocessing.active_children()[0].kill()\nfor _ in range(100):\n    next(batches)\n"
    code = LOADING.format(folder=str(tmp_path)) + kill
    done = python("-c", code)
    assert done.returncode == 1 and "a process that decodes images has died" in done.stderr
