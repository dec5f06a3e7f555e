"""Cores: layouts, gradients of dense(), bad input."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal

from lowrank_ops import cores, reference


def test_banded_layout() -> None:
    values = torch.arange(1.0, 16).view(3, 5)
    core = cores.Banded(values)
    C = core.dense()
    for i in range(5):
        for j in range(5):
            expected = values[j - i + 1, i] if abs(i - j) <= 1 else 0
            assert C[i, j] == expected
    assert core.size == 5 and core.bandwidth == 1 and core.values.numel() == 5 * 3 - 2
    assert_bits_equal(cores.Banded(core.values, 5).dense(), C)


@pytest.mark.parametrize("R", [1, 2, 5, 8])
def test_every_band(R: int) -> None:
    for d in range(R):
        core = cores.Banded(torch.randn(2 * d + 1, R))
        assert core.values.numel() == R * (2 * d + 1) - d * (d + 1) and core.bandwidth == d
        i, j = core.dense().nonzero(as_tuple=True)
        assert len(i) == core.values.numel() and (i - j).abs().max() == d


def test_diagonal_is_the_band_of_width_0() -> None:
    values = torch.randn(7)
    assert_bits_equal(cores.Diagonal(values).dense(), cores.Banded(values[None]).dense())


def test_sparse_layout_and_index() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randperm(36, generator=generator)[:11]
    rows, cols, values = flat // 6, flat % 6, torch.randn(11, generator=generator)
    core = cores.Sparse(rows, cols, values, 6)
    expected = torch.zeros(6, 6)
    expected[rows, cols] = values
    assert_bits_equal(core.dense(), expected)
    assert torch.equal(core.rows * 6 + core.cols, flat.sort().values)
    row_start, columns, column_start, by_column, order = core.index.split([7, 11, 7, 11, 11])
    again = torch.zeros(6, 6)
    for j in range(6):
        for e in range(column_start[j], column_start[j + 1]):
            again[by_column[e], j] = core.values[order[e]]
    assert_bits_equal(again, expected)
    assert row_start[-1] == 11 and torch.equal(columns.long(), core.cols)
    assert_bits_equal(cores.with_values(core, 2 * core.values).dense(), 2 * expected)


def test_values_in_order_stay_the_leaf() -> None:
    values = torch.randn(3, requires_grad=True)
    core = cores.Sparse(torch.tensor([0, 0, 2]), torch.tensor([0, 2, 1]), values, 3)
    assert (
        core.values is values and cores.Banded(values, 3).values is values and cores.Diagonal(values).values is values
    )
    assert cores.Sparse(torch.tensor([0, 2, 0]), torch.tensor([0, 1, 2]), values, 3).values is not values


@pytest.mark.parametrize(
    "entries, make",
    [
        (4, cores.Diagonal),
        (10, lambda v: cores.Banded(v, 4)),
        (2, lambda v: cores.Sparse(torch.tensor([3, 0]), torch.tensor([1, 2]), v, 4)),
    ],
)
def test_dense_is_differentiable(entries: int, make) -> None:  # type: ignore[no-untyped-def]
    values, g = torch.randn(entries, requires_grad=True), torch.randn(4, 4)
    core = make(values)
    (core.dense() * g).sum().backward()
    rows, cols = reference.core_pattern(core.values, core.index, 4)
    torch.testing.assert_close(values.grad.sort().values, g[rows, cols].sort().values)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "values must be a Tensor", lambda: cores.Diagonal([1.0])),
        (TypeError, "values must be floats, got torch.int64", lambda: cores.Diagonal(torch.ones(3).long())),
        (ValueError, r"non-empty \[R\], got \[0\]", lambda: cores.Diagonal(torch.ones(0))),
        (ValueError, r"must be \[R, R\], got \[3, 4\]", lambda: cores.Dense(torch.ones(3, 4))),
        (ValueError, r"odd number of diagonals.*\[4, 5\]", lambda: cores.Banded(torch.ones(4, 5))),
        (ValueError, r"at most 2R − 1, got \[11, 5\]", lambda: cores.Banded(torch.ones(11, 5))),
        (ValueError, "no band of a 5 x 5 matrix has 6", lambda: cores.Banded(torch.ones(6), 5)),
        (
            ValueError,
            r"pair \(1, 2\) twice",
            lambda: cores.Sparse(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), torch.ones(3), 3),
        ),
        (
            ValueError,
            r"cols must be in \[0, 3\), got 0 to 3",
            lambda: cores.Sparse(torch.tensor([1, 0]), torch.tensor([3, 0]), torch.ones(2), 3),
        ),
        (
            ValueError,
            r"rows must be integers \[3\]",
            lambda: cores.Sparse(torch.tensor([1, 0]), torch.tensor([1, 0, 2]), torch.ones(3), 3),
        ),
        (
            ValueError,
            "size must be at least 1",
            lambda: cores.Sparse(torch.tensor([0]), torch.tensor([0]), torch.ones(1), 0),
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
