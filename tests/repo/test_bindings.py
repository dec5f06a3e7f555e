"""The compiled module, its stub and its callers agree: names of functions, and number, names and order of arguments.

Arguments are plain numbers in a fixed order, so nothing else would notice a swap.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lowrank_ops.kernels import arena_layout
from lowrank_ops.ops import _cpu

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "csrc" / "bindings.cpp").read_text()
STUB = ast.parse((ROOT / "lowrank_ops" / "_C.pyi").read_text())
CALLER = ast.parse((ROOT / "lowrank_ops" / "ops" / "_cpu.py").read_text())
# The Python types that pybind11 converts to these C++ types.
TYPES = {
    "int": "int", "int64_t": "int", "Address": "int", "double": "float", "const std::string&": "str",
    "const BranchFields&": "Sequence[int] | None",
}  # fmt: skip


def parameters(text: str) -> list[tuple[str, str]]:
    """(type, name) of each parameter of a C++ function."""
    found = []
    for parameter in re.split(r",\s*", text) if text.strip() else []:
        kind, name = re.fullmatch(r"(.*?)\s*(\w+)", parameter.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        found.append((kind, name))
    return found


def bound() -> dict[str, list[tuple[str, str]]]:
    """The parameters of every function that bindings.cpp defines, by the name Python calls it."""
    functions = {}
    for name, target, text in re.findall(r'm\.def\(\s*"(\w+)",\s*(\w+|\[\]\s*(?:\(([^)]*)\))?)', SOURCE):
        if not target.startswith("["):
            definition = re.search(rf"^[\w:<>]+ {target}\(([^)]*)\) \{{", SOURCE, re.MULTILINE)
            assert definition is not None, f"bindings.cpp binds {target} and does not define it"
            text = definition[1]
        functions[name] = parameters(text)
    return functions


def stubbed() -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def positional_calls() -> list[tuple[str, int, int]]:
    """(function, arguments, line) of every `module().function(…)`; a starred tuple counts what it was assigned."""
    calls = []
    for function in ast.walk(CALLER):
        if not isinstance(function, ast.FunctionDef):
            continue
        tuples = {
            node.targets[0].id: len(node.value.elts)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Tuple)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("module()."):
                assert not node.keywords, f"line {node.lineno}: calls of the compiled module are positional"
                sizes = [tuples[ast.unparse(a.value)] if isinstance(a, ast.Starred) else 1 for a in node.args]
                calls.append((ast.unparse(node.func).removeprefix("module()."), sum(sizes), node.lineno))
    return calls


def test_stub_names_what_is_bound() -> None:
    assert sorted(stubbed()) == sorted(bound())


@pytest.mark.parametrize("name", sorted(bound()))
def test_stub_has_the_parameters_of_the_binding(name: str) -> None:
    if name not in stubbed():
        pytest.fail(f"_C.pyi lacks {name}")
    arguments = stubbed()[name].args
    assert [argument.arg for argument in arguments.args] == [parameter for _, parameter in bound()[name]]
    for argument, (kind, parameter) in zip(arguments.args, bound()[name], strict=True):
        assert argument.annotation is not None
        assert ast.unparse(argument.annotation) == TYPES.get(kind, "Sequence[int]"), parameter


def test_callers_give_as_many_arguments_as_are_taken() -> None:
    calls = positional_calls()
    # Those of tests and of `lowrank_ops.info` aside, every bound function has a caller here.
    asked = {"cuda_targets", "isa", "isas", "set_isa"}
    assert {name for name, _, _ in calls} | asked == set(bound()) | asked
    for name, given, line in calls:
        assert given == len(bound()[name]), f"_cpu.py, line {line}: {name} takes {len(bound()[name])}, is given {given}"


def test_the_module_has_what_is_bound() -> None:
    functions = {name for name in bound() if not name.endswith("_cuda") or _cpu.module().cuda_targets()}
    assert functions <= set(dir(_cpu.module()))


def test_the_arena_has_one_layout() -> None:
    assert _cpu.module().arena_fields == arena_layout.FIELDS
