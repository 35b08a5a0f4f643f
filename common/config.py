"""Typed configs: YAML over dataclass defaults, `key=value` over the YAML, checked by OmegaConf.

A mistake in a config is a person's mistake, so it ends the program with one line on stderr, exit status 2 and no
traceback. Nothing here imports PyTorch: the line appears before anything slow has started.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.settings import explain_settings
from common.terminal import accept_any_letter

Mode = str  # which program: train, eval, sample, ...
WITHOUT_RUN = ("index",)  # programs that need no run to begin with: their settings start from the defaults


# what may differ between a run and its --resume without a word
FREE_KEYS = ("run_dir", "data_root", "device", "compile", "keep_last", "keep_every", "tensorboard", "wandb")
FREE_SECTIONS = ("sample", "eval", "encode", "decode", "generate", "merge", "plan", "answer", "ask", "serve")


class ConfigError(ValueError):
    """A value that a config must not have. `key` is its dotted name."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


def require(condition: object, key: str, message: str) -> None:
    """Raise `ConfigError` unless `condition` holds; for `__post_init__` of config dataclasses."""
    if not condition:
        raise ConfigError(key, message)


@dataclass(frozen=True)
class BaseConfig:
    """The settings that every project has beside its own sections."""

    seed: int = 0  # of everything random in the run
    run_dir: str = ""  # where everything of this run goes; default runs/<config name>
    data_root: str = ""  # where datasets are looked for and downloaded to; default $DATA_ROOT, else data/
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # auto: bf16 where the device has it, fp16 on older GPUs, else fp32
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False  # torch.compile: slower to start, faster to run
    # also on a GPU: same bits every run, at some cost in speed (a CPU always repeats itself)
    deterministic: bool = False
    keep_last: int = 2  # checkpoints kept beside the best one
    keep_every: int = 0  # also keep every checkpoint whose step is a multiple of this; 0 = none
    tensorboard: bool = False  # also write TensorBoard event files (pip install tensorboard)
    wandb: str = ""  # also log to this Weights & Biases project (pip install wandb)


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config."""

    mode: Mode
    resume: bool = False
    dry_run: bool = False
    overwrite: bool = False
    checkpoint: str = ""  # all but train: a checkpoint other than the newest
    words: tuple[str, ...] = ()  # what was given beside options and settings, to programs that ask for it


C = TypeVar("C", bound=BaseConfig)
# what the readers of YAML and of numbers raise on nonsense: 900 nested maps, 10,000 digits, `!!bool maybe`
UNREADABLE = (ValueError, TypeError, RecursionError, OverflowError, KeyError, AttributeError, AssertionError)
_REFERENCES: dict[tuple[str, object], str] = {}  # (key, value) -> the reference to the environment that gave it
# `resolve` raises these
UNUSABLE = (ConfigError, OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError, TypeError)


def load(
    schema: type[C],
    project: str,
    mode: Mode = "train",
    argv: list[str] | None = None,
    short: Mapping[str, str] = MappingProxyType({}),
    takes: Literal["", "config", "run"] = "",
    words: str = "",
    program: str = "",
) -> tuple[C, Options]:
    """Read the command line of `python -m <project>.<mode>` into a checked config.

    mode "train" takes `--config FILE`; the others take `--run DIR` and read the config that the run was started with.
    Any mistake prints one line on stderr and exits with status 2.

    Args:
        takes: `config` for a program other than train that takes `--config FILE`, too.
        words: what this program calls free text on its command line, such as "question"; empty: it takes none.
        short: options of this program that stand for settings: {"out": "sample.out"} makes `--out DIR` mean
            `sample.out=DIR`.
        program: its name where that is not the mode's: `train_reader` trains, too.
    """
    accept_any_letter()  # --help ends the program
    takes = takes or ("config" if mode == "train" else "run")
    args = _parse(schema, project, mode, sys.argv[1:] if argv is None else argv, short, takes, words, program)
    free = tuple(item for item in args.overrides if words and not _is_setting(schema, item))
    args.overrides = [item for item in args.overrides if item not in free]
    given = {key: getattr(args, name.replace("-", "_")) for name, key in short.items()}
    args.overrides += [f"{key}={value}" for key, value in given.items() if value is not None]
    if takes == "config":
        if not args.config:
            known = ", ".join(list_configs(project)) or "none here; run from the repository's root"
            _fail(f"--config is required; {project} has: {known}")
        path: Path | None = Path(args.config)
        run_dir = f"runs/{Path(args.config).stem}"
    elif mode in WITHOUT_RUN and not args.run:
        path = None
        run_dir = ""
    else:
        if not args.run:
            example = Path((list_configs(project) or ["<name>"])[0]).stem
            _fail(f"--run is required, for example: python -m {project}.{mode} --run runs/{example}")
        path = Path(args.run) / "config.yaml"
        run_dir = args.run
    try:
        config = resolve(schema, path, args.overrides, run_dir)
    except UNUSABLE as error:
        _fail(explain(error, schema, path or Path("settings")))
    options = {
        name: getattr(args, name) for name in ("resume", "dry_run", "overwrite", "checkpoint") if hasattr(args, name)
    }
    return config, Options(mode, **options, words=free)


def _is_setting(schema: type, item: str) -> bool:
    """Whether a word of the command line is meant as `key=value`: a dotted name, right or wrong, or a known one."""
    key, equals, _ = item.partition("=")
    known = {field.name for field in dataclasses.fields(schema)}
    return bool(equals) and (key in known or re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", key) is not None)


def resolve(schema: type[C], path: Path | None, overrides: list[str] = [], run_dir: str = "") -> C:  # noqa: B006 (never mutated)
    """Defaults of `schema`, then the YAML file `path`, then `key=value` strings. Raises instead of exiting."""
    merged = OmegaConf.structured(schema)  # frozen, as the dataclass is
    OmegaConf.set_readonly(merged, False)
    if path is not None:
        node = read_yaml(path)
        for key, value in _leaves(OmegaConf.to_container(node)):
            quoted = isinstance(value, str) or value is None or not is_text(schema, key)
            require(quoted, key, f"is text, but YAML reads this as {value!r}: put it in quotes")
        merged = _merge(merged, node)
    for item in overrides:
        merged = _merge(merged, read_override(schema, item))
    # a run folder may have been moved since
    if not merged.run_dir or (path is not None and path.name == "config.yaml"):
        merged.run_dir = run_dir if not any(item.startswith("run_dir=") for item in overrides) else merged.run_dir
    if not merged.data_root:
        merged.data_root = os.environ.get("DATA_ROOT", "data")
    for key, value in _leaves(OmegaConf.to_container(merged)):
        if isinstance(value, str) and "${oc.env:" in value:
            _REFERENCES[key, OmegaConf.select(merged, key)] = value
    return OmegaConf.to_object(merged)  # type: ignore[return-value]  # of the class that `merged` was structured by


def read_override(schema: type, item: str) -> DictConfig:
    """`key=value` as an OmegaConf node. Where the setting is text, the value is that text and no YAML: `007`, `1.10`
    and `a #2` stay what they are.
    """
    key, equals, text = item.partition("=")
    require(key and equals, item, "an override is written key=value")
    if is_text(schema, key):
        value: object = text
        for name in reversed(key.split(".")):
            value = {name: value}
        return OmegaConf.create(value)  # type: ignore[call-overload]
    try:
        return OmegaConf.from_dotlist([item])
    except yaml.MarkedYAMLError as error:
        raise ConfigError(key, str(error.problem)) from None
    except UNREADABLE as error:
        raise ConfigError(
            key, f"cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:100]}"
        ) from None


def is_text(schema: type, key: str) -> bool:
    """Whether the setting of this dotted name is a string, or one of several; not for a name that is none."""
    kind: object = schema
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return False
        kind = get_type_hints(kind).get(name)
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return kind is str


def read_yaml(path: Path) -> DictConfig:
    """A YAML mapping as an OmegaConf node. `ConfigError` for a missing, empty or unreadable file."""
    name = str(path)
    if not path.exists():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], n=1
        )
        raise ConfigError(name, f"no such file{f'; did you mean {path.parent / near[0]}?' if near else ''}")
    require(path.is_file(), name, "is a folder, not a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(name, "is not a text file") from None
    except OSError as error:
        raise ConfigError(name, f"cannot be read: {error.strerror}") from None
    try:
        node = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    except yaml.YAMLError:
        raise
    except UNREADABLE as error:
        raise ConfigError(
            name, f"cannot be read as YAML: {(str(error) or type(error).__name__).splitlines()[0][:100]}"
        ) from None
    require(len(node) > 0, name, "is empty")
    if not isinstance(node, DictConfig):
        raise ConfigError(name, "must hold `key: value` lines")
    return node


def _merge(merged: DictConfig, node: DictConfig) -> DictConfig:
    """`node` over `merged`. Of a value in a list, or in place of a section, OmegaConf does not say which key it is;
    this does.
    """
    try:
        return OmegaConf.merge(merged, node)  # type: ignore[return-value]
    except (OmegaConfBaseException, OverflowError) as error:
        if getattr(error, "full_key", None):
            raise
        whole = error
    for key, value in _leaves(OmegaConf.to_container(node)):
        alone: object = value
        for name in reversed(key.split(".")):
            alone = {name: alone}
        try:
            OmegaConf.merge(merged, alone)
        except (OmegaConfBaseException, OverflowError) as error:
            reason = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "an item")
            raise ConfigError(key, f"{str(value)[:80]} does not fit: {reason}") from None
    raise ConfigError(str(next(iter(node))), str(whole).splitlines()[0])


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():  # type: ignore[attr-defined]
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(config: BaseConfig) -> str:
    """Every setting of `config`, defaults included, as YAML text that `resolve` reads back to an equal object.

    What was given as `${oc.env:NAME}` is written so again: a password in the environment must not end up in files.
    """
    node = OmegaConf.structured(config)
    OmegaConf.set_readonly(node, False)
    for key, value in flatten(config).items():
        if isinstance(value, str) and (key, value) in _REFERENCES:
            OmegaConf.update(node, key, _REFERENCES[key, value])
    return OmegaConf.to_yaml(node)


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value for every leaf of a config dataclass."""
    flat: dict[str, object] = {}
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def list_configs(project: str, folder: Path = Path("configs")) -> list[str]:
    """The configs of a project: those whose opening comment gives its training command."""
    command = f"python -m {project}.train"
    return [
        str(path)
        for path in sorted(folder.glob("*.yaml"))
        if path.name[0] != "." and path.is_file() and command in path.read_text(encoding="utf-8", errors="replace")
    ]


def explain(error: Exception, schema: type[BaseConfig], path: Path) -> str:
    """One line for a person: which key, what is wrong with it, and the nearest valid key."""
    text = str(error).split("\n")[0].strip()
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, yaml.MarkedYAMLError):
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{path}{line}: {error.problem or text}"
    key = getattr(error, "full_key", None)
    if isinstance(error, OmegaConfBaseException) and key:
        if "not in" in text:
            keys = list(flatten(schema()))
            sections = sorted({k.rsplit(".", 1)[0] for k in keys if "." in k})
            near = difflib.get_close_matches(key, keys + sections, n=1, cutoff=0.5)
            leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # right name, wrong section
            return f"{key}: unknown key" + (f"; did you mean {(leaf or near)[0]}?" if leaf or near else "")
        return f"{key}: {text}"
    return f"{path}: {text}"


def _parse(
    schema: type[C],
    project: str,
    mode: Mode,
    argv: list[str],
    short: Mapping[str, str],
    takes: str = "run",
    words: str = "",
    program: str = "",
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {project}.{program or mode}", allow_abbrev=False, add_help=False)
    explain_settings(parser, schema)
    if takes == "config":
        parser.add_argument(
            "--config", help="YAML file: " + (", ".join(list_configs(project)) or "configs/<name>.yaml")
        )
    if mode == "train":
        parser.add_argument(
            "--resume", action="store_true", help="continue from the newest valid checkpoint of the run folder"
        )
        parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same folder")
        parser.add_argument(
            "--dry-run", action="store_true", help="print the resolved config, parameter count and shapes, then stop"
        )
    if takes == "run":
        parser.add_argument("--run", help="a run folder, such as runs/<config name>")
        parser.add_argument(
            "--checkpoint", default="", help="a file in its checkpoints/ (default: the newest valid one)"
        )
    for name, key in short.items():
        parser.add_argument(f"--{name}", help=f"the setting {key}")
    metavar = f"key=value or {words}" if words else "key=value"
    parser.add_argument("overrides", nargs="*", metavar=metavar, help="settings over the YAML, dotted: train.lr=1e-4")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.error = _fail  # type: ignore[method-assign]  # one line, without the usage
    return parser.parse_intermixed_args(argv)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
