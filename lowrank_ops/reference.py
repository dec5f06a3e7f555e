"""Every op of the package in plain PyTorch, for any float dtype up to float64.

These functions judge the kernels: tests compare against them in float64, and benchmarks use them as the unfused
baseline. They are written to be read next to the equation, not to be fast. In use they run only if chosen by name
(``with lowrank_ops.implementation("reference")``).

Letters: ``M`` tokens, ``N`` out features, ``K`` in features, ``R`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.operands import FP4, MXFP4, NF4, Format

NF4_CODE = NF4.levels
BLOCK_SIZES = NF4.block_sizes
ABSMAX_BLOCK = 256  # block scales that share one second-level scale under double quantisation


def nf4_code(device: torch.device | str | None = None) -> Tensor:
    """The 16 NF4 levels, float32 [16]; the index is the nibble."""
    return levels(NF4, device)


def levels(format: Format, device: torch.device | str | None = None) -> Tensor:
    """The 16 levels of a format, float32 [16]; the index is the nibble."""
    return torch.tensor(format.levels, dtype=torch.float32, device=device)


def dynamic_code(device: torch.device | str | None = None) -> Tensor:
    """The signed 8-bit dynamic map of double quantisation, float32 [256], ascending, 0 at index 127.

    For i = 0 … 6 the midpoints of 2^i equal parts of [0.1, 1], times 10^(i-6), with both signs; then 0 and 1
    (Dettmers et al., arXiv 2110.02861, section 2.1). Each mantissa is rounded to float32 before it is scaled in
    double precision: this order decides the last bit.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        midpoints = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints + [-m for m in midpoints]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def nf4_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """nibble[i] = #{t : w[i] / absmax[i // block_size] > t} over the 15 midpoints t of neighbouring NF4 levels.

    Blocks run over the row-major flattened tensor, so they straddle rows unless ``K`` is a multiple of ``block_size``;
    the last may be short. A tie takes the lower level. Byte j holds element 2j in its high nibble and 2j+1 in its low
    one; an odd count is padded with the nibble of zero.

    Args:
        w: float tensor of any shape.
        block_size: elements that share one scale.

    Returns:
        packed: uint8 [ceil(numel / 2)]; absmax: float32 [ceil(numel / block_size)].

    Numerics: float32, by the rule of bitsandbytes 0.50.2 on a CPU, bit for bit: full blocks multiply by the reciprocal
    of absmax, a short last block divides by it; absmax is at least 1e-38 inside the division.
    """
    return _quantize_by_absmax(NF4, w, block_size)


def fp4_quantize(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """level(nibble[i]) = the FP4 level nearest to w[i] / absmax[i // block_size]; a tie takes the lower level.

    FP4 is bitsandbytes' table: a sign, two bits of exponent, one of mantissa, over the largest level. Two nibbles mean
    0: 8 for small positive numbers, 0 for 0 and small negative ones.

    Args, Returns and Numerics as :func:`nf4_quantize`.
    """
    return _quantize_by_absmax(FP4, w, block_size)


def _quantize_by_absmax(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = w.reshape(-1).float()
    full = flat.numel() - flat.numel() % block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).reshape(-1)
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    ascending, order = levels(format, w.device).sort(stable=True)
    nibbles = order[torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2)]
    return _pack(nibbles), absmax


def mxfp4_quantize(w: Tensor, block_size: int = 32) -> tuple[Tensor, Tensor]:
    """byte[b] = floor(log2(max |w| of block b)) − 2 + 127, nibble[i] = the E2M1 number nearest to w[i] / 2^(byte − 127).

    Ties take the even mantissa, numbers beyond 6 saturate to 6, and zeros keep their sign. A block of zeros has byte 0.
    A block that contains NaN or infinity has byte 255, which makes the whole block NaN.

    Args:
        w: float tensor of any shape.
        block_size: 32.

    Returns:
        packed: uint8 [ceil(numel / 2)]; exponents: uint8 [ceil(numel / block_size)].

    Numerics: exact except for one rounding, because scales are powers of two.

    Source: OCP Microscaling formats (MX) v1.0, sections 5.3.3, 5.4.1 and 6.3.
    """
    flat = w.reshape(-1).double()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    largest = blocks.abs().amax(dim=1)
    # frexp: m · 2^e with ½ <= m < 1, so that floor(log2) is e − 1.
    exponents = torch.where(largest > 0, torch.frexp(largest)[1] - 3 + 127, 0).clamp(0, 254)
    exponents = torch.where(largest.isfinite(), exponents, 255)
    scaled = blocks * torch.exp2(127.0 - exponents.double()).unsqueeze(1)
    size = levels(MXFP4, w.device)[:8].double()
    between = (size[:-1] + size[1:]) / 2
    below, above = (torch.bucketize(scaled.abs(), between, right=right) for right in (False, True))
    # The two differ only in a tie. Even mantissas have even nibbles.
    nibbles = torch.where(below % 2 == 0, below, above) + 8 * scaled.signbit()
    nibbles = nibbles.reshape(-1)[: flat.numel()]
    return _pack(torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2))), exponents.to(torch.uint8)


def _pack(nibbles: Tensor) -> Tensor:
    """Pack an even number of nibbles, two in a byte, the first in the high half."""
    nibbles = nibbles.to(torch.uint8)
    return (nibbles[::2] << 4) | nibbles[1::2]


def quantize(format: Format, w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(packed, scales) = ``{format}_quantize(w)``."""
    return _QUANTIZE[format.name](w, block_size)


def absmax_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """code[index[b]] · absmax2[b // 256] ≈ absmax[b] − offset: the second level of double quantisation.

    Args:
        absmax: float32 [blocks], the first-level scales.
        offset: float32 scalar, their mean.

    Returns:
        index: uint8 [blocks] into :func:`dynamic_code`; absmax2: float32 [ceil(blocks / 256)].

    Numerics: float32, bit for bit as bitsandbytes 0.50.2 on a CPU: the scaled value is rounded to a grid of
    65,536 points of [-1, 1] and the level nearest to the grid point is taken, which differs from the level nearest to
    the value in about one index of a thousand.
    """
    centred = absmax.float() - offset
    pad = -centred.numel() % ABSMAX_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, pad)).view(-1, ABSMAX_BLOCK)
    absmax2 = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax2).unsqueeze(1)).clamp(-1, 1)
    position = ((scaled + 1.0) * 0.5 * 65535 + 0.5).to(torch.int64).clamp(0, 65535)
    grid = -1.0 + (2.0 * torch.arange(65536, dtype=torch.float32, device=absmax.device)) / 65535
    code = dynamic_code(absmax.device)
    nearest = torch.bucketize(grid, 0.5 * (code[:-1] + code[1:]))
    index = torch.where(absmax2.unsqueeze(1) > 0, nearest[position], 0).to(torch.uint8)
    return index.reshape(-1)[: centred.numel()].contiguous(), absmax2


def absmax_dequantize(index: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """absmax[b] = code[index[b]] · absmax2[b // 256] + offset, float32 [blocks]; product and sum each rounded."""
    code = dynamic_code(index.device)
    return code[index.long()] * absmax2.repeat_interleave(ABSMAX_BLOCK)[: index.numel()] + offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = code[nibble(n·K + k)] · absmax[(n·K + k) // block_size].

    Args:
        packed: uint8, ceil(N·K / 2) bytes in any shape.
        absmax: float32 [blocks], or uint8 [blocks] with ``absmax2`` float32 and ``offset`` float32 scalar.
        out_features, in_features: ``N`` and ``K``.
        block_size: elements that share one scale.
        dtype: of the result.

    Returns:
        [N, K] of ``dtype``.

    Numerics: the product is computed in float32 and rounded once to ``dtype`` (float64 holds the float32 product,
    because every kernel computes with it).
    """
    return dequantize(NF4, packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype)


def fp4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = level[nibble(n·K + k)] · absmax[(n·K + k) // block_size], as :func:`nf4_dequantize` with FP4's levels."""
    return dequantize(FP4, packed, absmax, absmax2, offset, out_features, in_features, block_size, dtype)


def mxfp4_dequantize(
    packed: Tensor,
    exponents: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = E2M1[nibble(n·K + k)] · 2^(exponents[(n·K + k) // block_size] − 127); the exponent 255 is NaN.

    Args:
        packed: uint8, ceil(N·K / 2) bytes in any shape.
        exponents: uint8 [blocks].
        absmax2, offset: None; other formats use them.
        out_features, in_features: ``N`` and ``K``.
        block_size: 32.
        dtype: of the result.

    Returns:
        [N, K] of ``dtype``, rounded once.
    """
    return dequantize(MXFP4, packed, exponents, absmax2, offset, out_features, in_features, block_size, dtype)


def dequantize(
    format: Format,
    packed: Tensor,
    scales: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w[n, k] = level[nibble(n·K + k)] · scale[(n·K + k) // block_size] with the levels and the scales of a format.

    Args, Returns and Numerics as :func:`nf4_dequantize`.
    """
    numel = out_features * in_features
    packed = packed.reshape(-1)
    if format.exponents:
        scales = torch.where(scales < 255, torch.exp2(scales.double() - 127), torch.nan).float()
    elif absmax2 is not None:
        assert offset is not None
        scales = absmax_dequantize(scales, absmax2, offset)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel].long()
    scales = scales.repeat_interleave(block_size)[:numel]
    return (levels(format, packed.device)[nibbles] * scales).view(out_features, in_features).to(dtype)


_QUANTIZE = {"nf4": nf4_quantize, "fp4": fp4_quantize, "mxfp4": mxfp4_quantize}


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
    if dropout > 0:
        assert seed is not None
        x = x * dropout_mask(seed, x.shape[0], x.shape[1], dropout).to(x.dtype) / (1 - dropout)
    return x @ down.to(x.dtype).T


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
) -> Tensor:
    """y = W x + bias + s · U C (D drop(x)), row by row of x.

    Args:
        x: [M, K].
        weight: W, dense [N, K].
        down, up: D [R, K] and U [N, R], or both None.
        bias: [N] or None.
        scale: s.
        dropout: probability to drop an element of the adapter's input; kept elements are divided by 1 - dropout.
        seed: int64 [1], needed where dropout > 0.
        core: C [R, R], or None for the identity.

    Returns:
        y [M, N] in the dtype of x. Every operand is first cast to it; in bfloat16 this is what unfused code computes.

    Source: LoRA, arXiv 2106.09685, equation 3; with a core LoRA-XS, arXiv 2405.17604, and SVFT, arXiv 2405.19597.
    """
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if down is None or up is None:
        return y
    return y + scale * (_times_core(project(x, down, dropout, seed), core) @ up.to(x.dtype).T)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[tuple[Tensor, Tensor, Tensor | None, float] | None],
    slots: Tensor,
) -> Tensor:
    """y[t] = W x[t] + bias + s_a · U_a C_a (D_a x[t]), a = slots[t]; W x[t] + bias where a is -1.

    Args:
        x: [M, K].
        weight: W, dense [N, K].
        bias: [N] or None.
        updates: (D [R, K], U [N, R], C [R, R] or None, s) of each slot, or None.
        slots: integers [M].

    Returns:
        y [M, N] in the dtype of x, to which every operand is cast first.
    """
    y = adapted_linear(x, weight, bias=bias)
    for slot, update in enumerate(updates):
        if update is not None and len(rows := (slots == slot).nonzero().flatten()):
            down, up, core, scale = update
            y[rows] = adapted_linear(x[rows], weight, down, up, bias, scale, core=core)
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx = Wᵀg + drop(Dᵀ Cᵀ gh), dD = (Cᵀ gh)ᵀ drop(x), dU = s · gᵀ C h, dC = ghᵀ h, with gh = s · Uᵀg, h = D drop(x).

    Args:
        g: gradient of y, [M, N].
        x: [M, K]; None leaves out dD.
        h: [M, R]; None computes it from x; without h and x, dU and dC are left out.
        others: as in :func:`adapted_linear`.

    Returns:
        dx [M, K], dD [R, K] in the dtype of down, dU [N, R] in the dtype of up, dC [R, R] in the dtype of the core.
    """
    dx = g @ weight.to(g.dtype)
    if down is None or up is None:
        return dx, None, None, None
    gh = scale * (g @ up.to(g.dtype))
    gd = gh if core is None else gh @ core.to(gh.dtype)
    through = gd @ down.to(g.dtype)
    ddown, dup, dcore = None, None, None
    if h is None and x is not None:
        h = project(x, down, dropout, seed)
    if dropout > 0:
        assert seed is not None
        keep = dropout_mask(seed, g.shape[0], weight.shape[1], dropout).to(g.dtype) / (1 - dropout)
        through = through * keep
        x = None if x is None else x * keep
    if x is not None:
        ddown = (gd.T @ x).to(down.dtype)
    if h is not None:
        h = h.to(g.dtype)
        dup = (scale * (g.T @ _times_core(h, core))).to(up.dtype)
        dcore = None if core is None else (gh.T @ h).to(core.dtype)
    return dx + through, ddown, dup, dcore


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


# ---- preferences ----


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, labels: Tensor | None = None, center: float = 0.0
) -> Tensor:
    """loss = mean(−y log σ(d) − (1 − y) log σ(−d) + center (c + r)²), d = c − r − margin.

    Args:
        chosen, rejected: c and r [n], n >= 1.
        margin: [n]; None means 0.
        labels: y [n] in [0, 1], the probability that c is better, ½ for a tie; None means 1. NaN outside [0, 1].

    Returns:
        a scalar in the dtype of the rewards, float32 for 16-bit ones.

    Source: Bradley and Terry (1952); margin: arXiv 2307.09288, equation 2; centring: arXiv 2312.09244, equation 2.
    """
    d, both, y = _pairs(chosen, rejected, margin, labels)
    # The first addend is 0 unless the gap is not finite; then it makes the loss NaN.
    softplus = 0.0 * d.abs() - torch.nn.functional.logsigmoid(d.abs())
    return (softplus + torch.where(d > 0, 1 - y, y) * d.abs() + center * both * both).mean()


def bradley_terry_loss_backward(
    g: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    labels: Tensor | None = None,
    center: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """dc = g/n · (2 center (c + r) + (1 − y) σ(d) − y σ(−d)), dr = g/n · (2 center (c + r) − (1 − y) σ(d) + y σ(−d)).

    Args and Returns as in :func:`bradley_terry_loss`; g is a scalar. Gradients have the dtype of the rewards.
    """
    d, both, y = _pairs(chosen, rejected, margin, labels)
    slope = (1 - y) * torch.sigmoid(d) - y * torch.sigmoid(-d) + 0.0 * d
    g, pull = g.to(d.dtype) / d.numel(), 2 * center * both
    return (g * (pull + slope)).to(chosen.dtype), (g * (pull - slope)).to(chosen.dtype)


def _pairs(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d, c + r, y in float32, or float64 where the rewards are."""
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    c, r = chosen.to(dtype), rejected.to(dtype)
    d = c - r if margin is None else c - r - margin.to(dtype)
    y = torch.ones_like(d) if labels is None else labels.to(dtype)
    return d, c + r, torch.where((y >= 0) & (y <= 1), y, torch.nan)
