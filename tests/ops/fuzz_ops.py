"""Call the registered ops with arguments that do not fit: each call must raise, or answer what plain PyTorch answers.

    python tests/ops/fuzz_ops.py [--seconds 5] [--seed 0] [--first 0] [--calls N] [--server PROGRAM]

Valid calls of every op, forward and backward, are recorded and then changed in one to three arguments. Every tensor ends
where its memory ends: reading one byte more kills the process. With --server the kernels run in that program, which
``tests/arm_machine.py`` builds with sanitizers; the valid calls run there too. The last line of the output counts the
calls. Before each call its number and what was changed go to the file of --log, so that a call that kills the process
can be found; --first repeats it.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import lowrank_ops as lo
from lowrank_ops import cores, functional, ops
from lowrank_ops.kernels.operands import FORMATS
from lowrank_ops.preference import bradley_terry_loss

REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)
INTS = (0, -1, 1, 2, 3, 31, 32, 64, 4096, 1 << 16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 0.5, 1.0, 2.0, float("nan"), float("inf"), 1e-300)
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool,
    torch.complex64,
)  # fmt: skip
Call = tuple[str, tuple[Any, ...]]


class Recorder(TorchDispatchMode):
    """Keeps the calls of the package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lowrank_ops":
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))


def valid_calls() -> list[Call]:
    """Calls of every op with every kind of matrix, core and optional operand."""
    random_ = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=random_).to(dtype)

    def trained(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(*shape, dtype=dtype).requires_grad_()

    N, K, R, E = 24, 64, 8, 3
    rows, cols = torch.tensor([0, 3, 5]), torch.tensor([2, 0, 5])
    kinds = [
        None,
        cores.Diagonal(trained(R)),
        cores.Banded(trained(R * 3 - 2), R),
        cores.Sparse(rows, cols, trained(3), R),
        cores.Dense(trained(R, R)),
    ]
    stacks = [None, cores.Diagonal(trained(E, R)), cores.Sparse(rows, cols, trained(E, 3), R)]
    recorder = Recorder()
    with recorder:
        for i, name in enumerate((*FORMATS, "double", "dense")):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
            make: dict[str, Callable[[Tensor], Any]] = {
                "nf4": lambda w: lo.NF4Weight.quantize(w, 64, False),
                "double": lambda w: lo.NF4Weight.quantize(w, 32, True),
                "fp4": lambda w: lo.FP4Weight.quantize(w, 32),
                "mxfp4": lo.MXFP4Weight.quantize,
                "int8": lo.Int8Weight.quantize,
                "dense": lambda w: w,
            }
            w, stack = make[name](normal(N, K)), make[name](normal(E, N, K))
            if name != "dense":
                w.dequantize()
            update = functional.LowRankUpdate(
                trained(R, K), trained(N, R, dtype=dtype), kinds[i % len(kinds)], 0.5, dropout=0.25 * (i % 2)
            )
            branch = functional.LowRankUpdate(normal(2, K), normal(N, 2)) if i % 2 else None
            for M in (3, 40):
                x = trained(M, K, dtype=dtype)
                functional.adapted_linear(x, w, update, trained(N), branch=branch).sum().backward()
            functional.adapted_linear(x, w).sum().backward()
            of_experts = functional.LowRankUpdate(trained(E, R, K), trained(E, N, R), stacks[i % 3], 0.5)
            offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
            functional.experts_linear(
                trained(6, K, dtype=dtype), stack, offsets, of_experts, normal(E, N)
            ).sum().backward()
            functional.experts_linear(normal(6, K, dtype=dtype), stack, offsets)
            with torch.no_grad():
                slots = torch.tensor([0, -1, 1, 0, 2, 1])
                many = [update, functional.LowRankUpdate(normal(3, K), normal(N, 3)), None]
                functional.routed_linear(normal(6, K, dtype=dtype), w, many, slots, normal(N))
                both = torch.stack([slots, slots.flip(0)], 1)
                functional.routed_linear(normal(6, K, dtype=dtype), w, many, both, strengths=normal(6, 2))
                functional.routed_linear(normal(6, K), stack, [of_experts], slots.clamp(max=0), None, offsets)
            vt = make[name](normal(32, K))
            u = make[name](normal(N, 32))
            functional.svd_linear(
                trained(3, K, dtype=dtype), u, cores.Diagonal(trained(32)), vt, trained(N)
            ).sum().backward()
        for dtype in DTYPES[:4]:
            bradley_terry_loss(trained(9, dtype=dtype), trained(9, dtype=dtype), 0.5, torch.rand(9)).backward()
    seen = {name for name, _ in recorder.calls}
    assert seen == set(ops.SCHEMAS), set(ops.SCHEMAS) - seen
    return recorder.calls


class Fence:
    """Memory whose last byte lies before a page that may not be touched."""

    SIZE = 1 << 18

    def __init__(self) -> None:
        page = mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.SIZE + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(start + self.SIZE), page, 0) == 0

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor in this memory, with the strides that it has."""
        source = tensor.untyped_storage()
        size = source.nbytes()
        if not 0 < size <= self.SIZE:
            return tensor
        held = torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=self.SIZE - size)
        held.copy_(torch.empty(0, dtype=torch.uint8).set_(source))
        made = torch.empty(0, dtype=tensor.dtype).set_(
            held.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        return made.requires_grad_(tensor.requires_grad)


def change_tensor(t: Tensor, dice: random.Random, others: list[Tensor]) -> tuple[str, Any]:
    """What was done to it, and the result."""
    t = t.detach()
    dim = dice.randrange(t.dim()) if t.dim() else 0
    whole = t.clone()
    choices: dict[str, Callable[[], Any]] = {
        "None": lambda: None,
        "empty": lambda: t.new_empty(0),
        "another argument": lambda: dice.choice(others),
        "cast": lambda: t.to(dice.choice(DTYPES)),
        "bytes": lambda: whole.reshape(-1).view(torch.uint8),
        "a scalar": lambda: whole.reshape(-1)[0].clone() if t.numel() else t,
        "flat": lambda: whole.reshape(-1),
        "one dimension more": lambda: whole.unsqueeze(dim),
        "shorter": lambda: whole.narrow(dim, 0, max(0, t.shape[dim] - 1)).clone() if t.dim() else t,
        "shorter view": lambda: whole.narrow(dim, 1, t.shape[dim] - 1) if t.dim() and t.shape[dim] > 1 else t,
        "longer": lambda: torch.cat([whole, whole.narrow(dim, 0, min(1, t.shape[dim]))], dim) if t.dim() else t,
        "no rows": lambda: whole.narrow(dim, 0, 0) if t.dim() else t,
        "transposed": lambda: whole.t() if t.dim() == 2 else t,
        "strided": lambda: torch.stack([whole, whole], -1)[..., 0],
        "expanded": lambda: whole.narrow(dim, 0, 1).expand(t.shape) if t.dim() and t.shape[dim] else t,
        "numbers": lambda: _filled(t, dice),
        "one number": lambda: _with_one(whole, dice),
        "not finite": lambda: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        "negated": lambda: torch._neg_view(whole) if t.is_floating_point() else t,
        "conjugated": lambda: torch.complex(t.float(), t.float()).conj() if t.is_floating_point() else t,
        "memory freed": lambda: _without_memory(whole, 0),
        "half of the memory": lambda: _without_memory(whole, whole.nbytes // 2),
        "nested": lambda: torch.nested.nested_tensor([whole]) if t.is_floating_point() else t,
        "huge": lambda: t.new_empty(1).expand(2**31, 2**20) if dim else t.new_empty(1).expand(2**50),
        "trained": lambda: whole.requires_grad_() if t.is_floating_point() else t,
    }  # fmt: skip
    name = dice.choice(list(choices))
    return name, choices[name]()


def _filled(t: Tensor, dice: random.Random) -> Tensor:
    wide = t.dtype in (torch.int32, torch.int64)
    return torch.full_like(t, dice.choice((-1, 1, 2**31 - 1, -(2**31))) if wide else 255)


def _with_one(t: Tensor, dice: random.Random) -> Tensor:
    if t.numel():
        limits = (0, 1, 255) if t.dtype == torch.uint8 else (0, 1, -1, 64, 1000, 2**31 - 1, -(2**31))
        t.view(-1)[dice.randrange(t.numel())] = dice.choice(limits)
    return t


def _without_memory(t: Tensor, size: int) -> Tensor:
    t.untyped_storage().resize_(size)
    return t


def change(op: str, arguments: tuple[Any, ...], dice: random.Random) -> tuple[str, list[Any]]:
    changed, notes = list(arguments), []
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for at in dice.sample(range(len(changed)), min(len(changed), dice.choice((1, 1, 1, 2, 3)))):
        value = changed[at]
        if isinstance(value, Tensor):
            try:
                note, changed[at] = change_tensor(value, dice, tensors)
            except REFUSALS:  # torch does not make such a tensor
                continue
        elif isinstance(value, bool):
            note, changed[at] = "flipped", not value
        elif isinstance(value, int):
            changed[at] = dice.choice((*INTS, value + 1, value - 1, value * 2, -value, value | 1 << 18))
            note = str(changed[at])
        elif isinstance(value, float):
            changed[at] = dice.choice(FLOATS)
            note = str(changed[at])
        elif isinstance(value, torch.dtype):
            changed[at] = dice.choice(DTYPES)
            note = str(changed[at])
        else:
            note, changed[at] = "given", dice.choice(tensors).detach().clone()
        notes.append(f"{ops.SIGNATURES[op].arguments[at]}: {note}")
    return f"{op} {'; '.join(notes)}", changed


def unlike(got: Any, want: Any) -> str:
    """How an answer differs from plain PyTorch, "" if it does not."""
    got, want = (list(value) if isinstance(value, list | tuple) else [value] for value in (got, want))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        a, b = a.double(), b.double()
        finite = a.isfinite() & b.isfinite()
        if a.numel() and finite.any():
            error, scale = float((a - b)[finite].abs().max()), float(b[finite].abs().max())
            if error > 0.1 * scale + 1e-3:
                return f"result {i} differs by {error:.3g}, largest number {scale:.3g}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of this process's CPU time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calls", type=int, default=10**9)
    parser.add_argument("--log", default="")
    parser.add_argument("--server", default="")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    log = Path(arguments.log) if arguments.log else None
    machine = None
    if arguments.server:
        import arm_machine
        import pytest

        machine = arm_machine.Machine([arguments.server], ASAN_OPTIONS="detect_leaks=0")
        machine.replace_module(pytest.MonkeyPatch())
    calls = valid_calls()
    names = sorted({name for name, _ in calls})
    by_name = {name: [given for called, given in calls if called == name] for name in names}
    fences = [Fence() for _ in range(32)]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.process_time() + arguments.seconds
    number = arguments.first
    while number < arguments.first + arguments.calls and time.process_time() < end:
        dice = random.Random(f"{arguments.seed} {number}")
        op = names[number % len(names)]
        note, changed = change(op, dice.choice(by_name[op]), dice)
        if log:
            log.write_text(f"{number} {note}\n")
        changed = [fences[i].copy(a) if _plain(a) else a for i, a in enumerate(changed)]
        call = getattr(torch.ops.lowrank_ops, op)
        if machine is not None:
            machine.forget()
        try:
            answer = call(*changed)
        except REFUSALS as error:
            counts["raised"] += 1
            if not str(error) or "server ended" in str(error):
                wrong.append(f"{number} {note}: {type(error).__name__} {error}")
        except Exception as error:
            wrong.append(f"{number} {note}: {type(error).__name__} {error}")
        else:
            counts["answered"] += 1
            if fault := _compare(call, changed, answer):
                wrong.append(f"{number} {note}: {fault}")
        number += 1
    print("\n".join(wrong))
    told = f"{counts['raised']} raised, {counts['answered']} answered, {len(wrong)} wrong"
    print(f"{number - arguments.first} calls of {len(names)} ops: {told}")
    sys.exit(bool(wrong))


def _plain(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    if value.is_nested or value.is_quantized or value.is_neg() or value.is_conj() or not value.numel():
        return False
    reach = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)) + 1
    return value.untyped_storage().nbytes() >= (value.storage_offset() + reach) * value.itemsize


def _compare(call: Any, changed: list[Any], answer: Any) -> str:
    results = answer if isinstance(answer, list | tuple) else [answer]
    if any(result.is_meta for result in results):
        return "" if all(a.is_meta for a in changed if isinstance(a, Tensor)) else "answered on the meta device"
    if results[0].dtype == torch.uint8:
        return ""  # bytes of a format: numbers that are not finite have no defined ones
    try:
        with lo.implementation("reference"):
            return unlike(answer, call(*changed))
    except REFUSALS as error:
        return f"answered, but plain PyTorch says {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
