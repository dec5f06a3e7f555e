"""The compiled side in another process, in the place of the module _C: on an emulated ARM processor, or with sanitizers.

``tests/arm/server.cpp`` is built by a cross compiler and runs under qemu, or by this machine's compiler. A call goes to it
with copies of the memory that its addresses point into, and what it leaves there is copied back. So every test of the CPU
kernels can run on ARM, and under sanitizers without Python or torch in the process.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lowrank_ops.ops import _cpu

ROOT = Path(__file__).resolve().parents[1]
COMPILER, QEMU, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"

# Every instruction set of ARM that the build has, and a processor on which it is the best.
PROCESSORS = {"neon_bf16": "max", "neon": "cortex-a57"}


def build() -> Path:
    """The server for ARM; skips the test where a tool is missing."""
    return _build("arm", (COMPILER, QEMU), f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'csrc/cpu/aarch64-linux.cmake'}")


def build_sanitized(sanitizers: str, isa: str = "", level: str = "-O1") -> Path:
    """The server for this machine with GCC's sanitizers, such as "address,undefined"; isa: with its kernels alone."""
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    name = f"sanitized-{sanitizers.replace(',', '-')}{isa and f'-{isa}'}{level if level != '-O1' else ''}"
    return _build(name, ("g++",), f"-DCMAKE_CXX_FLAGS={flags}", f"-DLOWRANK_OPS_ISA_ONLY={isa}", level=level)


def _build(name: str, tools: Sequence[str], *options: str, level: str = "-O1") -> Path:
    """The server, which all processes of all runs share: what has not changed is not compiled again."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = [tool for tool in (*tools, "cmake", "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"the server needs {', '.join(missing)}: `make arm-tools` installs Debian's packages for ARM")
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    launcher = folder / "compile"  # the tests ask for the results; optimisation takes most of the compiler's time
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "tests/arm"), "-B", str(folder), *options]
    configure += [f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launcher.write_text(f'#!/bin/sh\nexec "$@" {level}\n')
        launcher.chmod(0o755)
        for command in (configure, ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "server"


def emulated(server: Path, processor: str) -> list[str]:
    """The command that runs the server on an ARM processor."""
    return [QEMU, "-cpu", processor, "-L", SYSROOT, str(server)]


class Machine:
    """Answers as the module _C would where the command runs."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "LOWRANK_OPS_ISA"}
        self._process = subprocess.Popen(
            command, env=inherited | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._storages: dict[int, torch.UntypedStorage] = {}  # by address

    def replace_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answer the package's calls during a test, and keep the memory of every tensor whose address is taken."""
        self.forget()
        address_of = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage
            return address_of(tensor)

        monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
        monkeypatch.setattr(_cpu, "_module", self)

    def forget(self) -> None:
        """Let go of the memory of calls so far."""
        self._storages.clear()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0

    def __getattr__(self, name: str) -> Callable[..., str]:
        return lambda *arguments: self._call(name, arguments)

    def isas(self) -> list[str]:
        return self._call("isas", ()).split()

    def _call(self, name: str, arguments: Sequence[object]) -> str:
        starts = sorted(self._storages)
        used: dict[int, int] = {}  # address of a storage: its number

        def words(argument: object) -> list[str]:
            if isinstance(argument, tuple | list):
                return [word for part in argument for word in words(part)]
            if argument is None:
                return ["none"]
            if isinstance(argument, float):
                return [argument.hex()]
            if isinstance(argument, str):
                return [argument or "-"]
            assert isinstance(argument, int)
            at = bisect.bisect_right(starts, argument) - 1
            if argument and at >= 0 and argument < starts[at] + max(1, self._storages[starts[at]].nbytes()):
                return [f"@{used.setdefault(starts[at], len(used))}+{argument - starts[at]}"]
            return [str(argument)]

        text = words(list(arguments))
        sizes = [self._storages[address].nbytes() for address in used]
        line = " ".join([name, str(len(used)), *map(str, sizes), *text])
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line.encode() + b"\n")
        for address, size in zip(used, sizes, strict=True):
            process.stdin.write(ctypes.string_at(address, size))
        process.stdin.flush()
        first = process.stdout.readline()
        if not first:
            raise RuntimeError(f"the server ended during {line}")
        status, _, answer = first.decode().rstrip("\n").partition(" ")
        for address, size in zip(used, sizes, strict=True):
            ctypes.memmove(address, process.stdout.read(size), size)
        if status != "ok":
            raise ValueError(answer)
        return answer
