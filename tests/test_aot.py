"""Every Triton kernel compiles for every target, without spills and within its shared memory. Needs no GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lowrank_ops.kernels import aot, launch, nf4

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="compiling and interpreting need two processes")
# The dtypes share their kernels' structure: all of them on the two main targets, bfloat16 on the others.
FULL = (80, 90)


@pytest.mark.slow
def test_every_kernel_fits_every_target() -> None:
    reports = aot.compile_all(FULL)
    reports += aot.compile_all([t for t in aot.TARGETS if t not in FULL], (torch.bfloat16,))
    bad = [r for r in reports if not r.fits]
    assert not bad, "\n" + aot.table(bad)
    # Few tokens in 16 bits must run on the tensor cores, and packed bytes must be loaded whole words at a time.
    for r in reports:
        if r.kernel in ("_few_forward_kernel", "_few_backward_kernel") and r.case in (
            "bf16 double M=16",
            "fp16 double M=16",
        ):
            assert r.tensor_core > 0, r
            assert "64b" in r.loads or "128b" in r.loads, r


def test_every_kernel_is_recorded() -> None:
    defined = set()
    for path in Path(nf4.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        defined |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")}
    found = aot.signatures(90)
    assert {s.kernel for s in found} == defined - {"_probe_kernel"}
    for kernel in ("_few_forward_kernel", "_few_backward_kernel", "_shrink_kernel", "_token_sum_kernel"):
        types = {t for s in found if s.kernel == kernel for _, t in s.types}
        assert {"*bf16", "*fp16", "*fp32"} <= types, kernel


def test_every_kind_of_core_is_recorded() -> None:
    found = aot.signatures(90)
    kinds = {"none", "diagonal", "banded", "sparse", "dense"}
    for kernel in ("_few_forward_kernel", "_few_backward_kernel"):
        assert {dict(s.constants)["CORE"] for s in found if s.kernel == kernel} == kinds, kernel
    assert {dict(s.constants)["SPARSE"] for s in found if s.kernel == "_core_gradient_kernel"} == {False, True}
    # Sizes of a core must not make a kernel of their own: d = 1 and d = 16 are the same code.
    assert not any("core_size" in dict(s.constants) or "core_size" in s.aligned for s in found)


def test_recording_starts_nothing() -> None:
    with launch.recording(aot.Arch("", 90, 132)) as launches:
        w = torch.empty(64, 64, device="meta")
        nf4.quantize(w)
    assert [x.kernel.fn.__name__ for x in launches] == ["_quantize_kernel"]
