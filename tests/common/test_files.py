"""Where a person's own files are looked for."""

from __future__ import annotations

from pathlib import Path

from common.files import place_of


def test_a_persons_file_is_found_in_the_data_folder_else_here(tmp_path, monkeypatch):
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        folder.mkdir()
        (folder / "both.csv").touch()
    (here / "mine.csv").touch()
    monkeypatch.chdir(here)
    assert place_of("both.csv", data) == data / "both.csv"
    assert place_of("mine.csv", data) == place_of("./mine.csv", data) == Path("mine.csv")
    assert place_of("nowhere.csv", data) == data / "nowhere.csv"  # what a message names
    assert place_of("", data) == data
    assert place_of(str(here / "mine.csv"), str(data)) == here / "mine.csv"
    monkeypatch.setenv("HOME", str(here))
    assert place_of("~/mine.csv", data) == here / "mine.csv"
