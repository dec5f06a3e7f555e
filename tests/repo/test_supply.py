"""What is installed and what is shipped: ranges and pins of dependencies, interpreters, licences."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"] | {"": PROJECT["dependencies"]}
# Every requirement of every extra, without those that name other extras of this package.
REQUIREMENTS = [
    (extra, requirement)
    for extra, lines in EXTRAS.items()
    for requirement in map(Requirement, lines)
    if canonicalize_name(requirement.name) != PROJECT["name"]
]
FILES = ["constraints.txt", "constraints-newest.txt", "constraints-oldest.txt"]


def pins(file: str) -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version and canonicalize_name(name) not in found, f"{file}: {line!r} is no pin, or a second one"
            found[canonicalize_name(name)] = Version(version)
    return found


def ranges(name: str) -> dict[str, SpecifierSet]:
    """The ranges of a package by the extras that ask for it."""
    return {extra: r.specifier for extra, r in REQUIREMENTS if canonicalize_name(r.name) == name}


@pytest.mark.parametrize("file", FILES)
def test_pins_are_in_the_ranges(file: str) -> None:
    """An extra that wants one version for its figures has it in constraints.txt alone."""
    for name, version in pins(file).items():
        assert ranges(name), f"{file} pins {name}, which pyproject.toml does not name"
        for extra, allowed in ranges(name).items():
            if file != "constraints.txt" and str(allowed).startswith("=="):
                continue
            assert allowed.contains(version, prereleases=True), f"{file}: {name} {version}; [{extra}] needs {allowed}"


def test_every_package_that_is_asked_for_has_a_pin() -> None:
    pinned = pins("constraints.txt")
    for extra, requirement in REQUIREMENTS:
        exact = any(part.operator == "==" for part in requirement.specifier)
        assert exact or canonicalize_name(requirement.name) in pinned, f"[{extra}] {requirement.name}: no pin"


def least(allowed: SpecifierSet) -> Version:
    return Version(next(part.version for part in allowed if part.operator in (">=", "==")))


def test_the_oldest_pins_are_the_least_versions() -> None:
    """A range may begin at 0.19 where 0.19.1 is the first release that was published or works."""
    for name, version in pins("constraints-oldest.txt").items():
        begins = max(least(allowed) for allowed in ranges(name).values() if not str(allowed).startswith("=="))
        assert version.release[: len(begins.release)] == begins.release, (
            f"{name}: {version}, the range begins at {begins}"
        )


def test_the_newest_pins_are_newer() -> None:
    usual = pins("constraints.txt")
    for name, version in pins("constraints-newest.txt").items():
        assert version > usual[name], name


def test_interpreters_are_those_that_the_documentation_names() -> None:
    """CONTRIBUTING.md says for which the wheels are built and on which the tests run."""
    classified = re.findall(r"Python :: (3\.\d+)'", str(PROJECT["classifiers"]))
    row = next(line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| built"))
    assert re.findall(r"3\.\d+", row) == classified
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={classified[0]}")


def test_what_is_linked_has_its_notice() -> None:
    assert PROJECT["license-files"] == ["LICENSE", "THIRD_PARTY_LICENSES"]
    notices = (ROOT / "THIRD_PARTY_LICENSES").read_text()
    build = "".join((ROOT / file).read_text() for file in ("CMakeLists.txt", "csrc/cpu/kernels.cmake"))
    own = set(re.findall(r"add_library\((\S+)", build)) | {"${CMAKE_DL_LIBS}"}  # dlopen is the system's
    linked = {
        name for names in re.findall(r"target_link_libraries\(\S+ PRIVATE (.+)\)", build) for name in names.split()
    }
    assert linked - own == {"CUDA::cudart_static"}
    assert "cudart_static" in notices
    headers = set(re.findall(r"#include <(\w+)/", (ROOT / "csrc/bindings.cpp").read_text()))
    assert headers == {"pybind11"}
    # torch ships the licence of the same headers.
    text = (metadata.distribution("torch").read_text("licenses/third_party/pybind11/LICENSE") or "").split()
    if not text:
        pytest.skip("this torch has no licence of pybind11")
    assert " ".join(text) in " ".join(notices.split())
