"""One's own environments: `env.id=module:Id-v0`, `env.id=module:Class`, and wrappers by name.

`module` is anything Python can import, a file in the current folder included. `module:Id-v0` is gymnasium's own
notation: importing the module registers the environment. `module:Class` needs no registration; a function that returns
an environment will do as well.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from common.config import ConfigError
from common.errors import ProjectError


def spec_of(name: str) -> EnvSpec:
    """What gymnasium needs to make the environment that `env.id` names. `ProjectError` with the nearest names."""
    path, _, leaf = name.rpartition(":")
    module = import_module(path, "env.id") if path else None
    if leaf in gym.registry:
        return gym.registry[leaf]
    if module is None:
        raise ProjectError(f"there is no environment {name!r}{did_you_mean(name, list(gym.registry))}")
    made = getattr(module, leaf, None)
    if callable(made):
        return EnvSpec(id=name, entry_point=made)
    classes = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, gym.Env)]
    raise ProjectError(
        f"{path} has no class {leaf!r} and registers no environment of this name"
        + did_you_mean(leaf, [*classes, *gym.registry])
    )


def wrapped(environment: gym.Env, names: tuple[str, ...]) -> gym.Env:
    """The environment in the wrappers `package.module.Name` or `module:Name`, the first one innermost. `ConfigError`
    for a name that leads nowhere.
    """
    for name in names:
        path, _, leaf = name.replace(":", ".").rpartition(".")
        wrapper = getattr(import_module(path, "env.wrappers"), leaf, None) if path else None
        if not callable(wrapper):
            raise ConfigError("env.wrappers", f"{name!r} is no wrapper; write package.module.Name")
        environment = wrapper(environment)
    return environment


def import_module(path: str, key: str) -> ModuleType:
    """The module, from the current folder or the installed packages. `ConfigError` naming `key` where there is none."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not path.startswith(error.name or " "):
            raise ProjectError(f"{path} cannot be imported: {error}") from error
        raise ConfigError(
            key, f"there is no module {error.name!r} in this folder or among the installed packages"
        ) from None
    except Exception as error:  # whatever somebody's module does when it is imported
        raise ProjectError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error


def nearest(name: str, known: list[Any]) -> str:
    """Up to three known names like this one, with commas; empty where none is."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5))


def did_you_mean(name: str, known: list[Any]) -> str:
    """`; did you mean ...?`, or nothing."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""
