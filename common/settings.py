"""What `--help` says of the settings: read from the source of the config dataclasses, so that it cannot fall behind.

A field is explained by the comment at the end of its lines, or by the comment lines right above it, or by both.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import os
import shutil
import sys
import textwrap
import tokenize
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

TOOL_COMMENTS = ("type:", "noqa", "fmt:", "pragma")  # for tools, not for people


@dataclass(frozen=True)
class Setting:
    """One field of a config, as a person sets it."""

    key: str  # dotted
    default: str
    choices: tuple[str, ...]
    comment: str


@dataclass(frozen=True)
class Section:
    """The settings of one config dataclass, without those of its own sections."""

    name: str  # dotted; empty at the top
    about: str
    settings: tuple[Setting, ...]


def sections_of(schema: type, name: str = "", about: str = "") -> list[Section]:
    """Every section of a config class, the top one first, each with its settings in the order of the source."""
    prefix = f"{name}." if name else ""
    types = typing.get_type_hints(schema)
    default = schema()
    settings, below = [], []
    for field in dataclasses.fields(schema):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            below += sections_of(type(value), prefix + field.name, inspect.getdoc(type(value)) or "")
            continue
        kind = types[field.name]
        choices = tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else ()
        settings.append(Setting(prefix + field.name, written(value), choices, comment_of(schema, field.name)))
    return [Section(name, about, tuple(settings)), *below]


def written(value: Any) -> str:
    """A value as it would stand after `key=` on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(written, value))}]"
    return '""' if value == "" else str(value)


def comment_of(schema: type, field: str) -> str:
    """The comment of a field, from the class that declared it last."""
    for owner in schema.__mro__:
        if field in inspect.get_annotations(owner):
            return comments_in(owner.__module__).get(f"{owner.__name__}.{field}", "")
    return ""


@cache
def comments_in(module: str) -> dict[str, str]:
    """`Class.field` -> comment, for every annotated field of a module's classes."""
    source = inspect.getsource(sys.modules[module])
    comments: dict[int, str] = {}  # by line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            parts = [part.strip() for part in token.string.split("#")]
            comments[token.start[0]] = " ".join(part for part in parts if part and not part.startswith(TOOL_COMMENTS))
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                first = item.lineno
                while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                words = [comments.get(line, "") for line in range(first, (item.end_lineno or item.lineno) + 1)]
                found[f"{node.name}.{item.target.id}"] = " ".join(word for word in words if word)
    return found


def describe(schema: type) -> str:
    """All settings of a config class as text for a terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["settings, with their defaults; `key=value` on the command line goes over the YAML file:"]
    for section in sections_of(schema):
        lines.append("")
        if section.name:
            lines.append(f"{section.name}: {section.about.splitlines()[0] if section.about else ''}")
        for setting in section.settings:
            lines.append(f"  {setting.key}={setting.default}")
            text = setting.comment
            if setting.choices:
                text = f"{' | '.join(setting.choices)}{'; ' if text else ''}{text}"
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


class _Help(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, schema: type, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this help and every setting, then stop")
        self.schema = schema

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        try:
            print(parser.format_help())
            print(describe(self.schema), flush=True)
        except BrokenPipeError:  # whoever reads has enough, as `| head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


def explain_settings(parser: argparse.ArgumentParser, schema: type) -> None:
    """Give a parser made with `add_help=False` a `--help` that shows the settings of a config class, too."""
    parser.add_argument("-h", "--help", action=_Help, schema=schema)
