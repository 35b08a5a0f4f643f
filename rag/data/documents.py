"""A person's own folder: text, Markdown, HTML, PDF and Word files become passages.

What cannot be read is left out, counted and named, and never ends the program: of a thousand files one is always odd.
Nothing that a document says is followed: no link, no script, no macro.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ProjectError, first_line
from common.files import sha256
from rag.config import DataConfig
from rag.data.chunks import Section, chunk
from rag.data.corpus import Collection, Passage, Passages, named

KINDS = (".txt", ".md", ".html", ".htm", ".pdf", ".docx")
MARKDOWN_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
HTML_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
HTML_TEXT = ("p", "li", "td", "th", "pre", "blockquote", "dt", "dd", "figcaption")
LONGEST_WORD = 200  # characters: what is longer is no word, and no model reads it


class Unreadable(Exception):
    """A file that is left out; the message says why, in a few words."""


@dataclass
class Folder:
    """What is in a folder, before any of it is read.

    Attributes:
        files: path below the folder -> SHA-256 of its content, sorted.
        skipped: reason -> paths.
    """

    files: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, path: str, reason: str) -> None:
        """Note a file that is left out."""
        self.skipped.setdefault(reason, []).append(path)

    def notes(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{len(paths)} file{'s' * (len(paths) > 1)} left out ({reason}): {named(paths)}"
            for reason, paths in self.skipped.items()
        ]


def check_folder(folder: Path) -> None:
    """`ProjectError` where there is no such folder."""
    if not folder.is_dir():
        raise ProjectError(f"{folder} is no folder; give one with {', '.join(KINDS)} files")


def scan(folder: Path, config: DataConfig) -> Folder:
    """The documents of a folder and its sub-folders; hidden ones, other kinds, files too large, and second copies of
    the same content are left out. `ProjectError` where there is no such folder or nothing in it.
    """
    check_folder(folder)
    found = Folder()
    first: dict[str, str] = {}  # content -> the file that had it first
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part[0] == "." for part in name.split("/")) or not path.is_file():
            continue
        if path.suffix.lower() not in KINDS:
            found.skip(name, f"not {', '.join(KINDS)}")
            continue
        try:
            if path.stat().st_size > config.max_megabytes * 1_000_000:
                found.skip(name, f"more than data.max_megabytes={config.max_megabytes}")
                continue
            digest = sha256(path)
        except OSError as error:
            found.skip(name, str(error.strerror).lower())
            continue
        if digest in first:
            found.skip(name, "the same as another file")
            continue
        first[digest] = name
        found.files[name] = digest
    if not found.files:
        left = "; ".join(found.notes()) or "it is empty"
        raise ProjectError(f"{folder} holds no document that can be read: {left}")
    return found


def load_folder(folder: Path, config: DataConfig) -> Collection:
    """All passages of a folder; it has no questions."""
    found = scan(folder, config)
    passages = [passage for name in found.files for passage in read_document(folder, name, config, found)]
    if not passages:
        raise ProjectError(f"{folder} holds no text: {'; '.join(found.notes()) or 'its documents are empty'}")
    return Collection(folder.name, Passages(passages), notes=found.notes())


def read_document(folder: Path, name: str, config: DataConfig, found: Folder) -> list[Passage]:
    """The passages of one file, with ids `<file>#<number>`; none, and a note, for one that cannot be read."""
    try:
        sections = read_sections(folder / name)
    except Unreadable as error:
        found.skip(name, str(error))
        return []
    except Exception as error:  # readers of PDF and Word raise whatever they come upon
        found.skip(name, f"damaged: {first_line(error)[:80]}")
        return []
    passages = []
    for number, (heading, text) in enumerate(chunk(sections, config.chunk_words, config.chunk_overlap)):
        passages.append(Passage(f"{name}#{number}", text, heading or Path(name).stem, name))
    if not passages:
        found.skip(name, "no text in it")
    return passages


def read_sections(path: Path) -> list[Section]:
    """A file's text under its headings. `Unreadable` for one that is not what its name says."""
    readers = {".txt": read_text, ".md": read_markdown, ".pdf": read_pdf, ".docx": read_word}
    return [
        Section(section.heading, tuple(cut_words(paragraph) for paragraph in section.paragraphs))
        for section in readers.get(path.suffix.lower(), read_html)(path)
    ]


def cut_words(text: str) -> str:
    """Text in which no run of letters is longer than a word may be."""
    if all(len(word) <= LONGEST_WORD for word in text.split()):
        return text
    return " ".join(
        word[start : start + LONGEST_WORD] for word in text.split() for start in range(0, len(word), LONGEST_WORD)
    )


def decode(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 where its first bytes say so."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8 text") from None
    if "\0" in text:
        raise Unreadable("not text")
    return text


def paragraphs_of(text: str) -> tuple[str, ...]:
    """Text between empty lines."""
    return tuple(part.strip() for part in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")) if part.strip())


def read_text(path: Path) -> list[Section]:
    """Plain text: one section."""
    return [Section("", paragraphs_of(decode(path)))]


def read_markdown(path: Path) -> list[Section]:
    """Markdown: a section for each heading; a `#` within a block of code is none."""
    sections: list[Section] = []
    headings: dict[int, str] = {}
    lines: list[str] = []
    fenced = False
    for line in [*decode(path).splitlines(), "# "]:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        mark = None if fenced else MARKDOWN_HEADING.match(line)
        if mark or line == "# ":
            sections.append(Section(trail(headings), paragraphs_of("\n".join(lines))))
            lines = []
        if mark:
            headings = {level: text for level, text in headings.items() if level < len(mark[1])}
            headings[len(mark[1])] = mark[2]
        else:
            lines.append(line)
    return sections


def trail(headings: dict[int, str]) -> str:
    """A heading after those it stands under."""
    return " > ".join(headings[level] for level in sorted(headings))


def read_html(path: Path) -> list[Section]:
    """A web page: a section for each heading; scripts, styles and what is hidden are left out."""
    from bs4 import BeautifulSoup

    page = BeautifulSoup(path.read_bytes(), "html.parser")
    for tag in page(["script", "style", "noscript", "template", "svg", "iframe"]):
        tag.decompose()
    for tag in page(hidden=True):
        tag.decompose()
    title = page.title.get_text(" ", strip=True) if page.title else ""
    headings = {0: title} if title else {}
    sections: list[Section] = []
    texts: list[str] = []
    body = page.body or page
    for tag in body.find_all([*HTML_HEADINGS, *HTML_TEXT]):
        text = tag.get_text(" ", strip=True)
        if tag.name in HTML_HEADINGS:
            sections.append(Section(trail(headings), tuple(texts)))
            texts = []
            level = int(tag.name[1])
            headings = {old: words for old, words in headings.items() if old < level} | {level: text}
        elif text and tag.find(HTML_TEXT) is None:  # the innermost: a list in a cell must not be read twice
            texts.append(text)
    sections.append(Section(trail(headings), tuple(texts)))
    if not any(section.paragraphs for section in sections):  # text in nothing but <div>
        sections = [Section(title, paragraphs_of(body.get_text("\n", strip=True)))]
    return sections


def read_pdf(path: Path) -> list[Section]:
    """A PDF: a section for each page. Pictures of text have none."""
    import pypdf

    reader = pypdf.PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("encrypted")
    pages = [paragraphs_of(page.extract_text()) for page in reader.pages]
    return [Section(f"{path.stem}, page {number}", text) for number, text in enumerate(pages, start=1)]


def read_word(path: Path) -> list[Section]:
    """A Word document: a section for each heading; a row of a table is a paragraph."""
    import docx
    from docx.table import Table

    headings: dict[int, str] = {}
    sections: list[Section] = []
    texts: list[str] = []
    for item in docx.Document(str(path)).iter_inner_content():
        if isinstance(item, Table):
            texts += [" | ".join(cell.text.strip() for cell in row.cells) for row in item.rows]
            continue
        style = item.style.name if item.style is not None and item.style.name else ""
        if style.startswith("Heading ") and style[8:].isdecimal():
            sections.append(Section(trail(headings), tuple(texts)))
            texts = []
            level = int(style[8:])
            headings = {old: words for old, words in headings.items() if old < level} | {level: item.text.strip()}
        elif item.text.strip():
            texts.append(item.text.strip())
    return [*sections, Section(trail(headings), tuple(texts))]


def changes(before: dict[str, str], now: dict[str, str]) -> dict[str, list[str]]:
    """What happened to a folder's files between two scans: added, changed and deleted paths."""
    return {
        "added": [name for name in now if name not in before],
        "changed": [name for name in now if name in before and now[name] != before[name]],
        "deleted": [name for name in before if name not in now],
    }


def count_kinds(names: Iterator[str]) -> str:
    """`3 md, 1 pdf`."""
    kinds = Counter(Path(name).suffix.lower().removeprefix(".") for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
