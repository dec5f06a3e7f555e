"""dx of weights with so many rows that no cache holds a row of g, as output heads have: g is copied in pieces."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.formats import QuantizedWeight

N, K = 33_001, 34  # more than the limit in units of two bfloat16, too


def gradient(g: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    x = torch.zeros(len(g), K, dtype=g.dtype, requires_grad=True)
    lo.functional.adapted_linear(x, weight).backward(g)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, lo.NF4Weight, lo.Int8Weight])
def test_it_is_right_and_has_the_same_bits_alone_and_on_other_threads(isa: str, dtype: torch.dtype, kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=generator).to(dtype)
    # More than a block, which is too many for an emulator and for the thread sanitizer.
    tokens = 3 if isa.startswith("neon") else 34 if os.environ.get("LOWRANK_OPS_SANITIZE") == "thread" else 258
    g = torch.randn(tokens, N, generator=generator).to(dtype)
    weight = w if kind is None else kind.quantize(w)
    numbers = weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight
    got = gradient(g, weight)
    assert_within_baseline(got, g.double() @ numbers.double(), g @ numbers)
    assert_bits_equal(gradient(g[-2:], weight), got[-2:])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        assert_bits_equal(gradient(g, weight), got)
    finally:
        torch.set_num_threads(threads)
