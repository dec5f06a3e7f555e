"""Tests of the tolerance rule: it must catch seeded bugs and accept correct variants."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from torch import Tensor

from lowrank_ops import NF4Weight, reference

M, N, K, R = 33, 192, 512, 16


def operands() -> tuple[Tensor, NF4Weight, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = NF4Weight.quantize(torch.randn(N, K) * K**-0.5)
    return torch.randn(M, K), weight, torch.randn(R, K) * K**-0.5, 0.3 * torch.randn(N, R) * R**-0.5


def variant(name: str, dtype: torch.dtype) -> Tensor:
    """A kernel with one seeded bug: float32 arithmetic on operands of ``dtype``, rounded once."""
    x, weight, down, up = operands()
    w, scale = weight.dequantize(torch.float32), 1.0
    if name == "1 % scale on W":
        w = w * 1.01
    elif name == "s * 1.05":
        scale = 1.05
    elif name == "no adapter":
        scale = 0.0
    elif name == "last K lost":
        w[:, -1] = 0
    elif name == "one wrong absmax":
        w[5, :64] *= 1.5
    elif name == "one code off by one":
        blocks = weight.packed.clone()
        blocks[1000] = blocks[1000] ^ 0x10
        w = reference.nf4_dequantize(blocks, weight.absmax, weight.absmax2, weight.offset, N, K, 64)
    elif name == "nibbles swapped":
        packed = (weight.packed >> 4) | (weight.packed << 4)
        w = reference.nf4_dequantize(packed, weight.absmax, weight.absmax2, weight.offset, N, K, 64)
    x, w, down, up = (t.to(dtype).float() for t in (x, w, down, up))
    if name == "another order of summation":
        half = K // 2
        y = x[:, half:] @ w[:, half:].T + x[:, :half] @ w[:, :half].T + scale * (x @ down.T) @ up.T
    else:
        y = reference.adapted_linear(x, w, down, up, None, scale)
    if name == "h rounded":
        y = x @ w.T + ((x @ down.T).to(dtype).float() @ up.T)
    y = y.to(dtype)
    if name == "one output + 5 %":
        y[7, 11] *= 1.05
    return y


def accepted(name: str, dtype: torch.dtype) -> bool:
    x, weight, down, up = (t.to(dtype) if isinstance(t, Tensor) else t for t in operands())
    exact = reference.adapted_linear(x.double(), weight.dequantize(torch.float32).double(), down.double(), up.double())
    baseline = reference.adapted_linear(x, weight.dequantize(dtype), down, up)
    try:
        assert_within_baseline(variant(name, dtype), exact, baseline)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["correct", "another order of summation", "h rounded"])
def test_correct_variants_pass(name: str, dtype: torch.dtype) -> None:
    assert accepted(name, dtype)


BUGS = [
    "1 % scale on W",
    "s * 1.05",
    "no adapter",
    "last K lost",
    "one wrong absmax",
    "one code off by one",
    "one output + 5 %",
    "nibbles swapped",
]


@pytest.mark.parametrize("name", BUGS)
def test_float32_catches_every_bug(name: str) -> None:
    assert not accepted(name, torch.float32)


@pytest.mark.parametrize("name", [bug for bug in BUGS if bug != "one code off by one"])
def test_bfloat16_catches_all_but_the_smallest(name: str) -> None:
    assert not accepted(name, torch.bfloat16)


def test_not_finite_and_wrong_type_are_caught() -> None:
    exact = torch.ones(2, 2, dtype=torch.float64)
    for bad in (torch.tensor([[1.0, float("nan")], [1, 1]]), torch.ones(2, 3), torch.ones(2, 2).half()):
        with pytest.raises(AssertionError):
            assert_within_baseline(bad, exact, torch.ones(2, 2))


def test_bits() -> None:
    assert_bits_equal(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))
    for other in (torch.tensor([-0.0]), torch.tensor([1e-45])):
        with pytest.raises(AssertionError, match="1 of 1 values differ"):
            assert_bits_equal(torch.tensor([0.0]), other)
