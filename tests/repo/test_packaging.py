"""Installation: sdist to wheel in isolation, import from any folder, and the errors if parts are missing."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from lowrank_ops.ops import _cpu

ROOT = Path(__file__).parents[2]


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the tracked files, and its wheel as .ci/wheel makes it, without torch in the build environment."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    subprocess.run(
        ["tar", "-c", "-f", str(source / "tree.tar"), "--null", "-T", "-"], cwd=ROOT, input=listed.stdout, check=True
    )
    subprocess.run(["tar", "-x", "-f", "tree.tar"], cwd=source, check=True)
    (source / "tree.tar").unlink()
    # These tests ask what is built and whether it works. Optimisation takes most of the compilers' time, and the other
    # instruction sets the rest; the module that all tests use has them.
    launcher = dist / "compile"
    launcher.write_text('#!/bin/sh\nexec "$@" -O0\n')
    launcher.chmod(0o755)
    environment = {"CMAKE_CXX_COMPILER_LAUNCHER": str(launcher), "LOWRANK_OPS_BUILD": "cpu"}
    environment["LOWRANK_OPS_ISA_ONLY"] = _cpu.module().isas()[-1]
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = subprocess.run(
        [str(ROOT / ".ci/wheel"), str(dist), sys.executable, platform.machine()],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))


@pytest.mark.slow
def test_sdist_and_wheel_hold_what_they_should(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "kernels/nf4.py"} <= sdist, "MANIFEST.in"
    with zipfile.ZipFile(built[1]) as archive:
        wheel = archive.namelist()
    assert any(name.startswith("lowrank_ops/_C.") and name.endswith(".so") for name in wheel)
    assert {
        "lowrank_ops/kernels/nf4.py",
        "lowrank_ops/bench/suite.py",
        "lowrank_ops/integrations/trl_reference/config.json",
        "lowrank_ops/_C.pyi",
        "lowrank_ops/py.typed",
    } <= set(wheel)
    # No library was put beside the package, and the notices of what is compiled in are there.
    assert not [name for name in wheel if not name.startswith(("lowrank_ops/", "lowrank_ops-"))]
    for name in ("LICENSE", "THIRD_PARTY_LICENSES"):
        assert name in sdist and any(file.endswith(f".dist-info/licenses/{name}") for file in wheel)


@pytest.mark.slow
def test_the_same_sources_give_the_same_sdist(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    made = []
    for name in ("first", "second"):
        for file in listed.decode().split("\0")[:-1]:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / file).is_symlink():
                (tmp_path / name / file).symlink_to((ROOT / file).readlink())
            else:
                (tmp_path / name / file).write_bytes((ROOT / file).read_bytes())  # with another time
        subprocess.run(
            [sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path / name, capture_output=True, check=True
        )
        made.append(next((tmp_path / name / "dist").iterdir()).read_bytes())
    assert made[0] == made[1]


@pytest.mark.slow
def test_an_installed_wheel_works_from_any_directory(built: tuple[Path, Path], tmp_path: Path) -> None:
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(rf"-{version}-{version}-manylinux_2_\d+_{platform.machine()}\.whl$", built[1].name)
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clean)], check=True)
    python = clean / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(built[1])]
    subprocess.run(install, check=True)
    # The dependencies come from here. A path in a .pth file does not run the .pth files that it holds, so an editable
    # installation of the package is not found through it.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(clean)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import torch, lowrank_ops as lo; "
        "y = lo.Linear(64, 32, adapter=lo.LoRA(4))(torch.randn(3, 64)); assert y.shape == (3, 32); "
        "import lowrank_ops.kernels.nf4; print(lo.__file__)"
    )
    # An empty PATH shows that neither a compiler nor CMake is looked for.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": ""}
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(site))


def test_import_needs_no_compiled_module(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lowrank_ops._C'] = None\n"
        "import torch, lowrank_ops as lo\n"
        "from lowrank_ops.commands import info\n"
        "print(info.text())\n"
        "try: lo.NF4Weight.quantize(torch.randn(4, 64))\n"
        "except RuntimeError as error: print('ERROR', error)\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("compiled module +missing, CPU kernels cannot run", done.stdout)
    assert "ERROR the compiled module lowrank_ops._C is missing" in done.stdout and "pip install ." in done.stdout


def test_import_needs_no_triton(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lowrank_ops as lo\n"
        "print(lo.Linear(64, 32, adapter=lo.LoRA(4))(torch.randn(3, 64)).shape)\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_import_loads_no_studies_and_no_serving(tmp_path: Path) -> None:
    code = (
        "import sys, lowrank_ops as lo\n"
        "lazy = ('AdapterPool', 'preference', 'scaling_laws')\n"
        "rooms = tuple(f'lowrank_ops.{room}' for room in (*lazy, 'serving', 'pool', 'commands'))\n"
        "print([name for name in sys.modules if name.startswith(rooms)], set(lazy) <= set(dir(lo)))\n"
        "from lowrank_ops import AdapterPool, scaling_laws\n"
        "print(lo.AdapterPool is AdapterPool, lo.scaling_laws is scaling_laws, lo.preference.bradley_terry_loss)\n"
        "try: lo.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = run(code, tmp_path)
    first, second, third = done.stdout.splitlines()
    assert first == "[] True" and second.startswith("True True <function bradley_terry_loss"), done.stdout
    assert third == "module 'lowrank_ops' has no attribute 'nothing'"


def test_info() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "lowrank_ops", "info"], capture_output=True, text=True, check=True
    ).stdout
    for fact in ("lowrank_ops", "torch", "instruction set", "cuda targets", "gpu", "triton"):
        assert fact in text
    facts = json.loads(
        subprocess.run(
            [sys.executable, "-m", "lowrank_ops", "info", "--json"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert facts["compiled module"].startswith("version")


def test_an_instruction_set_can_be_asked_for(tmp_path: Path) -> None:
    code = "from lowrank_ops.ops import _cpu; print(_cpu.module().isa())"
    least = _cpu.module().isas()[-1]
    assert run(code, tmp_path, LOWRANK_OPS_ISA=least).stdout.strip() == least
    assert "nonsense" in run(code, tmp_path, LOWRANK_OPS_ISA="nonsense").stderr
    info = run("from lowrank_ops.commands import info; print(info.text())", tmp_path, LOWRANK_OPS_ISA="nonsense")
    assert "none: instruction set 'nonsense'" in info.stdout
    code = "import torch, lowrank_ops as lo; lo.Linear(64, 64)(torch.ones(1, 64))"
    assert "LOWRANK_OPS_IMPLEMENTATION must be" in run(code, tmp_path, LOWRANK_OPS_IMPLEMENTATION="nonsense").stderr


def test_one_openmp_runtime_in_the_process(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = (
        "import torch, lowrank_ops as lo\n"
        "lo.NF4Weight.quantize(torch.randn(512, 512))\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}\n"
        "print(len(paths), paths)\n"
    )
    done = run(code, tmp_path)
    assert done.stdout.startswith("1 "), done.stdout + done.stderr


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert 8 <= len(lines) <= 14, "the README's example is about twelve lines"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
