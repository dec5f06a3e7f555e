"""Every Triton kernel compiles for every kind of target, without spills and within its shared memory. Needs no GPU."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from lowrank_ops.bench import decode_variants
from lowrank_ops.kernels import aot, launch, matrix, nf4, operands

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="compiling and interpreting need two processes")
LINES = [
    dict(zip(aot.HEAD, line.strip("| ").split(" | "), strict=True)) for line in aot.REPORT.read_text().splitlines()[4:]
]
# Compiled here again, to see that this machine's compiler gives the lines of the report; `make aot` compiles everything.
AGAIN = (" double M=1", " wide M=16", " routed M=2048", " experts P=8")


def test_the_report_belongs_to_this_code() -> None:
    head = aot.REPORT.read_text().splitlines()[0]
    if f"Triton {aot.triton.__version__}," not in head:
        pytest.skip(f"the report is of another version of Triton: {head}")
    assert head == aot.report_head(), "python -m lowrank_ops.kernels.aot --write"


def test_comments_and_docstrings_do_not_count_as_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "__file__", str(tmp_path / "aot.py"))
    found = []
    for text in ('"""A."""\nx = 1  # a\n', '"""B."""\nx = 1\n', "x = 2\n"):
        (tmp_path / "a.py").write_text(text)
        found.append(aot.digest())
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_every_kernel_fits_its_targets() -> None:
    assert {line["spills"] for line in LINES} == {"0"}
    # Several 16-bit tokens must run on the tensor cores (on Hopper, by wgmma); packed bytes must be loaded 16 at a
    # time.
    checked = set()
    for line in LINES:
        kernel, case, target = line["kernel"], line["case"], line["target"]
        if "double M=" not in case and "wide" not in case or not kernel.startswith("few"):
            continue
        assert "128b" in line["loads"], line
        if kernel == "few_split_kernel" or "wide" in case:
            assert {"sm_80": "HMMA.16816", "sm_90": "HGMMA.64x"}[target] in line["matrix instructions"], line
            checked.add((kernel, case[:4], target))
    for target in ("sm_80", "sm_90"):
        assert {("few_split_kernel", dtype, target) for dtype in ("bf16", "fp16")} <= checked
        assert {(f"few_{way}_kernel", "bf16", target) for way in ("forward", "backward")} <= checked
    reports = aot.compile_all((90,), (torch.bfloat16,), cases=["bf16" + case for case in AGAIN])
    reports += aot.compile_all((120,), (torch.bfloat16,), cases=["bf16" + AGAIN[0]])
    bad = [r for r in reports if not r.fits]
    assert not bad, "\n" + aot.table(bad)
    if aot.triton.__version__ in aot.REPORT.read_text().splitlines()[0]:
        kept = [tuple(line.values()) for line in LINES]
        changed = [r for r in reports if r.target in aot.KEPT and r.cells not in kept]
        assert not changed, "python -m lowrank_ops.kernels.aot --write\n" + aot.table(changed)


def test_every_kernel_is_recorded() -> None:
    defined = set()
    for path in Path(nf4.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        defined |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")}
    found = aot.signatures(90)
    assert {s.kernel for s in found} == defined - {"_probe_kernel"}
    for kernel in ("_few_split_kernel", "_expand_kernel", "_token_sum_kernel"):
        types = {t for s in found if s.kernel == kernel for _, t in s.types if isinstance(t, str)}
        assert {"*bf16", "*fp16", "*fp32"} <= types, kernel


def test_every_kind_of_core_is_recorded() -> None:
    found = aot.signatures(90)
    kinds = {"none", "diagonal", "banded", "sparse", "dense"}
    for kernel in ("_few_forward_kernel", "_few_backward_kernel"):
        assert {dict(s.constants)["core.KIND"] for s in found if s.kernel == kernel} == kinds, kernel
    assert {"none", "sparse", "dense"} <= {
        dict(s.constants)["core.KIND"] for s in found if s.kernel == "_expand_kernel"
    }
    assert {dict(s.constants)["SPARSE"] for s in found if s.kernel == "_core_gradient_kernel"} == {False, True}
    # The size of a core must not specialise a kernel: d = 1 and d = 16 are the same code.
    assert not any("core_size" in dict(s.constants) or "core_size" in s.aligned for s in found)


def _run_ptx(code: str, lanes: int, operands: list[np.ndarray], results: int) -> list[np.ndarray]:
    """Execute inline assembly of Triton for a warp: $0 … are the results, then the operands; registers have 32 bits.

    The instructions follow the PTX ISA, written here independently of the kernels.
    """
    registers = {f"${results + i}": value.astype(np.uint32) for i, value in enumerate(operands)}
    registers["%laneid"] = np.arange(lanes, dtype=np.uint32)

    def read(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(lanes, int(name, 0), np.uint32)

    for op, arguments in re.findall(r"([a-z][a-z0-9.]+)\s+([^;{}]*);", code):
        if op == ".reg" or op.startswith("reg"):
            continue
        target, *names = (name.strip() for name in arguments.split(","))
        a, *others = map(read, names)
        if op in ("mov.b32", "mov.u32"):
            value = a
        elif op == "and.b32":
            value = a & others[0]
        elif op == "or.b32":
            value = a | others[0]
        elif op == "shr.u32":
            value = a >> others[0]
        elif op == "prmt.b32":
            both = a.astype(np.uint64) | others[0].astype(np.uint64) << np.uint64(32)
            value = np.zeros(lanes, np.uint32)
            for byte in range(4):
                selector = others[1] >> np.uint32(4 * byte) & np.uint32(15)
                chosen = (both >> (8 * (selector & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
                sign = np.where(chosen & 128, 255, 0).astype(np.uint32)
                value |= np.where(selector & 8, sign, chosen).astype(np.uint32) << np.uint32(8 * byte)
        elif op == "shfl.sync.idx.b32":
            index, control, members = others
            assert (members == 0xFFFFFFFF).all()
            lane = np.arange(lanes, dtype=np.uint32)
            segment, bound = control >> 8 & 31, control & 31
            last = lane & segment | bound & ~segment
            source = lane & segment | index & 31 & ~segment
            value = a[np.where(source <= last, source, lane)]
        else:
            raise AssertionError(f"not an instruction that this test knows: {op}")
        registers[target] = value.astype(np.uint32)
    return [registers[f"${i}"] for i in range(results)]


LEVELS = np.array(operands.NF4.levels, np.float32)


def test_a_shuffle_looks_up_the_low_nibble_of_any_index() -> None:
    (lane,) = _run_ptx(matrix.LANE.value, 32, [], 1)
    held = LEVELS[lane & 15].view(np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 8192, dtype=np.uint32)
    for index in np.concatenate([np.arange(256, dtype=np.uint32), random]).reshape(-1, 32):
        for shift in range(0, 32, 4):
            shifted = (index.view(np.int32) >> shift).view(np.uint32)  # as the kernels shift, with the sign
            (level,) = _run_ptx(matrix.LOOK_UP.value, 32, [held, shifted], 1)
            assert (level.view(np.float32) == LEVELS[index >> shift & 15]).all()


def test_a_shuffle_of_another_width_would_be_seen() -> None:
    held = LEVELS[np.arange(32) & 15].view(np.uint32)
    held[16:] = 0  # of a whole warp, the upper lanes would be read
    index = np.full(32, 0x13, np.uint32)
    (level,) = _run_ptx(matrix.LOOK_UP.value, 32, [held, index], 1)
    assert (level[:16].view(np.float32) == LEVELS[3]).all() and not level[16:].any()


def test_the_byte_permuting_variant_is_exact() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, 1024, dtype=np.uint32)
    words[:256] = np.arange(256, dtype=np.uint32) * 0x01010101  # every byte in every place
    levels = _run_ptx(decode_variants.PERMUTE.value, len(words), [words], 8)
    for i, level in enumerate(levels):
        assert (level.view(np.float32) == LEVELS[words >> 4 * (i ^ 1) & 15]).all(), i


def test_shuffles_are_what_the_kernels_decode_by() -> None:
    loops = {name: (ops, weights) for name, ops, weights in decode_variants.kernel_loops(90)}
    assert len(loops) == 3
    for name, (ops, weights) in loops.items():
        # One shuffle per weight, and no look-up in memory.
        assert sum(n for op, n in ops.items() if op.startswith("SHFL.IDX")) == weights, name


@pytest.mark.parametrize("weight", ["single", "double"])
@pytest.mark.parametrize("N, K", [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (1001, 1003)])
@pytest.mark.parametrize("M", [1, 2, 3, 16, 64])
def test_launches_of_a_layer(M: int, N: int, K: int, weight: str) -> None:
    def count(*arguments: object, **options: object) -> list[str]:
        with launch.recording(aot.Arch("", 90, 132)) as launches:
            aot._run_adapted(*arguments, ("few",), **options)  # type: ignore[arg-type]
        return [x.kernel.fn.__name__ for x in launches]

    split = K % 64 == 0 and M > 2 and N < 64 * 132
    layers = [(0, "none", "dense"), (16, "none", "dense"), (16, "banded", "dense"), (16, "dense", "dense")]
    layers += [(16, "none", weight), (64, "banded", weight)]
    for R, core, factors in layers:
        names = count(M, N, K, R, torch.bfloat16, weight, core=core, factor_scales=factors)
        forward = names[: 2 if R or split else 1]
        second = "_expand_kernel" if split else "_few_forward_kernel"
        assert forward == (["_few_split_kernel" if split else "_shrink_kernel"] if R or split else []) + [second], names
        if factors != "dense":
            assert names == forward  # no kernel decodes W separately
            continue
        # Backward: the gradients of x, and of each factor and the core by a sum over tokens.
        assert names[len(forward)] in ("_few_split_kernel", "_shrink_kernel", "_few_backward_kernel")


@pytest.mark.parametrize("M", [1, 16, 64])
def test_launches_of_a_layer_without_w(M: int) -> None:
    with launch.recording(aot.Arch("", 90, 132)) as launches:
        aot._run_svd(M, 1024, 4096, 1024, torch.bfloat16, "double", "banded")
    names = [x.kernel.fn.__name__ for x in launches]
    assert names == ["_few_forward_kernel"] * 2 + ["_few_backward_kernel"] * 2 + ["_core_gradient_kernel"]


def test_a_multiprocessor_holds_what_its_limits_say() -> None:
    def warps(target: int, registers: int, shared: int, num_warps: int) -> int:
        return aot.Report("", "", target, registers, 0, shared, num_warps, "", "").warps

    assert warps(80, 32, 0, 4) == 64  # all of them
    assert warps(89, 32, 0, 4) == 48
    assert warps(80, 32, 0, 1) == 32  # 32 blocks
    assert warps(90, 128, 0, 4) == 16  # registers: 65536 / (128 * 32)
    assert warps(90, 121, 0, 4) == 16  # in units of eight a thread
    assert warps(80, 32, 40 * 1024, 4) == 16  # shared memory: four blocks of 41 KiB in 164


def test_a_changed_report_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = aot.Report("_few_forward_kernel", "bf16", 80, 96, 0, 1024, 4, "", "128b:4")
    monkeypatch.setattr(aot, "REPORT", tmp_path / "report.md")
    assert "+| few_forward_kernel | bf16 | sm_80 | 96 |" in aot.difference([report])
    aot.REPORT.write_text(aot.report_text([report]))
    assert aot.difference([report]) == ""
    changed = aot.difference([replace(report, registers=128)])
    assert "-| few_forward_kernel | bf16 | sm_80 | 96 |" in changed and "| 128 |" in changed
    aot.REPORT.write_text(aot.report_text([report]).replace("Triton ", "Triton 0.", 1))
    assert aot.difference([replace(report, registers=128)]) == ""


def test_recording_starts_nothing() -> None:
    with launch.recording(aot.Arch("", 90, 132)) as launches:
        w = torch.empty(64, 64, device="meta")
        nf4.quantize(operands.NF4, w)
    assert [x.kernel.fn.__name__ for x in launches] == ["_quantize_kernel"]
