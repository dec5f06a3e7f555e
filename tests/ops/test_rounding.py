"""Rounding that looks at a second moment: identities, what each step may not worsen, bytes, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.formats import WEIGHTS, QuantizedWeight, curvature
from lowrank_ops.kernels.operands import NF4
from lowrank_ops.ops import rounding

FORMATS = [name for name, kind in WEIGHTS.items() if kind.format.bits == 4]
BUFFERS = ("packed", "absmax", "absmax2", "offset", "exponents")


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled rounding, and the one that GPUs run."""
    if request.param == "compiled":
        yield request.param
    else:
        with lo.implementation("reference"):
            yield request.param


def sample(N: int, K: int, tokens: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W and the second moment of correlated inputs, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator).add(0.1) * 0.05
    mix = torch.randn(K, K, generator=generator) / (1 + torch.arange(K)).sqrt() + 0.3 * torch.eye(K)
    x = torch.randn(tokens or 4 * K, K, generator=generator) @ mix.T
    x *= torch.randn(K, generator=generator).exp()
    return w, x.T @ x / len(x)


def weighted_error(w: Tensor, weight: QuantizedWeight, H: Tensor) -> Tensor:
    """E H Eᵀ of every row, in float64."""
    error = w.double() - weight.dequantize(torch.float32).double()
    return ((error @ H.double()) * error).sum(dim=-1)


def made(format: str, w: Tensor, block_size: int = 64, double_quant: bool = True, **options: Any) -> QuantizedWeight:
    """A weight of any format; MXFP4 has one size of block and no second level."""
    sizes = {} if format == "mxfp4" else {"block_size": block_size, "double_quant": double_quant}
    weight: QuantizedWeight = WEIGHTS[format].quantize(w, **sizes, **options)
    return weight


def assert_same_bytes(a: QuantizedWeight, b: QuantizedWeight) -> None:
    for name in BUFFERS:
        mine, other = getattr(a, name, None), getattr(b, name, None)
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert_bits_equal(mine, other)


# ---- the method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["columns", "diagonal"])
def test_feeding_back_is_gptq(order: str) -> None:
    """E = e U with U = R⁻¹, tr(E H Eᵀ) = ‖e‖², and the codes of the form with an inverse."""
    w, H = sample(5, 70)
    ready = curvature(H, order)
    columns, R = ready.order, ready.factor.double()
    w = w.double()
    scales = w.abs().amax(dim=1, keepdim=True).expand(w.shape) * 0.9
    rounded = reference.feed_back(NF4, w, scales, R, columns)
    error = (w - rounded)[:, columns]

    # GPTQ: H⁻¹ = Uᵀ U, and each column's error is taken from the columns after it.
    damped = R @ R.T
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, e = w[:, columns].clone(), torch.zeros_like(w)
    for k in range(w.shape[1]):
        s = scales[:, columns[k]]
        q = reference.rounding.round_to(NF4, left[:, k].clone(), s)
        e[:, k] = (left[:, k] - q) / U[k, k]
        left[:, k + 1 :] -= e[:, k, None] * U[k, k + 1 :]
        assert torch.equal(q, rounded[:, columns[k]])
    torch.testing.assert_close(error, e @ U, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(error @ R, e, rtol=1e-9, atol=1e-12)
    of_rows = ((error @ damped) * error).sum(dim=1)
    torch.testing.assert_close(of_rows, e.square().sum(dim=1), rtol=1e-9, atol=0)
    torch.testing.assert_close(reference.weighted_errors(w - rounded, R, columns), of_rows, rtol=1e-9, atol=0)


def test_the_factor_is_of_the_damped_moment() -> None:
    _, H = sample(1, 40)
    for order in ("columns", "diagonal"):
        ready = curvature(H, order, damping=0.02)
        scale = float(ready.moment[0, 1] / H[0, 1])
        damped = H.double() * scale + 0.02 * scale * H.double().diagonal().mean() * torch.eye(40)
        torch.testing.assert_close(ready.moment, damped.float(), rtol=1e-6, atol=0)
        R = ready.factor.double()
        assert torch.equal(R, R.triu())
        torch.testing.assert_close(R @ R.T, damped[ready.order][:, ready.order], rtol=1e-6, atol=1e-6)
    assert torch.equal(ready.order, H.diagonal().argsort(descending=True, stable=True))


@pytest.mark.parametrize("format", FORMATS)
def test_no_step_is_worse_than_the_one_before(format: str, path: str) -> None:
    """To nearest ≥ searched ≥ fed back ≥ at the end, for many shapes, blocks and moments."""
    for seed, (N, K, tokens, block) in enumerate(
        [(3, 32, 0, 32), (7, 64, 20, 64), (5, 96, 0, 32), (4, 128, 40, 128), (17, 192, 0, 64), (1, 320, 100, 64)]
    ):
        if path == "torch" and K > 64:  # a loop over columns
            continue
        w, H = sample(N, K, tokens, seed)
        ready = curvature(H)
        for double_quant in (True, False):
            for order in ("columns", "diagonal"):
                nearest = made(format, w, block, double_quant)
                weight = made(format, w, block, double_quant, second_moment=H, order=order)
                report = weight.rounding
                assert isinstance(report, lo.formats.Rounding)
                steps = [1.0, report.searched, report.fed_back, report.final]
                assert all(b <= a * (1 + 1e-6) for a, b in zip(steps, steps[1:], strict=False)), steps
                H_damped = ready.moment.double()
                plain, final = (float(weighted_error(w, made, H_damped).sum()) for made in (nearest, weight))
                assert final / plain == pytest.approx(report.final, rel=1e-4)
                assert float(weighted_error(w, weight, H).sum()) < float(weighted_error(w, nearest, H).sum())


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("K", [63, 80, 100])
def test_rows_that_are_not_whole_blocks(format: str, K: int, path: str) -> None:
    w, H = sample(9, K)
    nearest, weight = made(format, w), made(format, w, second_moment=H)
    assert float(weighted_error(w, weight, H).sum()) < 0.6 * float(weighted_error(w, nearest, H).sum())
    assert float(weighted_error(w, made(format, w, scales="search"), torch.eye(K)).sum()) <= float(
        weighted_error(w, nearest, torch.eye(K)).sum()
    )


@pytest.mark.parametrize("format", FORMATS)
def test_absmax_scales_stay_if_asked(format: str, path: str) -> None:
    w, H = sample(8, 128)
    nearest, weight = made(format, w), made(format, w, second_moment=H, scales="absmax")
    for name in BUFFERS[1:]:
        if getattr(nearest, name, None) is not None:
            assert_bits_equal(getattr(weight, name), getattr(nearest, name))
    assert float(weighted_error(w, weight, H).sum()) < 0.7 * float(weighted_error(w, nearest, H).sum())


@pytest.mark.parametrize("format", FORMATS)
def test_search_without_data_lessens_the_squared_error(format: str, path: str) -> None:
    w, _ = sample(6, 256)
    for double_quant in (True, False):
        nearest, searched = made(format, w, 64, double_quant), made(format, w, 64, double_quant, scales="search")
        assert searched.rounding is None and searched.nbytes == nearest.nbytes
        errors = [float((w - weight.dequantize()).square().sum()) for weight in (nearest, searched)]
        assert errors[1] < errors[0]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_bitsandbytes_decodes_what_was_fed_back(format: str, path: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    for K in (128, 100):
        w, H = sample(12, K)
        for double_quant in (True, False):
            weight = made(format, w, 64, double_quant, second_moment=H)
            entries = weight.to_bitsandbytes()
            packed = entries.pop("weight")
            state = bnb.QuantState.from_dict(
                {key.removeprefix("weight."): value for key, value in entries.items()}, device=torch.device("cpu")
            )
            # Adding 0 turns -0 into +0, which bitsandbytes may give for FP4's second zero.
            assert_bits_equal(weight.dequantize() + 0.0, bnb.dequantize_4bit(packed, state) + 0.0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_its_experts(format: str, path: str) -> None:
    w = torch.stack([sample(6, 64, seed=i)[0] for i in range(3)])
    H = torch.stack([sample(6, 64, seed=i)[1] for i in range(3)])
    own, shared = made(format, w, second_moment=H), made(format, w, second_moment=H[0])
    for e in range(3):
        alone = made(format, w[e], second_moment=H[e])
        assert_same_bytes(own[e], alone)
        assert isinstance(own.rounding, tuple) and own.rounding[e] == alone.rounding
        assert_same_bytes(shared[e], made(format, w[e], second_moment=curvature(H[0])))


def test_a_factor_of_the_moment_changes_nothing(path: str) -> None:
    w, H = sample(6, 128)
    for factor in (2.0**-40, 2.0**30):
        assert_same_bytes(made("nf4", w, second_moment=H), made("nf4", w, second_moment=H * factor))


def test_dead_columns_are_rounded_to_nearest(path: str) -> None:
    w, H = sample(6, 128)
    dead = torch.tensor([0, 5, 64, 127])
    H[dead], H[:, dead] = 0, 0
    near = H.clone()
    near[dead, dead] = 1e-9 * float(H.diagonal().mean())
    near[5, 6] = near[6, 5] = 1e-5 * float(H[6, 6])
    for moment in (H, near):
        weight = made("nf4", w, 64, False, second_moment=moment)
        scales = weight.absmax.view(6, 2).repeat_interleave(64, dim=1)  # type: ignore[operator]
        expected = reference.rounding.round_to(NF4, w[:, dead], scales[:, dead])
        assert_bits_equal(weight.dequantize()[:, dead], expected)


def test_the_default_without_data_is_bitsandbytes_rule(path: str) -> None:
    w, _ = sample(6, 128)
    packed, absmax = reference.nf4_quantize(w)
    for weight in (made("nf4", w, 64, False), made("nf4", w, 64, False, scales="absmax")):
        assert_bits_equal(weight.packed, packed)
        assert_bits_equal(weight.absmax, absmax)  # type: ignore[arg-type]


# ---- the compiled side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("K", [64, 150, 192])
def test_every_instruction_set_rounds_as_torch_does(format: str, K: int, isa: str) -> None:
    if format == "mxfp4" and K % 32:
        K = 160
    w, H = sample(70, K)
    weight = made(format, w, second_moment=H)
    with lo.implementation("reference"):
        expected = made(format, w, second_moment=H)
    # Another order of summation may move a number across a threshold, and the rest of its row with it.
    same = (weight.dequantize() == expected.dequantize()).all(dim=1)
    assert same.float().mean() > 0.9
    errors = [weighted_error(w, rounded, H) for rounded in (weight, expected)]
    torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=0.01, atol=0)
    assert isinstance(weight.rounding, lo.formats.Rounding) and isinstance(expected.rounding, lo.formats.Rounding)
    assert weight.rounding.searched == pytest.approx(expected.rounding.searched, rel=1e-4)


@pytest.mark.parametrize("order", ["columns", "diagonal"])
def test_every_code_is_nearest_to_what_was_fed_back(order: str, isa: str) -> None:
    """From the codes alone: each argument of round, in float64, has its own level nearest, but for float32's error."""
    N, K = 67, 330
    w, H = sample(N, K)
    ready = curvature(H, order)
    start = made("nf4", w, 64, False)
    before = rounding.weighted_errors(w, start.operand(), ready.factor, ready.order)
    fed, errors = rounding.round_weighted(w, start.operand(), before, *parts(ready), False, 0)
    scales = reference.rounding.scales_of(fed, w)
    rounded = reference.dequantize_matrix(fed, w)
    error, R = (w - rounded).double()[:, ready.order], ready.factor.double()
    coupling = R / R.diagonal() - torch.eye(K)
    target = w.double()[:, ready.order] + error @ coupling
    s = scales.double()[:, ready.order, None]
    least = (target.unsqueeze(2) - s * torch.tensor(NF4.levels, dtype=torch.float64)).abs().amin(dim=2)
    mine = (target - rounded.double()[:, ready.order]).abs()
    # A float32 sum of K terms, each rounded, and its product with 1 / s.
    slack = 2**-24 * (K + 4) * (w.abs().double()[:, ready.order] + error.abs() @ coupling.abs())
    was_fed = errors[1] < errors[0]
    assert was_fed.float().mean() > 0.9
    assert (mine <= least + 2 * slack)[was_fed].all()
    exact = (error @ R).square().sum(dim=1)
    torch.testing.assert_close(errors[1], exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(errors[0], weighted_error(w, start, ready.moment), rtol=1e-4, atol=0)


def parts(ready: lo.formats.Curvature) -> tuple[Tensor, Tensor, Tensor]:
    return ready.moment, ready.factor, ready.order


@pytest.mark.parametrize("format", FORMATS)
def test_threads_and_other_rows_change_nothing(format: str) -> None:
    w, H = sample(200, 128)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(made(format, w, 64, False, second_moment=H))
    finally:
        torch.set_num_threads(before)
    assert_same_bytes(found[0], found[1])
    assert_same_bytes(found[0], found[2])
    assert found[0].rounding == found[1].rounding == found[2].rounding
    few = made(format, w[61:140], 64, False, second_moment=H)
    assert_bits_equal(few.dequantize(), found[0].dequantize()[61:140])


# ---- input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_infinities_in_the_weight(format: str, path: str) -> None:
    w, H = sample(6, 128)
    w[1], w[2, :64], w[:, 7] = 0, 0, 0
    for options in ({"second_moment": H}, {"scales": "search"}):
        for double_quant in (True, False):
            decoded = made(format, w, 64, double_quant, **options).dequantize()
            assert torch.isfinite(decoded).all()
            assert not decoded[1].any() if options.get("scales") else torch.isfinite(decoded[1]).all()
        for bad in (torch.nan, torch.inf):
            broken = w.clone()
            broken[3, 3] = bad
            with pytest.raises(ValueError, match="weight must be finite"):
                made(format, broken, **options)
    assert not made(format, torch.zeros(2, 64), second_moment=H[:64, :64]).dequantize().any()


def broken_moments(H: Tensor) -> dict[str, tuple[Any, type[Exception], str]]:
    infinite, negative, skew, indefinite = (H.clone() for _ in range(4))
    infinite[3, 4] = torch.inf
    negative[2, 2] = -1
    skew[0, 1] += 10
    indefinite[0, 1] = indefinite[1, 0] = 100 * float(H.diagonal().max())
    return {
        "no tensor": ([[1.0]], TypeError, "second_moment must be a Tensor"),
        "dtype": (H.half(), TypeError, "float32 or float64, got torch.float16"),
        "width": (H[:-1, :-1], ValueError, r"must be \[64, 64\], got \[63, 63\]"),
        "experts": (H.expand(2, 64, 64), ValueError, r"must be \[64, 64\], got \[2, 64, 64\]"),
        "infinite": (infinite, ValueError, "second_moment must be finite"),
        "negative": (negative, ValueError, "no negative number on its diagonal, got -1"),
        "skew": (skew, ValueError, "must be symmetric"),
        "zero": (torch.zeros_like(H), ValueError, "no input was seen"),
        "indefinite": (indefinite, ValueError, "positive semidefinite"),
    }


@pytest.mark.parametrize("case", broken_moments(torch.eye(64)))
@pytest.mark.parametrize("format", FORMATS)
def test_bad_moments_are_refused(format: str, case: str) -> None:
    w, H = sample(4, 64)
    moment, error, message = broken_moments(H)[case]
    with pytest.raises(error, match=message):
        made(format, w, second_moment=moment)


def test_bad_options_are_refused() -> None:
    w, H = sample(4, 64)
    for options, message in (
        ({"scales": "best"}, "scales must be 'absmax' or 'search', got 'best'"),
        ({"order": "rows"}, "order must be 'diagonal' or 'columns', got 'rows'"),
        ({"damping": 0}, "damping must be a number above 0"),
        ({"damping": True}, "damping must be a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            made("nf4", w, second_moment=H, **options)
    stack = torch.stack([H, torch.zeros_like(H)])
    with pytest.raises(ValueError, match=r"second_moment\[1\] must not be zero"):
        made("nf4", torch.stack([w, w]), second_moment=stack)


def test_damping_grows_until_the_moment_is_positive() -> None:
    w, _ = sample(4, 64)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    H = x.T @ x / 256
    v = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    H -= (v @ H @ v + 0.05 * H.diagonal().mean()) * torch.outer(v, v)
    weight = made("nf4", w, second_moment=H, damping=0.01)
    assert isinstance(weight.rounding, lo.formats.Rounding)
    assert weight.rounding.damping in [0.01 * 2**i for i in range(1, 7)]
    assert weight.rounding.damping == curvature(H, damping=0.01).damping
