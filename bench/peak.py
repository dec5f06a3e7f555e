"""The most memory that a step takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .common import Settings

Make = Callable[..., Callable[[], object]]


def measurable(settings: Settings) -> bool:
    return settings.kind == "cuda" or platform.system() == "Linux"


def peak_bytes(settings: Settings, make: Make, arguments: tuple[Any, ...], small: tuple[Any, ...]) -> int:
    """Bytes that ``make(device, *arguments)()`` has allocated at its peak, the results that it returns included.

    CPU: the resident memory of a process of its own, so that scratch memory counts and nothing that was freed before
    is used again; a step of the ``small`` arguments loads code and libraries first. GPU: torch's allocator, here.

    Raises:
        RuntimeError: on a CPU where the system does not tell (it takes Linux).
    """
    if settings.kind == "cuda":
        step = make(settings.device, *arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated()) - before
    if not measurable(settings):
        raise RuntimeError("the peak of a process's memory is read from /proc, which only Linux has")
    # The server has imported torch and used no threads, so that a fork of it is a fresh process at no cost.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, make.__module__])
    with context.Pool(1) as pool:
        return pool.apply(resident, (make, arguments, small, torch.get_num_threads()))


def resident(make: Make, arguments: tuple[Any, ...], small: tuple[Any, ...], threads: int) -> int:
    """In a process of its own: see :func:`peak_bytes`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make(torch.device("cpu"), *small)()
    step = make(torch.device("cpu"), *arguments)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: gives back what was freed
    if trim:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    kept = step()
    peak = status("VmHWM")
    del kept
    return peak - before


def status(name: str) -> int:
    """A size from /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
