"""Threads and scratch memory of the C++ side, tested alone under sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_scopes_threads_exceptions_and_children(tmp_path: Path) -> None:
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("needs g++ on Linux")
    sources = [ROOT / "tests/emulation/runtime.cpp", *sorted((ROOT / "csrc/cpu/runtime").glob("[ts]*.cpp"))]
    command = ["g++", "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-DLOWRANK_ISA=portable"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, *sources, "-o", tmp_path / "runtime", "-ldl", "-pthread"], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "allocator_may_return_null=1"}
    done = subprocess.run([tmp_path / "runtime"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
