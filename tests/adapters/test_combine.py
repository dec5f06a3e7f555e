"""Combining and converting updates is exact on ΔW for all kinds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import linear, perturb

import lowrank_ops as lo
from lowrank_ops import LowRankUpdate, cores

N, K = 48, 64


def lora(R: int, seed: int = 0, scale: float = 1.0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(R, K, generator=generator), torch.randn(N, R, generator=generator)
    return LowRankUpdate(down, up, scale=scale)


def of_shape(n: int, k: int) -> LowRankUpdate:
    return LowRankUpdate(torch.ones(1, k), torch.ones(n, 1))


def with_core(core: cores.Core, scale: float = 1.0, nf4: bool = False) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(9)
    down, up = torch.randn(core.size, K, generator=generator), torch.randn(N, core.size, generator=generator)
    if nf4:
        return LowRankUpdate(lo.NF4Weight.quantize(down), lo.NF4Weight.quantize(up), core, scale)
    return LowRankUpdate(down, up, core, scale)


def sparse(R: int, entries: int, seed: int) -> cores.Sparse:
    flat = torch.randperm(R * R, generator=torch.Generator().manual_seed(seed))[:entries]
    return cores.Sparse(flat // R, flat % R, torch.randn(entries), R)


def exact(updates: list[tuple[LowRankUpdate, float]]) -> torch.Tensor:
    total = torch.zeros(N, K, dtype=torch.float64)
    for update, weight in updates:
        down, up = (f.dequantize(torch.float32) if isinstance(f, lo.NF4Weight) else f for f in (update.down, update.up))
        core = torch.eye(update.rank) if update.core is None else update.core.dense()
        total += weight * update.scale * (up.double() @ core.double() @ down.double())
    return total


def assert_is(update: LowRankUpdate, judge: torch.Tensor, error: float = 1e-6) -> None:
    assert (update.delta().double() - judge).norm() <= error * judge.norm()


ALL = [
    lora(4),
    lora(4, 1, scale=2.0),
    with_core(cores.Dense(torch.randn(6, 6)), 0.5),
    with_core(cores.Diagonal(torch.randn(10)), nf4=True),
    with_core(cores.Banded(torch.randn(5, 12))),
    with_core(sparse(20, 37, 0)),
]


@pytest.mark.parametrize("update", ALL, ids=lambda u: f"{type(u.core).__name__}-{u.rank}")
def test_one_of_weight_1_is_itself(update: LowRankUpdate) -> None:
    assert lo.combine([(update, 1)]) is update
    assert_is(lo.combine([(update, 1.0)], rank=min(N, update.rank)), exact([(update, 1)]))
    assert_is(lo.combine([(update, -0.25)]), exact([(update, -0.25)]))


def test_any_mixture_is_exact() -> None:
    updates = [(update, weight) for update, weight in zip(ALL, (1.0, -0.5, 2.0, 0.0, 0.3, 1.0), strict=True)]
    combined = lo.combine(updates)
    assert combined.core is None and combined.rank == sum(u.rank for u, _ in updates)
    assert_is(combined, exact(updates))


def test_to_a_given_rank_is_the_best_of_that_rank() -> None:
    updates = [(lora(6), 1.0), (lora(5, 1), -2.0)]
    U, S, Vt = torch.linalg.svd(exact(updates))
    for rank in (1, 4, 11, 20):
        combined = lo.combine(updates, rank=rank)
        assert combined.rank == min(rank, 11)
        best = U[:, :rank] * S[:rank] @ Vt[:rank]
        assert (combined.delta().double() - best).norm() <= 1e-6 * S.norm()
        assert combined.down.is_contiguous() and combined.up.is_contiguous()


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    "first, second",
    [
        (cores.Dense(torch.randn(8, 8)), cores.Dense(torch.randn(8, 8))),
        (cores.Diagonal(torch.randn(8)), cores.Diagonal(torch.randn(8))),
        (cores.Banded(torch.randn(3, 8)), cores.Banded(torch.randn(3, 8))),
        (cores.Banded(torch.randn(3, 8)), cores.Banded(torch.randn(7, 8))),
        (cores.Diagonal(torch.randn(8)), sparse(8, 19, 1)),
        (sparse(8, 19, 1), sparse(8, 13, 2)),
        (sparse(8, 19, 1), sparse(8, 19, 1)),
        (sparse(8, 19, 1), cores.Dense(torch.randn(8, 8))),
    ],
    ids=lambda c: type(c).__name__,
)
def test_cores_over_the_same_factors_are_added(first: cores.Core, second: cores.Core, nf4: bool) -> None:
    updates = [(with_core(first, 0.5, nf4), 2.0), (with_core(second, 1.5, nf4), -1.0)]
    combined = lo.combine(updates)
    assert combined.rank == 8 and combined.core is not None and combined.scale == 0.5
    assert_is(combined, exact(updates))
    if type(first) is type(second) and first.values.shape == second.values.shape:
        assert combined.core.values.numel() in (first.values.numel(), len(set(_pairs(first)) | set(_pairs(second))))


def _pairs(core: cores.Core) -> list[tuple[int, int]]:
    rows, cols = (t.tolist() for t in core.dense().nonzero().T)
    return list(zip(rows, cols, strict=True))


def test_the_rule_of_the_singular_value_factors() -> None:
    """Z₁ + Z₂ − I, not Z₁ + Z₂, in which W would count twice."""
    dense = linear()
    layers = [perturb(lo.Linear.from_linear(dense, lo.SVF(form="replace", factors="float32")), s) for s in (0.2, -0.3)]
    U, S, Vt = (t.double() for t in torch.linalg.svd(dense.weight.detach().double(), full_matrices=False))
    combined = lo.combine([(layer.update, 1.0) for layer in layers])
    start = layers[0].core_offset.double()
    Z = [(layer.core_offset + layer.core.detach()).double() / start for layer in layers]
    expected = layers[0].up.double() * (start * (Z[0] + Z[1] - 1)) @ layers[0].down.double()
    merged = (layers[0].up.double() * start) @ layers[0].down.double() + combined.delta().double()
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(start, S, atol=1e-5, rtol=1e-4)


def test_convert_is_exact_at_full_rank_and_says_its_error_below() -> None:
    for update in ALL:
        judge = exact([(update, 1)])
        converted, error = lo.convert(update, to="lora")
        assert converted.core is None and error == 0
        assert_is(converted, judge)
        converted, error = lo.convert(update, rank=2)
        assert converted.rank == 2
        assert error == pytest.approx(float((converted.delta().double() - judge).norm() / judge.norm()), rel=1e-3)
        assert 0 < error < 1


@pytest.mark.parametrize("kind", [lo.LoRA(4, alpha=8, init="pissa"), lo.LoRA(4, init="milora"), lo.LoRAXS(6), lo.SVF()])
def test_a_layer_becomes_a_lora_for_the_original_weight(kind) -> None:  # type: ignore[no-untyped-def]
    dense = linear()
    layer = perturb(lo.Linear.from_linear(dense, kind, quantize=None))
    converted, error = lo.convert(layer)
    assert error == 0 and converted.rank == {lo.LoRA: 8, lo.LoRAXS: 6, lo.SVF: 48}[type(kind)]
    x = torch.randn(5, K)
    y = lo.functional.adapted_linear(x, dense.weight.detach(), converted, dense.bias)
    torch.testing.assert_close(y, layer(x), atol=2e-4, rtol=1e-4)


def test_loftq_over_nf4_becomes_a_lora_for_the_original_weight() -> None:
    dense = linear()
    layer = perturb(lo.Linear.from_linear(dense, lo.LoRA(4, init="loftq", iterations=3)))
    delta = lo.convert(layer).update.delta()
    # They differ by the base's quantisation error.
    base = layer.weight.dequantize(torch.float32)
    lost = dense.weight.detach() - layer.base_update.delta() - base
    torch.testing.assert_close(dense.weight.detach() + delta - lost, layer.merged_weight(), atol=1e-5, rtol=1e-4)


CHANGED = [
    lo.LoRA(4, alpha=8, init="pissa"),
    lo.LoRA(4, init="milora"),
    lo.LoRA(6, alpha=3, init="pissa", rslora=True),
    lo.LoRA(4, init="loftq", iterations=3),
    lo.LoRA(4, init="pissa", iterations=3),
]


@pytest.mark.parametrize(
    "kind, quantize", [(kind, "nf4") for kind in CHANGED] + [(k, None) for k in CHANGED if k.iterations == 1], ids=str
)
def test_changed_bases_are_combined_over_the_original_weight(kind: lo.LoRA, quantize: str | None) -> None:
    dense = linear()
    changed = perturb(lo.Linear.from_linear(dense, kind, quantize))
    plain, cored = (perturb(lo.Linear.from_linear(dense, k, quantize)) for k in (lo.LoRA(3), lo.SVF(rank=5)))
    deltas = [layer.update.delta().detach().double() for layer in (changed, plain, cored)]
    own = deltas[0] - kind.scale * changed.base_up.double() @ changed.base_down.double()
    assert (own - deltas[0]).norm() > 1e-3 * own.norm()  # a sum without it is far off
    if quantize is None:
        torch.testing.assert_close(own, (changed.merged_weight() - dense.weight).detach().double(), atol=1e-5, rtol=0)
    for first in (changed, changed.update, replace(changed.update)):
        assert_is(lo.combine([(first, 1.0)]), own)
        assert_is(lo.combine([(first, 1)], rank=2 * kind.rank), own)
        mixed = lo.combine([(first, 0.7), (plain, -0.4), (cored.update, 2), (changed, 0.1)])
        assert mixed.base is None
        assert_is(mixed, 0.8 * own - 0.4 * deltas[1] + 2 * deltas[2])
        assert_is(lo.convert(first).update, own)
    assert_is(lo.convert(lo.combine([(changed, 0.5), (plain, 0.5)])).update, 0.5 * own + 0.5 * deltas[1])


def test_layers_of_any_form_are_taken_beside_updates() -> None:
    dense = linear()
    forms = [
        perturb(lo.Linear.from_linear(dense, lo.SVF(form=form, factors="float32"))) for form in ("replace", "additive")
    ]
    combined = lo.combine([(forms[0], 0.7), (forms[1].update, 0.3)])
    assert combined.rank == 48 and combined.core is not None  # the same factors
    assert_is(combined, exact([(forms[0].update, 0.7), (forms[1].update, 0.3)]))
    whole = (forms[0].merged_weight() - dense.weight).detach().double()
    assert (lo.combine([(forms[0], 1)]).delta().double() - whole).norm() < 1e-5 * dense.weight.norm()


def test_combined_updates_carry_no_gradient_and_no_dropout() -> None:
    a = LowRankUpdate(torch.randn(3, K, requires_grad=True), torch.randn(N, 3), dropout=0.5)
    combined = lo.combine([(a, 1.0), (lora(2), 1.0)])
    assert not combined.down.requires_grad and combined.dropout == 0


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "must not be empty", lambda: lo.combine([])),
        (TypeError, "pairs", lambda: lo.combine([lora(2)])),
        (ValueError, "finite number, got nan", lambda: lo.combine([(lora(2), float("nan"))])),
        (
            ValueError,
            r"one shape.*\(3, 5\)",
            lambda: lo.combine([(lora(2), 1), (LowRankUpdate(torch.ones(2, 5), torch.ones(3, 2)), 1)]),
        ),
        (ValueError, "rank must be in 1 … 48.*got 0", lambda: lo.combine([(lora(2), 1)], rank=0)),
        (ValueError, "rank must be in 1 … 48.*got 49", lambda: lo.convert(lora(2), rank=49)),
        (ValueError, "to must be 'lora', got 'dora'", lambda: lo.convert(lora(2), to="dora")),
        (TypeError, "source must be", lambda: lo.convert(torch.ones(2, 2))),
        (ValueError, "must have an adapter", lambda: lo.convert(lo.Linear(8, 8, adapter=None))),
        (ValueError, "must have an adapter", lambda: lo.combine([(lo.Linear(8, 8, adapter=None), 1.0)])),
        (ValueError, r"base must be \[48, 64\].*\[8, 8\]", lambda: replace(lora(2), base=of_shape(8, 8))),
        (TypeError, "base must be a LowRankUpdate", lambda: replace(lora(2), base=torch.ones(48, 64))),
    ],
)
def test_bad_input(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


PRUNING = ("ties", "dare", "dare_ties", "magnitude")


def merged_by_hand(
    method: str, changes: list[torch.Tensor], weights: list[float], density: float, seed: int
) -> torch.Tensor:
    """The formulas of combine, entry by entry in float64."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for change in changes:
        if method.startswith("dare"):
            mask = torch.bernoulli(torch.full(change.shape, density), generator=generator).double()
            kept.append(change * mask / density)
        else:
            least = change.abs().flatten().sort(descending=True).values[int(density * change.numel()) - 1]
            kept.append(torch.where(change.abs() >= least, change, 0.0))
    if not method.endswith("ties"):
        return sum(
            (w * c for c, w in zip(kept, weights, strict=True)), torch.zeros(changes[0].shape, dtype=torch.float64)
        )
    total = torch.zeros_like(kept[0])
    for at in range(total.numel()):
        entries = [c.flatten()[at] for c in kept]
        sign = 1.0 if sum(entries) >= 0 else -1.0
        chosen = [w * e for e, w in zip(entries, weights, strict=True) if e * sign > 0]
        total.view(-1)[at] = sum(chosen) / max(1, len(chosen))
    return total


@pytest.mark.parametrize("method", PRUNING)
def test_methods_work_on_the_entries_of_the_changes(method: str) -> None:
    updates = [lora(4), lora(4, 1, scale=2.0), with_core(cores.Dense(torch.randn(6, 6)), 0.5)]
    weights = [0.7, -0.2, 1.5]
    made = lo.combine(list(zip(updates, weights, strict=True)), min(N, K), method, density=0.4, seed=5)
    changes = [exact([(update, 1.0)]) for update in updates]
    assert_is(made, merged_by_hand(method, changes, weights, 0.4, 5), 1e-5)
    # Without a rank: the nearest of the sum of ranks.
    less = lo.combine(list(zip(updates, weights, strict=True)), None, method, density=0.4, seed=5)
    assert less.rank == 14
    u, s, vt = torch.linalg.svd(merged_by_hand(method, changes, weights, 0.4, 5))
    assert_is(less, (u[:, :14] * s[:14]) @ vt[:14], 1e-4)


@pytest.mark.parametrize("method", ["sum", *PRUNING])
def test_methods_work_on_the_entries_of_cores_between_the_same_factors(method: str) -> None:
    first = with_core(cores.Banded(torch.randn(5, 12)))
    others = [replace(first, core=cores.Banded(torch.randn(5, 12)), scale=2.0), first]
    density = {} if method == "sum" else {"density": 0.5}
    weights = [0.5, 2.0, -1.0]
    made = lo.combine(list(zip([first, *others], weights, strict=True)), method=method, **density)
    assert isinstance(made.core, cores.Banded) and made.down is first.down
    changes = [u.scale * u.core.values.double() for u in (first, *others) if u.core is not None]
    judge = (
        sum(w * c for c, w in zip(changes, weights, strict=True))
        if method == "sum"
        else merged_by_hand(method, changes, weights, 0.5, 0)
    )
    assert isinstance(judge, torch.Tensor)
    torch.testing.assert_close(made.core.values.double(), judge, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", PRUNING)
def test_methods_are_those_of_peft(method: str) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    name = {"dare": "dare_linear", "magnitude": "magnitude_prune"}.get(method, method)
    updates = [lora(4, scale=1.5), lora(6, 1)]
    torch.manual_seed(3)
    judge = getattr(theirs, name)([update.delta() for update in updates], torch.tensor([0.7, 0.4]), 0.6)
    made = lo.combine(list(zip(updates, [0.7, 0.4], strict=True)), min(N, K), method, 0.6, seed=3)
    assert_is(made, judge.double(), 1e-5)


def test_svd_is_the_nearest_of_a_rank() -> None:
    updates = [(lora(14), 0.7), (lora(20, 1), 0.4)]
    u, s, vt = torch.linalg.svd(exact(updates))
    for rank in (None, 13):
        kept = rank or 20  # the largest rank of the updates
        assert_is(lo.combine(updates, rank, "svd"), (u[:, :kept] * s[:kept]) @ vt[:kept], 1e-5)


def test_a_stack_of_experts_is_combined_expert_by_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    stacks = [
        LowRankUpdate(torch.randn(3, 4, K, generator=generator), torch.randn(3, N, 4, generator=generator))
        for _ in "ab"
    ]
    for method in ("ties", "magnitude"):
        made = lo.combine([(stacks[0], 1.0), (stacks[1], 0.5)], 8, method, density=0.3)
        for e in range(3):
            alone = [LowRankUpdate(s.down[e], s.up[e]) for s in stacks]  # type: ignore[index]
            one = lo.combine([(alone[0], 1.0), (alone[1], 0.5)], 8, method, density=0.3)
            assert (made.delta()[e] - one.delta()).norm() <= 1e-5 * one.delta().norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "method must be one of sum, svd, ties"),
        ({"method": "ties"}, "density must be above 0"),
        ({"method": "dare", "density": 0}, "density must be above 0 and at most 1 for method 'dare', got 0"),
        ({"method": "ties", "density": float("nan")}, "density must be above 0"),
        ({"density": 0.5}, "density is for ties, dare, dare_ties, magnitude"),
        ({"method": "ties", "density": 0.5, "seed": -1}, "seed must be an int of at least 0"),
        ({"method": "ties", "density": 0.5, "rank": 49}, "rank must be in 1 … 48"),
    ],
)
def test_methods_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lo.combine([(lora(2), 1.0), (lora(3, 1), 1.0)], **options)
