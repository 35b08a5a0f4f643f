"""`--help` explains every setting, and nobody can add one without a word about it."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap

import pytest

from common.config import load
from common.projects import find_projects
from common.settings import comments_in, describe, sections_of
from tests.helpers import ROOT, schema_of

PROGRAMS = sorted(
    f"{project}.{program}"
    for project in find_projects()
    for program in ("train", "eval", "sample", "sweep")
    if (ROOT / project / f"{program}.py").is_file()
)


def test_the_projects_are_found():
    assert {"diffusion", "gnn", "ppo"} <= set(find_projects()) and len(PROGRAMS) >= 8


@pytest.mark.parametrize("project", find_projects())
def test_every_setting_has_a_comment(project):
    sections = sections_of(schema_of(project))
    silent = [setting.key for section in sections for setting in section.settings if not setting.comment]
    assert not silent, "a comment at the end of the line, or on the lines above it"
    assert all(section.about for section in sections[1:])


@pytest.mark.parametrize("project", find_projects())
def test_the_text_holds_every_setting(project):
    text = " ".join(describe(schema_of(project)).split())
    for section in sections_of(schema_of(project)):
        for setting in section.settings:
            assert f"{setting.key}={setting.default} " in text
            assert " | ".join(setting.choices) in text and setting.comment in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_without_pytorch(program):
    """As a process: everything that answers is imported before PyTorch."""
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_module('{program}', run_name='__main__')"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "train.steps=" in done.stdout and "usage: python -m" in done.stdout and not done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1  # of CPU time: others may be busy


def test_help_ends_with_status_0(capsys):
    with pytest.raises(SystemExit) as stop:
        load(schema_of("gnn"), "gnn", "eval", ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--run" in out and "node | link | graph | community" in out and "sampling.fanouts=[10,10]" in out


def test_both_styles_of_comment(tmp_path, monkeypatch):
    """At the end of the line, above it, both, inside a list of choices; words for tools are left out."""
    (tmp_path / "beads_config.py").write_text(
        textwrap.dedent('''
        from __future__ import annotations
        from dataclasses import dataclass, field
        from typing import Literal


        @dataclass(frozen=True)
        class Inner:
            """Beads."""

            count: int = 3  # how many
            # above,
            # on two lines
            colour: Literal["red", "blue"] = "red"
            both: tuple[int, ...] = (1, 2)  # and after
            kind: Literal[  # after the bracket
                "a",
                "b",  # of the second
            ] = "a"
            silent: bool = False

            def method(self) -> None:
                x: int = 1  # not a setting


        @dataclass(frozen=True)
        class Base:
            speed: float = 1e-4  # of the base
            seed: int = 0  # of the base, too


        @dataclass(frozen=True)
        class Config(Base):
            speed: float = 2.0  # type: ignore  # noqa: E501  # said anew
            name: str = ""  # a name # with a sign
            inner: Inner = field(default_factory=Inner)
        ''')
    )
    monkeypatch.syspath_prepend(tmp_path)
    from beads_config import Config

    top, inner = sections_of(Config)
    assert [(s.key, s.default, s.comment) for s in top.settings] == [
        ("speed", "2.0", "said anew"),
        ("seed", "0", "of the base, too"),
        ("name", '""', "a name with a sign"),
    ]
    assert (inner.name, inner.about) == ("inner", "Beads.")
    assert [(s.key, s.default, s.choices, s.comment) for s in inner.settings] == [
        ("inner.count", "3", (), "how many"),
        ("inner.colour", "red", ("red", "blue"), "above, on two lines"),
        ("inner.both", "[1,2]", (), "and after"),
        ("inner.kind", "a", ("a", "b"), "after the bracket of the second"),
        ("inner.silent", "false", (), ""),
    ]
    assert "Inner.x" not in comments_in("beads_config")
