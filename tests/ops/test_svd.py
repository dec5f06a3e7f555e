"""truncated_svd and full_svd against LAPACK's SVD in float64."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.svd import decompose as svd

EPS = torch.finfo(torch.float32).eps
SHAPES = [(300, 500), (512, 512), (640, 130), (96, 700)]
SMALL = [(130, 200), (160, 160), (190, 96)]  # LAPACK in float64 is what takes the time
RANK = 32


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {"power": i**-0.5, "exponential": torch.exp(-0.05 * i), "flat": torch.ones(n), "linear": 1.5 - i / n}[kind]


@lru_cache
def matrix(kind: str, N: int, K: int, seed: int = 0) -> Tensor:
    """A float32 W with this spectrum and random vectors."""
    n = min(N, K)
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64))[0] for size in (N, K))
    return ((u * spectrum(kind, n)) @ v.T).float()


def dense(weight: Tensor | lo.NF4Weight) -> Tensor:
    return weight.dequantize(torch.float32).double() if isinstance(weight, lo.NF4Weight) else weight.double()


def check_form(weight: Any, U: Tensor, S: Tensor, Vt: Tensor, rank: int) -> None:
    """Check shapes, order, orthonormality, the sign rule, and that the triples of U diag(S) Vᵀ are Ritz triples of W."""
    N, K = weight.shape
    assert (U.shape, S.shape, Vt.shape) == ((N, rank), (rank,), (rank, K))
    assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in (U, S, Vt))
    assert (S >= 0).all() and (S.diff() <= 0).all()
    identity = torch.eye(rank, dtype=torch.float64)
    for basis in (U.T.double(), Vt.double()):
        assert (basis @ basis.T - identity).abs().max() <= 4 * EPS
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    w = dense(weight)
    # Wᵀ U = V S or W V = U S, on the side that was projected last; the float32 products leave some of sqrt(q) roundings.
    residuals = (w.T @ U.double() - Vt.T.double() * S, w @ Vt.T.double() - U.double() * S)
    assert min(residual.abs().max() for residual in residuals) <= 32 * EPS * max(float(S[0]), 1e-300)


def exact_svd(weight: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _exact_svd(weight) if isinstance(weight, Tensor) else _exact_svd(dense(weight))


@lru_cache  # by identity, since matrix() returns the same tensor
def _exact_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(dense(weight), full_matrices=False)
    return U, S, Vt


def overlap(U: Tensor, weight: Any) -> float:
    exact = exact_svd(weight)[0][:, : U.shape[1]]
    return float((U.double().T @ exact).square().sum()) / U.shape[1]


CASES = [(shape, "float32") for shape in SHAPES]
CASES += [(shape, form) for shape in ((160, 250), (190, 96)) for form in ("bfloat16", "float16", "nf4")]


@pytest.mark.parametrize("kind", ["power", "exponential"])
@pytest.mark.parametrize(("shape", "form"), CASES, ids=str)
def test_a_decaying_spectrum(shape: tuple[int, int], form: str, kind: str) -> None:
    w = matrix(kind, *shape)
    weight = lo.NF4Weight.quantize(w) if form == "nf4" else w.to(getattr(torch, form))
    U, S, Vt = lo.truncated_svd(weight, RANK)
    check_form(weight, U, S, Vt, RANK)
    exact = exact_svd(weight)[1][:RANK]
    assert overlap(U, weight) >= 0.999
    assert ((S.double() - exact).abs() / exact).max() <= 1e-3


@pytest.mark.parametrize("kind", ["flat", "linear"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_flat_spectrum(shape: tuple[int, int], kind: str) -> None:
    w = matrix(kind, *shape)
    U, S, Vt = lo.truncated_svd(w, RANK)
    check_form(w, U, S, Vt, RANK)
    exact = exact_svd(w)[1][:RANK]
    # Ritz values are lower bounds.
    assert (S.double() <= exact * (1 + 8 * EPS)).all()
    assert (S.double() >= 0.95 * exact).all()


def test_it_is_more_accurate_than_svd_lowrank_with_fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix("power", 512, 512)
    products = []
    for name in ("_times", "transposed_times"):
        original = getattr(svd, name)
        monkeypatch.setattr(svd, name, lambda *a, _original=original: products.append(1) or _original(*a))
    ours = lo.truncated_svd(w, RANK)[0]
    assert len(products) == 9  # of torch's 10
    torch.manual_seed(0)
    theirs = torch.svd_lowrank(w, q=2 * RANK, niter=4)[0][:, :RANK]
    assert 1 - overlap(ours, w) < (1 - overlap(theirs, w)) / 4


def test_power_iterations_and_oversampling_help() -> None:
    w = matrix("power", 160, 250)
    overlaps = [overlap(lo.truncated_svd(w, 16, power_iterations=p)[0], w) for p in range(6)]
    assert overlaps == sorted(overlaps) and overlaps[0] > 0.3 and overlaps[5] > 0.9999
    overlaps = [overlap(lo.truncated_svd(w, 16, oversample=o, power_iterations=2)[0], w) for o in (0, 4, 16, 64)]
    assert overlaps == sorted(overlaps)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("kind", ["power", "flat"])
def test_every_singular_value(shape: tuple[int, int], kind: str) -> None:
    w, n = matrix(kind, *shape), min(shape)
    exact = exact_svd(w)[1]
    for U, S, Vt in (svd.full_svd(w), lo.truncated_svd(w, n)):
        check_form(w, U, S, Vt, n)
        assert ((S.double() - exact).abs() <= 2 * EPS * exact).all()
        assert ((U.double() * S) @ Vt.double() - w).abs().max() <= 2 * EPS * exact[0]
    for ours, again in zip(svd.full_svd(w), lo.truncated_svd(w, n), strict=True):
        assert_bits_equal(ours, again)


def test_full_svd_of_nf4_and_16_bit() -> None:
    w = matrix("power", 65, 77)
    for weight in (lo.NF4Weight.quantize(w), w.bfloat16(), w.half().T):
        U, S, Vt = svd.full_svd(weight)
        check_form(weight, U, S, Vt, 65)
        exact = torch.linalg.svdvals(dense(weight))
        assert ((S.double() - exact).abs() <= 2 * EPS * exact[0]).all()


def test_all_from_one_weight_have_the_same_signs() -> None:
    w = matrix("exponential", 130, 200)
    full = svd.full_svd(w)
    truncated = lo.truncated_svd(w, 20)
    other = lo.truncated_svd(w, 20, seed=5, power_iterations=5)
    for ours, theirs in ((truncated, full), (other, full)):
        assert (ours[0] - theirs[0][:, :20]).abs().max() < 1e-3
        assert (ours[2] - theirs[2][:20]).abs().max() < 1e-3


def test_the_first_of_equal_entries_is_positive() -> None:
    w = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    for U, S, Vt in (svd.full_svd(w), lo.truncated_svd(w, 1)):
        torch.testing.assert_close(U[:, 0], torch.tensor([1.0, -1.0]) * 0.5**0.5)
        torch.testing.assert_close(Vt[0], -torch.full((2,), 0.5).sqrt())
        torch.testing.assert_close(S[0], torch.tensor(2.0))


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (64, 64)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 12, 32])
@pytest.mark.parametrize("power_iterations", [0, 1, 4])
def test_low_rank_and_graded(shape: tuple[int, int], rank: int, power_iterations: int) -> None:
    N, K = shape
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(N, 7, generator=generator) @ torch.randn(7, K, generator=generator)
    graded = torch.zeros(N, K)
    graded.diagonal().copy_(10.0 ** -torch.arange(min(N, K), dtype=torch.float32))
    sparse = torch.zeros(N, K)
    sparse[3, 5] = -2.0
    zeros, ones, identity = torch.zeros(N, K), torch.ones(N, K), torch.eye(N, K)
    for w, true_rank in ((product, 7), (graded, None), (sparse, 1), (zeros, 0), (ones, 1), (identity, None)):
        U, S, Vt = lo.truncated_svd(w, rank, power_iterations=power_iterations)
        check_form(w, U, S, Vt, rank)
        exact = torch.linalg.svdvals(w.double())[:rank]
        assert (S.double() <= exact + 4 * EPS * exact[0]).all()
        if true_rank is not None and rank >= true_rank:  # the range holds all of W
            assert ((S.double() - exact).abs() <= 4 * EPS * exact[0]).all()
            assert ((U.double() * S) @ Vt.double() - w).abs().max() <= 16 * EPS * exact[0]


def test_sizes_of_numbers_and_of_matrices() -> None:
    w = matrix("power", 60, 90)
    U, S, Vt = lo.truncated_svd(w, 8)
    for scale in (2.0**100, 2.0**-100):
        scaled = lo.truncated_svd(w * scale, 8)
        assert_bits_equal(scaled[0], U)
        assert_bits_equal(scaled[1], S * scale)
        assert_bits_equal(scaled[2], Vt)
    big = lo.truncated_svd(torch.full((4, 4), torch.finfo(torch.float32).max / 8), 2)
    torch.testing.assert_close(big[1][0], torch.tensor(torch.finfo(torch.float32).max / 2))
    for N, K in ((1, 1), (1, 9), (9, 1), (2, 3)):
        w = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
        check_form(w, *lo.truncated_svd(w, 1), 1)
        check_form(w, *svd.full_svd(w), min(N, K))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4", "mixed"])
def test_a_batch_is_its_members(form: str) -> None:
    ws = [matrix(kind, 96, 130, seed) for seed, kind in enumerate(("power", "flat", "exponential"))]
    ws[1][:, 5:] = 0  # of low rank, which must not affect the others
    weights: list[Any] = {
        "float32": ws,
        "bfloat16": [w.bfloat16() for w in ws],
        "nf4": [lo.NF4Weight.quantize(w) for w in ws],
        "mixed": [ws[0], lo.NF4Weight.quantize(ws[1]), ws[2].half()],
    }[form]
    batch = lo.truncated_svd(weights, 10)
    assert [list(t.shape) for t in batch] == [[3, 96, 10], [3, 10], [3, 10, 130]]
    for i, weight in enumerate(weights):
        check_form(weight, *(t[i] for t in batch), 10)
        for together, alone in zip(batch, lo.truncated_svd(weight, 10), strict=True):
            assert_bits_equal(together[i], alone)


def test_several_in_one_stack_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's way on the CPU: batched arithmetic, and flags that are read once at the end."""
    monkeypatch.setattr(svd._Cholesky, "note", lambda self, failed: self.failed.append(failed))
    ws = [matrix("power", 96, 130, seed) * 10.0**seed for seed in range(3)]
    for weights in (ws, [*ws, torch.zeros(96, 130)]):
        stack = svd._Stack(weights, [svd.magnitude(w) for w in weights])
        start = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
        U, S, Vt = svd._decompose(stack, start, 12, 4)
        for i, w in enumerate(weights):
            check_form(w, U[i], S[i], Vt[i], 12)
        for i, w in enumerate(ws):
            assert overlap(U[i], w) >= 0.99


def test_the_same_bits_again_and_another_seed() -> None:
    weight = lo.NF4Weight.quantize(matrix("power", 200, 300))
    first = lo.truncated_svd(weight, 16)
    state = torch.get_rng_state()
    torch.manual_seed(77)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        for ours, again in zip(first, lo.truncated_svd(weight, 16), strict=True):
            assert_bits_equal(ours, again)
    torch.manual_seed(77)
    expected = torch.rand(1)
    torch.manual_seed(77)
    other = lo.truncated_svd(weight, 16, seed=1)
    assert torch.equal(torch.rand(1), expected), "torch's own generator moved"
    torch.set_rng_state(state)
    assert not torch.equal(first[0], other[0])


def test_strides_and_gradients_do_not_matter() -> None:
    w = matrix("power", 90, 60)
    for dtype in (torch.float32, torch.bfloat16):
        plain = lo.truncated_svd(w.to(dtype), 8)
        strided = torch.nn.Parameter(w.to(dtype).T.contiguous().T)
        assert not strided.is_contiguous()
        for ours, theirs in zip(lo.truncated_svd(strided, 8), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
            assert not ours.requires_grad


def test_nf4_is_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = lo.NF4Weight.quantize(matrix("power", 128, 256))

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a dense copy of W was made")

    monkeypatch.setattr(lo.NF4Weight, "dequantize", refuse)
    lo.truncated_svd(weight, 8)


class Params4bit(torch.nn.Parameter):
    """Stands in for bitsandbytes' class of this name, whose bytes may have a float dtype."""


NAN = torch.ones(4, 6)
NAN[1, 2] = torch.nan
HALF_INF = torch.ones(4, 6, dtype=torch.float16)
HALF_INF[3, 5] = -torch.inf
GOOD = torch.ones(4, 6)
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (GOOD, {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    (GOOD, {"rank": 5}, ValueError, "rank must be at most min(N, K) = 4 for a weight 4 x 6, got 5"),
    (GOOD, {"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
    (GOOD, {"rank": True}, TypeError, "rank must be an integer, got True"),
    (GOOD, {"rank": 2, "oversample": -1}, ValueError, "oversample must be at least 0, got -1"),
    (GOOD, {"rank": 2, "power_iterations": -1}, ValueError, "power_iterations must be at least 0, got -1"),
    (GOOD, {"rank": 2, "seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
    (NAN, {"rank": 2}, ValueError, "weight must be finite"),
    (HALF_INF, {"rank": 2}, ValueError, "weight must be finite"),
    ([GOOD, NAN], {"rank": 2}, ValueError, "weight must be finite"),
    (torch.ones(4), {"rank": 2}, ValueError, "weight must be a non-empty [N, K], got [4]"),
    (torch.ones(2, 4, 6), {"rank": 2}, ValueError, "weight must be a non-empty [N, K], got [2, 4, 6]"),
    (torch.ones(0, 6), {"rank": 2}, ValueError, "weight must be a non-empty [N, K], got [0, 6]"),
    (torch.ones(4, 6, device="meta"), {"rank": 2}, ValueError, "weight is on the meta device"),
    (torch.ones(4, 6).to_sparse(), {"rank": 2}, ValueError, "weight must be a dense tensor"),
    (torch.ones(4, 6, dtype=torch.float64), {"rank": 2}, TypeError, "weight must be float32, bfloat16 or float16"),
    (torch.ones(4, 6, dtype=torch.uint8), {"rank": 2}, TypeError, "weight must be float32, bfloat16 or float16"),
    ([[1.0]], {"rank": 1}, TypeError, "a 4-bit weight such as NF4Weight or a list of these, got list"),
    (None, {"rank": 1}, TypeError, "a 4-bit weight such as NF4Weight or a list of these, got NoneType"),
    ([], {"rank": 1}, ValueError, "got an empty list"),
    (
        [GOOD, torch.ones(6, 4)],
        {"rank": 1},
        ValueError,
        "must have one shape and device, got 4 x 6 on cpu and, at 1, 6 x 4",
    ),
    (Params4bit(torch.ones(12, 1), False), {"rank": 1}, TypeError, "weight is packed 4-bit storage"),
]


@pytest.mark.parametrize(("weight", "options", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(weight: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lo.truncated_svd(weight, **options)
    if weight is not GOOD and not isinstance(weight, list):
        with pytest.raises(error, match=re.escape(message)):
            svd.full_svd(weight)


def test_a_damaged_nf4_weight_and_a_list_for_full_svd() -> None:
    weight = lo.NF4Weight.quantize(torch.ones(8, 64))
    assert weight.absmax2 is not None
    weight.absmax2[0] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        lo.truncated_svd(weight, 2)
    with pytest.raises(TypeError, match="weight must be one Tensor"):
        svd.full_svd([GOOD])  # type: ignore[arg-type]


def test_what_does_not_converge_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("12 off-diagonal elements")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    for function in (svd.full_svd, lambda w: lo.truncated_svd(w, 2)):
        with pytest.raises(RuntimeError, match="did not converge; try .*12 off-diagonal"):
            function(torch.randn(8, 12))
