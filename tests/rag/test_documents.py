"""A person's own folder, with everything that is wrong in such folders."""

from __future__ import annotations

import itertools

import pytest

from common.errors import ProjectError
from rag.config import DataConfig
from rag.data import documents
from rag.data.chunks import Section, chunk

CONFIG = DataConfig(dataset="folder", folder="x", chunk_words=20, chunk_overlap=5)


def make_pdf(path, text: str, password: str = "") -> None:
    """A PDF of one page, written by hand: pypdf reads text and writes none."""
    import pypdf

    content = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    table = b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    path.write_bytes(data + table + b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(data))
    if password:
        writer = pypdf.PdfWriter(clone_from=path)
        writer.encrypt(password)
        writer.write(path)


def write_folder(folder) -> None:
    import docx

    (folder / "deep/.hidden").mkdir(parents=True)
    (folder / "notes.md").write_text(
        "intro\n\n# Cats\n\nCats sleep.\n\n## Old cats\n\nThey sleep more.\n\n```\n# no heading\n```\n\n"
        "# Dogs\nDogs run."
    )
    (folder / "deep/page.html").write_text(
        "<html><head><title>Site</title><script>alert('cats')</script></head><body><h1>Fish</h1><p>Fish <b>swim</b>."
        "</p><ul><li>carp</li></ul><style>p {}</style><p hidden>secret</p><h2>Sharks</h2><div><p>bite</p></div></body>"
    )
    (folder / "bare.htm").write_text("<div>only a div</div>")
    (folder / "plain.txt").write_bytes("\ufeffBöse Wörter.\r\n\r\nZweiter Absatz.".encode())
    (folder / "wide.txt").write_bytes("in UTF-16".encode("utf-16"))
    document = docx.Document()
    document.add_heading("Birds", 1)
    document.add_paragraph("Birds fly.")
    document.add_heading("Owls", 2)
    table = document.add_table(1, 2)
    table.cell(0, 0).text = "owl"
    table.cell(0, 1).text = "night"
    document.save(folder / "word.docx")
    make_pdf(folder / "good.pdf", "Horses gallop.")
    make_pdf(folder / "locked.pdf", "Secret horses.", "password")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "binary.txt").write_bytes(b"\0\1\2")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "broken.docx").write_bytes(b"no zip")
    (folder / "copy.md").write_bytes((folder / "notes.md").read_bytes())
    (folder / "empty.txt").write_text("\n \n")
    (folder / "picture.png").write_bytes(b"png")
    (folder / "deep/.hidden/x.txt").write_text("hidden")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(100_000_000)  # one line of 100 MB


def test_every_kind_is_read_and_the_rest_is_named(tmp_path):
    write_folder(tmp_path)
    data = documents.load_folder(tmp_path, CONFIG)
    found = {passage.id: (passage.title, passage.text) for passage in data.passages}
    assert found["copy.md#0"] == ("copy", "intro")
    assert found["copy.md#1"] == ("Cats", "Cats sleep.")
    assert found["copy.md#2"] == ("Cats > Old cats", "They sleep more. ``` # no heading ```")
    assert found["copy.md#3"] == ("Dogs", "Dogs run.")
    assert found["deep/page.html#0"] == ("Site > Fish", "Fish swim . carp")
    assert found["deep/page.html#1"] == ("Site > Fish > Sharks", "bite")
    assert found["bare.htm#0"][1] == "only a div"
    assert found["plain.txt#0"] == ("plain", "Böse Wörter. Zweiter Absatz.")
    assert found["wide.txt#0"][1] == "in UTF-16"
    assert found["word.docx#0"] == ("Birds", "Birds fly.") and found["word.docx#1"] == ("Birds > Owls", "owl | night")
    assert found["good.pdf#0"] == ("good, page 1", "Horses gallop.")
    text = " ".join(part for pair in found.values() for part in pair).lower()
    assert not any(word in text for word in ("secret", "alert", "hidden"))
    notes = "\n".join(data.notes)
    for words in (
        "(more than data.max_megabytes=50): huge.txt", "(not UTF-8 text): latin1.txt", "(not text): binary.txt",
        "(encrypted): locked.pdf", "(no text in it): empty.txt", "(the same as another file): notes.md", "picture.png",
        "broken.pdf", "broken.docx",
    ):  # fmt: skip
        assert words in notes, words
    assert ".hidden" not in notes


def test_a_huge_line_below_the_limit_is_cut(tmp_path):
    """Ten megabytes without a line end, and a word of a million letters."""
    (tmp_path / "line.txt").write_text("word " * 2_000_000)
    (tmp_path / "long.txt").write_text("x" * 1_000_000)
    data = documents.load_folder(tmp_path, DataConfig(dataset="folder", folder="x"))
    assert max(len(passage.text.split()) for passage in data.passages) <= 180
    assert max(len(word) for passage in data.passages[-40:] for word in passage.text.split()) == 200


def test_empty_folders_are_refused(tmp_path):
    with pytest.raises(ProjectError, match="is no folder"):
        documents.load_folder(tmp_path / "nowhere", CONFIG)
    with pytest.raises(ProjectError, match="holds no document that can be read: it is empty"):
        documents.load_folder(tmp_path, CONFIG)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ProjectError, match="holds no text"):
        documents.load_folder(tmp_path, CONFIG)


def test_chunks():
    """Nothing is lost, nothing is too long, sections stay apart, and cut passages overlap."""
    words = [f"w{i}" for i in range(200)]
    sections = [Section("a", (" ".join(words[:50]), "Short. Next.")), Section("b", (" ".join(words[50:]),))]
    found = list(chunk(sections, 20, 5))
    assert all(len(text.split()) <= 20 for _, text in found)
    assert {word for _, text in found for word in text.split()} == {*words, "Short.", "Next."}
    for (heading, text), (following, after) in itertools.pairwise(found):
        if heading == following:
            assert text.split()[-5:] == after.split()[:5]
    assert not any("w49" in text and "w50" in text for _, text in found)
    assert list(chunk([Section("a", ("one two.", "three."))], 10, 5)) == [("a", "one two. three.")]
    assert list(chunk([Section("", ())], 10, 0)) == []
    sentences = "One two three. Four five six. Seven eight nine."
    assert [text for _, text in chunk([Section("", (sentences,))], 6, 0)] == [
        "One two three. Four five six.",
        "Seven eight nine.",
    ]


def test_changes():
    before = {"a": "1", "b": "2", "c": "3"}
    assert documents.changes(before, {"a": "1", "b": "9", "d": "4"}) == {
        "added": ["d"],
        "changed": ["b"],
        "deleted": ["c"],
    }
