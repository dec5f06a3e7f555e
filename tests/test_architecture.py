"""The layout is the architecture: arrows point only downward, and an op family has one name on every floor."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import from floors below its own, and from its own.
FLOORS = [
    ["reference", "kernels", "_C", "_huber", "_strengths", "_pairs", "route"],
    ["ops", "adapters"],
    ["formats", "nf4", "cores"],
    ["functional"],
    ["svd"],
    ["factors"],
    ["init"],
    ["linear"],
    ["model", "combine", "precompute", "_laws"],
    ["checkpoint", "scaling_laws", "_runs"],
    ["pool", "preference", "references"],
    ["engine"],
    ["__init__"],
    ["info", "demo", "demo_serve", "compare", "scaling", "reward", "server", "serve"],
    ["bench"],
    ["__main__"],
]
HEIGHT = {module: height for height, modules in enumerate(FLOORS) for module in modules}
FAMILIES = ["nf4", "adapted_linear", "svd_linear", "routed_linear", "preference"]


def imports(path: Path) -> set[str]:
    """Names of modules imported anywhere in a file; relative ones with their leading dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = {f"{base}.{alias.name}" if node.module else f"{base}{alias.name}" for alias in node.names}
            found |= names if node.module is None else {base}
    return found


def modules() -> list[Path]:
    return sorted((ROOT / "lowrank_ops").glob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.name)
def test_imports_point_downward(path: Path) -> None:
    assert path.stem in HEIGHT, f"{path.name} stands on no floor: add it to FLOORS"
    for name in imports(path):
        match = re.fullmatch(r"(?:\.|lowrank_ops\.?)(\w*).*", name)
        if match:
            target = match[1] if match[1] in HEIGHT else "__init__"
            if path.stem != "__init__" or target != "__init__":
                assert HEIGHT[target] <= HEIGHT[path.stem], f"{path.name} imports {target}, which stands above it"


def test_kernels_are_a_leaf() -> None:
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for name in imports(path):
            assert name.startswith(".") or name.partition(".")[0] != "lowrank_ops", f"{path.name} imports {name}"
            assert not name.startswith(".."), f"{path.name} reaches above itself: {name}"


def test_nobody_imports_a_top_level_kernels_or_bench() -> None:
    for folder in ("lowrank_ops", "kernels", "tests", "bench"):
        for path in (ROOT / folder).glob("**/*.py"):
            top = {name.partition(".")[0] for name in imports(path)}
            assert not top & {"kernels", "bench"}, f"{path} imports a top-level `kernels` or `bench`"


def test_the_compiled_side_knows_neither_torch_nor_python() -> None:
    for path in (ROOT / "csrc").glob("**/*"):
        if path.is_file():
            included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
            assert not [i for i in included if re.match(r"(torch|ATen|c10)/", i)], path
            if path.name != "bindings.cpp":
                assert not [i for i in included if i.startswith(("pybind11/", "Python.h"))], path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_one_name_on_every_floor(family: str) -> None:
    for path in (
        f"kernels/{family}.py",
        f"csrc/cpu/{family}.cpp",
        f"tests/test_{family}.py",
        f"bench/bench_{family}.py",
    ):
        assert (ROOT / path).is_file(), f"{path} is missing"


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_symlinks(folder: str) -> None:
    assert (ROOT / "lowrank_ops" / folder).resolve() == (ROOT / folder).resolve()
