"""Measure the peak memory of a step beyond what was allocated before it."""

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
    """The peak of bytes that ``make(device, *arguments)()`` allocates, its results included.

    CPU: the resident memory of a separate process, so that scratch memory counts and freed memory is not reused; a step
    with the ``small`` arguments first loads code and libraries. GPU: torch's allocator, in this process.

    Raises:
        RuntimeError: the device is a CPU and the system is not Linux.
        TimeoutError: on a CPU, the step takes more than three times a call's share of the run's time.
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
        raise RuntimeError("the peak of a process's memory can be read only from /proc on Linux")
    # The fork server has imported torch and used no threads, so a fork of it is a fresh process at no cost.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, make.__module__])
    with context.Pool(1) as pool:
        result = pool.apply_async(resident, (make, arguments, small, torch.get_num_threads()))
        try:
            return result.get(timeout=3 * settings.share)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"the step had not ended after {3 * settings.share:.3g} s") from None


def resident(make: Make, arguments: tuple[Any, ...], small: tuple[Any, ...], threads: int) -> int:
    """Measure in a separate process, for :func:`peak_bytes`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make(torch.device("cpu"), *small)()
    step = make(torch.device("cpu"), *arguments)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: returns freed memory to the system
    if trim:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    kept = step()
    peak = status("VmHWM")
    del kept
    return peak - before


def status(name: str) -> int:
    """Read a size from /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
