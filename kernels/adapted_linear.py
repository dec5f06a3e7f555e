"""y = W x + U_b (D_b x) + bias + s · U C h with h = D drop(x), and its gradients; W in NF4 or dense.

Two forms; the caller chooses. Both are right for every shape.

few   Tiles of W are decoded in registers: :mod:`adapted_linear_few`. A small kernel makes h first. Where the result has
      too few columns to give every multiprocessor a tile, the sum is split: one kernel makes the partial sums, and h in
      separate programs; a second adds the partial sums in their order, the low-rank term and the bias. Forward takes
      two launches either way, because NF4 factors are decoded in registers too. Backward decodes W again and multiplies
      along the other axis; it decodes NF4 factors into a workspace first, because it reads them across their rows.
many  W is decoded once into a workspace, the vendor's matrix product runs on it, and Triton kernels compute the
      low-rank part. Each call takes the workspace from torch's caching allocator, which reuses the block once the
      stream has passed its last use and knows streams and CUDA graphs. A buffer kept here would be shared between
      streams.

The core C is applied in registers when h is loaded for the next product: no extra launch and no extra pass over memory.
The same kernels compute the branch U_b D_b and the update; only D_b x of many tokens takes a launch of its own.

Letters: M tokens, N out features, K in features, R rank. For matrices and cores see :mod:`operands`.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapted_linear_few import LowRank, few_backward, few_forward, few_split, low_rank_arguments, shrink_both
from .config import Override, choose
from .core import core_arguments, core_gradient, core_tile, token_sum
from .dropout import Dropout, dropout_argument, keep_tile
from .launch import arch_of, launch
from .matrix import check_operands, decode_tile, load_levels, load_tile, matrix_argument, unit_rows
from .nf4 import dequantize
from .operands import Branch, Core, Matrix

FORMS = ("few", "many")


# ---- kernels


@triton.jit(do_not_specialize=["dropout"])
def _shrink_kernel(
    x_ptr, branch, branch_h_ptr, branch_rank, down, dropout, h_ptr, M, K, R, stride_x, scale, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h = scale · D drop(x); branch_h = D_b x."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    shrink_both(
        x_ptr, branch, branch_h_ptr, branch_rank, down, dropout, h_ptr, m, tl.program_id(1), M, K, R, stride_x, scale,
        BLOCK_K, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["dropout", "core_size"])
def _expand_kernel(
    branch, branch_h_ptr, branch_rank, h_ptr, up, core, core_size, bias_ptr, dropout, parts_ptr, out_ptr, M, N, R, scale,
    TRANSPOSED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[m, n] = drop(scale · Σ_r (C h)[m, r] · up[n, r]) + Σ_r branch_h[m, r] · branch[n, r] + bias[n] + Σ parts.

    TRANSPOSED uses Cᵀ in place of C. The splits parts[split, m, n] are added in their order. Each term may be absent.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column0 = tl.program_id(1) * BLOCK_N
    n = column0 + tl.arange(0, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if up.data is not None:
        levels = load_levels(up.levels)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            h = core_tile(h_ptr, m, r, M, R, R, core, core_size, TRANSPOSED, dtype)
            if up.SCALES == "none":
                u = load_tile(up.data, r, n, up.stride_column, up.stride_row, R, N)
            else:
                u = tl.trans(decode_tile(up, levels, column0, r0, N, R, BLOCK_N, BLOCK_R))
            acc = tl.dot(h.to(dtype), u.to(dtype), acc, input_precision="ieee")
    acc = acc * scale
    if dropout.seed is not None:
        acc = tl.where(keep_tile(dropout, m, column0, BLOCK_N), acc, 0.0)
    if branch.data is not None:
        for r0 in range(0, branch_rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            h = load_tile(branch_h_ptr, m, r, branch_rank, 1, M, branch_rank)
            u = load_tile(branch.data, r, n, branch.stride_column, branch.stride_row, branch_rank, N)
            acc = tl.dot(h.to(dtype), u.to(dtype), acc, input_precision="ieee")
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
    x: Tensor, weight: Matrix, out_features: int, rank: int, down: Matrix | None, up: Matrix | None,
    core: Core | None, bias: Tensor | None, scale: float, dropout: float, seed: Tensor | None, form: str,
    config: Override = None, branch: Branch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = W x + U_b (D_b x) + bias + s · U C h, h = D drop(x), row by row of x.

    Args:
        x: [M, K], float32, bfloat16 or float16, any row stride; M >= 1.
        weight: W [N, K].
        out_features: N.
        rank: R; 0 where there is no update.
        down, up: D [R, K] and U [N, R], or both None; dense ones may have any strides.
        core: C [R, R] as (values, index), see :mod:`core`; None for the identity.
        bias: [N] or None.
        scale: s.
        dropout: probability to drop an element of the input of D.
        seed: int64 [1] on the device of x, read by the kernel; needed where dropout > 0.
        form: "few" or "many".
        config: one for every kernel, or a mapping from kernel name to one; None for :func:`config.get_config`.
        branch: D_b [R_b, K] and U_b [N, R_b], or None.

    Returns:
        y [M, N] in the dtype of x; h float32 [M, R].

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: products accumulate in float32. Operands of another dtype are rounded to the dtype of x: NF4 weights once,
    from the float32 product of level and scale (not at all for one or two tokens in form "few", where the scale may
    multiply a sum of eight levels times x); s · C h (C h in form "many" and in split sums) as an operand of the second
    product. C h is float32 except with a dense core, see :func:`core.core_tile`. NF4 factors are rounded as W is; form
    "many" decodes them into a workspace in the dtype of x. Form "few" rounds y once, split or not, and adds splits in
    their order; "many" rounds s · U C h + bias to the dtype of x and then the sum with W x. Float32 products are IEEE
    in Triton; the vendor's product follows torch's TF32 setting. Within a form and a configuration a token's row does
    not depend on other rows, provided the vendor's product of form "many" guarantees it.
    """
    check_operands(x, weight, down, up, core, bias, *(branch or ()))
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    x = unit_rows(x)
    (M, K), bits = x.shape, 8 * x.itemsize
    h = torch.empty(M, rank, dtype=torch.float32, device=x.device)
    keep, drop = 1 / (1 - dropout), dropout_argument(dropout, seed)
    projected = through = None
    if branch is not None:
        branch_h = torch.empty(M, branch.down.shape[0], dtype=torch.float32, device=x.device)
        projected, through = LowRank(branch.down, branch_h), LowRank(branch.up, branch_h)
    if form == "few":
        cfg = choose(config, "few_forward_split", arch_of(x.device), M, out_features, K, rank, bits, weight.block_size)
        if cfg.SPLITS > 1:
            parts = few_split(x, weight, out_features, down, h, keep, drop, False, projected, cfg, config)
            y = _expand(h, up, out_features, core, False, bias, scale, Dropout(), x.dtype, through, config, parts)
            return y, h
    elif down is not None and up is not None:
        down, up = _decode(down, rank, K, x.dtype), _decode(up, out_features, rank, x.dtype)
    _shrink(x, down, h, keep, drop, projected, config)
    if form == "few":
        return few_forward(x, weight, out_features, up, h, core, bias, scale, through=through, config=config), h
    w = _decode(weight, out_features, K, x.dtype).data.to(x.dtype)
    if up is None and through is None:
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype)), h
    y = _expand(h, up, out_features, core, False, bias, scale, Dropout(), x.dtype, through, config)
    return y.addmm_(x, w.t()), h


def backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, in_features: int, rank: int, down: Matrix | None,
    up: Matrix | None, core: Core | None, scale: float, dropout: float, seed: Tensor | None, form: str, need_x: bool,
    need_down: bool, need_up: bool, need_core: bool, config: Override = None, branch: Branch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx = Wᵀ g + D_bᵀ U_bᵀ g + drop(Dᵀ Cᵀ gh), dD = (Cᵀ gh)ᵀ drop(x), dU = s · gᵀ C h, dC = ghᵀ h on its pattern.

    gh = s · Uᵀ g.

    Args:
        g: gradient of y, [M, N], float32, bfloat16 or float16, any row stride; M >= 1.
        x: as given to :func:`forward`; may be None unless ``need_down``.
        h: as returned by :func:`forward`; may be None unless ``need_up`` or ``need_core``.
        in_features: K.
        need_x, need_down, need_up, need_core: which gradients to compute; NF4 factors have none.
        The other arguments are as in :func:`forward`.

    Returns:
        dx [M, K] in the dtype of g, dD [R, K] in the dtype of D, dU [N, R] in the dtype of U, dC in the layout and
        dtype of the values of C; None where not needed.

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: as in :func:`forward`, with NF4 factors decoded into a workspace in both forms. Cᵀ gh and C h are rounded
    to the dtype of g as operands of the low-rank products; dC takes gh and h unrounded. A sum over tokens has a fixed
    order, see :func:`core.token_sum`.
    """
    check_operands(g, weight, down, up, core, x, *(branch or ()))
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    g = unit_rows(g)
    M, N, K = *g.shape, in_features
    keep, drop = 1 / (1 - dropout), dropout_argument(dropout, seed)
    gh = torch.empty(M, rank, dtype=torch.float32, device=g.device)
    u = projected = through = None
    if up is not None and (need_x or need_down or need_core):
        u = _transpose(_decode(up, N, rank, g.dtype))
    if branch is not None and need_x:
        branch_gh = torch.empty(M, branch.down.shape[0], dtype=torch.float32, device=g.device)
        projected, through = LowRank(branch.up.t(), branch_gh), LowRank(branch.down.t(), branch_gh)
    dx = ddown = dup = dcore = None
    cfg = choose(config, "few_backward_split", arch_of(g.device), M, N, K, rank, 8 * g.itemsize, weight.block_size)
    split = need_x and form == "few" and cfg.SPLITS > 1
    if not split:
        _shrink(g, u, gh, scale, Dropout(), projected, config)
    if need_x:
        d = None if down is None else _decode(down, rank, K, g.dtype)
        if split:
            parts = few_split(g, weight, K, u, gh, scale, Dropout(), True, projected, cfg, config)
            dx = _expand(gh, _transpose(d), K, core, True, None, keep, drop, g.dtype, through, config, parts)
        elif form == "few":
            back = None if branch is None else LowRank(branch.down, branch_gh)
            dx = few_backward(g, weight, K, g.dtype, d, gh, core, keep, drop, through=back, config=config)
        else:
            w = _decode(weight, N, K, g.dtype).data.to(g.dtype)
            if d is None and through is None:
                dx = g @ w
            else:
                dx = _expand(gh, _transpose(d), K, core, True, None, keep, drop, g.dtype, through, config)
                dx.addmm_(g, w)
    if need_down and down is not None and x is not None:
        ddown = torch.empty(down.data.shape, dtype=down.data.dtype, device=g.device)
        token_sum(gh, unit_rows(x), ddown, K, 1, keep, drop, core, True, config)
    if need_up and up is not None and h is not None:
        dup = torch.empty(up.data.shape, dtype=up.data.dtype, device=g.device)
        token_sum(h, g, dup, 1, rank, scale, Dropout(), core, False, config)
    if need_core and core is not None and h is not None:
        dcore = core_gradient(gh, h, core, config=config)
    return dx, ddown, dup, dcore


def _shrink(
    x: Tensor, down: Matrix | None, h: Tensor, scale: float, dropout: Dropout, through: LowRank | None, config: Override
) -> None:
    """h = scale · drop(x) downᵀ for a factor [R, K], and the h of ``through``, x factorᵀ; each may be absent."""
    if through is not None and x.shape[0] > 64:
        # For many tokens a launch costs little, and one kernel with both loops would spill for sm_80.
        _shrink(x, Matrix(through.factor), through.h, 1.0, Dropout(), None, config)
        through = None
    if down is None and through is None:
        return
    (M, K), R = x.shape, 0 if down is None else h.shape[1]
    ranks = [R, 0 if through is None else through.h.shape[1]]
    block_size = 0 if down is None else down.block_size
    cfg = choose(config, "shrink", arch_of(x.device), M, max(ranks), K, max(ranks), 8 * x.itemsize, block_size)
    launch(
        _shrink_kernel,
        (triton.cdiv(M, cfg.BLOCK_M), sum(triton.cdiv(rank, cfg.BLOCK_R) for rank in ranks)),
        x.device,
        cfg,
        x_ptr=x,
        **low_rank_arguments(through),
        down=matrix_argument(down, K),
        dropout=dropout,
        h_ptr=None if down is None else h,
        stride_x=x.stride(0),
        scale=float(scale),
        M=M,
        K=K,
        R=R,
    )


def _expand(
    h: Tensor, up: Matrix | None, N: int, core: Core | None, transposed: bool, bias: Tensor | None, scale: float,
    dropout: Dropout, dtype: torch.dtype, through: LowRank | None, config: Override, parts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out = drop(scale · C h upᵀ) + bias + Σ parts for a factor [N, R] + the term of ``through``; [M, N] of ``dtype``."""
    M, R = h.shape
    out = torch.empty(M, N, dtype=dtype, device=h.device)
    ranks = max(R, 0 if through is None else through.h.shape[1])
    cfg = choose(config, "expand", arch_of(h.device), M, N, ranks, ranks, 8 * out.itemsize)
    launch(
        _expand_kernel,
        (triton.cdiv(M, cfg.BLOCK_M), triton.cdiv(N, cfg.BLOCK_N)),
        h.device,
        cfg,
        **low_rank_arguments(through),
        h_ptr=None if up is None else h,
        up=matrix_argument(up, R),
        **core_arguments(core, R),
        TRANSPOSED=core is not None and transposed,
        bias_ptr=None if bias is None else bias.contiguous(),
        dropout=dropout,
        parts_ptr=parts,
        SPLITS=0 if parts is None else parts.shape[0],
        out_ptr=out,
        scale=float(scale),
        M=M,
        N=N,
        R=R,
    )
    return out


def _decode(matrix: Matrix, rows: int, columns: int, dtype: torch.dtype) -> Matrix:
    """Decode a matrix [rows, columns] to ``dtype``; return a dense one unchanged."""
    return matrix if matrix.format is None else Matrix(dequantize(matrix, rows, columns, dtype))


def _transpose(matrix: Matrix | None) -> Matrix | None:
    """Transpose a dense matrix."""
    return None if matrix is None else Matrix(matrix.data.t())
