"""The rooms of the package and the imports between them, printed by ``python tests/repo/import_graph.py`` as Mermaid.

A room is a folder of lowrank_ops/ or a file that stands by itself in it. Imports anywhere in a file count, those inside
functions too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lowrank_ops"
# From top to bottom. A room imports only from floors below its own.
FLOORS = [
    ["__main__"],
    ["bench"],
    ["commands"],
    ["__init__"],
    ["integrations"],
    ["serving", "preference", "scaling_laws", "calibration"],
    ["adapters"],
    ["functional", "svd"],
    ["formats"],
    ["ops", "cores"],
    ["reference"],
    ["kernels", "_C", "files"],
]
# Files that belong to a room but lie outside its folder.
ROOMS = {"_aliases": "__init__", "_checks": "functional"}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package, "" for the package itself -> file; the compiled module is not among them."""
    folders = {ROOT / PACKAGE: "", ROOT / "kernels": "kernels", ROOT / "bench": "bench"}
    found = {}
    for folder, prefix in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if prefix or inside.parts[0] not in ("kernels", "bench"):  # symlinks to the other two
                parts = [part for part in (prefix, *inside.with_suffix("").parts) if part and part != "__init__"]
                found[".".join(parts)] = path
    return found


def imports(module: str) -> Iterator[tuple[str, str | None]]:
    """The modules of the package that a module imports, each with the imported name, or None for the whole module."""
    known = modules()
    path = known[module]
    above = [PACKAGE, *(part for part in module.split(".") if part)]
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = above[: len(above) - node.level + (path.name == "__init__.py")] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = [(source, alias.name) for alias in node.names]
        for source, name in found:
            package, _, inside = source.partition(".")
            if package != PACKAGE:
                continue
            child = f"{inside}.{name}" if inside and name else name or ""
            if name and (child in known or child == "_C"):
                yield child, None
            else:
                yield inside, name


def room(module: str) -> str:
    top = module.partition(".")[0] or "__init__"
    return ROOMS.get(top, top)


@functools.cache
def arrows() -> dict[tuple[str, str], list[str]]:
    """(importing room, imported room) -> the files with such an import."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, path in modules().items():
        for target, _ in imports(module):
            if room(module) != room(target):
                found.setdefault((room(module), room(target)), []).append(str(path.relative_to(ROOT)))
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that ends where it began, or None."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str] | None:
        if node in way:
            return way[way.index(node) :]
        if node not in done:
            for target in sorted(graph.get(node, ())):
                if found := visit(target, [*way, node]):
                    return found
            done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := visit(node, []))), None)


def mermaid() -> str:
    """The rooms by floor, and the arrows that do not follow from a longer path."""
    pairs = set(arrows())
    below: dict[str, set[str]] = {}
    for floor in reversed(FLOORS):
        for name in floor:
            direct = {target for source, target in pairs if source == name}
            below[name] = direct.union(*(below.get(target, set()) for target in direct))
    there = {name for pair in pairs for name in pair}
    lines = ["graph TD"]
    for number, floor in enumerate(FLOORS):
        nodes = "; ".join(f'{name.strip("_")}["{name}"]' for name in floor if name in there)
        if nodes:
            lines += [f"  subgraph floor{len(FLOORS) - number}[ ]", f"    {nodes}", "  end"]
    for source, target in sorted(pairs):
        if not any(target in below.get(other, ()) for s, other in pairs if s == source and other != target):
            lines.append(f"  {source.strip('_')} --> {target.strip('_')}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(mermaid())
