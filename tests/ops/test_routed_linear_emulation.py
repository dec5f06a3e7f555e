"""The CUDA decode kernels of routed_linear, executed on the host, against plain torch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from helpers import run_driver as run
from mixes import BF16, DTYPES, F16, F32, KINDS, Mix
from torch import Tensor

from lowrank_ops.kernels.operands import NF4
from lowrank_ops.ops import _plan, arena

RANKS = (1, 5, 16, 64, 512, 8, 33)


def request(
    mix: Mix, x: Tensor, slots: Tensor, y: Tensor, capacity: int = 512, misaligned: int = 0, seed: int = 0,
    strengths: Tensor | None = None,
) -> bytes:  # fmt: skip
    memory, table = arena.build(mix.packed, torch.device("cpu"))
    head = [
        *(len(x), mix.N, mix.K, DTYPES.index(x.dtype), x.stride(0) if len(x) else 0, memory.numel(), len(table)),
        *(capacity, 0 if strengths is None else slots.shape[1], misaligned, seed),
    ]
    # A strided x has memory between its rows, but none after its last element.
    rows = x.as_strided((max((len(x) - 1) * x.stride(0) + mix.K, 0),), (1,)) if len(x) else x.flatten()
    tensors = (rows, memory, table, slots, *(() if strengths is None else (strengths,)), y)
    parts = (arena.bytes_of(t).numpy().tobytes() for t in tensors)
    return np.array(head, dtype=np.int64).tobytes() + b"".join(parts)


def updated(driver: Path, requests: Sequence[bytes], like: Tensor) -> list[Tensor]:
    """y after each request."""
    result = run(driver, "routed", data=b"".join(requests))
    assert result.returncode == 0, result.stderr.decode()
    answers = np.frombuffer(result.stdout, dtype=np.uint8).reshape(len(requests), -1)
    return [torch.from_numpy(a.copy()).view(like.dtype).view(like.shape) for a in answers]


def check(driver: Path, mix: Mix, dtype: torch.dtype) -> None:
    x, slots, y = mix.tokens(dtype)
    (got,) = updated(driver, [request(mix, x, slots, y)], y)
    assert_within_baseline(got, mix.add_updates(x, slots, y, torch.float64), mix.add_updates(x, slots, y, dtype))
    assert_bits_equal(got[:2], y[:2])  # no adapter, and a slot that holds nothing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(67, 77), (64, 128), (1, 1), (130, 1096)])
def test_mixed_ranks_and_dtypes(emulator: Path, N: int, K: int, dtype: torch.dtype) -> None:
    mix = Mix(N, K)
    for rank, of in zip(RANKS, itertools.cycle((*DTYPES, "single", "double", "fp4", "mxfp4"))):
        mix.add(rank, "", of)
    check(emulator, mix, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [*DTYPES, "single", "double", "fp4", "mxfp4"], ids=str)
def test_kinds_of_core_and_of_factors(emulator: Path, of: torch.dtype | str, dtype: torch.dtype) -> None:
    mix = Mix(70, 96)
    for kind, rank in itertools.product(KINDS, (5, 16, 64)):
        mix.add(rank, kind, of)
    mix.add(1, "diagonal", of)
    check(emulator, mix, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_beyond_what_a_block_holds_at_a_time(emulator: Path, kind: str) -> None:
    mix = Mix(65, 40)
    mix.add(1027, "", BF16)
    mix.add(520, kind, F32)
    x, slots, y = mix.tokens(F32)
    (got,) = updated(emulator, [request(mix, x, slots, y, capacity=1027)], y)
    assert_within_baseline(got, mix.add_updates(x, slots, y, torch.float64), mix.add_updates(x, slots, y, F32))


@pytest.mark.parametrize("misaligned", [0, 1, 2, 3], ids=["aligned", "x_off", "arena_off", "both_off"])
def test_alignment_strides_and_order_of_threads_do_not_change_a_bit(emulator: Path, misaligned: int) -> None:
    mix = Mix(66, 192)
    for kind, of in zip(KINDS, (*DTYPES, "single", "double"), strict=True):
        mix.add(40, kind, of)
    x, slots, y = mix.tokens(BF16)
    (expected,) = updated(emulator, [request(mix, x, slots, y)], y)
    wide = torch.full((len(x), 199), float("nan"), dtype=BF16)
    wide[:, 3:195] = x
    operands = (x, wide[:, 3:195])
    for seed, strided in enumerate(operands):
        (got,) = updated(emulator, [request(mix, strided, slots, y, 64, misaligned, seed + 1)], y)
        assert_bits_equal(got, expected)


def test_a_token_does_not_depend_on_the_others(emulator: Path) -> None:
    mix = Mix(66, 77)
    for kind in KINDS:
        mix.add(20, kind, F16)
    x, slots, y = mix.tokens(F16)
    (together,) = updated(emulator, [request(mix, x, slots, y)], y)
    order = torch.randperm(len(x), generator=mix.generator)
    (shuffled,) = updated(emulator, [request(mix, x[order], slots[order], y[order])], y)
    assert_bits_equal(shuffled, together[order])
    alone = [request(mix, x[t : t + 1], slots[t : t + 1], y[t : t + 1]) for t in range(len(x))]
    assert_bits_equal(torch.cat(updated(emulator, alone, y[:1])), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_updates_of_a_token(emulator: Path, dtype: torch.dtype) -> None:
    mix = Mix(70, 96)
    for rank, kind, of in zip((5, 64, 16, 33, 8), KINDS, (*DTYPES, "double", "mxfp4"), strict=True):
        mix.add(rank if of != "mxfp4" else 32, kind, of)
    x, slots, strengths, y = mix.mixed_tokens(dtype)
    (got,) = updated(emulator, [request(mix, x, slots, y, strengths=strengths)], y)
    exact, baseline = (mix.add_updates(x, slots, y, to, strengths) for to in (torch.float64, dtype))
    assert_within_baseline(got, exact, baseline)
    alone = (slots >= 0).sum(1) < 2  # the first column, at full strength
    (single,) = updated(emulator, [request(mix, x[alone], slots[alone, 0].contiguous(), y[alone])], y[alone])
    assert_bits_equal(got[alone], single)


def test_what_is_not_the_adapters_own_is_not_read(emulator: Path) -> None:
    """A neighbour of NaN, and slots beyond the table."""
    mix = Mix(33, 64)
    mix.add(16, "dense", F32)
    mix.add(16, "", F32)
    assert mix.packed[2] is not None
    mix.packed[2][1][0].fill_(float("nan"))
    x, _, y = mix.tokens(F32)
    slots = torch.tensor([1, -1, 2, 1, 3, -7, 1], dtype=torch.int32)[: len(x)]
    (got,) = updated(emulator, [request(mix, x, slots, y)], y)
    nan = slots == 2
    assert got[nan].isnan().all() and not got[~nan].isnan().any()
    untouched = (slots < 0) | (slots > 2)
    assert_bits_equal(got[untouched], y[untouched])


def test_a_rank_beyond_the_workspace_shows(emulator: Path) -> None:
    mix = Mix(70, 40)
    mix.add(16, "", F32)
    mix.add(17, "dense", F32)
    x, slots, y = (t[:-1] for t in mix.tokens(F16))  # the adapter of rank 17 comes last, at the end of the workspace
    (expected,) = updated(emulator, [request(mix, x, slots, y, capacity=17)], y)
    (got,) = updated(emulator, [request(mix, x, slots, y, capacity=16)], y)
    larger = slots == 2
    assert got[larger].isnan().all() and not expected.isnan().any()
    assert_bits_equal(got[~larger], expected[~larger])


@pytest.mark.parametrize(("M", "N", "K", "message"), [(0, 4, 4, "M must be"), (1, 0, 4, "N must"), (1, 4, 0, "K must")])
def test_sizes(emulator: Path, M: int, N: int, K: int, message: str) -> None:
    head = [M, N, K, 0, K, 0, 0, 1, 0, 0, 0]
    data = np.array(head, dtype=np.int64).tobytes() + bytes(4 * (M * K + M + M * N))
    result = run(emulator, "routed", data=data)
    assert result.returncode == 3 and message in result.stderr.decode()


def test_an_unknown_dtype_is_refused(emulator: Path) -> None:
    data = np.array([1, 1, 1, 3, 1, 0, 0, 1, 0, 0, 0], dtype=np.int64).tobytes() + bytes(8)
    result = run(emulator, "routed", data=data)
    assert result.returncode == 3 and "dtype must be 0, 1 or 2" in result.stderr.decode()


def test_when_they_run() -> None:
    def plan(M: int, forced: str | None = None, kernels: bool = True, block_size: int = 64) -> _plan.Plan:
        return _plan.plan_routed(
            "cuda", M, 64, BF16, NF4 if block_size else None, block_size, forced, cuda_kernel=kernels
        )

    few, many = plan(_plan.FEW_ROUTED), plan(_plan.FEW_ROUTED + 1)
    assert (few.implementation, few.form) == ("cuda", "few") and "its own update" in few.reason
    assert (many.implementation, many.form) == ("triton", "few") and "tiles of tokens" in many.reason
    assert plan(10**5).form == "many"
    assert plan(1, block_size=0).form == "many"  # the product alone: a dense W is not decoded
    without = plan(1, kernels=False)
    assert without.implementation == "triton" and "no CUDA kernels" in without.reason
    assert plan(10**5, "cuda").implementation == "cuda" and plan(1, "triton").implementation == "triton"
    assert plan(1, "reference").implementation == "reference"
    with pytest.raises(RuntimeError, match="'cuda'"):
        plan(1, "cuda", kernels=False)
    with pytest.raises(RuntimeError, match="'cpp'"):
        plan(1, "cpp")
    assert _plan.plan_routed("cpu", 3, 64, BF16, NF4, 64) == _plan.plan_linear("cpu", 3, 64, BF16, NF4, 64)
