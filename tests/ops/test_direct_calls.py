"""The registered ops called with anything, the settings of a process that its caller made, and buffers cast in place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arm_machine
import pytest
import torch
from helpers import assert_bits_equal
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.formats import QuantizedWeight
from lowrank_ops.kernels.arena_layout import FIELDS
from lowrank_ops.preference import bradley_terry_loss

OPS = torch.ops.lowrank_ops
BYTES = torch.zeros(480, dtype=torch.uint8)
DENSE = (None, None, None, 0)
NO_MATRIX = (None, *DENSE)


def fuzz(tmp_path: Path, *options: str) -> None:
    log = tmp_path / "log"
    command = [sys.executable, str(Path(__file__).with_name("fuzz_ops.py")), "--log", str(log), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    last = log.read_text() if log.exists() else "no call"
    assert done.returncode == 0, f"after {last}\n{done.stdout}{done.stderr}"
    assert f"of {len(lo.ops.SCHEMAS)} ops" in done.stdout and " 0 wrong" in done.stdout


def test_fuzzed_arguments_are_refused_or_answered_as_plain_pytorch_does(tmp_path: Path) -> None:
    fuzz(tmp_path, "--seconds", "3")


def test_valid_and_fuzzed_arguments_under_sanitizers(tmp_path: Path) -> None:
    """A sample of `make test-sanitized`: plain C++, compiled without optimisation, which takes the least time."""
    server = arm_machine.build_sanitized("address,undefined", "portable", "-O0")
    fuzz(tmp_path, "--seconds", "2", "--server", str(server))


def routed(slots: Tensor, table: Tensor, arena: int = 64) -> Tensor:
    x, w = torch.randn(5, 40), torch.randn(24, 40)
    return OPS.routed_linear(x, w, *DENSE, 24, None, torch.zeros(arena, dtype=torch.uint8), table, slots)


def row(**fields: int) -> Tensor:
    """A table of one slot."""
    return torch.tensor([[fields.get(name, 0) for name in FIELDS]])


SLOTS = torch.zeros(5, dtype=torch.int32)


def dequantize(packed: Tensor, N: int, K: int, block_size: int) -> Tensor:
    return OPS.nf4_dequantize(packed, torch.ones(15), None, None, N, K, block_size, torch.float32)


def adapted(rank: int, up: Tensor) -> Tensor:
    x, w = torch.randn(5, 40), torch.randn(24, 40)
    return OPS.adapted_linear(x, w, *DENSE, 24, rank, *NO_MATRIX, up, *DENSE, None, None, None, 1.0, 0.0, None)


def svd(u: Tensor, values: Tensor, index: Tensor | None, N: int) -> Tensor:
    x, vt = torch.randn(5, 8), torch.randn(4, 8)
    return OPS.svd_linear(x, u, *DENSE, values, index, vt, *DENSE, N, 4, None)


def loss(rejected: Tensor) -> Tensor:
    return OPS.bradley_terry_loss(torch.randn(33), rejected, None, None, 0.1)


INDEX = torch.full((16,), 99, dtype=torch.int32)
WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    "no bytes": (r"packed must be \[480\]", lambda: dequantize(BYTES[:0], 24, 40, 64)),
    "sizes beyond the bytes": (r"packed must be", lambda: dequantize(BYTES, 100000, 4000, 64)),
    "a block of 0": (r"block_size must be one of", lambda: dequantize(BYTES, 24, 40, 0)),
    "no offset": (r"offset must be \[\]", lambda: OPS.absmax_quantize(torch.rand(100), torch.empty(0))),
    "no down": (r"down must be given for R = 8", lambda: adapted(8, torch.randn(24, 8))),
    "a slot beyond the table": (r"slots must be in \[-1, 1\)", lambda: routed(SLOTS + 10**6, row())),
    "too few slots": (r"slots must be \[M=5\]", lambda: routed(SLOTS[:0], row())),
    "a rank beyond the arena": (r"its rank does not fit", lambda: routed(SLOTS, row(rank=2**40))),
    "a factor beyond the arena": (r"its D does not fit", lambda: routed(SLOTS, row(rank=1))),
    "before the arena": (r"its U does not fit", lambda: routed(SLOTS, row(rank=1, up_data=-64), 256)),
    "a core beyond the arena": (
        r"its C does not fit",
        lambda: routed(SLOTS, row(rank=1, up_data=192, core_kind=3, core_entries=10**12), 512),
    ),
    "factors too small": (r"u must be \[N=30000, R=4\]", lambda: svd(torch.randn(1, 1), torch.randn(4), None, 30000)),
    "an index of elsewhere": (r"core_index is wrong", lambda: svd(torch.randn(6, 4), torch.randn(2), INDEX, 6)),
    "no rejected": (r"rejected must be \[n=33\]", lambda: loss(torch.empty(0))),
    "none on the meta device": (
        r"absmax must be a Tensor, got None",
        lambda: OPS.absmax_quantize(None, torch.empty(1, device="meta")),
    ),
    "one on the meta device": (r"on one device", lambda: loss(torch.randn(33, device="meta"))),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    message, call = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_arena_that_begins_within_a_number_is_refused() -> None:
    arena = torch.zeros(129, dtype=torch.uint8)[1:]
    with pytest.raises(ValueError, match="arena must begin at a multiple of 4 bytes"):
        OPS.routed_linear(torch.randn(5, 40), torch.randn(24, 40), *DENSE, 24, None, arena, row(), SLOTS)


def test_a_tensor_without_memory_is_refused() -> None:
    w = torch.randn(24, 40)
    w.untyped_storage().resize_(100)
    x = torch.randn(5, 40)
    with pytest.raises(ValueError, match=r"weight must have memory for its shape \[24, 40\], 3840 bytes, got 100"):
        OPS.adapted_linear(x, w, *DENSE, 24, 0, *NO_MATRIX, *NO_MATRIX, None, None, None, 1.0, 0.0, None)


def test_a_hook_that_changes_what_backward_saved_is_told() -> None:
    x, down, up = torch.randn(5, 40), torch.randn(8, 40), torch.randn(24, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
        y = lo.functional.adapted_linear(x, torch.randn(24, 40), lo.LowRankUpdate(down, up))
    with pytest.raises(TypeError, match="adapted_linear_backward: h must be float32, got torch.float16"):
        y.sum().backward()


# ---- settings of a process ----


def results() -> list[Tensor]:
    """Bytes of a weight, and results and gradients of ops, from fixed inputs."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32, device="cpu")

    weight = lo.NF4Weight.quantize(normal(24, 64))
    x, factors = normal(5, 64), [normal(4, 64), normal(24, 4), normal(4)]
    training = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for tensor in (x, *factors) if training else ():
        tensor.requires_grad_()
    update = lo.LowRankUpdate(*factors[:2], lo.cores.Diagonal(factors[2]))
    y = lo.functional.adapted_linear(x, weight, update)
    of_experts = lo.functional.experts_linear(
        x, lo.FP4Weight.quantize(normal(2, 24, 64)), torch.tensor([0, 2, 5], dtype=torch.int32, device="cpu")
    )
    pairs = bradley_terry_loss(y[:, 0], y[:, 1], 0.5)
    made = [weight.packed, weight.absmax, weight.dequantize(), y, of_experts, pairs]
    if training:
        (pairs + y.sum() + of_experts.sum()).backward()
        made += [tensor.grad for tensor in (x, *factors)]
    return [tensor.detach().clone() for tensor in made]


@pytest.mark.parametrize("setting", ["dtype", "device", "deterministic", "inference"])
def test_settings_of_the_process_change_no_result(setting: str) -> None:
    expected = results()
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.float64)
        elif setting == "device":
            torch.set_default_device("meta")
        elif setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        with torch.inference_mode(setting == "inference"):
            got = results()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, expected, strict=setting != "inference"):
        assert_bits_equal(a, b)


# ---- buffers cast in place ----

WEIGHTS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": lambda w: lo.NF4Weight.quantize(w, 64, False),
    "double": lo.NF4Weight.quantize,
    "fp4": lambda w: lo.FP4Weight.quantize(w, 64, False),
    "mxfp4": lo.MXFP4Weight.quantize,
    "int8": lo.Int8Weight.quantize,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_buffers_cast_in_place_are_refused_by_name(name: str) -> None:
    weight, x = WEIGHTS[name](torch.randn(64, 64)), torch.randn(3, 64)
    run = lo.functional.prepare(weight)
    with torch.no_grad():
        before = run(x)
    for module_wide in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        module_wide(weight)  # leaves the bytes alone
        with torch.no_grad():
            assert_bits_equal(run(x), before)
    for buffer in weight.buffers():
        held = buffer.data
        buffer.data = held.to(torch.bfloat16)
        for call in (
            lambda: run(x.clone().requires_grad_()),
            weight.dequantize,
            lambda: weight.dequantize_rows(torch.tensor([1])),
            torch.no_grad()(lambda: run(x)),
        ):
            with pytest.raises(TypeError, match="must be torch.* got torch.bfloat16: its buffers were cast in place"):
                call()
        buffer.data = held
    with torch.no_grad():
        assert_bits_equal(run(x), before)
