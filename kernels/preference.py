"""The Bradley–Terry loss of pairs, forward and backward.

loss = mean over pairs of  −y log σ(d) − (1 − y) log σ(−d) + center (c + r)²,    d = c − r − margin
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

from .config import FLAT
from .launch import check_dtypes, launch

BLOCK = 1024  # pairs a program loads at a time
PROGRAMS = 128  # at most, so that one program can add their partial sums


@triton.jit
def _pairs(chosen_ptr, rejected_ptr, margin_ptr, labels_ptr, at, mask):
    """d, c + r and y of the pairs ``at``, float32; y is NaN unless it is a probability."""
    chosen = tl.load(chosen_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rejected = tl.load(rejected_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d = chosen - rejected
    if margin_ptr is not None:
        d -= tl.load(margin_ptr + at, mask=mask, other=0.0)
    y = tl.full(at.shape, 1.0, tl.float32)
    if labels_ptr is not None:
        y = tl.load(labels_ptr + at, mask=mask, other=0.0)
        y = tl.where((y >= 0.0) & (y <= 1.0), y, float("nan"))
    return d, chosen + rejected, y


@triton.jit
def _log_one_plus(e):
    """log(1 + e) for 0 <= e <= 1 as 2 artanh(s), s = e / (2 + e): exact for small e too, where log(1 + e) is not."""
    s = e / (2.0 + e)
    q = s * s
    p = tl.full(e.shape, 1.0 / 15, tl.float32)
    for i in tl.static_range(7):
        p = p * q + 1.0 / (13 - 2 * i)
    return 2.0 * s * p


@triton.jit
def _loss_kernel(
    chosen_ptr, rejected_ptr, margin_ptr, labels_ptr, out_ptr, n, tokens, center, weight, BLOCK: tl.constexpr
):
    """out[program] = weight · Σ of the losses of its pairs."""
    first = tl.program_id(0).to(tl.int64) * tokens
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tokens, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        mask = at < n
        d, both, y = _pairs(chosen_ptr, rejected_ptr, margin_ptr, labels_ptr, at, mask)
        size = tl.abs(d)
        # The second addend is 0 unless the gap is not finite; then it makes the loss NaN.
        loss = _log_one_plus(tl.exp(-size)) + 0.0 * size
        loss += tl.where(d > 0, 1.0 - y, y) * size + center * (both * both)
        acc += tl.where(mask, loss, 0.0)
    tl.store(out_ptr + tl.program_id(0), weight * tl.sum(acc, axis=0))


@triton.jit
def _total_kernel(parts_ptr, out_ptr, parts, weight, PROGRAMS: tl.constexpr):
    """out = weight · Σ parts."""
    at = tl.arange(0, PROGRAMS)
    tl.store(out_ptr, weight * tl.sum(tl.load(parts_ptr + at, mask=at < parts, other=0.0), axis=0))


@triton.jit
def _loss_backward_kernel(
    g_ptr, chosen_ptr, rejected_ptr, margin_ptr, labels_ptr, dchosen_ptr, drejected_ptr, n, center, weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    d, both, y = _pairs(chosen_ptr, rejected_ptr, margin_ptr, labels_ptr, at, mask)
    size = tl.abs(d)
    e = tl.exp(-size) + 0.0 * size
    less, more = e / (1.0 + e), 1.0 / (1.0 + e)
    # σ(d) − y as (1 − y) σ(d) − y σ(−d), which has no cancellation at either end.
    slope = (1.0 - y) * tl.where(d > 0, more, less) - y * tl.where(d > 0, less, more)
    pull = 2.0 * center * both
    g = weight * tl.load(g_ptr)
    tl.store(dchosen_ptr + at, (g * (pull + slope)).to(dchosen_ptr.dtype.element_ty), mask=mask)
    tl.store(drejected_ptr + at, (g * (pull - slope)).to(drejected_ptr.dtype.element_ty), mask=mask)


# ---- launchers


def _check(chosen: Tensor) -> None:
    check_dtypes(chosen)
    if chosen.dtype == torch.float64:
        raise TypeError("the Triton kernels compute in float32; float64 needs the CPU or implementation('reference')")


def forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float = 0.0
) -> Tensor:
    """loss = mean(softplus(−d) + (1 − y) d + center (c + r)²), d = c − r − margin.

    Args:
        chosen, rejected: [n], one of float32, bfloat16, float16, contiguous; n >= 1.
        margin, labels: float32 [n], contiguous; None means 0 and 1.

    Returns:
        a float32 scalar.

    Raises:
        TypeError: float64, or bfloat16 in the interpreter.

    Numerics: float32; the order of the sum depends on n alone. NaN where a label is outside [0, 1] or a gap not finite.
    """
    _check(chosen)
    n = chosen.numel()
    pairs = {"chosen_ptr": chosen, "rejected_ptr": rejected, "margin_ptr": margin, "labels_ptr": labels}
    out = torch.empty((), dtype=torch.float32, device=chosen.device)
    tokens = BLOCK * triton.cdiv(triton.cdiv(n, BLOCK), PROGRAMS) if n > 8 * BLOCK else 8 * BLOCK
    programs = triton.cdiv(n, tokens)
    parts = out if programs == 1 else torch.empty(programs, dtype=torch.float32, device=chosen.device)
    launch(
        _loss_kernel,
        (programs,),
        chosen.device,
        FLAT,
        **pairs,
        out_ptr=parts,
        n=n,
        tokens=tokens,
        center=float(center),
        weight=1 / n if programs == 1 else 1.0,
        BLOCK=BLOCK,
    )
    if programs > 1:
        launch(
            _total_kernel,
            (1,),
            chosen.device,
            FLAT,
            parts_ptr=parts,
            out_ptr=out,
            parts=programs,
            weight=1 / n,
            PROGRAMS=PROGRAMS,
        )
    return out


def backward(
    g: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None, labels: Tensor | None, center: float = 0.0
) -> tuple[Tensor, Tensor]:
    """dc, dr = g/n · (2 center (c + r) ± (σ(d) − y)), in one pass.

    Args:
        g: float32 scalar on the same device.
        chosen, rejected, margin, labels: as in :func:`forward`.

    Returns:
        dchosen, drejected [n] in the dtype of the rewards.

    Raises:
            TypeError: as in :func:`forward`.
    """
    _check(chosen)
    n = chosen.numel()
    pairs = {"chosen_ptr": chosen, "rejected_ptr": rejected, "margin_ptr": margin, "labels_ptr": labels}
    dchosen, drejected = (torch.empty(chosen.shape, dtype=chosen.dtype, device=chosen.device) for _ in range(2))
    launch(
        _loss_backward_kernel,
        (triton.cdiv(n, BLOCK),),
        chosen.device,
        FLAT,
        g_ptr=g,
        **pairs,
        dchosen_ptr=dchosen,
        drejected_ptr=drejected,
        n=n,
        center=float(center),
        weight=1 / n,
        BLOCK=BLOCK,
    )
    return dchosen, drejected


def aot_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for :mod:`aot` that start every kernel: a small one, and one with all operands."""
    for n, name, optional in ((32, "n=32", False), (100001, "n=100001 margin labels", True)):
        rewards, g = torch.empty(n, dtype=dtype, device="meta"), torch.empty((), device="meta")
        data = torch.empty(n, device="meta") if optional else None
        yield name, partial(forward, rewards, rewards, data, data, 0.01)
        yield name, partial(backward, g, rewards, rewards, data, data, 0.01)
