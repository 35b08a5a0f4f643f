"""Runs in, one HTML page out."""

from __future__ import annotations

import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from common.files import write_text
from common.report.reading import read_run
from common.report.text import duration


def build(folders: list[Path], out: Path, title: str = "Training report") -> Path:
    """Write one page about the runs in `folders` to `out`; returns `out`."""
    runs = [read_run(folder) for folder in folders]
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "thousands": lambda n: f"{n:,}"}
    page = environment.get_template("report.html.j2").render(
        title=title, runs=runs, written=time.strftime("%Y-%m-%d %H:%M")
    )
    write_text(out, page)
    return out
