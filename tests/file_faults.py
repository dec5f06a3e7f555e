"""Faults for tests of writers: a process that is killed at any of its steps on files, and a small full disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_ops import files

# What a writer does to files, each a function of the module that it calls.
STEPS = [(os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (files, "save_file"), (Path, "write_bytes")]


def killed_at(step: int, action: Callable[[], object], *more: tuple[Any, str]) -> bool:
    """Run an action in a child process that ends by SIGKILL before its step, counted from 0; whether it got that far.

    Odd steps are killed after the call, even ones before it, so 2 · i and 2 · i + 1 are of one call. ``more`` names further
    functions of modules that count as steps.
    """
    child = os.fork()
    if child == 0:
        left = [step]

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 2
                if left[0] == -2:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return original(*arguments, **options)
                finally:
                    if left[0] == -1:
                        os.kill(os.getpid(), signal.SIGKILL)

            return call

        for owner, name in (*STEPS, *more):
            setattr(owner, name, counted(getattr(owner, name)))
        code = 1
        with contextlib.suppress(BaseException):
            action()
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the action failed in the child"
    return os.WIFSIGNALED(status)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of a size at a folder; skips the test where the process may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
