"""y[p] = W_e x[p] + U_be (D_be x[p]) + bias_e + s · U_e C_e h[p], h[p] = D_e drop(x[p]), e the expert of row p.

And its gradients.

Rows are sorted by expert, and the offsets stay on the device: see :mod:`expert_rows`. A program takes a tile of rows of
one expert and a tile of columns, and decodes the expert's weights in registers. The number of programs follows from P
and E alone, and a program finds its rows by itself, so a captured graph serves any routing.

Two forms, which differ in their tiles; both are right for any split of the rows.

few   One row a program up to one row an expert on average, which reads W once for a row; 16 or 32 rows beyond.
many  64 or 128 rows a program, so that a decoded tile serves many of them.

No form decodes into a workspace, as :mod:`adapted_linear` does for many tokens: a dense copy of the experts that have
rows would take the memory that their four bits save, and how many have rows is not known on the host.

Letters: P rows, E experts, N out features, K in features, R rank. Stacks of matrices and cores have a leading E.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapted_linear_few import (
    LowRank,
    add_update,
    low_rank_arguments,
    product_tile,
    shrink_both,
    update_gradient_tile,
)  # fmt: skip
from .config import Override, choose
from .core import CoreArgument, core_gradient, core_values, stacked_core_arguments, token_sum
from .dropout import Dropout, dropout_argument
from .expert_rows import count_tiles, groups_of, tile_of_rows
from .launch import arch_of, launch
from .matrix import (
    MatrixArgument,
    check_operands,
    load_levels,
    matrix_argument,
    shifted,
    stack_data,
    stack_scales,
    unit_rows,
)
from .operands import MXFP4, NF4, Branch, Core, Matrix

FORMS = ("few", "many")


# ---- kernels


@triton.jit(do_not_specialize=["dropout", "P"])
def _experts_shrink_kernel(
    x_ptr, offsets_ptr, branch, branch_h_ptr, branch_rank, down, dropout, h_ptr, P, E, K, R, stride_x, scale,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[p] = scale · D_e drop(x[p]), 0 for rows without an expert; branch_h[p] = D_be x[p], left out for such rows."""
    before = tl.cdiv(branch_rank, BLOCK_R)
    tiles = before + tl.cdiv(R, BLOCK_R)
    tile = tl.program_id(0) % tiles
    e, m, end = tile_of_rows(offsets_ptr, tl.program_id(0) // tiles, P, E, GROUPS, BLOCK_M)
    if e < E:
        shrink_both(
            x_ptr,
            MatrixArgument(
                stack_data(branch, e, branch_rank, K), None, None, None, None, None, branch.stride_row,
                branch.stride_column, branch.SCALES, branch.BLOCK, branch.ALIGNED,
            ),
            branch_h_ptr, branch_rank,
            MatrixArgument(
                stack_data(down, e, R, K), stack_scales(down.scales, down, e, R, K, 1),
                stack_scales(down.absmax2, down, e, R, K, 256), shifted(down.offset, e), down.levels, down.dynamic,
                down.stride_row, down.stride_column, down.SCALES, down.BLOCK, down.ALIGNED,
            ),
            dropout, h_ptr, m, tile, end, K, R, stride_x, scale, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    elif tile >= before:
        r = (tile - before) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = m.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(h_ptr + at, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), mask=(m < end)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["core_size", "P"])
def _experts_forward_kernel(
    x_ptr, offsets_ptr, weight, branch, branch_h_ptr, branch_rank, up, h_ptr, core, core_size, core_entries, bias_ptr,
    y_ptr, P, E, N, K, R, stride_x, scale, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[p] = W_e x[p] + U_be branch_h[p] + bias_e + scale · U_e (C_e h[p]); 0 for rows without an expert."""
    tiles = tl.cdiv(N, BLOCK_N)
    row0 = tl.program_id(0) % tiles * BLOCK_N
    e, m, end = tile_of_rows(offsets_ptr, tl.program_id(0) // tiles, P, E, GROUPS, BLOCK_M)
    n = row0 + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if e < E:
        levels = load_levels(weight.levels)
        y = product_tile(
            x_ptr,
            MatrixArgument(
                stack_data(weight, e, N, K), stack_scales(weight.scales, weight, e, N, K, 1),
                stack_scales(weight.absmax2, weight, e, N, K, 256), shifted(weight.offset, e), weight.levels,
                weight.dynamic, weight.stride_row, weight.stride_column, weight.SCALES, weight.BLOCK, weight.ALIGNED,
            ),
            levels, None, 0, m, row0, 0, K, end, N, K, stride_x, False, dtype, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if branch.data is not None:
            y = add_update(
                y,
                MatrixArgument(
                    stack_data(branch, e, N, branch_rank), None, None, None, None, None, branch.stride_row,
                    branch.stride_column, branch.SCALES, branch.BLOCK, branch.ALIGNED,
                ),
                None, branch_h_ptr, None, 0, m, row0, end, N, branch_rank, 1.0, dtype, BLOCK_R,
            )  # fmt: skip
        if up.data is not None:
            # The factor has no table of its own where it shares the weight's.
            up_levels = levels if up.levels is None else load_levels(up.levels)
            y = add_update(
                y,
                MatrixArgument(
                    stack_data(up, e, N, R), stack_scales(up.scales, up, e, N, R, 1),
                    stack_scales(up.absmax2, up, e, N, R, 256), shifted(up.offset, e), up.levels, up.dynamic,
                    up.stride_row, up.stride_column, up.SCALES, up.BLOCK, up.ALIGNED,
                ),
                up_levels, h_ptr, CoreArgument(core_values(core, core_entries, e), core.index_ptr, core.KIND),
                core_size, m, row0, end, N, R, scale, dtype, BLOCK_R,
            )  # fmt: skip
        if bias_ptr is not None:
            y += tl.load(bias_ptr + e * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, tl.trans(y).to(dtype), mask=(m < end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["dropout", "core_size", "P"])
def _experts_backward_kernel(
    g_ptr, offsets_ptr, weight, branch, branch_gh_ptr, branch_rank, down, gh_ptr, core, core_size, core_entries, dropout,
    dx_ptr, P, E, N, K, R, stride_g, scale, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx[p] = W_eᵀ g[p] + D_beᵀ branch_gh[p] + scale · keep · D_eᵀ (C_eᵀ gh[p]); 0 for rows without an expert."""
    tiles = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % tiles * BLOCK_K
    e, m, end = tile_of_rows(offsets_ptr, tl.program_id(0) // tiles, P, E, GROUPS, BLOCK_M)
    k = k0 + tl.arange(0, BLOCK_K)
    dtype = g_ptr.dtype.element_ty
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if e < E:
        levels = load_levels(weight.levels)
        dx = tl.trans(product_tile(
            g_ptr,
            MatrixArgument(
                stack_data(weight, e, N, K), stack_scales(weight.scales, weight, e, N, K, 1),
                stack_scales(weight.absmax2, weight, e, N, K, 256), shifted(weight.offset, e), weight.levels,
                weight.dynamic, weight.stride_row, weight.stride_column, weight.SCALES, weight.BLOCK, weight.ALIGNED,
            ),
            levels, None, 0, m, k0, 0, N, end, N, K, stride_g, False, dtype, BLOCK_N, BLOCK_K, True,
        ))  # fmt: skip
        if branch.data is not None:
            dx += update_gradient_tile(
                MatrixArgument(
                    stack_data(branch, e, branch_rank, K), None, None, None, None, None, branch.stride_row,
                    branch.stride_column, branch.SCALES, branch.BLOCK, branch.ALIGNED,
                ),
                None, branch_gh_ptr, None, 0, None, m, k0, end, K, branch_rank, dtype, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        if down.data is not None:
            down_levels = levels if down.levels is None else load_levels(down.levels)
            dx += scale * update_gradient_tile(
                MatrixArgument(
                    stack_data(down, e, R, K), stack_scales(down.scales, down, e, R, K, 1),
                    stack_scales(down.absmax2, down, e, R, K, 256), shifted(down.offset, e), down.levels, down.dynamic,
                    down.stride_row, down.stride_column, down.SCALES, down.BLOCK, down.ALIGNED,
                ),
                down_levels, gh_ptr, CoreArgument(core_values(core, core_entries, e), core.index_ptr, core.KIND),
                core_size, dropout, m, k0, end, K, R, dtype, BLOCK_K, BLOCK_R,
            )  # fmt: skip
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=(m < end)[:, None] & (k < K)[None, :])


# ---- launchers


def forward(
    x: Tensor, weight: Matrix, offsets: Tensor, out_features: int, rank: int, down: Matrix | None, up: Matrix | None,
    core: Core | None, bias: Tensor | None, scale: float, dropout: float, seed: Tensor | None, form: str,
    config: Override = None, branch: Branch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y[p] = W_e x[p] + U_be (D_be x[p]) + bias_e + s · U_e C_e h[p], h[p] = D_e drop(x[p]); 0 for rows without an expert.

    Args:
        x: [P, K], float32, bfloat16 or float16, sorted by expert, any row stride; P >= 1.
        weight: W [E, N, K].
        offsets: int32 [E + 1] on the device of x; rows offsets[e] … offsets[e + 1] - 1 belong to expert e.
        out_features: N.
        rank: R; 0 where there is no update.
        down, up: D [E, R, K] and U [E, N, R], or both None.
        core: C [E, R, R]: values [E, …] and one index for all, see :mod:`core`; None for the identity.
        bias: [E, N] or None.
        scale: s.
        dropout: probability to drop an element of the input of D.
        seed: int64 [1] on the device of x, read by the kernel; needed where dropout > 0.
        form: "few" or "many".
        config: as in :func:`adapted_linear.forward`.
        branch: D_b [E, R_b, K] and U_b [E, N, R_b], contiguous, or None.

    Returns:
        y [P, N] in the dtype of x; h float32 [P, R].

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: as in form "few" of :func:`adapted_linear.forward`, in both forms. Within a form and a configuration a
    row's result does not depend on other rows.
    """
    check_operands(x, weight, down, up, core, bias, *(branch or ()))
    x, E = unit_rows(x), offsets.numel() - 1
    P, K = x.shape
    h = torch.empty(P, rank, dtype=torch.float32, device=x.device)
    y = torch.empty(P, out_features, dtype=x.dtype, device=x.device)
    shared = {"offsets_ptr": offsets, "E": E, "P": P, "GROUPS": groups_of(E), "K": K, "R": rank, "x_ptr": x}
    shared["stride_x"] = x.stride(0)
    arch, bits = arch_of(x.device), 8 * x.itemsize
    projected = through = None
    if branch is not None:
        branch_h = torch.empty(P, branch.down.shape[1], dtype=torch.float32, device=x.device)
        projected, through = LowRank(branch.down, branch_h), LowRank(branch.up, branch_h)
    if down is not None or branch is not None:
        ranks = [rank, 0 if branch is None else branch.down.shape[1]]
        block_size = 0 if down is None else down.block_size
        cfg = choose(config, "shrink", arch, P, max(ranks), K, max(ranks), bits, block_size)
        launch(
            _experts_shrink_kernel,
            (count_tiles(P, E, cfg.BLOCK_M) * sum(triton.cdiv(r, cfg.BLOCK_R) for r in ranks),),
            x.device,
            cfg,
            **low_rank_arguments(projected),
            down=_stack_argument(down, K),
            dropout=dropout_argument(dropout, seed),
            h_ptr=h,
            scale=1 / (1 - dropout),
            **shared,
        )
    cfg = choose(config, "experts_forward", arch, _rows(P, E, form), out_features, K, rank, bits, weight.block_size)
    launch(
        _experts_forward_kernel,
        (count_tiles(P, E, cfg.BLOCK_M) * triton.cdiv(out_features, cfg.BLOCK_N),),
        x.device,
        cfg,
        weight=_stack_argument(weight, K),
        **low_rank_arguments(through),
        up=_stack_argument(up, rank, weight),
        h_ptr=None if up is None else h,
        **stacked_core_arguments(core, rank),
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        N=out_features,
        scale=float(scale),
        **shared,
    )
    return y, h


def backward(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Matrix, offsets: Tensor, in_features: int, rank: int,
    down: Matrix | None, up: Matrix | None, core: Core | None, scale: float, dropout: float, seed: Tensor | None,
    form: str, need_x: bool, need_down: bool, need_up: bool, need_core: bool, config: Override = None,
    branch: Branch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx = W_eᵀ g + D_beᵀ U_beᵀ g + drop(D_eᵀ C_eᵀ gh), dD_e = (C_eᵀ gh)ᵀ drop(x), dU_e = s · gᵀ C_e h, dC_e = ghᵀ h.

    dC_e is that on its pattern, and gh = s · U_eᵀ g, row by row; the sums of dD, dU and dC are over the rows of an
    expert, 0 without any.

    Args:
        g: gradient of y, [P, N], float32, bfloat16 or float16, any row stride; P >= 1.
        x: as given to :func:`forward`; may be None unless ``need_down``.
        h: as returned by :func:`forward`; may be None unless ``need_up`` or ``need_core``.
        in_features: K.
        need_x, need_down, need_up, need_core: which gradients to compute; 4-bit factors have none.
        The other arguments are as in :func:`forward`.

    Returns:
        dx [P, K] in the dtype of g, 0 for rows without an expert; dD, dU and dC in the shape and dtype of D, U and the
        values of C; None where not needed.

    Raises:
        TypeError: bfloat16 in the interpreter. ValueError: an unknown form.

    Numerics: as in form "few" of :func:`adapted_linear.backward`, in both forms, but 4-bit factors are decoded in
    registers, and s multiplies sums instead of gh. The rows of an expert are summed in their order.
    """
    check_operands(g, weight, down, up, core, x, *(branch or ()))
    g = unit_rows(g)
    K = in_features
    keep, drop = 1 / (1 - dropout), dropout_argument(dropout, seed)
    gh = dx = ddown = dup = dcore = None
    if up is not None and (need_x or need_down or need_core):
        gh = _multiply_transposed(g, up, offsets, rank, torch.float32, form, config)  # without s
    if need_x:
        through = None
        if branch is not None:
            ranks = branch.down.shape[1]
            branch_gh = _multiply_transposed(g, Matrix(branch.up), offsets, ranks, torch.float32, form, config)
            through = LowRank(branch.down, branch_gh)
        dx = _multiply_transposed(
            g, weight, offsets, K, g.dtype, form, config, down, gh, core, scale * keep, drop, through
        )  # fmt: skip
    if need_down and down is not None and gh is not None and x is not None:
        ddown = torch.empty(down.data.shape, dtype=down.data.dtype, device=g.device)
        token_sum(gh, unit_rows(x), ddown, K, 1, scale * keep, drop, core, True, config, offsets)
    if need_up and up is not None and h is not None:
        dup = torch.empty(up.data.shape, dtype=up.data.dtype, device=g.device)
        token_sum(h, g, dup, 1, rank, scale, Dropout(), core, False, config, offsets)
    if need_core and core is not None and gh is not None and h is not None:
        dcore = core_gradient(gh, h, core, scale, config, offsets)
    return dx, ddown, dup, dcore


def _multiply_transposed(
    g: Tensor, weight: Matrix, offsets: Tensor, K: int, dtype: torch.dtype, form: str, config: Override,
    down: Matrix | None = None, gh: Tensor | None = None, core: Core | None = None, scale: float = 1.0,
    dropout: Dropout = Dropout(),  # noqa: B008
    through: LowRank | None = None,
) -> Tensor:  # fmt: skip
    """W_eᵀ g[p] + D_beᵀ branch_gh[p] + scale · drop(D_eᵀ C_eᵀ gh[p]) for W [E, N, K]: [P, K] in ``dtype``.

    0 for rows without an expert. ``through`` holds D_b and branch_gh.
    """
    (P, N), E, R = g.shape, offsets.numel() - 1, 0 if gh is None else gh.shape[1]
    out = torch.empty(P, K, dtype=dtype, device=g.device)
    rows = _rows(P, E, form)
    cfg = choose(config, "experts_backward", arch_of(g.device), rows, N, K, R, 8 * g.itemsize, weight.block_size)
    launch(
        _experts_backward_kernel,
        (count_tiles(P, E, cfg.BLOCK_M) * triton.cdiv(K, cfg.BLOCK_K),),
        g.device,
        cfg,
        g_ptr=g,
        offsets_ptr=offsets,
        weight=_stack_argument(weight, K),
        **low_rank_arguments(through, "branch_gh_ptr"),
        down=_stack_argument(down, K, weight),
        gh_ptr=gh,
        **stacked_core_arguments(core, R),
        dropout=dropout,
        dx_ptr=out,
        P=P,
        E=E,
        N=N,
        K=K,
        R=R,
        stride_g=g.stride(0),
        scale=float(scale),
        GROUPS=groups_of(E),
    )
    return out


def _rows(P: int, E: int, form: str) -> int:
    """The rows of an expert by which tiles are chosen: the mean of P rows of E experts, kept within the form."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    mean = triton.cdiv(P, E)
    return min(mean, 16) if form == "few" else max(mean, 17)


def _stack_argument(stack: Matrix | None, columns: int, beside: Matrix | None = None) -> MatrixArgument:
    """Call :func:`matrix.matrix_argument` for a stack; it has no table of levels if ``beside`` has the same."""
    if stack is not None and stack.format is None:
        stack = Matrix(stack.data.contiguous())
    argument = matrix_argument(stack, columns)
    shares = stack is not None and beside is not None and stack.format == beside.format
    return argument._replace(levels=None) if shares else argument


def aot_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for :mod:`aot` that start every kernel in its forms, with every format, factor and kind of core."""
    empty = partial(torch.empty, device="meta")

    def stack(E: int, rows: int, columns: int, kind: str) -> Matrix:
        if kind == "dense":
            return Matrix(empty(E, rows, columns, dtype=dtype))
        size = 32 if kind == "mxfp4" else 64
        packed, blocks = empty(E, -(-rows * columns // 2), dtype=torch.uint8), -(-rows * columns // size)
        if kind == "mxfp4":
            return Matrix(packed, (empty(E, blocks, dtype=torch.uint8),), size, MXFP4)
        double = empty(E, blocks, dtype=torch.uint8), empty(E, -(-blocks // 256)), empty(E)
        return Matrix(packed, double, size, NF4)

    def run(
        P: int, E: int, N: int, K: int, R: int, weight: str = "nf4", factors: str = "dense", core: str = "none",
        dropout: float = 0.0, trained: bool = False, branch_rank: int = 0,
    ) -> None:  # fmt: skip
        down, up, c = None, None, None
        if R:
            down, up = stack(E, R, K, factors), stack(E, N, R, factors)
        if core != "none":
            shape = {"diagonal": (R,), "banded": (3 * R - 2,), "sparse": (5 * R,), "dense": (R, R)}[core]
            index = empty(17 * R + 2, dtype=torch.int32) if core == "sparse" else None
            c = Core(empty(E, *shape, dtype=dtype), index)
        w, offsets, seed = stack(E, N, K, weight), empty(E + 1, dtype=torch.int32), empty(1, dtype=torch.int64)
        x, g, bias = empty(P, K, dtype=dtype), empty(P, N, dtype=dtype), empty(E, N, dtype=dtype)
        form = "few" if P <= 16 * E else "many"
        branch = None
        if branch_rank:
            branch = Branch(empty(E, branch_rank, K, dtype=dtype), empty(E, N, branch_rank, dtype=dtype))
        _, h = forward(x, w, offsets, N, R, down, up, c, bias, 2.0, dropout, seed, form, branch=branch)
        needed = (True, trained, trained, trained and c is not None)
        backward(g, x, h, w, offsets, K, R, down, up, c, 2.0, dropout, seed, form, *needed, branch=branch)

    many, one = "experts P=16384", "experts P=8"
    if dtype == torch.float16:  # differs from bfloat16 in one conversion instruction
        yield many, partial(run, 16384, 128, 1536, 2048, 0)
        return
    yield one, partial(run, 8, 128, 1536, 2048, 16, core="diagonal", trained=dtype == torch.bfloat16)
    yield "experts general", partial(run, 8192, 60, 1001, 1003, 5, dropout=0.1)
    yield "experts NF4 factors", partial(run, 16384, 32, 2048, 2048, 1024, factors="nf4", core="banded")
    if dtype == torch.float32:
        return
    yield many, partial(run, 16384, 128, 1536, 2048, 16, dropout=0.1, trained=True)
    yield "experts P=1024", partial(run, 1024, 128, 1536, 2048, 16)
    for P in (8, 1024, 16384):
        yield f"experts branch P={P}", partial(run, P, 128, 1536, 2048, 16, branch_rank=16)
    yield "experts MXFP4 P=128", partial(run, 128, 32, 2880, 2880, 0, "mxfp4")
    yield "experts dense", partial(run, 16384, 8, 4096, 4096, 64, "dense", core="dense")
    yield "experts sparse core", partial(run, 16384, 32, 2048, 2048, 64, core="sparse", trained=True)
