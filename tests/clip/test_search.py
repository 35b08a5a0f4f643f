"""A folder of images is found again by words and likeness, whatever its files are called and whatever happens to them
between two calls.
"""

from __future__ import annotations

import html.parser
import json
import os
import shutil
import signal
import sqlite3
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip import search
from clip.gallery import index as neighbours
from clip.gallery import update as updating
from clip.gallery.sheet import Answer, Hit, fit, link, save_sheet
from clip.gallery.store import Store
from common.logging import Display
from tests.clip.colours import Colours, chosen, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three colours, in sub-folders."""
    images = tmp_path / "my pictures"
    picture(images / "roses.jpg", (250, 20, 20))
    picture(images / "garden/lawn.png", (20, 250, 20))
    picture(images / "sea/the sea, in August.png", (20, 20, 250))
    picture(images / "sea/dusk.png", (160, 20, 200))
    return images


class Searcher:
    """`clip.search` on a folder, in this process."""

    def __init__(self, folder: Path, home: Path, capsys: Any, monkeypatch: Any) -> None:
        self.folder = folder
        self.home = home
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.model = Colours()
        self.err = ""

    def run(self, *words: str) -> dict[str, Any]:
        """The JSON that it prints."""
        self.monkeypatch.setattr(search, "load_chosen", chosen(self.model))
        argv = ["--run", str(self.home), "--images", str(self.folder), "--json", "--workers", "1", *words]
        search.main(search.parse(argv))
        captured = self.capsys.readouterr()
        self.err = captured.err
        return json.loads(captured.out.splitlines()[-1])

    def refused(self, *words: str) -> str:
        """The one line of an error."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            self.run(*words)
        assert stopped.value.code == 1
        errors = [line for line in self.capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]


@pytest.fixture
def searcher(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Searcher:
    return Searcher(folder, tmp_path / "run", capsys, monkeypatch)


def paths(result: dict[str, Any], query: int = 0) -> list[str]:
    return [hit["path"] for hit in result["queries"][query]["results"]]


def test_words_and_likeness(searcher: Searcher, tmp_path: Path) -> None:
    like = picture(tmp_path / "elsewhere/grass.png", (0, 200, 0))
    result = searcher.run("something red", "blue", "--like", str(like), "--top", "2")
    assert paths(result, 0)[0] == "roses.jpg"
    assert paths(result, 1) == ["sea/the sea, in August.png", "sea/dusk.png"]
    assert paths(result, 2)[0] == "garden/lawn.png"
    assert [query["query"] for query in result["queries"]] == ["“something red”", "“blue”", f"like {like}"]
    scores = [hit["score"] for hit in result["queries"][1]["results"]]
    assert scores == sorted(scores, reverse=True)
    # a cosine, of the embedding in the store
    mean = torch.nn.functional.normalize(torch.tensor([20.0, 20.0, 250.0]) + 1e-3, dim=0)
    assert scores[0] == pytest.approx(float(Colours().encode_texts(["blue"])[0] @ mean), abs=1e-5)
    assert result["images"]["new"] == result["images"]["usable"] == 4
    assert Path(result["index"]["path"]).is_relative_to(searcher.home)
    assert "something" in searcher.err  # a word that this model has never seen


def test_the_list_on_the_terminal(searcher: Searcher, capsys: Any) -> None:
    searcher.run()
    argv = ["--run", str(searcher.home), "--images", str(searcher.folder), "red", "--top", "1"]
    search.main(search.parse(argv))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "“red”"
    assert lines[1].split() == ["1", "0.995", "roses.jpg"]


def test_only_what_is_new_or_changed_is_embedded(searcher: Searcher, folder: Path) -> None:
    counts = ("new", "changed", "removed", "unchanged", "embedded")

    def after(*words: str) -> tuple[int, ...]:
        before = searcher.model.embedded
        images = searcher.run(*words)["images"]
        assert searcher.model.embedded - before == images["embedded"]
        return tuple(images[name] for name in counts)

    assert after() == (4, 0, 0, 0, 4)
    assert after() == (0, 0, 0, 4, 0)
    os.utime(folder / "roses.jpg")  # touched only
    assert after() == (0, 0, 0, 4, 0)
    (folder / "roses.jpg").rename(folder / "garden/roses.jpg")
    assert after() == (1, 0, 1, 3, 0)
    shutil.copy(folder / "garden/roses.jpg", folder / "copy.jpg")
    assert after() == (1, 0, 0, 4, 0)
    hit = searcher.run("red")["queries"][0]["results"][0]
    assert (hit["path"], hit["copies"]) == ("copy.jpg", ["garden/roses.jpg"])
    picture(folder / "copy.jpg", (20, 250, 240))
    assert after() == (0, 1, 0, 4, 1)
    assert "copy.jpg" not in paths(searcher.run("red", "--top", "1"))
    (folder / "garden/roses.jpg").unlink()
    assert after() == (0, 0, 1, 4, 0)
    assert paths(searcher.run("red"))[0] == "sea/dusk.png"


def test_a_change_behind_the_clocks_back_is_found_by_verify(searcher: Searcher, folder: Path) -> None:
    """Same size, same time."""
    path = picture(folder / "same.bmp", (250, 0, 0))
    searcher.run()
    status = path.stat()
    picture(path, (0, 0, 250))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert searcher.run()["images"]["changed"] == 0
    assert searcher.run("--verify")["images"]["changed"] == 1
    assert searcher.run("--verify")["images"]["embedded"] == 0


def test_odd_folders(searcher: Searcher, folder: Path) -> None:
    picture(folder / ".hidden.png", "red")
    picture(folder / ".cache/thumb.png", "red")
    (folder / "notes.txt").write_text("no image")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "linked.png").symlink_to(folder / "roses.jpg")
    picture(folder / "日本語 🐶.png", (250, 250, 0))
    picture(folder / 'quote " and \n newline.png', (250, 250, 0))
    strange = os.fsencode(folder) + b"/latin-1 \xe9t\xe9.png"
    shutil.copy(folder / "日本語 🐶.png", os.fsdecode(strange))
    (folder / "empty.jpg").touch()
    (folder / "broken.png").write_bytes((folder / "sea/dusk.png").read_bytes()[:40])
    (folder / "liar.png").write_text("not a png at all")
    result = searcher.run("red green", "--top", "20")
    assert result["images"]["usable"] == 8
    assert result["images"]["embedded"] == 5  # copies and links are of the same content
    broken = {Path(item["path"]).name: item["why"] for item in result["images"]["broken"]}
    assert broken.keys() == {"empty.jpg", "broken.png", "liar.png"}
    assert broken["empty.jpg"] == "empty file"
    assert broken["liar.png"] == "not a readable image"
    assert "3 cannot be used" in searcher.err
    assert "skipping" in searcher.err
    best = result["queries"][0]["results"][0]
    assert sorted([best["path"], *best["copies"]]) == [
        "latin-1 \ufffdt\ufffd.png",
        'quote " and \n newline.png',
        "日本語 🐶.png",
    ]
    # what became broken is no longer found, and what was mended is
    (folder / "roses.jpg").write_bytes(b"gone bad")
    shutil.copy(folder / "sea/dusk.png", folder / "broken.png")
    result = searcher.run("red", "--top", "20")
    assert "roses.jpg" not in paths(result)
    assert {Path(item["path"]).name for item in result["images"]["broken"]} == {
        "empty.jpg", "liar.png", "roses.jpg", "linked.png"
    }  # fmt: skip
    assert result["images"]["removed"] == 0
    copies = {hit["path"]: hit["copies"] for hit in result["queries"][0]["results"]}
    assert copies["broken.png"] == ["sea/dusk.png"]


def test_images_are_read_as_they_were_meant(searcher: Searcher, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    Image.new("RGB", (16, 16), (255, 255, 0)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(folder / "clear.png")  # white: nothing red can be seen
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(folder / "print.jpg")
    result = searcher.run("red", "--top", "20")
    assert not result["images"]["broken"]
    assert "print.jpg" in paths(result)[:2]
    scores = {hit["path"]: hit["score"] for hit in result["queries"][0]["results"]}
    assert scores["deep.png"] == pytest.approx(scores["clear.png"], abs=1e-3)  # grey and white are of one colour


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(searcher: Searcher, folder: Path) -> None:
    (folder / "roses.jpg").chmod(0)
    result = searcher.run()
    assert [item["why"] for item in result["images"]["broken"]] == ["EACCES Permission denied"]
    (folder / "roses.jpg").chmod(0o644)
    assert searcher.run()["images"]["new"] == 1


def test_a_file_that_cannot_be_opened_is_named(searcher: Searcher, folder: Path, monkeypatch: Any) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "roses.jpg":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = searcher.run()
    assert [item["why"] for item in result["images"]["broken"]] == ["EACCES Permission denied"]


def test_folders_without_images(searcher: Searcher, folder: Path) -> None:
    searcher.run()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert "has no usable image" in searcher.refused("red")
    picture(folder / "again.png", (250, 20, 20))
    assert searcher.run("red")["images"]["new"] == 1
    searcher.folder = folder / "nowhere"
    assert "is not a folder" in searcher.refused("red")


# -- what must not be lost, or mistaken --------------------------------------------------------------------------------


def test_killed_in_the_middle_nothing_is_lost(searcher: Searcher, folder: Path, monkeypatch: Any) -> None:
    """By a signal that no program can catch, after two of its batches of two."""
    for i in range(6):
        picture(folder / f"more/{i}.png", (40 * i, 100, 100))
    monkeypatch.setattr(updating, "BATCH", 2)
    place = search.default_index(searcher.home, folder.absolute())
    child = os.fork()
    if child == 0:  # the process that will be killed
        embed = searcher.model.encode_images

        def deadly(pixels: torch.Tensor) -> torch.Tensor:
            if searcher.model.embedded == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return embed(pixels)

        store = Store(place, searcher.model.weights_hash, "run", folder.absolute())
        updating.update(store, folder.absolute(), deadly, searcher.model.preprocess, 1, Display(False))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    images = searcher.run("red")["images"]
    assert (images["unchanged"], images["new"], images["embedded"]) == (4, 6, 6)


def test_an_index_of_other_weights_is_refused(searcher: Searcher, folder: Path) -> None:
    place = searcher.home / "x.sqlite"
    searcher.run("--index", str(place))
    before = place.read_bytes()
    searcher.model = Colours("bb" * 32)
    message = searcher.refused("red", "--index", str(place))
    assert "aaaaaaaaaaaa of run" in message
    assert "--rebuild" in message
    assert place.read_bytes() == before
    assert searcher.run("red", "--index", str(place), "--rebuild")["images"]["embedded"] == 4
    searcher.folder = folder / "sea"
    message = searcher.refused("red", "--index", str(place))
    assert f"of the images in {folder}" in message
    assert searcher.run("red", "--index", str(place), "--rebuild")["images"]["usable"] == 2


def test_files_of_others_are_left_alone(searcher: Searcher, tmp_path: Path) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("Dear friend, " * 200)
    database = tmp_path / "bank.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE money (amount)")
    connection.close()
    for path, words in ((text, "is damaged or no index"), (database, "is a database of another program")):
        before = path.read_bytes()
        message = searcher.refused("--index", str(path), "--rebuild")
        assert words in message
        assert "give another --index" in message
        assert path.read_bytes() == before


def test_the_same_again_with_the_graph(searcher: Searcher, folder: Path, monkeypatch: Any) -> None:
    """Added to, passed over what is gone, built anew when that is much or when its file is damaged."""
    built = []
    build = neighbours.build
    monkeypatch.setattr(neighbours, "build", lambda kind, *rest: built.append(kind) or build(kind, *rest))
    for i in range(20):
        picture(folder / f"greens/{i:02}.png", (5 * i, 200, 3 * i))

    def both() -> None:
        flat = searcher.run("red", "blue", "--top", "30")
        built.clear()
        graph = searcher.run("red", "blue", "--top", "30", "--index-kind", "hnsw")
        assert paths(graph, 0) == paths(flat, 0)
        assert paths(graph, 1) == paths(flat, 1)
        assert flat["index"]["exact"] and not graph["index"]["exact"]

    both()
    assert built == ["hnsw"]
    picture(folder / "new.png", (255, 0, 0))
    (folder / "greens/07.png").unlink()
    both()
    assert built == []  # one came and one went
    for i in range(8, 20):
        (folder / f"greens/{i:02}.png").unlink()
    both()
    assert built == ["hnsw"]
    (graph,) = searcher.home.rglob("*.hnsw")
    graph.write_bytes(graph.read_bytes()[:100])
    both()
    assert built == ["hnsw"]
    for name in ("zinnias.jpg", "asters.jpg"):  # numbers begin anew, and stand for other images than in the old graph
        next(searcher.home.rglob("index.sqlite")).unlink()
        next(folder.glob("*s.jpg")).rename(folder / name)
        both()
        assert built == ["hnsw"]
    assert len(list(searcher.home.rglob("*.hnsw"))) == 1


def test_the_approximate_index_finds_nearly_all() -> None:
    """Of 3,000 vectors in clusters; and with half of the numbers ruled out, none of those."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 32))
    vectors = centres[rng.integers(50, size=3000)] + 0.5 * rng.normal(size=(3000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(3000, dtype=np.int64) * 3 + 1
    queries = vectors[::60]
    flat, graph = (neighbours.build(kind, ids, vectors) for kind in neighbours.KINDS)
    scores, exact = neighbours.search(flat, queries, 10)
    order = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert (exact == ids[order]).mean() > 0.99  # equal but for ties
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, order, 1), atol=1e-5)
    _, found = neighbours.search(graph, queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.95
    alive = ids[::2]
    for index in (flat, graph):
        _, found = neighbours.search(index, queries, 10, alive)
        assert np.isin(found, alive).all()


# -- the contact sheet -------------------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """The links and the texts of a page, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        assert not any(name.startswith("on") for name in found)
        if tag == "a":
            self.links.append(found["href"] or "")
        if tag == "img":
            self.sources.append(found["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_text_and_not_markup(searcher: Searcher, folder: Path) -> None:
    picture(folder / "<img src=x onerror=alert(1)>.png", (251, 0, 0))
    picture(folder / "100% #1? & \"more\" 'x'.png", (252, 0, 0))
    picture(folder / "日本語.png", (253, 0, 0))
    shutil.copy(folder / "roses.jpg", os.fsdecode(os.fsencode(folder) + b"/\xe9.jpg"))
    result = searcher.run("red <script>alert(2)</script>", "--top", "20")
    page = Path(result["sheet"]["html"])
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    assert "script" not in links.tags
    assert links.tags.count("img") == len(links.links) == 7
    assert "<img src=x onerror=alert(1)>.png" in links.text
    assert "<script>alert(2)</script>" in links.text
    for target in links.links:  # relative, and right byte by byte
        assert not target.startswith("/")
        assert (page.parent / os.fsdecode(urllib.parse.unquote_to_bytes(target))).is_file()
    assert all(source.startswith("data:image/jpeg;base64,") for source in links.sources)  # nothing is fetched
    with Image.open(result["sheet"]["png"]) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width <= 8 * 204 + 12
        colours = sheet.convert("RGB").getcolors(1_000_000)
        assert any(abs(r - 252) < 4 and g < 8 and b < 8 for _, (r, g, b) in colours)


def test_the_sheet_beside_the_images_is_not_one_of_them(searcher: Searcher, folder: Path) -> None:
    searcher.run("red", "--out", str(folder))
    assert (folder / "contact_sheet.png").is_file()
    assert searcher.run("red", "--out", str(folder))["images"]["usable"] == 4


def test_a_file_that_has_gone_since_is_grey(folder: Path, tmp_path: Path) -> None:
    answers = [Answer("red", (Hit(0.9, ("roses.jpg",)), Hit(0.8, ("gone.jpg",))))]
    faults = save_sheet(answers, folder, tmp_path / "a.html", tmp_path / "a.png", "")
    assert [path.name for path, _ in faults] == ["gone.jpg"]
    assert (tmp_path / "a.png").is_file()


def test_links_and_cut_names() -> None:
    assert link(Path("/a/b c/d.png"), Path("/a/e")) == "../b%20c/d.png"

    class Ten:
        def getlength(self, text: str) -> float:
            return 10.0 * len(text)

    assert fit("abcdef", Ten(), 60) == "abcdef"  # type: ignore[arg-type]
    assert fit("abcdefg", Ten(), 60) == "abcde…"  # type: ignore[arg-type]
    assert fit("folder/name.png", Ten(), 90, end=True) == "…name.png"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--images", "x", "red"], "--run --weights is required"),
        (["--run", "r", "--weights", "w", "--images", "x"], "not allowed with"),
        (["--run", "r", "red"], "--images"),
        (["--run", "r", "--images", "x", "--top", "0"], "--top must be at least 1"),
        (["--run", "r", "--images", "x", " "], "a query is empty"),
        (["--run", "r", "--images", "x", "--activation", "gelu"], "for --weights"),
        (["--run", "r", "--images", "x", "--tpo", "3"], "unrecognized arguments: --tpo"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        search.parse(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_bad_example_is_told_first(searcher: Searcher, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "bad.jpg").write_text("no")
    monkeypatch.setattr(Colours, "encode_images", lambda *args: pytest.fail("embedded before the mistake was told"))
    assert "bad.jpg: not a readable image" in searcher.refused("--like", str(tmp_path / "bad.jpg"))
    assert "ENOENT" in searcher.refused("--like", str(tmp_path / "nowhere.jpg"))
