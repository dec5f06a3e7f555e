"""Tensors that callers change or bring in other layouts: the same answer as their copy, or a refusal that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops import cores, functional
from lowrank_ops.preference import bradley_terry_loss
from lowrank_ops.svd.store import weight_key


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


W, X, DOWN, UP, BIAS, PAIRS = normal(24, 64), normal(5, 64), normal(4, 64), normal(24, 4), normal(24), torch.rand(9)
PACKED, STACK = lo.NF4Weight.quantize(W), torch.stack([W, W])
OFFSETS, SLOTS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, -1, 0, 0, -1])


def linear(x: Tensor = X, w: Any = PACKED, down: Tensor = DOWN, up: Tensor = UP, bias: Tensor = BIAS) -> Tensor:
    return functional.adapted_linear(x, w, lo.LowRankUpdate(down, up), bias)


# A call with one tensor, and the name that a refusal of it must have.
CALLS: dict[str, tuple[Tensor, str, Callable[[Tensor], Any]]] = {
    "x": (X, "x", lambda t: linear(x=t)),
    "weight": (W, "weight", lambda t: linear(w=t)),
    "down": (DOWN, "down", lambda t: linear(down=t)),
    "up": (UP, "up", lambda t: linear(up=t)),
    "bias": (BIAS, "bias", lambda t: linear(bias=t)),
    "core": (BIAS[:4].clone(), "values|core", lambda t: functional.adapted_linear(
        X, W, lo.LowRankUpdate(DOWN, UP, cores.Diagonal(t)))),
    "x prepared": (X, "x", lambda t: torch.no_grad()(functional.prepare(PACKED))(t)),
    "bias prepared": (BIAS, "bias", lambda t: torch.no_grad()(lambda: functional.prepare(PACKED, t)(X))()),
    "offsets": (OFFSETS, "offsets", lambda t: functional.experts_linear(X, STACK, t)),
    "slots": (SLOTS, "slots", lambda t: functional.routed_linear(X, W, [lo.LowRankUpdate(DOWN, UP)], t)),
    "rewards": (PAIRS, "chosen", lambda t: bradley_terry_loss(t, torch.zeros(9))),
    "labels": (PAIRS, "labels", lambda t: bradley_terry_loss(torch.ones(9), torch.zeros(9), labels=t)),
    "moment": (torch.eye(64), "second_moment", lambda t: lo.NF4Weight.quantize(W, second_moment=t).packed),
    "key": (W, "weight", weight_key),
    "rows": (torch.tensor([1, 3]), "index", PACKED.dequantize_rows),
}  # fmt: skip
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
}
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda t: torch._neg_view(-t),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "within another": lambda t: torch.cat([t.reshape(-1)] * 2)[t.numel() :].view(t.shape),
    "subclass": lambda t: t.as_subclass(type("Own", (Tensor,), {})),
    "inference": lambda t: torch.inference_mode()(t.clone)(),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_layout_is_refused_by_name(call: str) -> None:
    tensor, name, run = CALLS[call]
    for make in LAYOUTS.values():
        try:
            other = make(tensor)
        except (RuntimeError, TypeError, IndexError):  # torch has no such tensor
            continue
        with pytest.raises((TypeError, ValueError), match=f"^({name}) must be"):
            run(other)


@pytest.mark.parametrize("call", CALLS)
def test_a_view_answers_as_its_copy(call: str) -> None:
    tensor, _, run = CALLS[call]
    want = run(tensor)
    for name, make in SAME.items():
        if name == "negated" and not tensor.is_floating_point() or call == "weight" and name in ("negated", "strided"):
            continue  # a frozen weight must be contiguous
        got = run(make(tensor))
        if isinstance(want, Tensor):
            assert_bits_equal(got.as_subclass(Tensor).detach(), want.detach())
        else:
            assert got == want


def test_memory_that_was_freed_is_refused() -> None:
    """As FSDP does with parameters that are not in use; such a call read address 0."""
    for call in ("x", "weight", "down", "up", "bias", "core", "x prepared", "bias prepared", "rewards"):
        tensor, _, run = CALLS[call]
        freed = tensor.clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="must have memory for its shape"):
            run(freed)


def test_a_weight_that_is_freed_and_comes_back() -> None:
    weight = lo.NF4Weight.quantize(W)
    run = functional.prepare(weight)
    with torch.no_grad():
        before, held = run(X), weight.packed.clone()
        weight.packed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="must have memory"):
            run(X)
        weight.packed.untyped_storage().resize_(held.nbytes)
        weight.packed.copy_(held)
        assert_bits_equal(run(X), before)


@pytest.mark.parametrize("index", [[1, 2], None, torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1j])])
def test_rows_by_something_else_than_integers(index: Any) -> None:
    with pytest.raises(TypeError, match="index must be a Tensor of int64 or int32"):
        PACKED.dequantize_rows(index)
