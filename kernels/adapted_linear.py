"""y = W x + bias + s · U h with h = D drop(x), and its gradients; W in NF4 or dense.

Two forms, chosen above and passed in. Both are right for every shape.

few   One kernel decodes a tile of W in registers, multiplies it and adds the low-rank term and the bias; a small kernel
      makes h before it. Two launches forward; backward decodes again and multiplies along the other axis.
many  W is decoded once into a workspace, the vendor's matrix product runs on it, and Triton kernels do what is of low
      rank around it. The workspace is taken from torch's caching allocator at each call: the allocator hands the same
      block out again, once the stream is past its last use, and knows streams and CUDA graphs; a buffer kept here would
      be shared between streams.

The tile products of both directions are formed transposed, [columns of the result, tokens]: the decoded weight is then
the first operand of the tensor-core instruction, whose 64 rows on Hopper fit the weight and not a handful of tokens.

Letters: M tokens, N out features, K in features, R rank. ``block_size == 0`` says that ``weight`` is dense.
"""

# mypy: allow-untyped-defs
# The parameters of a kernel have types of Triton.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Override, choose
from .launch import arch_of, check_dtypes, launch
from .nf4 import decode_tile, dequantize, load_levels, tables

FORMS = ("few", "many")


# ---- helpers


@triton.jit
def _keep_tile(seed_ptr, threshold, rows, column0, COLUMNS: tl.constexpr):
    """keep[m, k] = philox(key=seed, counter=(k // 4, m, 0, 0))[k % 4] >= threshold, a tile [len(rows), COLUMNS].

    ``column0`` must be a multiple of four: all four words of a counter are used.
    """
    quad = (column0 // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    row = rows.to(tl.int32)[:, None]
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), zero + quad, zero + row, zero, zero, 10)
    # Two joins put word 2a + b at [..., a, b].
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return words >= threshold.to(tl.uint32)


@triton.jit
def _load_tile(ptr, rows, columns, stride_row, stride_column, row_count, column_count):
    """[len(rows), len(columns)] of a strided matrix, zero outside of it."""
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + at, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)


@triton.jit
def _weight_tile(
    weight_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    levels,
    dynamic_ptr,
    row0,
    column0,
    N,
    K,
    stride_wn,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of W [ROWS, COLUMNS]: NF4 in float32, dense in its own dtype. Outside of W it is finite."""
    if BLOCK_SIZE == 0:
        rows = row0 + tl.arange(0, ROWS)
        columns = column0 + tl.arange(0, COLUMNS)
        w = _load_tile(weight_ptr, rows, columns, stride_wn, 1, N, K)
    else:
        w = decode_tile(
            weight_ptr,
            absmax_ptr,
            absmax2_ptr,
            offset_ptr,
            levels,
            dynamic_ptr,
            row0,
            column0,
            N,
            K,
            BLOCK_SIZE,
            ALIGNED,
            ROWS,
            COLUMNS,
        )
    return w


# ---- few tokens


@triton.jit
def _few_forward_kernel(
    x_ptr,
    weight_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    levels_ptr,
    dynamic_ptr,
    up_ptr,
    h_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_wn,
    stride_un,
    stride_ur,
    scale,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row0 = tl.program_id(0) * BLOCK_N
    n = row0 + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = x_ptr.dtype.element_ty
    levels = levels_ptr
    if BLOCK_SIZE > 0:
        levels = load_levels(levels_ptr)

    # One partial sum per element of the tile for one token, the tensor cores' accumulator for more.
    acc = tl.zeros((BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load_tile(x_ptr, m, k, stride_xm, 1, M, K)
        w = _weight_tile(
            weight_ptr,
            absmax_ptr,
            absmax2_ptr,
            offset_ptr,
            levels,
            dynamic_ptr,
            row0,
            k0,
            N,
            K,
            stride_wn,
            BLOCK_SIZE,
            ALIGNED,
            BLOCK_N,
            BLOCK_K,
        )
        if BLOCK_M == 1:
            acc = tl.fma(w.to(tl.float32), tl.broadcast_to(x.to(tl.float32), (BLOCK_N, BLOCK_K)), acc)
        else:
            acc = tl.dot(w.to(dtype), tl.trans(x), acc, input_precision="ieee")

    y = tl.sum(acc, axis=1)[:, None] if BLOCK_M == 1 else acc  # [BLOCK_N, BLOCK_M]
    if up_ptr is not None:
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            up = _load_tile(up_ptr, n, r, stride_un, stride_ur, N, R)
            h = _load_tile(h_ptr, m, r, R, 1, M, R) * scale
            if BLOCK_M == 1:
                y += tl.sum(up.to(tl.float32) * h, axis=1)[:, None]
            else:
                y = tl.dot(up.to(dtype), tl.trans(h.to(dtype)), y, input_precision="ieee")
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, tl.trans(y).to(dtype), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def _few_backward_kernel(
    g_ptr,
    weight_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    levels_ptr,
    dynamic_ptr,
    down_ptr,
    gh_ptr,
    seed_ptr,
    dx_ptr,
    M,
    N,
    K,
    R,
    stride_gm,
    stride_wn,
    stride_dr,
    stride_dk,
    factor,
    threshold,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    column0 = tl.program_id(0) * BLOCK_K
    k = column0 + tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype = g_ptr.dtype.element_ty
    levels = levels_ptr
    if BLOCK_SIZE > 0:
        levels = load_levels(levels_ptr)

    acc = tl.zeros((BLOCK_N if BLOCK_M == 1 else BLOCK_M, BLOCK_K), tl.float32)
    if BLOCK_M > 1:
        acc = tl.trans(acc)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        g = _load_tile(g_ptr, m, n, stride_gm, 1, M, N)
        w = _weight_tile(
            weight_ptr,
            absmax_ptr,
            absmax2_ptr,
            offset_ptr,
            levels,
            dynamic_ptr,
            n0,
            column0,
            N,
            K,
            stride_wn,
            BLOCK_SIZE,
            ALIGNED,
            BLOCK_N,
            BLOCK_K,
        )
        if BLOCK_M == 1:
            acc = tl.fma(w.to(tl.float32), tl.broadcast_to(tl.trans(g).to(tl.float32), (BLOCK_N, BLOCK_K)), acc)
        else:
            acc = tl.dot(tl.trans(w.to(dtype)), tl.trans(g), acc, input_precision="ieee")

    dx = tl.sum(acc, axis=0)[None, :] if BLOCK_M == 1 else tl.trans(acc)  # [BLOCK_M, BLOCK_K]
    if down_ptr is not None:
        through = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            down = _load_tile(down_ptr, r, k, stride_dr, stride_dk, R, K)
            gh = _load_tile(gh_ptr, m, r, R, 1, M, R)
            if BLOCK_M == 1:
                through += tl.sum(down.to(tl.float32) * tl.trans(gh), axis=0)[None, :]
            else:
                through = tl.dot(gh.to(dtype), down.to(dtype), through, input_precision="ieee")
        if seed_ptr is not None:
            through = tl.where(_keep_tile(seed_ptr, threshold, m, column0, BLOCK_K), through, 0.0)
        dx += factor * through
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx_ptr + at, dx.to(dtype), mask=(m < M)[:, None] & (k < K)[None, :])


# ---- low rank


@triton.jit(do_not_specialize=["threshold"])
def _shrink_kernel(
    x_ptr,
    factor_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[m, r] = scale · Σ_k drop(x[m, k]) · factor[r, k], float32."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_K) if BLOCK_M == 1 else (BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load_tile(x_ptr, m, k, stride_xm, 1, M, K)
        factor = _load_tile(factor_ptr, r, k, stride_fr, stride_fk, R, K)
        if seed_ptr is not None:
            x = tl.where(_keep_tile(seed_ptr, threshold, m, k0, BLOCK_K), x, 0.0)
        if BLOCK_M == 1:
            acc = tl.fma(factor.to(tl.float32), tl.broadcast_to(x.to(tl.float32), (BLOCK_R, BLOCK_K)), acc)
        else:
            acc = tl.dot(x, tl.trans(factor.to(x.dtype)), acc, input_precision="ieee")
    h = tl.sum(acc, axis=1)[None, :] if BLOCK_M == 1 else acc
    at = m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(h_ptr + at, scale * h, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def _expand_kernel(
    h_ptr,
    factor_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    R,
    stride_fr,
    stride_fn,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m, n] = drop(scale · Σ_r h[m, r] · factor[r, n]) + bias[n]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column0 = tl.program_id(1) * BLOCK_N
    n = column0 + tl.arange(0, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        h = _load_tile(h_ptr, m, r, R, 1, M, R)
        factor = _load_tile(factor_ptr, r, n, stride_fr, stride_fn, R, N)
        acc = tl.dot(h.to(dtype), factor.to(dtype), acc, input_precision="ieee")
    acc = acc * scale
    if seed_ptr is not None:
        acc = tl.where(_keep_tile(seed_ptr, threshold, m, column0, BLOCK_N), acc, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, acc.to(dtype), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def _token_sum_kernel(
    h_ptr,
    x_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    R,
    stride_xm,
    stride_or,
    stride_on,
    stride_split,
    tokens,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, r, n] = scale · Σ_m h[m, r] · drop(x[m, n]) over the ``tokens`` rows of the split."""
    column0 = tl.program_id(0) * BLOCK_N
    n = column0 + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(2) * tokens
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for m0 in range(first, tl.minimum(first + tokens, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        h = _load_tile(h_ptr, m, r, R, 1, M, R)
        x = _load_tile(x_ptr, m, n, stride_xm, 1, M, N)
        if seed_ptr is not None:
            x = tl.where(_keep_tile(seed_ptr, threshold, m, column0, BLOCK_N), x, 0.0)
        acc = tl.dot(tl.trans(h.to(x.dtype)), x, acc, input_precision="ieee")
    at = r.to(tl.int64)[:, None] * stride_or + n.to(tl.int64)[None, :] * stride_on
    out = (scale * acc).to(out_ptr.dtype.element_ty)
    split_ptr = out_ptr + tl.program_id(2).to(tl.int64) * stride_split
    tl.store(split_ptr + at, out, mask=(r < R)[:, None] & (n < N)[None, :])


@triton.jit
def _sum_splits_kernel(parts_ptr, out_ptr, numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ_split parts[split, i], in the order of the splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(parts_ptr + split * tl.cast(numel, tl.int64) + at, mask=at < numel, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < numel)


# ---- launchers


def forward(
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
    config: Override = None,
) -> tuple[Tensor, Tensor]:
    """y = W x + bias + s · U h, h = D drop(x), row by row of x.

    Args:
        x: [M, K], float32, bfloat16 or float16, any row stride; M >= 1.
        weight: dense [N, K], or the packed uint8 bytes of NF4.
        absmax, absmax2, offset: scales of NF4 as in :func:`nf4.dequantize`; None for a dense weight.
        out_features: N.
        block_size: of NF4; 0 for a dense weight.
        down, up: D [R, K] and U [N, R], any strides, or both None.
        bias: [N] or None.
        scale: s.
        dropout: probability to drop an element of the input of D.
        seed: int64 [1] on the device of x, read by the kernel; needed where dropout > 0.
        form: "few" or "many".
        config: one for every kernel, or a mapping from kernel name; None for :func:`config.get_config`.

    Returns:
        y [M, N] in the dtype of x; h float32 [M, R], with R = 0 where there is no update.

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: products accumulate in float32. Other dtypes than that of x are rounded to it, NF4 weights once from the
    float32 product of level and scale (not at all for a single token in form "few"), and so is s · h (h in form "many")
    as an operand of the second product. Form "few" rounds y once; "many" rounds s · U h + bias to the dtype of x and
    then the sum with W x. Float32 products are IEEE in Triton; the vendor's product follows torch's TF32 setting. The
    row of a token does not depend on other rows within a form and a configuration, as far as the vendor's product of
    form "many" keeps that.
    """
    check_dtypes(x, weight, down, up, bias)
    x = _unit_rows(x)
    M, K = x.shape
    N = out_features
    h = torch.empty(M, 0 if down is None else down.shape[0], dtype=torch.float32, device=x.device)
    drop = _drop(dropout, seed)
    if down is not None:
        _shrink(x, down, down.stride(0), down.stride(1), h, 1 / (1 - dropout), drop, config)
    if form == "many":
        w = _dense(weight, absmax, absmax2, offset, N, K, block_size, x.dtype)
        if up is None:
            return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype)), h
        y = _expand(h, up, up.stride(1), up.stride(0), N, bias, scale, _drop(0.0, None), x.dtype, config)
        return y.addmm_(x, w.t()), h
    if form != "few":
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    R = h.shape[1]
    cfg = choose(config, "few_forward", arch_of(x.device), M, N, K, R, 8 * x.itemsize, block_size)
    launch(
        _few_forward_kernel,
        (triton.cdiv(N, cfg.BLOCK_N), triton.cdiv(M, cfg.BLOCK_M)),
        x.device,
        cfg.num_warps,
        cfg.num_stages,
        x_ptr=x,
        **_weight_arguments(weight, absmax, absmax2, offset, K, block_size),
        up_ptr=up,
        h_ptr=None if up is None else h,
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        R=R,
        stride_xm=x.stride(0),
        stride_un=0 if up is None else up.stride(0),
        stride_ur=0 if up is None else up.stride(1),
        scale=float(scale),
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_K=cfg.BLOCK_K,
        BLOCK_R=cfg.BLOCK_R,
    )
    return y, h


def backward(
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
    need_dx: bool,
    need_ddown: bool,
    need_dup: bool,
    config: Override = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = Wᵀ g + drop(Dᵀ gh), dD = ghᵀ drop(x), dU = s · gᵀ h, with gh = s · Uᵀ g, row by row.

    Args:
        g: gradient of y, [M, N], float32, bfloat16 or float16, any row stride; M >= 1.
        x: as given to :func:`forward`; may be None unless ``need_ddown``.
        h: as returned by :func:`forward`; may be None unless ``need_dup``.
        in_features: K.
        need_dx, need_ddown, need_dup: which gradients to compute.
        The other arguments are those of :func:`forward`.

    Returns:
        dx [M, K] in the dtype of g, dD [R, K] in that of D, dU [N, R] in that of U; None where not needed.

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: as in :func:`forward`; gh and h are rounded to the dtype of g as operands of the products of low rank. A
    sum over tokens has a fixed order: each program adds its tokens in turn, and splits of the tokens are added in
    turn by a second kernel, in float32, so the result is the same at every run.
    """
    check_dtypes(g, x, weight, down, up)
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    g = _unit_rows(g)
    M, N, K = *g.shape, in_features
    drop = _drop(dropout, seed)
    keep = 1 / (1 - dropout)
    gh = torch.empty(M, 0 if down is None else down.shape[0], dtype=torch.float32, device=g.device)
    if up is not None and (need_dx or need_ddown):
        _shrink(g, up, up.stride(1), up.stride(0), gh, scale, _drop(0.0, None), config)
    dx = ddown = dup = None
    if need_dx:
        if form == "few":
            dx = _few_dx(g, weight, absmax, absmax2, offset, K, block_size, down, gh, keep, drop, config)
        else:
            w = _dense(weight, absmax, absmax2, offset, N, K, block_size, g.dtype)
            if down is None:
                dx = g @ w
            else:
                strides = (down.stride(0), down.stride(1))
                dx = _expand(gh, down, *strides, K, None, keep, drop, g.dtype, config).addmm_(g, w)
    if need_ddown and down is not None and x is not None:
        ddown = torch.empty(down.shape, dtype=down.dtype, device=g.device)
        _token_sum(gh, _unit_rows(x), keep, drop, ddown, ddown.stride(0), 1, config)
    if need_dup and up is not None and h is not None:
        dup = torch.empty(up.shape, dtype=up.dtype, device=g.device)
        _token_sum(h, g, scale, _drop(0.0, None), dup, 1, dup.stride(0), config)
    return dx, ddown, dup


def _few_dx(
    g: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    K: int,
    block_size: int,
    down: Tensor | None,
    gh: Tensor,
    keep: float,
    drop: dict[str, Any],
    config: Override,
) -> Tensor:
    M, N = g.shape
    R = gh.shape[1]
    dx = torch.empty(M, K, dtype=g.dtype, device=g.device)
    cfg = choose(config, "few_backward", arch_of(g.device), M, N, K, R, 8 * g.itemsize, block_size)
    launch(
        _few_backward_kernel,
        (triton.cdiv(K, cfg.BLOCK_K), triton.cdiv(M, cfg.BLOCK_M)),
        g.device,
        cfg.num_warps,
        cfg.num_stages,
        g_ptr=g,
        **_weight_arguments(weight, absmax, absmax2, offset, K, block_size),
        down_ptr=down,
        gh_ptr=None if down is None else gh,
        dx_ptr=dx,
        M=M,
        N=N,
        K=K,
        R=R,
        stride_gm=g.stride(0),
        stride_dr=0 if down is None else down.stride(0),
        stride_dk=0 if down is None else down.stride(1),
        factor=keep,
        **(drop if down is not None else _drop(0.0, None)),
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_K=cfg.BLOCK_K,
        BLOCK_R=cfg.BLOCK_R,
    )
    return dx


def _shrink(
    x: Tensor,
    factor: Tensor,
    stride_fr: int,
    stride_fk: int,
    h: Tensor,
    scale: float,
    drop: dict[str, Any],
    config: Override,
) -> None:
    (M, K), R = x.shape, h.shape[1]
    cfg = choose(config, "shrink", arch_of(x.device), M, R, K, R, 8 * x.itemsize)
    launch(
        _shrink_kernel,
        (triton.cdiv(M, cfg.BLOCK_M), triton.cdiv(R, cfg.BLOCK_R)),
        x.device,
        cfg.num_warps,
        cfg.num_stages,
        x_ptr=x,
        factor_ptr=factor,
        h_ptr=h,
        M=M,
        K=K,
        R=R,
        stride_xm=x.stride(0),
        stride_fr=stride_fr,
        stride_fk=stride_fk,
        scale=float(scale),
        **drop,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_K=cfg.BLOCK_K,
        BLOCK_R=cfg.BLOCK_R,
    )


def _expand(
    h: Tensor,
    factor: Tensor,
    stride_fr: int,
    stride_fn: int,
    N: int,
    bias: Tensor | None,
    scale: float,
    drop: dict[str, Any],
    dtype: torch.dtype,
    config: Override,
) -> Tensor:
    M, R = h.shape
    out = torch.empty(M, N, dtype=dtype, device=h.device)
    cfg = choose(config, "expand", arch_of(h.device), M, N, R, R, 8 * out.itemsize)
    launch(
        _expand_kernel,
        (triton.cdiv(M, cfg.BLOCK_M), triton.cdiv(N, cfg.BLOCK_N)),
        h.device,
        cfg.num_warps,
        cfg.num_stages,
        h_ptr=h,
        factor_ptr=factor,
        bias_ptr=None if bias is None else bias.contiguous(),
        out_ptr=out,
        M=M,
        N=N,
        R=R,
        stride_fr=stride_fr,
        stride_fn=stride_fn,
        scale=float(scale),
        **drop,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_R=cfg.BLOCK_R,
    )
    return out


def _token_sum(
    h: Tensor,
    x: Tensor,
    scale: float,
    drop: dict[str, Any],
    out: Tensor,
    stride_or: int,
    stride_on: int,
    config: Override,
) -> None:
    (M, N), R = x.shape, h.shape[1]
    cfg = choose(config, "token_sum", arch_of(x.device), M, N, 0, R, 8 * x.itemsize)
    tokens = cfg.BLOCK_M * triton.cdiv(triton.cdiv(M, cfg.BLOCK_M), cfg.SPLITS)
    splits = triton.cdiv(M, tokens)
    target = out if splits == 1 else torch.empty(splits, out.numel(), dtype=torch.float32, device=x.device)
    launch(
        _token_sum_kernel,
        (triton.cdiv(N, cfg.BLOCK_N), triton.cdiv(R, cfg.BLOCK_R), splits),
        x.device,
        cfg.num_warps,
        cfg.num_stages,
        h_ptr=h,
        x_ptr=x,
        out_ptr=target,
        M=M,
        N=N,
        R=R,
        stride_xm=x.stride(0),
        stride_or=stride_or,
        stride_on=stride_on,
        stride_split=out.numel(),
        tokens=tokens,
        scale=float(scale),
        **drop,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_R=cfg.BLOCK_R,
    )
    if splits > 1:
        launch(
            _sum_splits_kernel,
            (triton.cdiv(out.numel(), 1024),),
            x.device,
            num_warps=4,
            num_stages=1,
            parts_ptr=target,
            out_ptr=out,
            numel=out.numel(),
            SPLITS=splits,
            BLOCK=1024,
        )


def _weight_arguments(
    weight: Tensor, absmax: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, K: int, block_size: int
) -> dict[str, Any]:
    levels, dynamic = tables(weight.device) if block_size else (None, None)
    return {
        "weight_ptr": weight if block_size else _unit_rows(weight),
        "absmax_ptr": absmax,
        "absmax2_ptr": absmax2,
        "offset_ptr": offset,
        "levels_ptr": levels,
        "dynamic_ptr": dynamic if absmax2 is not None else None,
        "stride_wn": 0 if block_size else _unit_rows(weight).stride(0),
        "BLOCK_SIZE": block_size,
        "ALIGNED": block_size > 0 and K % block_size == 0,
    }


def _dense(
    weight: Tensor,
    absmax: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    N: int,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    if block_size == 0:
        return weight.to(dtype)
    assert absmax is not None
    return dequantize(weight, absmax, absmax2, offset, N, K, block_size, dtype)


def _drop(dropout: float, seed: Tensor | None) -> dict[str, Any]:
    # The smallest 32-bit word that is kept, as in reference.dropout_threshold.
    if dropout == 0:
        return {"seed_ptr": None, "threshold": 0}
    return {"seed_ptr": seed, "threshold": min(round(dropout * 2**32), 2**32 - 1)}


def _unit_rows(x: Tensor) -> Tensor:
    # The kernels take any row stride; the elements of a row must be neighbours.
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
