"""The package is a hierarchy: no module imports, however indirectly, one that imports it."""

from __future__ import annotations

import ast

from tests.helpers import ROOT

PACKAGE = ROOT / "gnn"


def imports(source: str, names: set[str]) -> set[str]:
    """Those of the modules `names` that the source imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & names


def import_graph() -> dict[str, set[str]]:
    """Every module of gnn and the modules of gnn that it imports."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: imports(path.read_text(), set(files)) for name, path in files.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, or nothing."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in finished:
            return []
        for other in sorted(graph[name]):
            if cycle := visit(other, [*path, name]):
                return cycle
        finished.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def test_no_module_imports_itself_by_a_detour():
    graph = import_graph()
    assert len(graph) > 30 and graph["gnn.train"] >= {"gnn.tasks", "gnn.task"}, "the search sees the imports"
    assert find_cycle(graph) == []


def test_the_search_finds_cycles_in_functions_too():
    source = "def f():\n    from gnn.b import g\n"
    assert imports(source, {"gnn.a", "gnn.b"}) == {"gnn.b"}
    assert find_cycle({"gnn.a": {"gnn.b"}, "gnn.b": {"gnn.c"}, "gnn.c": {"gnn.b"}}) == ["gnn.b", "gnn.c"]
    assert find_cycle({"gnn.a": {"gnn.b"}, "gnn.b": set()}) == []


def test_a_task_knows_no_task():
    """`task.py` is what all tasks share; `tasks.py` alone knows them all."""
    graph = import_graph()
    assert not {name for name in graph["gnn.task"] if name.endswith("task") and name != "gnn.task"}
    questions = {"gnn.node", "gnn.link", "gnn.whole_graph", "gnn.community"}
    for name, found in graph.items():
        package = ".".join(name.split(".")[:2])
        if package in questions:
            others = {".".join(other.split(".")[:2]) for other in found} & questions - {package}
            assert others <= {"gnn.community"} and (not others or name == "gnn.node.clusters"), f"{name} uses {others}"
