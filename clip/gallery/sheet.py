"""What was found as a contact sheet: a page that needs no other file, and a picture."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip.gallery.update import FAULTS, why
from common.files import atomic_open, write_text
from common.images.reading import open_image

THUMBNAIL = 192  # pixels of the longer side
MARGIN, LINE = 12, 16  # pixels
MISSING = (200, 200, 200)
PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 1280px; padding: 0 1rem; }
  h2 { margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
  ol { display: flex; flex-wrap: wrap; gap: 1rem; list-style: none; padding: 0; }
  li { width: {{ size }}px; }
  img { display: block; height: {{ size }}px; object-fit: contain; width: {{ size }}px; }
  small { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ note }}</p>
{% for query in queries %}
<h2>{{ query.name }}</h2>
<ol>
{% for hit in query.hits %}
<li><a href="{{ hit.link }}"><img src="{{ hit.image }}" alt="{{ hit.name }}" loading="lazy"></a>
<b>{{ "%.3f"|format(hit.score) }}</b> <small>{{ hit.name }}\
{% if hit.copies %} (and {{ hit.copies }} {{ "copy" if hit.copies == 1 else "copies" }}){% endif %}</small></li>
{% endfor %}
</ol>
{% endfor %}
</body>
</html>
""")


@dataclass(frozen=True)
class Hit:
    """A found image. `paths`: all files with this content, below the folder."""

    score: float  # cosine
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What was found for a query, best first."""

    query: str
    hits: tuple[Hit, ...]


def save_sheet(answers: Sequence[Answer], folder: Path, page: Path, picture: Path, note: str) -> list[tuple[Path, str]]:
    """Write the page and the picture; returns the files that could not be read any more, and why.

    The page holds its thumbnails and links to the images relative to itself: it may be moved together with them. What
    a person called a file or asked for is text in it and never markup.
    """
    thumbnails: dict[str, Image.Image] = {}
    faults = []
    for path in dict.fromkeys(hit.paths[0] for answer in answers for hit in answer.hits):
        try:
            thumbnails[path] = thumbnail(folder / path)
        except (*FAULTS, Image.DecompressionBombError) as error:
            faults.append((folder / path, why(error)))
            thumbnails[path] = Image.new("RGB", (THUMBNAIL, THUMBNAIL), MISSING)
    write_text(page, render(answers, folder, page, thumbnails, note))
    with atomic_open(picture) as file:
        draw(answers, thumbnails).save(file, "PNG")
    return faults


def thumbnail(path: Path) -> Image.Image:
    """The whole image, its longer side `THUMBNAIL` pixels."""
    return ImageOps.contain(open_image(path), (THUMBNAIL, THUMBNAIL))


def render(answers: Sequence[Answer], folder: Path, page: Path, thumbnails: dict[str, Image.Image], note: str) -> str:
    """The page's text."""
    images = {path: as_data(image) for path, image in thumbnails.items()}
    queries = []
    for answer in answers:
        hits = [
            {
                "score": hit.score,
                "name": printable(hit.paths[0]),
                "copies": len(hit.paths) - 1,
                "link": link(folder / hit.paths[0], page.parent),
                "image": images[hit.paths[0]],
            }
            for hit in answer.hits
        ]
        queries.append({"name": answer.query, "hits": hits})
    return PAGE.render(title=printable(folder.name) or "images", note=note, queries=queries, size=THUMBNAIL)


def as_data(image: Image.Image) -> str:
    """An image as a link that holds it."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def link(path: Path, start: Path) -> str:
    """From a page in `start` to a file; every byte of its name that means something in a link is escaped."""
    relative = os.fsencode(os.path.relpath(path.absolute(), start.absolute()))
    return urllib.parse.quote(relative if os.sep == "/" else relative.replace(b"\\", b"/"))


def printable(text: str) -> str:
    """A file name as text: bytes that are none become U+FFFD."""
    return os.fsencode(text).decode("utf-8", errors="replace")


def draw(answers: Sequence[Answer], thumbnails: dict[str, Image.Image]) -> Image.Image:
    """The picture: a row a query, under its words."""
    columns = max(1, *(len(answer.hits) for answer in answers))
    cell = THUMBNAIL + MARGIN
    row = THUMBNAIL + 5 * LINE + MARGIN
    columns = min(columns, 8)
    lines = [-(-len(answer.hits) // columns) for answer in answers]  # rows of images of each query
    title = 2 * LINE
    height = MARGIN + sum(title + row * max(1, count) for count in lines)
    sheet = Image.new("RGB", (MARGIN + columns * cell, height), "white")
    pen = ImageDraw.Draw(sheet)
    font, small = _font(16), _font(11)
    top = MARGIN
    for answer, count in zip(answers, lines, strict=True):
        pen.text((MARGIN, top), fit(answer.query, font, sheet.width - 2 * MARGIN), "black", font)
        for i, hit in enumerate(answer.hits):
            left = MARGIN + (i % columns) * cell
            y = top + title + (i // columns) * row
            image = thumbnails[hit.paths[0]]
            sheet.paste(image, (left + (THUMBNAIL - image.width) // 2, y + (THUMBNAIL - image.height) // 2))
            pen.text((left, y + THUMBNAIL + 2), f"{hit.score:.3f}", "black", small)
            name = fit(printable(hit.paths[0]), small, THUMBNAIL, end=True)
            pen.text((left, y + THUMBNAIL + 2 + LINE), name, "dimgray", small)
        top += title + row * max(1, count)
    return sheet


def fit(text: str, font: ImageFont.FreeTypeFont, width: int, end: bool = False) -> str:
    """A text in one line, cut to so many pixels; with `end` it keeps its end, as a path wants."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    for length in range(len(text), 0, -1):
        part = "…" + text[-length:] if end else text[:length] + "…"
        if font.getlength(part) <= width:
            return part
    return "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's font, which has more letters than Pillow's own."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
