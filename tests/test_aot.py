"""Every Triton kernel compiles for every target, without spills and within its shared memory. Needs no GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lowrank_ops.kernels import adapted_linear, aot, launch, nf4

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
    for module in (nf4, adapted_linear):
        tree = ast.parse(Path(module.__file__).read_text())
        defined |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")}
    found = aot.signatures(90)
    assert {s.kernel for s in found} == defined
    for kernel in defined - {"_absmax_quantize_kernel", "_quantize_kernel", "_dequantize_kernel", "_sum_splits_kernel"}:
        types = {t for s in found if s.kernel == kernel for _, t in s.types}
        assert {"*bf16", "*fp16", "*fp32"} <= types or kernel == "_expand_kernel", kernel


def test_recording_starts_nothing() -> None:
    with launch.recording(aot.Arch("", 90, 132)) as launches:
        w = torch.empty(64, 64, device="meta")
        nf4.quantize(w)
    assert [x.kernel.fn.__name__ for x in launches] == ["_quantize_kernel"]
