"""The layout is the architecture: arrows point only downward, and an op family has one name on every floor."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import import_graph
import pytest

from lowrank_ops import ops

ROOT = import_graph.ROOT
HEIGHT = {room: height for height, floor in enumerate(reversed(import_graph.FLOORS)) for room in floor}
MODULES = import_graph.modules()


def taken(path: Path) -> set[str]:
    """First parts of the absolute modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def test_every_module_stands_on_a_floor() -> None:
    assert not [module for module in MODULES if import_graph.room(module) not in HEIGHT], "add the room to FLOORS"


@pytest.mark.parametrize("source, target", sorted(import_graph.arrows()))
def test_imports_point_downward(source: str, target: str) -> None:
    files = import_graph.arrows()[source, target]
    assert HEIGHT[target] < HEIGHT[source], f"{target} stands no lower than {source}, and is imported by {files}"


def test_files_import_one_another_in_no_circle() -> None:
    graph = {m: {target for target, _ in import_graph.imports(m) if target not in ("", m)} for m in MODULES if m}
    assert import_graph.circle(graph) is None
    assert import_graph.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_room(module: str) -> None:
    """A private name or module is imported only inside its room; private modules of ops are the exception."""
    room = import_graph.room(module)
    for target, name in import_graph.imports(module):
        parts = [name or "", *(target.split(".") if import_graph.room(target) != "ops" else ())]
        private = [part for part in parts if part.startswith("_") and not part.startswith("__") and part != "_C"]
        assert not private or import_graph.room(target) == room, f"{module} takes {name or target} from another room"


def test_all_packages_are_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    parts = {path.relative_to(ROOT).parent.parts for path in MODULES.values()}
    assert sorted(listed) == sorted(".".join(p if p[0] == "lowrank_ops" else ("lowrank_ops", *p)) for p in parts)


def test_the_graph_is_printed() -> None:
    graph = import_graph.mermaid()
    assert "commands --> init" in graph and "functional --> formats" in graph
    assert "commands --> formats" not in graph, "a longer way says so already"
    drawn = (ROOT / "CONTRIBUTING.md").read_text().partition("```mermaid\n")[2].partition("\n```")[0]
    assert drawn == graph, "CONTRIBUTING.md: paste what tests/repo/import_graph.py prints"


def test_kernels_are_a_leaf() -> None:
    known = [module for module in MODULES if import_graph.room(module) == "kernels"]
    for module in known:
        assert {target for target, _ in import_graph.imports(module)} <= set(known), module
        assert "lowrank_ops" not in taken(MODULES[module]), module


def test_nobody_imports_a_top_level_kernels_or_bench() -> None:
    for folder in ("lowrank_ops", "kernels", "tests", "bench"):
        for path in (ROOT / folder).glob("**/*.py"):
            assert not taken(path) & {"kernels", "bench"}, f"{path} imports a top-level `kernels` or `bench`"


def test_the_compiled_side_knows_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc").glob("**/*"):
        if path.is_file():
            included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
            assert not [i for i in included if re.match(r"(torch|ATen|c10)/", i)], path
            if path.name != "bindings.cpp":
                assert not [i for i in included if i.startswith(("pybind11/", "Python.h"))], path


@pytest.mark.parametrize("family", sorted(set(ops.FAMILIES.values())))
def test_a_family_has_one_name_on_every_floor(family: str) -> None:
    for path in (
        f"kernels/{family}.py",
        f"csrc/cpu/{family}.cpp",
        f"tests/*/test_{family}.py",
        f"bench/cases/bench_{family}.py",
    ):
        assert list(ROOT.glob(path)), f"{path} is missing"


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_symlinks(folder: str) -> None:
    assert (ROOT / "lowrank_ops" / folder).resolve() == (ROOT / folder).resolve()
