"""weighted_low_rank against the minimum that Eckart and Young give, by LAPACK's SVD in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_ops.svd import weighted
from lowrank_ops.svd.weighted import weighted_low_rank, weighted_norm, weighted_spectrum

# N below K, above it, equal; odd.
SHAPES = [(17, 33), (35, 19), (24, 24)]


def problem(*shape: int, seed: int = 0, tokens: int = 200, decay: float = 3.0) -> tuple[Tensor, Tensor]:
    """E [N, K] and H [K, K] of correlated inputs; few tokens make H singular."""
    generator = torch.Generator().manual_seed(seed)
    *stack, N, K = shape
    error = torch.randn(*stack, N, K, generator=generator)
    mixing = torch.randn(*stack, K, K, generator=generator) * torch.exp(-decay * torch.arange(K) / K)
    x = torch.randn(*stack, tokens, K, generator=generator) @ mixing.mT
    return error, x.mT @ x / tokens


def squared_values(error: Tensor, second_moment: Tensor) -> Tensor:
    """σ² of E H^½ by the SVD."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.linalg.svdvals(error.double() @ root).square()


def left_over(error: Tensor, second_moment: Tensor, down: Tensor, up: Tensor) -> float:
    rest = error.double() - up.double() @ down.double()
    return float(((rest @ second_moment.double()) * rest).sum())


@pytest.mark.parametrize("tokens", [200, 7], ids=["regular", "singular"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_minimum_is_reached(shape: tuple[int, int], tokens: int) -> None:
    error, moment = problem(*shape, tokens=tokens)
    exact = squared_values(error, moment)
    total = float(exact.sum())
    spectrum = weighted_spectrum(error, moment)
    assert spectrum.shape == exact.shape and spectrum.dtype == torch.float64
    assert (spectrum - exact).abs().max() <= 1e-6 * exact[0]
    assert float(weighted_norm(error, moment)) == pytest.approx(total, rel=1e-5)
    for rank in (1, 5, min(shape)):
        down, up = weighted_low_rank(error, moment, rank)
        assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
        assert down.dtype == up.dtype == torch.float32 and torch.isfinite(down).all() and torch.isfinite(up).all()
        assert left_over(error, moment, down, up) == pytest.approx(
            float(exact[rank:].sum()), rel=1e-5, abs=2e-6 * total
        )
        assert down.norm(dim=1) == pytest.approx(up.norm(dim=0), rel=1e-4)


def test_it_beats_the_svd_that_knows_no_inputs() -> None:
    error, moment = problem(30, 40)
    U, S, Vt = torch.linalg.svd(error)
    down, up = weighted_low_rank(error, moment, 4)
    plain = left_over(error, moment, Vt[:4], U[:, :4] * S[:4])
    assert left_over(error, moment, down, up) < 0.9 * plain


def test_stacks_are_solved_matrix_by_matrix() -> None:
    error, moment = problem(3, 18, 26)
    down, up = weighted_low_rank(error, moment, 4)
    spectrum = weighted_spectrum(error, moment, 4)
    for e in range(3):
        exact = squared_values(error[e], moment[e])
        assert left_over(error[e], moment[e], down[e], up[e]) == pytest.approx(float(exact[4:].sum()), rel=1e-5)
        assert (spectrum[e] - exact[:4]).abs().max() <= 1e-6 * exact[0]


@pytest.mark.parametrize("shape", [(2, 90, 70), (90, 130)], ids=str)
def test_large_problems_take_a_krylov_space(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "_WHOLE", 64)
    error, moment = problem(*shape)
    down, up = weighted_low_rank(1e-3 * error, 1e4 * moment, 4)
    spectrum = weighted_spectrum(1e-3 * error, 1e4 * moment, 4)
    for e in range(shape[0]) if len(shape) == 3 else (...,):
        exact = squared_values(error[e], moment[e]) * 1e-2
        rest = left_over(1e-3 * error[e], 1e4 * moment[e], down[e], up[e])
        assert rest == pytest.approx(float(exact[4:].sum()), rel=1e-3)
        assert spectrum[e].tolist() == pytest.approx(exact[:4].tolist(), rel=1e-2)


def test_no_error_and_no_input_give_nothing() -> None:
    error, moment = problem(9, 12)
    for e, h in ((0 * error, moment), (error, 0 * moment)):
        down, up = weighted_low_rank(e, h, 3)
        assert not down.any() and not up.any()
    # An error of rank 2 needs no third direction.
    down, up = weighted_low_rank(error[:, :2] @ error[:2], moment, 4)
    assert not down[2:].any() and not up[:, 2:].any()


def test_bad_arguments_are_refused() -> None:
    error, moment = problem(9, 12)
    with pytest.raises(ValueError, match=r"rank must be from 1 to min\(N, K\) = 9 for \[9, 12\], got 10"):
        weighted_low_rank(error, moment, 10)
    with pytest.raises(ValueError, match=r"second_moment must be \[K, K\].*got \[9, 9\] for \[9, 12\]"):
        weighted_low_rank(error, moment[:9, :9], 2)
    moment[0, 0] = torch.nan
    with pytest.raises(ValueError, match="second_moment must be finite"):
        weighted_spectrum(error, moment)
