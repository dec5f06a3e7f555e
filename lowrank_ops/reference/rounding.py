"""Rounding to 4 bits that weighs the error by a second moment of the inputs, in plain PyTorch.

Letters: W [N, K] the weight, Ŵ its rounded version, E = W − Ŵ, H [K, K] the second moment, C the levels of the format
in ascending order, s(n, k) the scale of the block of element (n, k) as it is stored. The rows are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.operands import Format, Matrix
from .formats import absmax_dequantize, levels, pack

# Fractions of the largest magnitude that are tried as a block's scale.
SCALE_FRACTIONS = tuple(round(1.06 - 0.03 * i, 2) for i in range(18))
# float32 scales take steps of this size in :func:`descend`.
SCALE_STEP = 1 / 64
# Scales are chosen again only in blocks of up to this size.
LARGEST_SEARCHED_BLOCK = 128
_LARGEST_EXPONENT = 252  # of MXFP4: larger ones reach infinity in float32
_CHUNK = 64


def nearest(format: Format, v: Tensor) -> Tensor:
    """rank = #{t : v > t} over the 15 midpoints t of neighbouring levels; C[rank] is the level nearest to v."""
    ascending = levels(format, v.device).sort()[0].to(v.dtype)
    return torch.bucketize(v.contiguous(), (ascending[:-1] + ascending[1:]) / 2)


def round_to(format: Format, t: Tensor, scales: Tensor) -> Tensor:
    """q = s · C[nearest(t / s)]; 0 where s is 0."""
    ascending = levels(format, t.device).sort()[0].to(t.dtype)
    return scales * ascending[nearest(format, t * _inverse(scales))]


def scales_of(matrix: Matrix, like: Tensor) -> Tensor:
    """s(n, k) of a packed W, in the shape and dtype of ``like`` [N, K]."""
    if _format(matrix).exponents:
        scales = torch.exp2(matrix.scales[0].float() - 127)
    elif len(matrix.scales) == 3:
        scales = absmax_dequantize(*matrix.scales)
    else:
        scales = matrix.scales[0]
    return scales.repeat_interleave(matrix.block_size)[: like.numel()].view(like.shape).to(like.dtype)


def search_scales(format: Format, w: Tensor, importance: Tensor, block_size: int) -> Tensor:
    """s[b] = argmin over s of Σ_f h[f mod K] · (w[f] − q_s(w[f]))², f runs over block b of the row-major flattened W.

    Args:
        format: of the levels.
        w: W [N, K].
        importance: h [K], not negative: the diagonal of H, or ones.
        block_size: elements that share one scale.

    Returns:
        float32 [blocks]: the largest magnitude of the block times the best of ``SCALE_FRACTIONS``; the exponents uint8
        [blocks] that :func:`mxfp4_quantize` has, or one more or less, if the scales are powers of two. Of two equal
        errors the earlier fraction counts, and the exponent nearest to :func:`mxfp4_quantize`'s.
    """
    flat = w.reshape(-1)
    pad = -flat.numel() % block_size
    blocks = torch.nn.functional.pad(flat, (0, pad)).view(-1, block_size)
    h = importance.to(w.dtype).expand(w.shape).reshape(-1)
    h = torch.nn.functional.pad(h, (0, pad)).view(-1, block_size)
    largest = blocks.abs().amax(dim=1)
    tried: list[tuple[Tensor, Tensor]]  # what is stored, the scale
    if format.exponents:
        usual = torch.where(largest > 0, torch.frexp(largest)[1] - 3 + 127, 0).clamp(0, _LARGEST_EXPONENT)
        exponents = [(usual + step).clamp(0, _LARGEST_EXPONENT) for step in (0, -1, 1)]
        tried = [(e.to(torch.uint8), torch.exp2(e.to(w.dtype) - 127)) for e in exponents]
    else:
        tried = [(s.float(), s) for s in (largest * fraction for fraction in SCALE_FRACTIONS)]
    best, least = tried[0][0], torch.full_like(largest, torch.inf)
    for stored, scale in tried:
        error = (h * (blocks - round_to(format, blocks, scale.unsqueeze(1))).square()).sum(dim=1)
        best = torch.where(error < least, stored, best)
        least = torch.minimum(least, error)
    return best


def weighted_errors(error: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """‖E[n, order] R‖² = E[n] H E[n]ᵀ for every row, float64 [N]; R Rᵀ = H[order][:, order]."""
    return (error[:, order] @ factor).double().square().sum(dim=1)


def feed_back(format: Format, w: Tensor, scales: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """q_k = round(w_k + Σ_{j<k} E_j R_jk / R_kk), E_j = w_j − q_j, with the columns taken in ``order``.

    Each column is rounded after a correction that makes up for the errors of the columns before it. With e_k = R_kk ·
    (the argument of round − q_k) the weighted error is E H Eᵀ = ‖e‖². This is GPTQ (arXiv 2210.17323) without an
    inverse: its U is R⁻¹.

    Args:
        format: of the levels.
        w: W [N, K].
        scales: s(n, k), [N, K].
        factor: R [K, K], upper triangular, R Rᵀ = H[order][:, order].
        order: int64 [K], a permutation of the columns.

    Returns:
        Ŵ [N, K].
    """
    K = w.shape[1]
    coupling = factor / factor.diagonal()
    w, s = w[:, order], scales[:, order]
    error, rounded = torch.zeros_like(w), torch.empty_like(w)
    for first in range(0, K, _CHUNK):
        last = min(K, first + _CHUNK)
        target = w[:, first:last] + error[:, :first] @ coupling[:first, first:last]
        for k in range(first, last):
            i = k - first
            rounded[:, order[k]] = q = round_to(format, target[:, i], s[:, k])
            error[:, k] = w[:, k] - q
            target[:, i + 1 :] += error[:, k, None] * coupling[k, k + 1 : last]
    return rounded


def descend(w: Tensor, codes: Tensor, matrix: Matrix, moment: Tensor, choose: bool) -> tuple[Tensor, Matrix]:
    """q_k = round(w_k + Σ_{j≠k} E_j H_jk / H_kk), one column after the other: the best q_k while the others stay.

    No step raises E H Eᵀ. If ``choose``, each block of a row is rounded so three times, at its stored scale and at the
    next smaller and larger one, and the least error of the three is kept.

    Args:
        w: W [N, K].
        codes: int64 [N, K], ranks of the levels.
        matrix: its format and its scales.
        moment: H [K, K].
        choose: K must be a multiple of the block size.

    Returns:
        codes, and the matrix with the scales that were chosen; its packed codes are as before.
    """
    (N, K), format, ascending, diagonal = w.shape, _format(matrix), _ascending(matrix, w), moment.diagonal()
    codes, stored, scales = codes.clone(), matrix.scales[0].clone(), scales_of(matrix, w)
    error = w - scales * ascending[codes]
    chunk = matrix.block_size if choose else _CHUNK
    steps = [_stepped(matrix, stored, step) for step in (0, -1, 1)] if choose else [stored]
    tries = [(kept, scales_of(matrix._replace(scales=(kept, *matrix.scales[1:])), w)) for kept in steps]
    for first in range(0, K, chunk):
        last = min(K, first + chunk)
        here, inside = w[:, first:last], moment[first:last, first:last]
        outside = error[:, :first] @ moment[:first, first:last] + error[:, last:] @ moment[last:, first:last]
        best: list[Tensor] = []
        for tried, scales in tries:
            s = scales[:, first:last]
            c = codes[:, first:last].clone()
            e = here - s * ascending[c]
            slope, inverse = outside + e @ inside, _inverse(s)
            for i in range(last - first):
                target = here[:, i] - e[:, i] + slope[:, i] / diagonal[first + i]
                c[:, i] = nearest(format, target * inverse[:, i])
                new = here[:, i] - s[:, i] * ascending[c[:, i]]
                slope += (new - e[:, i]).unsqueeze(1) * inside[i]
                e[:, i] = new
            found = [(e * (slope + outside)).sum(dim=1, keepdim=True), c, e]
            if choose:
                found.append(tried.view(N, -1)[:, first // chunk, None])
            better = not best or found[0] < best[0]
            best = found if better is True else [torch.where(better, a, b) for a, b in zip(found, best, strict=True)]
        codes[:, first:last], error[:, first:last] = best[1:3]
        if choose:
            stored.view(N, -1)[:, first // chunk, None] = best[3]
    return codes, matrix._replace(scales=(stored, *matrix.scales[1:]))


def _stepped(matrix: Matrix, stored: Tensor, step: int) -> Tensor:
    """The next smaller (-1) or larger (1) scale of every block, as it is stored."""
    if stored.dtype == torch.uint8:
        largest = _LARGEST_EXPONENT if _format(matrix).exponents else 255
        return (stored.int() + step).clamp(0, largest).to(torch.uint8)
    return stored * (1 + step * SCALE_STEP)


def round_weighted(
    w: Tensor, matrix: Matrix, before: Tensor, moment: Tensor, factor: Tensor, order: Tensor, choose: bool, passes: int
) -> tuple[Matrix, Tensor]:
    """Make E H Eᵀ of a rounded W smaller: by :func:`feed_back`, then by passes of :func:`descend`.

    A row keeps its codes where feeding back gave it a larger E H Eᵀ, so no step raises it.

    Args:
        w: W [N, K], float32 or float64.
        matrix: W rounded in any way.
        before: its E H Eᵀ, float64 [N].
        moment: H [K, K], positive definite.
        factor, order: R [K, K] and a permutation of the columns, R Rᵀ = H[order][:, order].
        choose: let :func:`descend` choose scales, which it does in whole blocks of up to 128 columns only.
        passes: of :func:`descend`.

    Returns:
        W rounded better; E H Eᵀ of every row before, after the errors were fed back and at the end, float64 [3, N].
    """
    format, ascending, scales = _format(matrix), _ascending(matrix, w), scales_of(matrix, w)
    codes = unpack_codes(format, matrix.data, w)
    fed = feed_back(format, w, scales, factor, order)
    after = weighted_errors(w - fed, factor, order)
    codes = torch.where((after < before).unsqueeze(1), nearest(format, fed * _inverse(scales)), codes)
    choose = choose and w.shape[1] % matrix.block_size == 0 and matrix.block_size <= LARGEST_SEARCHED_BLOCK
    for _ in range(passes):
        codes, matrix = descend(w, codes, matrix, moment, choose)
    final = weighted_errors(w - scales_of(matrix, w) * ascending[codes], factor, order)
    return matrix._replace(data=pack_codes(format, codes)), torch.stack([before, torch.minimum(before, after), final])


def dequantize_matrix(matrix: Matrix, like: Tensor) -> Tensor:
    """Ŵ of a packed W, in the shape and dtype of ``like`` [N, K]."""
    return scales_of(matrix, like) * _ascending(matrix, like)[unpack_codes(_format(matrix), matrix.data, like)]


def round_nearest(w: Tensor, matrix: Matrix) -> Matrix:
    """W [N, K] rounded to the nearest levels for the scales of a matrix, whose packed codes are not read."""
    codes = nearest(_format(matrix), w * _inverse(scales_of(matrix, w)))
    return matrix._replace(data=pack_codes(_format(matrix), codes))


def pack_codes(format: Format, codes: Tensor) -> Tensor:
    """The nibbles of ranks of levels [N, K], two in a byte; an odd count is padded with the nibble of zero."""
    order = levels(format, codes.device).sort(stable=True)[1]
    zero = int(nearest(format, torch.zeros(1, device=codes.device)))
    return pack(order[torch.nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2), value=zero)])


def unpack_codes(format: Format, packed: Tensor, like: Tensor) -> Tensor:
    """The ranks of levels that packed nibbles stand for, int64, in the shape of ``like``."""
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: like.numel()].long()
    return levels(format, packed.device).sort(stable=True)[1].argsort()[nibbles].view(like.shape)


def _format(matrix: Matrix) -> Format:
    assert matrix.format is not None, "a dense matrix has no levels"
    return matrix.format


def _ascending(matrix: Matrix, like: Tensor) -> Tensor:
    return levels(_format(matrix), like.device).sort()[0].to(like.dtype)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() < 1e-38, 0, 1 / scales)
