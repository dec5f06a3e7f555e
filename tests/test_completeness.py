"""Half-added ops are impossible: every registered op has all that a user and a maintainer need."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import lowrank_ops as lo
from lowrank_ops import ops, reference
from lowrank_ops.bench import regression
from lowrank_ops.ops import _cpu, _plan

ROOT = Path(__file__).parent.parent
# The op family that holds an op, by the prefix of its name.
FAMILY = {
    "nf4": "nf4",
    "absmax": "nf4",
    "adapted_linear": "adapted_linear",
    "svd_linear": "svd_linear",
    "routed_linear": "routed_linear",
    "bradley_terry": "preference",
}


def family(op: str) -> str:
    return next(name for prefix, name in FAMILY.items() if op.startswith(prefix))


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("lowrank_ops::") for name in names if name.startswith("lowrank_ops::"))


def test_the_list_of_schemas_is_the_list_of_ops() -> None:
    assert registered() == sorted(ops.SCHEMAS)


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_every_op_is_whole(op: str) -> None:
    name = f"lowrank_ops::{op}"
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{op} has no {key} implementation"
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel, f"{op} has no fake"
    assert callable(getattr(reference, op, None)), f"{op} has no reference"
    assert {"=", "≈"} & set(inspect.getdoc(getattr(reference, op)) or ""), f"the reference of {op} states no equation"
    assert hasattr(_cpu.module(), op), f"{op} has no compiled CPU kernel"
    for folder, kind in (("tests", "test"), ("bench", "benchmark")):
        path = ROOT / folder / f"{'test' if folder == 'tests' else 'bench'}_{family(op)}.py"
        assert path.is_file() and op in path.read_text(), f"{op} has no {kind} in {path.name}"
    assert op in regression.CASES, f"{op} has no case in bench/regression.py"
    assert f"`{op}`" in (ROOT / "docs" / "ops.md").read_text(), f"{op} has no row in docs/ops.md"


LAUNCHERS = {
    "nf4_quantize": "quantize",
    "absmax_quantize": "absmax_quantize",
    "nf4_dequantize": "dequantize",
    "adapted_linear": "forward",
    "adapted_linear_backward": "backward",
    "svd_linear": "forward",
    "svd_linear_backward": "backward",
    "routed_linear": "forward",
    "bradley_terry_loss": "forward",
    "bradley_terry_loss_backward": "backward",
}


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_every_op_has_a_triton_launcher(op: str) -> None:
    assert callable(getattr(_plan.launchers(family(op)), LAUNCHERS[op]))


def test_public_names_have_docstrings() -> None:
    for name in lo.__all__:
        documented = inspect.getdoc(getattr(lo, name)) or ""
        assert len(documented) > 60, f"lowrank_ops.{name} has no docstring"
