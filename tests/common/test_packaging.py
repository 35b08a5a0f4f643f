"""What a clone installs and what a change must pass."""

from __future__ import annotations

import re
import tomllib

import yaml

from common.projects import find_projects
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(requirement: str) -> str:
    """`gymnasium[box2d]>=1.1` -> `gymnasium`."""
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()


def test_constraints_name_every_direct_dependency_and_fit():
    extras = PROJECT["project"]["optional-dependencies"]
    always = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["peers"]]
    known = {name_of(r): r for r in [*always, *(r for extra in extras.values() for r in extra)]}
    text = (ROOT / "constraints.txt").read_text()
    tested = dict(line.split("==") for line in text.splitlines() if line[0] != "#")
    untested = re.search("without a version: (.*)\\.", text).group(1).split(", ")
    assert {*tested, *untested} == known.keys() and {name_of(r) for r in always} <= tested.keys()
    for name, version in tested.items():
        least = re.search(r">=([0-9.]+)", known[name]).group(1)
        assert [int(n) for n in re.findall(r"\d+", version)] >= [int(n) for n in least.split(".")], name


def test_every_project_is_installed():
    assert {f"{name}*" for name in find_projects()} <= set(PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert (ROOT / "common/report/templates/report.html.j2").is_file()
    folders = [path for name in ("common", *find_projects()) for path in (ROOT / name).rglob("templates")]
    packages = {".".join(path.relative_to(ROOT).parent.parts): ["templates/*"] for path in folders}
    assert PROJECT["tool"]["setuptools"]["package-data"] == packages


def test_the_workflow_calls_what_a_clone_calls():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands and "make test-slow" in commands
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy"]
