"""Compile every kernel for every target without a GPU and report what it costs: ``python -m lowrank_ops.kernels.aot``.

The launchers themselves, called with meta tensors, tell which kernels, signatures and constants exist; see
:func:`launch.recording`. The report has one line for each compiled kernel: registers, spills (instructions that move
registers to or from the stack), shared memory, warps resident on a multiprocessor, tensor-core instructions, and load
instructions by width. The exit status is 1 if a kernel spills or uses more shared memory than its target has.

``static_report.md`` in this folder keeps the lines of the two main targets, so that a diff shows how a change of the
kernels changes the machine code. The command also fails if that file differs; ``--write`` updates it, after it has compiled
some cases for the other targets too. The file names the code that it belongs to by a digest, so a test need not compile
everything again.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import importlib
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import adapted_linear, nf4, operands, routed_linear, svd_linear
from .arena_layout import FIELDS
from .config import Arch
from .launch import FP_FUSION, Launch, interpreted, recording

# Shared memory one block may use, in KiB, and the multiprocessors of a GPU of that capability, which decide tile sizes.
TARGETS = {80: (163, 108), 86: (99, 84), 89: (99, 128), 90: (227, 132), 100: (227, 148), 120: (99, 170)}
# Warps and blocks a multiprocessor holds. It has 64 Ki registers, and 1 KiB more shared memory than a block may use.
RESIDENT = {80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}
KEPT = (80, 90)  # the targets of the report in the repository
# For the other targets ``--write`` compiles these cases in bfloat16, one or two of each kernel.
SAMPLE = (
    *("", " double M=1", " double M=16", " wide M=16", " double M=2048 dropout", " svd diagonal core M=64"),
    *(" NF4 factors R=64 M=1", " NF4 factors R=64 M=16"),
    *(" routed M=2048", " routed experts", " MXFP4", " MXFP4 M=16", " experts P=8", " experts P=16384"),
)
REPORT = Path(__file__).resolve().parent / "static_report.md"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Signature:
    """One compilation: a kernel by module and name, its types, constants, argument attributes and options.

    The type of a tuple is the tuple of its members' types; a member is named "argument.member".
    """

    module: str
    kernel: str
    case: str
    types: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Report:
    """The resources of one compilation on one target; shared memory in bytes."""

    kernel: str
    case: str
    target: int
    registers: int
    spills: int
    shared: int
    num_warps: int
    matrix: str
    loads: str

    @property
    def warps(self) -> int:
        """Warps of this kernel that one multiprocessor can hold."""
        most_warps, most_blocks = RESIDENT[self.target]
        # Registers are allocated to a warp in units of 256; the system takes 1 KiB of shared memory for each block.
        by_registers = 65536 // (256 * -(-self.registers * 32 // 256)) // self.num_warps
        by_shared = 1024 * (TARGETS[self.target][0] + 1) // (self.shared + 1024)
        return self.num_warps * min(most_blocks, most_warps // self.num_warps, by_registers, by_shared)

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of a line of the report."""
        resources = (
            str(self.registers),
            str(self.spills),
            str(self.shared),
            f"{self.warps}/{RESIDENT[self.target][0]}",
        )
        return (
            self.kernel.strip("_"),
            self.case,
            f"sm_{self.target}",
            *resources,
            self.matrix or "-",
            self.loads or "-",
        )

    @property
    def fits(self) -> bool:
        """Tell whether the kernel neither spills nor uses more shared memory than the target has."""
        return self.spills == 0 and self.shared <= 1024 * TARGETS[self.target][0]


def signature_of(launch: Launch, case: str) -> Signature:
    """The specialisation Triton makes of a launch: None and 1 become constants, multiples of 16 are marked as such."""
    constants, aligned = [], []

    def specialised(name: str, value: Any, specialise: bool, constant: bool) -> Any:
        if isinstance(value, tuple):
            members = (
                specialised(f"{name}.{field}", member, specialise, isinstance(member, tl.constexpr))
                for field, member in zip(value._fields, value, strict=True)  # type: ignore[attr-defined]
            )
            return type(value)(*members)
        if constant or value is None or (isinstance(value, int) and value == 1 and specialise):
            constants.append((name, value.value if isinstance(value, tl.constexpr) else value))
            return "constexpr"
        if isinstance(value, Tensor):
            if specialise:
                aligned.append(name)
            return f"*{({**DTYPES, torch.uint8: 'u8', torch.int32: 'i32', torch.int64: 'i64'})[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if specialise and value % 16 == 0:
            aligned.append(name)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    types = []
    for parameter in launch.kernel.params:
        value, specialise = launch.arguments[parameter.name], not parameter.do_not_specialize
        types.append((parameter.name, specialised(parameter.name, value, specialise, parameter.is_constexpr)))
    return Signature(
        launch.kernel.fn.__module__.rpartition(".")[2],
        launch.kernel.fn.__name__,
        case,
        tuple(types),
        tuple(constants),
        tuple(aligned),
        launch.num_warps,
        launch.num_stages,
    )


def _empty(*shape: int, of: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=of, device="meta")


def _matrix(rows: int, columns: int, dtype: torch.dtype, scales: str) -> operands.Matrix:
    """A matrix as launchers take it; ``scales``: "dense", NF4 with "single" or "double" quantisation, "mxfp4" or "int8"."""
    if scales == "dense":
        return operands.Matrix(_empty(rows, columns, of=dtype))
    blocks = -(-rows * columns // (32 if scales == "mxfp4" else 64))
    if scales == "int8":
        codes = _empty(rows * columns, of=torch.uint8)
        return operands.Matrix(codes, (_empty(blocks, of=torch.float32),), 64, operands.INT8)
    packed, absmax = _empty(-(-rows * columns // 2), of=torch.uint8), _empty(blocks, of=torch.float32)
    if scales == "single":
        return operands.Matrix(packed, (absmax,), 64, operands.NF4)
    if scales == "mxfp4":
        return operands.Matrix(packed, (_empty(blocks, of=torch.uint8),), 32, operands.MXFP4)
    double = _empty(blocks, of=torch.uint8), _empty(-(-blocks // 256), of=torch.float32), _empty(1, of=torch.float32)
    return operands.Matrix(packed, double, 64, operands.NF4)


def _core(kind: str, R: int, dtype: torch.dtype) -> operands.Core | None:
    """A core as launchers take it; a banded one has seventeen diagonals, a sparse one five entries in each row."""
    if kind == "none":
        return None
    if kind == "sparse":
        return operands.Core(_empty(5 * R, of=dtype), _empty(17 * R + 2, of=torch.int32))
    shapes = {"diagonal": (R,), "banded": (17 * R - 72,), "dense": (R, R)}
    return operands.Core(_empty(*shapes[kind], of=dtype))


def _run_adapted(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    weight: str,
    forms: Iterable[str] = adapted_linear.FORMS,
    factors: torch.dtype | None = None,
    dropout: float = 0.0,
    core: str = "none",
    factor_scales: str = "dense",
    branch_rank: int = 0,
) -> None:
    """Forward and backward of adapted_linear in every form with meta tensors."""
    w = _matrix(N, K, dtype, weight)
    c = _core(core, R, factors or dtype)
    down = up = bias = None
    if R:
        of = factors or dtype
        down, up, bias = _matrix(R, K, of, factor_scales), _matrix(N, R, of, factor_scales), _empty(N, of=of)
    x, g, seed = _empty(M, K, of=dtype), _empty(M, N, of=dtype), _empty(1, of=torch.int64)
    needed = (True, bool(R), bool(R), c is not None)
    branch = (
        operands.Branch(_empty(branch_rank, K, of=dtype), _empty(N, branch_rank, of=dtype)) if branch_rank else None
    )
    for form in forms:
        _, h = adapted_linear.forward(x, w, N, R, down, up, c, bias, 2.0, dropout, seed, form, branch=branch)
        if factor_scales == "dense":  # otherwise backward decodes them first and continues with dense ones
            operands_of = (g, x, h, w, K, R, down, up, c, 2.0, dropout, seed, form, *needed)
            adapted_linear.backward(*operands_of, branch=branch)


def _run_svd(M: int, N: int, K: int, R: int, dtype: torch.dtype, factors: str, core: str) -> None:
    """Forward and backward of svd_linear with meta tensors."""
    u, vt, c = _matrix(N, R, dtype, factors), _matrix(R, K, dtype, factors), _core(core, R, dtype)
    _, h = svd_linear.forward(_empty(M, K, of=dtype), u, c, vt, None, N, R)
    svd_linear.backward(_empty(M, N, of=dtype), h, u, c, vt, K, R, True, True)


def _run_routed(M: int, N: int, K: int, dtype: torch.dtype, experts: int | None = None, S: int | None = None) -> None:
    """The updates of a routed batch with meta tensors; ranks, cores and element types do not change the code."""
    arena, table = _empty(2**20, of=torch.uint8), _empty(32, len(FIELDS), of=torch.int64)
    x, y = _empty(M, K, of=dtype), _empty(M, N, of=dtype)
    size = (M,) if S is None else (M, S)
    slots, strengths = _empty(*size, of=torch.int32), None if S is None else _empty(*size, of=torch.float32)
    routed_linear.add_updates(x, arena, table, slots, y, experts=experts, strengths=strengths)


def own_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the cases of every module that declares ``aot_cases(dtype)``."""
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if file.name != "aot":
            module = importlib.import_module(f".{file.name}", __package__)
            yield from getattr(module, "aot_cases", lambda dtype: ())(dtype)


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls of launchers; together they start every kernel in every variant of the dtype.

    Products share kernels, and the first case that starts a kernel names it, so the cases of all products are here.
    """

    def case(
        name: str, run: Callable[..., object], *arguments: Any, **options: Any
    ) -> tuple[str, Callable[[], object]]:
        return f"{DTYPES[dtype]} {name}", functools.partial(run, *arguments, **options)

    for name, run in own_cases(dtype):
        yield case(name, run)
    few, many = ("few",), ("many",)
    adapted, svd = _run_adapted, _run_svd
    yield case("double M=16", adapted, 16, 4096, 4096, 16, dtype, "double", few)
    yield case("routed M=2048", _run_routed, 2048, 4096, 4096, dtype)
    yield case("routed M=2048 S=2", _run_routed, 2048, 4096, 4096, dtype, None, 2)
    if dtype == torch.float16:
        return  # differs from bfloat16 in one conversion instruction
    yield case("double M=1", adapted, 1, 4096, 4096, 16, dtype, "double", few)
    yield case("double M=2048 dropout", adapted, 2048, 4096, 4096, 16, dtype, "double", many, dropout=0.1)
    yield case("routed general M=17", _run_routed, 17, 1001, 1003, dtype)
    yield case("routed general M=16", _run_routed, 16, 1001, 1003, dtype)
    yield case("routed experts", _run_routed, 8192, 1536, 2048, dtype, 128)
    yield case("routed experts M=1024", _run_routed, 1024, 1536, 2048, dtype, 128)
    yield case("general R=5", adapted, 17, 1001, 1003, 5, dtype, "double", few)
    yield case("branch M=16", adapted, 16, 4096, 4096, 16, dtype, "double", few, branch_rank=16)
    w = _empty(4096, 4096, of=dtype)
    yield f"{DTYPES[dtype]}", functools.partial(nf4.quantize, operands.NF4, w)
    for M, R in ((1, 64), (16, 64), (16, 16)):
        factors = f"NF4 factors R={R} M={M}"
        yield case(factors, adapted, M, 4096, 4096, R, dtype, "double", few, core="banded", factor_scales="double")
    yield case("NF4 factors general", adapted, 17, 1001, 1003, 100, dtype, "double", few, factor_scales="double")
    if dtype == torch.float32:
        yield case("dense core M=16", adapted, 16, 4096, 4096, 16, dtype, "double", few, core="dense")
        yield case("svd dense factors M=64", svd, 64, 4096, 4096, 4096, dtype, "dense", "diagonal")
        yield case("svd dense factors M=1", svd, 1, 4096, 4096, 4096, dtype, "dense", "dense")
        absmax = _empty(2**18, of=torch.float32)
        yield "fp32", functools.partial(nf4.absmax_quantize, absmax, absmax[0])
        return
    yield case("wide M=16", adapted, 16, 16384, 16384, 16, dtype, "double", few)
    for M in (1, 64):
        yield case(f"branch M={M}", adapted, M, 4096, 4096, 16, dtype, "double", few, branch_rank=64)
    yield case("branch general", adapted, 17, 1001, 1003, 5, dtype, "double", few, branch_rank=5)
    yield case("branch M=2048", adapted, 2048, 4096, 4096, 16, dtype, "double", many, dropout=0.1, branch_rank=16)
    yield case("branch no update", adapted, 64, 4096, 4096, 0, dtype, "double", branch_rank=16)
    yield case("few rows M=1", adapted, 1, 1024, 4096, 16, dtype, "double", few)
    yield case("double M=64", adapted, 64, 4096, 4096, 64, dtype, "double", few)
    yield case(
        "single fp32 factors dropout", adapted, 16, 4096, 4096, 16, dtype, "single", factors=torch.float32, dropout=0.1
    )
    yield case("general M=1 R=5", adapted, 1, 1001, 1003, 5, dtype, "double", few)
    yield case("dense R=512", adapted, 64, 4096, 4096, 512, dtype, "dense")
    wide = "wide NF4 factors M=512"
    yield case(wide, adapted, 512, 16384, 16384, 256, dtype, "double", few, factor_scales="double", dropout=0.1)
    yield case("NF4 factors general M=1", adapted, 1, 1001, 1003, 100, dtype, "double", few, factor_scales="double")
    yield case("single NF4 factors M=64", adapted, 64, 4096, 4096, 256, dtype, "single", few, factor_scales="single")
    yield case("no update", adapted, 64, 4096, 4096, 0, dtype, "double", few)
    yield case("dense core M=64", adapted, 64, 4096, 4096, 64, dtype, "double", core="dense")
    yield case("wide sparse core M=16", adapted, 16, 16384, 16384, 64, dtype, "double", few, core="sparse")
    yield case("sparse core M=16", adapted, 16, 4096, 4096, 64, dtype, "double", few, core="sparse")
    yield case("svd diagonal core M=64", svd, 64, 4096, 4096, 4096, dtype, "double", "diagonal")
    yield case("svd dense core M=1", svd, 1, 4096, 4096, 4096, dtype, "double", "dense")
    yield case("svd general banded core M=64", svd, 64, 1001, 1003, 101, dtype, "double", "banded")
    # FP4 shares NF4's code except for quantising.
    yield "bf16 FP4", functools.partial(nf4.quantize, operands.FP4, w)
    yield "bf16 MXFP4", functools.partial(nf4.quantize, operands.MXFP4, w, 32)
    for M in (1, 16):
        yield case(f"MXFP4 M={M}", adapted, M, 4096, 4096, 16, dtype, "mxfp4", few)
    yield case("MXFP4 M=2048 dropout", adapted, 2048, 4096, 4096, 16, dtype, "mxfp4", many, dropout=0.1)
    yield "bf16 int8", functools.partial(nf4.quantize, operands.INT8, w)
    for M in (1, 16):
        yield case(f"int8 M={M}", adapted, M, 4096, 4096, 16, dtype, "int8", few)
    yield case("int8 general", adapted, 17, 1001, 1003, 5, dtype, "int8", few)


def signatures(target: int, dtypes: Iterable[torch.dtype] = tuple(DTYPES)) -> list[Signature]:
    """Every kernel as the launchers start it on a GPU of capability ``target``, without duplicates."""
    assert not interpreted(), "compiling needs TRITON_INTERPRET to be unset"
    found: dict[tuple[Any, ...], Signature] = {}
    for case, run in itertools.chain.from_iterable(_cases(dtype) for dtype in dtypes):
        with recording(Arch(f"sm_{target}", target, TARGETS[target][1])) as launches:
            run()
        for launch in launches:
            s = signature_of(launch, case)
            found.setdefault((s.kernel, s.types, s.constants, s.aligned, s.num_warps, s.num_stages), s)
    return list(found.values())


def compile_signature(signature: Signature, target: int) -> Any:
    """Compile a signature with Triton, through every stage."""
    kernel = getattr(importlib.import_module(f".{signature.module}", __package__), signature.kernel)
    paths: dict[str, tuple[int, ...]] = {}
    for i, (name, kind) in enumerate(signature.types):
        paths[name] = (i,)
        if isinstance(kind, tuple):
            paths |= {f"{name}.{field}": (i, member) for member, field in enumerate(kind._fields)}  # type: ignore[attr-defined]
    source = ASTSource(
        kernel,
        dict(signature.types),
        {paths[name]: value for name, value in signature.constants},
        {paths[name]: [["tt.divisibility", 16]] for name in signature.aligned},
    )
    options = {
        "num_warps": signature.num_warps,
        "num_stages": signature.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_one(signature: Signature, target: int) -> Report:
    """Compile a signature and read its resources from the cubin."""
    compiled = compile_signature(signature, target)
    # Count spill instructions, not the stack frame, which the call of the IEEE division routine needs too.
    usage = disassemble(compiled)
    resources = re.search(r"REG:(\d+)", usage)
    assert resources is not None, usage
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.x]+)", usage, re.MULTILINE)
    loads: dict[int, int] = {}
    matrix: dict[str, int] = {}
    for op in opcodes:
        if op.startswith(("LDG.", "LDGSTS.")):
            width = re.search(r"\.(128|64|U8|S8|U16|S16)\b", op)
            bits = int(width[1].lstrip("US")) if width else 32
            loads[bits] = loads.get(bits, 0) + 1
        elif re.match(r"(HMMA|QGMMA|HGMMA|UTC\w*MMA)", op):
            name = ".".join(op.split(".")[:2])
            matrix[name] = matrix.get(name, 0) + 1
    return Report(
        signature.kernel,
        signature.case,
        target,
        int(resources[1]),
        sum(op.startswith(("LDL", "STL")) for op in opcodes),
        compiled.metadata.shared,
        signature.num_warps,
        " ".join(f"{name}:{matrix[name]}" for name in sorted(matrix)),
        " ".join(f"{bits}b:{loads[bits]}" for bits in sorted(loads, reverse=True)),
    )


def disassemble(compiled: Any) -> str:
    """Resource usage and machine code of a compiled kernel, as cuobjdump writes them."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def compile_all(
    targets: Iterable[int] = tuple(TARGETS),
    dtypes: Iterable[torch.dtype] = tuple(DTYPES),
    workers: int = 2,
    cases: Iterable[str] | None = None,
) -> list[Report]:
    """Compile every signature, or only the signatures of ``cases``, for every target, from ``workers`` processes."""
    wanted = None if cases is None else set(cases)
    jobs = [(s, t) for t in targets for s in signatures(t, dtypes) if wanted is None or s.case in wanted]
    # A forked child would inherit locked mutexes of LLVM and torch without the threads that would release them.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, *zip(*jobs, strict=True), chunksize=4))


HEAD = ("kernel", "case", "target", "regs", "spills", "shared", "warps", "matrix instructions", "loads")


def table(reports: Iterable[Report]) -> str:
    """The reports as an aligned table."""
    rows = [(*HEAD, ""), *((*r.cells, "" if r.fits else "TOO MUCH") for r in reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def digest() -> str:
    """A digest of the kernels, their launchers and the cases here: the same code, whatever its comments, has the same."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()[:16]


def report_head() -> str:
    """The first line of ``static_report.md``: the compiler's version and the code that it compiled."""
    return f"`python -m lowrank_ops.kernels.aot --write`, Triton {triton.__version__}, code {digest()}. See kernels/aot.py."


def report_text(reports: Iterable[Report]) -> str:
    """The text of ``static_report.md``: columns are not aligned, so that a changed line is one line of a diff."""
    lines = [report_head(), ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(r.cells) + " |" for r in reports if r.target in KEPT]
    return "\n".join(lines) + "\n"


def difference(reports: Iterable[Report]) -> str:
    """Diff ``static_report.md`` against these reports of all dtypes, for their targets; empty if they agree.

    A file made by another version of Triton is not compared, because that version generates other code.
    """
    old = REPORT.read_text().splitlines() if REPORT.is_file() else []
    if old and f"Triton {triton.__version__}," not in old[0]:
        return ""
    reports = list(reports)
    other = {f"| sm_{target} |" for target in KEPT} - {f"| sm_{r.target} |" for r in reports}
    old = [line for line in old if not any(target in line for target in other)]
    return "\n".join(difflib.unified_diff(old, report_text(reports).splitlines(), "kept", "compiled", lineterm="", n=0))


def main() -> int:
    """Print the report; return 1 if a kernel does not fit its target or the report in the repository differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, choices=tuple(TARGETS), action="append", help="default: all")
    parser.add_argument(
        "--write", action="store_true", help=f"write {REPORT.name}, from targets {KEPT}, if all that is compiled fits"
    )
    arguments = parser.parse_args()
    targets = KEPT if arguments.write else arguments.target or tuple(TARGETS)
    reports = compile_all(targets)
    if arguments.write:
        others = tuple(target for target in TARGETS if target not in KEPT)
        own = tuple(f" {name}" for name, _ in own_cases(torch.bfloat16) if "experts" not in name)
        reports += compile_all(others, (torch.bfloat16,), cases=["bf16" + case for case in SAMPLE + own])
    print(table(reports))
    bad = sum(not r.fits for r in reports)
    print(f"{len(reports)} compiled, {bad} spill or exceed shared memory")
    if arguments.write and not bad:
        REPORT.write_text(report_text(reports))
    changed = difference(reports) if set(KEPT) <= set(targets) else ""
    if changed:
        print(f"{REPORT.name} is out of date (--write):\n{changed}")
    return bool(bad or changed)


if __name__ == "__main__":
    sys.exit(main())
