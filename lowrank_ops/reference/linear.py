"""The linear maps in plain PyTorch: adapted, routed, of experts, and in a singular basis, with their backwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Branch = tuple[Tensor, Tensor]  # (D_b, U_b): a frozen low-rank part of the base beside W
RoutedUpdate = tuple[Tensor, Tensor, Tensor | None, float]  # (D [R, K], U [N, R], C [R, R] or None, s)
UpdateGradients = tuple[Tensor, Tensor, Tensor | None]  # (dD, dU, dC)


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """keep[m, k] = philox(key=seed, counter=(k // 4, m, 0, 0))[k % 4] >= p · 2^32.

    The mask of the adapter's input dropout: a counter-based generator (Philox-4x32-10, Salmon et al., SC 2011) lets
    forward, backward, CPU and GPU make the same mask from one integer, without storing it.

    Args:
        seed: int64 [1].
        rows, columns: ``M`` and ``K``.
        p: probability to drop, 0 <= p < 1.

    Returns:
        bool [rows, columns], True where the element is kept.
    """
    device, low = seed.device, 0xFFFFFFFF
    counters = -(-columns // 4)
    c0 = torch.arange(counters, device=device).expand(rows, counters)
    c1 = torch.arange(rows, device=device).unsqueeze(1).expand(rows, counters)
    c2 = c3 = torch.zeros(rows, counters, dtype=torch.int64, device=device)
    k0, k1 = seed & low, (seed >> 32) & low

    def multiply(constant: int, c: Tensor) -> tuple[Tensor, Tensor]:
        # High and low word of a 32x32-bit product in 16-bit halves, because int64 has no unsigned high multiply.
        low_part, high_part = (c & 0xFFFF) * constant, (c >> 16) * constant
        middle = high_part + (low_part >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)

    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c0, c1, c2, c3], dim=2).reshape(rows, 4 * counters)[:, :columns]
    return words >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """The smallest 32-bit word that is kept."""
    return min(round(p * 2**32), 2**32 - 1)


def project(x: Tensor, down: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """h = D drop(x), row by row: x [M, K], down [R, K], h [M, R] in the dtype of x."""
    return _drop(x, dropout, seed) @ down.to(x.dtype).T


def _drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if dropout == 0:
        return x
    assert seed is not None
    return x * dropout_mask(seed, x.shape[0], x.shape[1], dropout).to(x.dtype) / (1 - dropout)


def _kept(g: Tensor, columns: int, dropout: float, seed: Tensor | None) -> Tensor | None:
    """The factor of every element of the adapter's input in the dtype of g: 0 or 1 / (1 - dropout); None means 1."""
    if dropout == 0:
        return None
    assert seed is not None
    return dropout_mask(seed, g.shape[0], columns, dropout).to(g.dtype) / (1 - dropout)


def core_bandwidth(entries: int, rank: int) -> int:
    """d with entries = R(2d+1) − d(d+1), the number of entries (i, j) of an R × R matrix with |i − j| <= d.

    Raises:
        ValueError: no d fits.
    """
    d = (2 * rank - 1 - math.isqrt(max(0, (2 * rank - 1) ** 2 - 4 * (entries - rank)))) // 2
    if 0 <= d < rank and rank * (2 * d + 1) - d * (d + 1) == entries:
        return d
    raise ValueError(f"no band of a {rank} x {rank} matrix has {entries} entries")


def core_pattern(values: Tensor, index: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(i, j) of every value of a banded or sparse core, int64 [entries] each, in the order of the values.

    Args:
        values: banded, ``index`` None: the diagonals j − i = −d … d one after the other, each by i. Sparse: by (i, j).
        index: int32, row_start [R+1] | columns | column_start [R+1] | rows_by_column | order_by_column.
        rank: ``R``.
    """
    device = values.device
    if index is None:
        d = core_bandwidth(values.numel(), rank)
        diagonals = [torch.arange(max(0, -o), rank - max(0, o), device=device) for o in range(-d, d + 1)]
        offsets = torch.cat([torch.full_like(i, o) for o, i in zip(range(-d, d + 1), diagonals, strict=True)])
        rows = torch.cat(diagonals)
        return rows, rows + offsets
    start, columns = index[: rank + 1].long(), index[rank + 1 : rank + 1 + values.numel()].long()
    return torch.repeat_interleave(torch.arange(rank, device=device), start.diff()), columns


def core_matrix(values: Tensor, index: Tensor | None, rank: int) -> Tensor:
    """C[i, j] = the value of entry (i, j), 0 outside the pattern: [R, R] in the dtype of the values.

    Args:
        values: [R, R] dense; 1-D banded or sparse, in the order of :func:`core_pattern`.
        index: the index of a sparse core, otherwise None.
        rank: ``R``.
    """
    if values.dim() == 2:
        return values
    return values.new_zeros(rank, rank).index_put(core_pattern(values, index, rank), values)


def core_values(matrix: Tensor, values: Tensor, index: Tensor | None) -> Tensor:
    """v[e] = C[i_e, j_e]: the entries of C [R, R] on the pattern of ``values``, the inverse of :func:`core_matrix`."""
    return matrix if values.dim() == 2 else matrix[core_pattern(values, index, matrix.shape[0])]


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    core: Tensor | None = None,
    branch: Branch | None = None,
) -> Tensor:
    """y = W x + U_b (D_b x) + bias + s · U C (D drop(x)), row by row of x.

    Args:
        x: [M, K].
        weight: W, dense [N, K].
        down, up: D [R, K] and U [N, R], or both None.
        bias: [N] or None.
        scale: s.
        dropout: probability to drop an element of the adapter's input; kept elements are divided by 1 - dropout.
        seed: int64 [1], needed where dropout > 0.
        core: C [R, R], or None for the identity.
        branch: (D_b [R_b, K], U_b [N, R_b]), or None.

    Returns:
        y [M, N] in the dtype of x. Every operand is first cast to it; in bfloat16 this is what unfused code computes.

    Source: LoRA, arXiv 2106.09685, equation 3; with a core LoRA-XS, arXiv 2405.17604, and SVFT, arXiv 2405.19597.
    """
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if branch is not None:
        y = y + project(x, branch[0]) @ branch[1].to(x.dtype).T
    if down is None or up is None:
        return y
    return y + scale * (_times_core(project(x, down, dropout, seed), core) @ up.to(x.dtype).T)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[RoutedUpdate | None],
    slots: Tensor,
    offsets: Tensor | None = None,
    branch: Branch | None = None,
    strengths: Tensor | None = None,
) -> Tensor:
    """y[t] = W x[t] + U_b (D_b x[t]) + bias + s_a · U_a C_a (D_a x[t]), a = slots[t]; without the update where a is -1.

    With strengths y[t] = W x[t] + U_b (D_b x[t]) + bias + Σ_j strengths[t, j] s_a · U_a C_a (D_a x[t]), a = slots[t, j].

    With offsets W, the branch, the bias, D, U and C are those of the row's expert, as in :func:`experts_linear`.

    Args:
        x: [M, K].
        weight: W, dense [N, K].
        bias: [N] or None.
        updates: (D [R, K], U [N, R], C [R, R] or None, s) of each slot, or None.
        slots: integers [M]; with strengths [M, S].
        offsets: None, or as in :func:`experts_linear`; then W, the branch, the bias, D, U and C have a leading E.
        branch: as in :func:`adapted_linear`.
        strengths: float32 [M, S], or None.

    Returns:
        y [M, N] in the dtype of x, to which every operand is cast first.
    """
    if offsets is not None:
        parts = []
        for e, mine in enumerate(_rows_of_experts(offsets)):
            own = [None if u is None else (u[0][e], u[1][e], _of(u[2], e), u[3]) for u in updates]
            some = None if strengths is None else strengths[mine]
            branch_of_expert = _branch_of(branch, e)
            parts.append(
                routed_linear(x[mine], weight[e], _of(bias, e), own, slots[mine], None, branch_of_expert, some)
            )
        return torch.cat([*parts, x.new_zeros(len(x) - int(offsets[-1]), weight.shape[1])])
    y = adapted_linear(x, weight, bias=bias, branch=branch)
    if strengths is not None:
        nothing = torch.zeros_like(weight)
        for slots_of, strength in zip(slots.T, strengths.T.to(x.dtype), strict=True):
            y = y + strength.unsqueeze(1) * routed_linear(x, nothing, None, updates, slots_of)
        return y
    for slot, update in enumerate(updates):
        if update is not None and len(rows := (slots == slot).nonzero().flatten()):
            down, up, core, scale = update
            y[rows] = adapted_linear(x[rows], weight, down, up, bias, scale, core=core, branch=branch)
    return y


def _times_core(h: Tensor, core: Tensor | None) -> Tensor:
    """c = C h, row by row of h."""
    return h if core is None else h @ core.to(h.dtype).T


def adapted_linear_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    h: Tensor | None = None,
    core: Tensor | None = None,
    branch: Branch | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx = Wᵀg + D_bᵀ U_bᵀ g + drop(Dᵀ Cᵀ gh), dD = (Cᵀ gh)ᵀ drop(x), dU = s · gᵀ C h, dC = ghᵀ h.

    Here gh = s · Uᵀg and h = D drop(x).

    Args:
        g: gradient of y, [M, N].
        x: [M, K]; None leaves out dD.
        h: [M, R]; None computes it from x; without h and x, dU and dC are left out.
        others: as in :func:`adapted_linear`.

    Returns:
        dx [M, K], dD [R, K] in the dtype of down, dU [N, R] in the dtype of up, dC [R, R] in the dtype of the core.
    """
    if h is None and x is not None and down is not None:
        h = project(x, down, dropout, seed)
    return _backward(g, x, weight, down, up, scale, _kept(g, weight.shape[1], dropout, seed), h, core, branch)


def _backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    keep: Tensor | None,
    h: Tensor | None,
    core: Tensor | None,
    branch: Branch | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    dx = g @ weight.to(g.dtype)
    if branch is not None:
        dx = dx + g @ branch[1].to(g.dtype) @ branch[0].to(g.dtype)
    if down is None or up is None:
        return dx, None, None, None
    through, ddown, dup, dcore = _update_backward(g, x, down, up, scale, keep, h, core)
    return dx + through, ddown, dup, dcore


def _update_backward(
    g: Tensor, x: Tensor | None, down: Tensor, up: Tensor, scale: float, keep: Tensor | None, h: Tensor | None,
    core: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The update's part of dx, and dD, dU and dC."""
    gh = scale * (g @ up.to(g.dtype))
    gd = gh if core is None else gh @ core.to(gh.dtype)
    through = gd @ down.to(g.dtype)
    ddown, dup, dcore = None, None, None
    if keep is not None:
        through = through * keep
        x = None if x is None else x * keep
    if x is not None:
        ddown = (gd.T @ x).to(down.dtype)
    if h is not None:
        h = h.to(g.dtype)
        dup = (scale * (g.T @ _times_core(h, core))).to(up.dtype)
        dcore = None if core is None else (gh.T @ h).to(core.dtype)
    return through, ddown, dup, dcore


def routed_linear_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    updates: Sequence[RoutedUpdate | None],
    slots: Tensor,
    offsets: Tensor | None = None,
    branch: Branch | None = None,
    strengths: Tensor | None = None,
) -> tuple[Tensor, list[UpdateGradients | None]]:
    """dx[t] = Wᵀg[t] + D_bᵀ U_bᵀ g[t] + Σ_j w s_a · D_aᵀ C_aᵀ U_aᵀ g[t], and dD_a, dU_a, dC_a of every slot a.

    The gradients of a slot are those of :func:`adapted_linear_backward` over the rows that have it, with w g[t] for
    g[t]; w is the strength of the slot on the row, 1 without strengths.

    Args:
        g: gradient of y, [M, N].
        others: as in :func:`routed_linear`.

    Returns:
        dx [M, K], 0 for rows past the last expert; for each slot None where it is empty, otherwise dD [R, K], dU [N, R]
        and dC [R, R] or None in the dtypes of D, U and C, 0 for a slot without rows. With offsets the gradients have a
        leading E.
    """
    if offsets is not None:
        parts, of_experts = [], []
        for e, mine in enumerate(_rows_of_experts(offsets)):
            own = [None if u is None else (u[0][e], u[1][e], _of(u[2], e), u[3]) for u in updates]
            branch_of_expert, some = _branch_of(branch, e), _of(strengths, mine)
            dx, made = routed_linear_backward(
                g[mine], x[mine], weight[e], own, slots[mine], None, branch_of_expert, some
            )
            parts.append(dx)
            of_experts.append(made)
        stacks = [_stacked(of_slot) for of_slot in zip(*of_experts, strict=True)]
        return torch.cat([*parts, g.new_zeros(len(g) - int(offsets[-1]), weight.shape[2])]), stacks
    dx, *_ = adapted_linear_backward(g, None, weight, branch=branch)
    slots = slots if slots.dim() == 2 else slots.unsqueeze(1)
    gradients: list[UpdateGradients | None] = []
    for slot, update in enumerate(updates):
        if update is None:
            gradients.append(None)
            continue
        down, up, core, scale = update
        rows, columns = (slots == slot).nonzero(as_tuple=True)
        own_g, own_x = g[rows], x[rows]
        if strengths is not None:
            own_g = own_g * strengths[rows, columns].to(g.dtype).unsqueeze(1)
        through, ddown, dup, dcore = _update_backward(own_g, own_x, down, up, scale, None, project(own_x, down), core)
        dx = dx.index_add(0, rows, through)
        assert ddown is not None and dup is not None
        gradients.append((ddown, dup, dcore))
    return dx, gradients


def _stacked(of_experts: Sequence[UpdateGradients | None]) -> UpdateGradients | None:
    """The gradients of one slot, with a leading E."""
    given = [gradients for gradients in of_experts if gradients is not None]
    if not given:
        return None
    ddown, dup, dcore = zip(*given, strict=True)
    return torch.stack(ddown), torch.stack(dup), None if dcore[0] is None else torch.stack(dcore)


def experts_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    core: Tensor | None = None,
    branch: Branch | None = None,
) -> Tensor:
    """y[p] = W_e x[p] + U_be (D_be x[p]) + b_e + s · U_e C_e (D_e drop(x[p])), e the expert of row p; 0 past the last.

    Args:
        x: [P, K], the rows of an expert one after the other.
        weight: W, dense [E, N, K].
        offsets: integers [E + 1]: expert e has the rows from offsets[e] to offsets[e + 1], and offsets[0] = 0.
        down, up: D [E, R, K] and U [E, N, R], or both None.
        bias: [E, N] or None.
        scale, dropout, seed: as in :func:`adapted_linear`; the mask belongs to the rows of x, whatever their experts.
        core: C [E, R, R], or None for the identity.
        branch: (D_b [E, R_b, K], U_b [E, N, R_b]), or None.

    Returns:
        y [P, N] in the dtype of x, to which every operand is cast first.
    """
    h, parts = None if down is None else project_experts(x, down, offsets, dropout, seed), []
    for e, rows in enumerate(_rows_of_experts(offsets)):
        y = adapted_linear(x[rows], weight[e], bias=_of(bias, e), branch=_branch_of(branch, e))
        if h is not None and up is not None:
            y = y + scale * (_times_core(h[rows], _of(core, e)) @ up[e].to(x.dtype).T)
        parts.append(y)
    return torch.cat([*parts, x.new_zeros(len(x) - int(offsets[-1]), weight.shape[1])])


def project_experts(
    x: Tensor, down: Tensor, offsets: Tensor, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """h[p] = D_e drop(x[p]), e the expert of row p: x [P, K], down [E, R, K], h [P, R]; 0 for rows past the last expert."""
    kept = _drop(x, dropout, seed)
    parts = [project(kept[rows], down[e]) for e, rows in enumerate(_rows_of_experts(offsets))]
    return torch.cat([*parts, x.new_zeros(len(x) - int(offsets[-1]), down.shape[1])])


def experts_linear_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    h: Tensor | None = None,
    core: Tensor | None = None,
    branch: Branch | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dD_e, dU_e, dC_e = the gradients of :func:`adapted_linear_backward` over the rows of each expert e.

    Args:
        g: gradient of y, [P, N].
        x: [P, K]; None leaves out dD.
        h: [P, R], D_e drop(x[p]); None computes it from x; without h and x, dU and dC are left out.
        others: as in :func:`experts_linear`.

    Returns:
        dx [P, K], 0 for rows past the last expert; dD [E, R, K], dU [E, N, R] and dC [E, R, R] in the dtypes of down, up
        and the core, 0 for experts without rows.
    """
    keep, made = _kept(g, weight.shape[2], dropout, seed), []
    if h is None and x is not None and down is not None:
        h = project_experts(x, down, offsets, dropout, seed)
    for e, rows in enumerate(_rows_of_experts(offsets)):
        operands = (_of(x, rows), weight[e], _of(down, e), _of(up, e))
        own = _of(keep, rows), _of(h, rows), _of(core, e), _branch_of(branch, e)
        made.append(_backward(g[rows], *operands, scale, *own))
    dx, *rest = zip(*made, strict=True)
    ddown, dup, dcore = (None if grads[0] is None else torch.stack(grads) for grads in rest)
    return torch.cat([*dx, g.new_zeros(len(g) - int(offsets[-1]), weight.shape[2])]), ddown, dup, dcore


def _rows_of_experts(offsets: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise(offsets.tolist())]


def _of(tensor: Tensor | None, at: int | slice) -> Tensor | None:
    return None if tensor is None else tensor[at]


def _branch_of(branch: Branch | None, expert: int) -> Branch | None:
    return None if branch is None else (branch[0][expert], branch[1][expert])


def svd_linear(x: Tensor, u: Tensor, core: Tensor, vt: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = U C (Vᵀ x) + bias, row by row of x; C = diag(S) Z in SVF and SVFT.

    Args:
        x: [M, K].
        u, vt: U [N, R] and Vᵀ [R, K].
        core: C [R, R].
        bias: [N] or None.

    Returns:
        y [M, N] in the dtype of x, to which every operand is cast first.

    Source: SVF, arXiv 2501.06252; SVFT, arXiv 2405.19597, equation 1.
    """
    c = _times_core(x @ vt.to(x.dtype).T, core)
    return torch.nn.functional.linear(c, u.to(x.dtype), None if bias is None else bias.to(x.dtype))


def svd_linear_backward(
    g: Tensor, h: Tensor | None, u: Tensor, core: Tensor, vt: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dx = V Cᵀ b, dC = bᵀ h, with b = Uᵀ g and h = Vᵀ x, row by row.

    Args:
        g: gradient of y, [M, N].
        h: [M, R]; None leaves out dC.
        others: as in :func:`svd_linear`.

    Returns:
        dx [M, K], dC [R, R] in the dtype of the core.
    """
    b = g @ u.to(g.dtype)
    dcore = None if h is None else (b.T @ h.to(g.dtype)).to(core.dtype)
    return b @ core.to(g.dtype) @ vt.to(g.dtype), dcore
