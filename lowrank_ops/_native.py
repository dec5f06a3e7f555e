"""The compiled module _C behind tensors: raw pointers, sizes and strides go in, nothing else.

Everything here trusts its caller: lowrank_ops.ops has checked shapes, dtypes and devices.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

# torch is imported first, so that _C finds torch's OpenMP runtime already loaded and shares its thread pool.
_module: ModuleType | None = None
_error: ImportError | None = None
try:
    _module = importlib.import_module("lowrank_ops._C")
except ImportError as error:
    _error = error

FORMS = {"few": 0, "many": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NF4 = 3


def module() -> ModuleType:
    """The compiled module, or RuntimeError that says how to get it."""
    if _module is None:
        raise RuntimeError(
            "the compiled module lowrank_ops._C is missing or does not load, and this path needs it: build it with "
            f"`pip install .` in the repository (it takes a C++17 compiler), or install a wheel. Import said: {_error}"
        )
    return _module


def missing() -> ImportError | None:
    """Why _C is missing, or None."""
    return _error


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _DTYPES[tensor.dtype]


def nf4_quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    w = w.contiguous()
    packed = torch.empty((w.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-w.numel() // block_size), dtype=torch.float32)
    module().nf4_quantize(
        w.data_ptr(), _DTYPES[w.dtype], w.numel(), block_size, packed.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed, absmax


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    absmax = absmax.contiguous()
    index = torch.empty(absmax.numel(), dtype=torch.uint8)
    absmax2 = torch.empty(-(-absmax.numel() // 256), dtype=torch.float32)
    module().absmax_quantize(
        absmax.data_ptr(), offset.data_ptr(), absmax.numel(), index.data_ptr(), absmax2.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return index, absmax2


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, out: Tensor, block_size: int
) -> Tensor:
    arguments = (
        packed.data_ptr(), absmax.data_ptr(), _ptr(absmax2), _ptr(offset), out.numel(), block_size, out.data_ptr(),
        _DTYPES[out.dtype],
    )  # fmt: skip
    if out.device.type == "cuda":
        with torch.cuda.device(out.device):
            module().nf4_dequantize_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        module().nf4_dequantize(*arguments, torch.get_num_threads())
    return out


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    R = 0 if down is None else down.shape[0]
    y, h = x.new_empty(M, out_features), x.new_empty(M, R, dtype=torch.float32)
    module().adapted_linear(
        form=FORMS[form], M=M, N=out_features, K=K, R=R,
        x=x.data_ptr(), dtype=_DTYPES[x.dtype], x_stride=x.stride(0),
        weight=weight.data_ptr(), weight_dtype=_NF4 if block_size else _DTYPES[weight.dtype],
        absmax=_ptr(absmax), absmax2=_ptr(absmax2), offset=_ptr(offset), block_size=block_size,
        down=_ptr(down), down_dtype=_dtype(down), up=_ptr(up), up_dtype=_dtype(up),
        bias=_ptr(bias), bias_dtype=_dtype(bias),
        scale=scale, dropout=dropout, seed=0 if seed is None else int(seed),
        y=y.data_ptr(), h=h.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return y, h


def adapted_linear_backward(
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    form: str,
    need_x: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # `form` is the launchers' in common; here one form of the backward serves every M.
    M, N = g.shape
    R = 0 if down is None else down.shape[0]
    dx = g.new_empty(M, in_features) if need_x else None
    ddown = torch.empty_like(down) if need_down and down is not None else None
    dup = torch.empty_like(up) if need_up and up is not None else None
    module().adapted_linear_backward(
        M=M, N=N, K=in_features, R=R,
        g=g.data_ptr(), dtype=_DTYPES[g.dtype], g_stride=g.stride(0),
        x=_ptr(x), x_stride=0 if x is None else x.stride(0), h=_ptr(h),
        weight=weight.data_ptr(), weight_dtype=_NF4 if block_size else _DTYPES[weight.dtype],
        absmax=_ptr(absmax), absmax2=_ptr(absmax2), offset=_ptr(offset), block_size=block_size,
        down=_ptr(down), down_dtype=_dtype(down), up=_ptr(up), up_dtype=_dtype(up),
        scale=scale, dropout=dropout, seed=0 if seed is None else int(seed),
        dx=_ptr(dx), ddown=_ptr(ddown), dup=_ptr(dup), threads=torch.get_num_threads(),
    )  # fmt: skip
    return dx, ddown, dup
