"""y = W x + bias + s · U C h with h = D drop(x), and its gradients; W in NF4 or dense.

Two forms, chosen above and passed in. Both are right for every shape.

few   Tiles of W are decoded in registers: :mod:`adapted_linear_few`. A small kernel makes h before it. Where the result
      has too few columns to give every multiprocessor a tile, the sum is split: one kernel makes the splits' sums and h,
      in programs of their own, and a second adds the splits in their order, the low-rank term and the bias. Two launches
      forward either way, for NF4 factors are decoded in registers too; backward decodes W again and multiplies along the
      other axis, and it decodes NF4 factors into a workspace first: it reads them across their rows.
many  W is decoded once into a workspace, the vendor's matrix product runs on it, and Triton kernels do what is of low
      rank around it. The workspace is taken from torch's caching allocator at each call: the allocator hands the same
      block out again, once the stream is past its last use, and knows streams and CUDA graphs; a buffer kept here would
      be shared between streams.

The core C is applied where h is loaded for the product after it, in registers: neither a launch nor a pass over memory.

Letters: M tokens, N out features, K in features, R rank. A matrix is ``(data, scales, block_size)``: dense with
``block_size == 0`` and no scales; or NF4 with its packed uint8 bytes and ``scales`` of (absmax,) or, under double
quantisation, (absmax, absmax2, offset).
"""

# mypy: allow-untyped-defs
# The parameters of a kernel have types of Triton.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapted_linear_few import (
    Matrix,
    all_scales,
    check_operands,
    decoding_arguments,
    factor_arguments,
    few_backward,
    few_forward,
    few_split,
    shrink_tile,
)
from .config import Override, choose
from .core import Core, core_arguments, core_gradient, core_tile, token_sum
from .dropout import drop_arguments, keep_tile
from .launch import arch_of, launch
from .matrix import decode_tile, load_levels, load_tile, unit_rows
from .nf4 import dequantize

FORMS = ("few", "many")


# ---- kernels


@triton.jit(do_not_specialize=["threshold"])
def _shrink_kernel(
    x_ptr,
    factor_ptr,
    factor_absmax_ptr,
    factor_absmax2_ptr,
    factor_offset_ptr,
    levels_ptr,
    dynamic_ptr,
    seed_ptr,
    h_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_fr,
    stride_fk,
    scale,
    threshold,
    FACTOR_BLOCK: tl.constexpr,
    FACTOR_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h = scale · D drop(x)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    shrink_tile(
        x_ptr,
        factor_ptr,
        factor_absmax_ptr,
        factor_absmax2_ptr,
        factor_offset_ptr,
        levels_ptr,
        dynamic_ptr,
        seed_ptr,
        h_ptr,
        m,
        tl.program_id(1) * BLOCK_R,
        M,
        K,
        R,
        stride_xm,
        stride_fr,
        stride_fk,
        scale,
        threshold,
        FACTOR_BLOCK,
        FACTOR_ALIGNED,
        BLOCK_K,
        BLOCK_R,
    )


@triton.jit(do_not_specialize=["threshold", "core_size"])
def _expand_kernel(
    h_ptr,
    factor_ptr,
    factor_absmax_ptr,
    factor_absmax2_ptr,
    factor_offset_ptr,
    levels_ptr,
    dynamic_ptr,
    core_ptr,
    index_ptr,
    core_size,
    bias_ptr,
    seed_ptr,
    parts_ptr,
    out_ptr,
    M,
    N,
    R,
    stride_fn,
    stride_fr,
    scale,
    threshold,
    FACTOR_BLOCK: tl.constexpr,
    FACTOR_ALIGNED: tl.constexpr,
    CORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m, n] = drop(scale · Σ_r (C h)[m, r] · factor[n, r]) + bias[n] + Σ_split parts[split, m, n].

    Cᵀ stands for C where TRANSPOSED; the splits are added in their order. Each term may be absent.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column0 = tl.program_id(1) * BLOCK_N
    n = column0 + tl.arange(0, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if factor_ptr is not None:
        levels = load_levels(levels_ptr)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            h = core_tile(h_ptr, m, r, M, R, R, core_ptr, index_ptr, core_size, CORE, TRANSPOSED, dtype)
            if FACTOR_BLOCK == 0:
                factor = load_tile(factor_ptr, r, n, stride_fr, stride_fn, R, N)
            else:
                factor = decode_tile(
                    factor_ptr,
                    factor_absmax_ptr,
                    factor_absmax2_ptr,
                    factor_offset_ptr,
                    levels,
                    dynamic_ptr,
                    column0,
                    r0,
                    N,
                    R,
                    FACTOR_BLOCK,
                    FACTOR_ALIGNED,
                    BLOCK_N,
                    BLOCK_R,
                )
                factor = tl.trans(factor)
            acc = tl.dot(h.to(dtype), factor.to(dtype), acc, input_precision="ieee")
    acc = acc * scale
    if seed_ptr is not None:
        acc = tl.where(keep_tile(seed_ptr, threshold, m, column0, BLOCK_N), acc, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if parts_ptr is not None:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in range(SPLITS):
            total += tl.load(parts_ptr + split * tl.cast(M, tl.int64) * N + at, mask=mask, other=0.0)
        acc += total
    tl.store(out_ptr + at, acc.to(dtype), mask=mask)


# ---- launchers


def forward(
    x: Tensor,
    weight: Matrix,
    out_features: int,
    rank: int,
    down: Matrix | None,
    up: Matrix | None,
    core: Core | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    form: str,
    config: Override = None,
) -> tuple[Tensor, Tensor]:
    """y = W x + bias + s · U C h, h = D drop(x), row by row of x.

    Args:
        x: [M, K], float32, bfloat16 or float16, any row stride; M >= 1.
        weight: W [N, K].
        out_features: N.
        rank: R; 0 where there is no update.
        down, up: D [R, K] and U [N, R], dense ones with any strides, or both None.
        core: C [R, R] as (values, index), see :mod:`core`; None for the identity.
        bias: [N] or None.
        scale: s.
        dropout: probability to drop an element of the input of D.
        seed: int64 [1] on the device of x, read by the kernel; needed where dropout > 0.
        form: "few" or "many".
        config: one for every kernel, or a mapping from kernel name; None for :func:`config.get_config`.

    Returns:
        y [M, N] in the dtype of x; h float32 [M, R].

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: products accumulate in float32. Other dtypes than that of x are rounded to it, NF4 weights once from the
    float32 product of level and scale (not at all for one or two tokens in form "few", where the scale may multiply a sum
    of eight levels times x), and so is s · C h (C h in form "many" and in split sums) as an operand of the second
    product; C h is float32 but for a dense core, see :func:`core.core_tile`. NF4 factors are rounded as W is; form
    "many" decodes them into a workspace in the dtype of x. Form "few" rounds y once, split or not, and splits are added
    in their order; "many" rounds s · U C h + bias to the dtype of x and then the sum with W x. Float32 products are IEEE
    in Triton; the vendor's product follows torch's TF32 setting. The row of a token does not depend on other rows within
    a form and a configuration, as far as the vendor's product of form "many" keeps that.
    """
    check_operands(x, weight, down, up, core, bias)
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    x = unit_rows(x)
    (M, K), bits = x.shape, 8 * x.itemsize
    h = torch.empty(M, rank, dtype=torch.float32, device=x.device)
    keep, drop = 1 / (1 - dropout), drop_arguments(dropout, seed)
    if form == "few":
        cfg = choose(config, "few_forward_split", arch_of(x.device), M, out_features, K, rank, bits, weight[2])
        if cfg.SPLITS > 1:
            parts = few_split(x, weight, out_features, down, h, keep, drop, False, cfg, config)
            return _expand(h, up, out_features, core, False, bias, scale, None, x.dtype, config, parts), h
    elif down is not None and up is not None:
        down, up = _decoded(down, rank, K, x.dtype), _decoded(up, out_features, rank, x.dtype)
    if down is not None:
        _shrink(x, down, h, keep, drop, config)
    if form == "few":
        return few_forward(x, weight, out_features, up, h, core, bias, scale, config=config), h
    w = _decoded(weight, out_features, K, x.dtype)[0].to(x.dtype)
    if up is None:
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype)), h
    y = _expand(h, up, out_features, core, False, bias, scale, None, x.dtype, config)
    return y.addmm_(x, w.t()), h


def backward(
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Matrix,
    in_features: int,
    rank: int,
    down: Matrix | None,
    up: Matrix | None,
    core: Core | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    form: str,
    need_x: bool,
    need_down: bool,
    need_up: bool,
    need_core: bool,
    config: Override = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx = Wᵀ g + drop(Dᵀ Cᵀ gh), dD = (Cᵀ gh)ᵀ drop(x), dU = s · gᵀ C h, dC = ghᵀ h on its pattern; gh = s · Uᵀ g.

    Args:
        g: gradient of y, [M, N], float32, bfloat16 or float16, any row stride; M >= 1.
        x: as given to :func:`forward`; may be None unless ``need_down``.
        h: as returned by :func:`forward`; may be None unless ``need_up`` or ``need_core``.
        in_features: K.
        need_x, need_down, need_up, need_core: which gradients to compute; of NF4 factors there are none.
        The other arguments are those of :func:`forward`.

    Returns:
        dx [M, K] in the dtype of g, dD [R, K] in that of D, dU [N, R] in that of U, dC in the layout and dtype of the
        values of C; None where not needed.

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: as in :func:`forward`, with NF4 factors decoded into a workspace in both forms; Cᵀ gh and C h are rounded to
    the dtype of g as operands of the products of low rank, gh and h not at all in dC. A sum over tokens has a fixed
    order, see :func:`core.token_sum`.
    """
    check_operands(g, weight, down, up, core, x)
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    g = unit_rows(g)
    M, N, K = *g.shape, in_features
    drop = drop_arguments(dropout, seed)
    keep = 1 / (1 - dropout)
    gh = torch.empty(M, rank, dtype=torch.float32, device=g.device)
    u = None
    if up is not None and (need_x or need_down or need_core):
        u = _transposed(_decoded(up, N, rank, g.dtype))
    dx = ddown = dup = dcore = None
    cfg = choose(config, "few_backward_split", arch_of(g.device), M, N, K, rank, 8 * g.itemsize, weight[2])
    split = need_x and form == "few" and cfg.SPLITS > 1
    if u is not None and not split:
        _shrink(g, u, gh, scale, drop_arguments(), config)
    if need_x:
        d = None if down is None else _transposed(_decoded(down, rank, K, g.dtype))
        if split:
            parts = few_split(g, weight, K, u, gh, scale, drop_arguments(), True, cfg, config)
            dx = _expand(gh, d, K, core, True, None, keep, drop, g.dtype, config, parts)
        elif form == "few":
            dx = few_backward(g, weight, K, g.dtype, d and d[0], gh, core, keep, drop, config=config)
        else:
            w = _decoded(weight, N, K, g.dtype)[0].to(g.dtype)
            if d is None:
                dx = g @ w
            else:
                dx = _expand(gh, d, K, core, True, None, keep, drop, g.dtype, config).addmm_(g, w)
    if need_down and down is not None and x is not None:
        ddown = torch.empty(down[0].shape, dtype=down[0].dtype, device=g.device)
        token_sum(gh, unit_rows(x), ddown, K, 1, keep, drop, core, True, config)
    if need_up and up is not None and h is not None:
        dup = torch.empty(up[0].shape, dtype=up[0].dtype, device=g.device)
        token_sum(h, g, dup, 1, rank, scale, None, core, False, config)
    if need_core and core is not None and h is not None:
        dcore = core_gradient(gh, h, core, config=config)
    return dx, ddown, dup, dcore


def _shrink(x: Tensor, factor: Matrix, h: Tensor, scale: float, drop: dict[str, Any], config: Override) -> None:
    """h = scale · drop(x) factorᵀ for a factor [R, K]."""
    (M, K), R = x.shape, h.shape[1]
    cfg = choose(config, "shrink", arch_of(x.device), M, R, K, R, 8 * x.itemsize, factor[2])
    launch(
        _shrink_kernel,
        (triton.cdiv(M, cfg.BLOCK_M), triton.cdiv(R, cfg.BLOCK_R)),
        x.device,
        cfg.num_warps,
        cfg.num_stages,
        x_ptr=x,
        **factor_arguments(factor, K, "stride_fr", "stride_fk"),
        **decoding_arguments(factor),
        h_ptr=h,
        M=M,
        K=K,
        R=R,
        stride_xm=x.stride(0),
        scale=float(scale),
        **drop,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_K=cfg.BLOCK_K,
        BLOCK_R=cfg.BLOCK_R,
    )


def _expand(
    h: Tensor,
    factor: Matrix | None,
    N: int,
    core: Core | None,
    transposed: bool,
    bias: Tensor | None,
    scale: float,
    drop: dict[str, Any] | None,
    dtype: torch.dtype,
    config: Override,
    parts: Tensor | None = None,
) -> Tensor:
    """out = drop(scale · C h factorᵀ) + bias + Σ parts for a factor [N, R]; [M, N] of ``dtype``."""
    M, R = h.shape
    out = torch.empty(M, N, dtype=dtype, device=h.device)
    cfg = choose(config, "expand", arch_of(h.device), M, N, R, R, 8 * out.itemsize)
    launch(
        _expand_kernel,
        (triton.cdiv(M, cfg.BLOCK_M), triton.cdiv(N, cfg.BLOCK_N)),
        h.device,
        cfg.num_warps,
        cfg.num_stages,
        h_ptr=None if factor is None else h,
        **factor_arguments(factor, R, "stride_fn", "stride_fr"),
        **decoding_arguments(factor),
        **core_arguments(core, R),
        TRANSPOSED=core is not None and transposed,
        bias_ptr=None if bias is None else bias.contiguous(),
        parts_ptr=parts,
        SPLITS=0 if parts is None else parts.shape[0],
        out_ptr=out,
        M=M,
        N=N,
        R=R,
        scale=float(scale),
        **(drop or drop_arguments()),
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_R=cfg.BLOCK_R,
    )
    return out


def _decoded(matrix: Matrix, rows: int, columns: int, dtype: torch.dtype) -> Matrix:
    """The matrix [rows, columns]: a dense one as it is, an NF4 one decoded to ``dtype``."""
    data, scales, block_size = matrix[:3]
    if block_size == 0:
        return matrix
    absmax, absmax2, offset = all_scales(scales)
    assert absmax is not None
    return dequantize(data, absmax, absmax2, offset, rows, columns, block_size, dtype), (), 0


def _transposed(matrix: Matrix) -> Matrix:
    """Of a dense matrix."""
    return matrix[0].t(), (), 0
