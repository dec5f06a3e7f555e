"""Start a kernel with the device guard and the fixed options, or record the launch instead of running it.

``aot`` calls the same launchers as users, with meta tensors inside :func:`recording`, so it compiles what runs: the
same specialised signatures, constants, warps and stages.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from .config import SIZES, Arch, Config

# Contraction would round the second level of the scales once instead of twice; kernels that want a fused multiply-add
# call tl.fma.
FP_FUSION = False


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: everything that decides the machine code, and the grid."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None
_recording_arch: Arch | None = None


@contextlib.contextmanager
def recording(arch: Arch) -> Iterator[list[Launch]]:
    """Record launches in the yielded list, configured for ``arch``, and run none of them."""
    global _recorded, _recording_arch
    _recorded, _recording_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded = _recording_arch = None


@triton.jit
def _probe_kernel() -> None:
    pass


def interpreted() -> bool:
    """Tell whether TRITON_INTERPRET was set when this package was imported."""
    return not isinstance(_probe_kernel, JITFunction)


def check_dtypes(*tensors: Tensor | torch.dtype | None) -> None:
    """Refuse bfloat16 in the interpreter, whose bfloat16 arithmetic is silently wrong.

    Raises:
            TypeError: the message names the dtype.
    """
    if not interpreted():
        return
    for tensor in tensors:
        dtype = tensor.dtype if isinstance(tensor, Tensor) else tensor
        if dtype == torch.bfloat16:
            raise TypeError("torch.bfloat16 is not supported under TRITON_INTERPRET=1: use float32 or float16")


@functools.cache
def _arch_of_cuda(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    return Arch(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


def arch_of(device: torch.device) -> Arch:
    """The GPU of a device, as :func:`config.get_config` takes it."""
    if _recording_arch is not None:
        return _recording_arch
    if device.type != "cuda":
        return Arch("interpreter", 80, 1)
    return _arch_of_cuda(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=None, typed=True)  # True is not 1 in a kernel's signature
def constant(value: Any) -> tl.constexpr:
    """Mark a member of a kernel's tuple argument as known when compiling."""
    return tl.constexpr(value)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, config: Config, **arguments: Any) -> None:
    """Start ``kernel`` on the current stream of ``device``, with those sizes of ``config`` for which it has parameters."""
    arguments.update((size, getattr(config, size)) for size in SIZES if size in kernel.arg_names)
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, grid, config.num_warps, config.num_stages))
        return
    # Triton launches on the current device, which may differ from the tensors' device.
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": FP_FUSION}
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**arguments, **options)
