"""Every registered op is complete: it has everything that a user and a maintainer need."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_ops as lo
from lowrank_ops import ops, reference
from lowrank_ops.bench import regression
from lowrank_ops.kernels.operands import FORMATS, FP4, MXFP4, NF4, Branch, Core, Matrix
from lowrank_ops.ops import _cpu, _plan

ROOT = Path(__file__).parents[2]


def of_every_format(op: str) -> str:
    """One launcher serves fp4_quantize and its siblings; the format is an argument."""
    prefix, _, rest = op.partition("_")
    return rest if prefix in FORMATS else op


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("lowrank_ops::") for name in names if name.startswith("lowrank_ops::"))


# The schemas are compared as text, because exported programs contain them.
SCHEMAS = {
    "adapted_linear": (
        "(Tensor x, Tensor weight, Tensor? weight_absmax, Tensor? weight_absmax2, Tensor? weight_offset, int "
        "weight_block, int out_features, int rank, Tensor? down, Tensor? down_absmax, Tensor? down_absmax2, "
        "Tensor? down_offset, int down_block, Tensor? up, Tensor? up_absmax, Tensor? up_absmax2, Tensor? "
        "up_offset, int up_block, Tensor? core, Tensor? core_index, Tensor? bias, float scale, float dropout, "
        "Tensor? seed, Tensor? branch_down=None, Tensor? "
        "branch_up=None) -> (Tensor y, Tensor h)"
    ),
    "adapted_linear_backward": (
        "(Tensor g, Tensor? x, Tensor? h, Tensor weight, Tensor? weight_absmax, Tensor? weight_absmax2, Tensor? "
        "weight_offset, int weight_block, int in_features, int rank, Tensor? down, Tensor? down_absmax, Tensor? "
        "down_absmax2, Tensor? down_offset, int down_block, Tensor? up, Tensor? up_absmax, Tensor? up_absmax2, "
        "Tensor? up_offset, int up_block, Tensor? core, Tensor? core_index, float scale, float dropout, Tensor? "
        "seed, bool need_x, bool need_down, bool need_up, bool need_core, Tensor? branch_down=None, Tensor? "
        "branch_up=None) -> (Tensor dx, Tensor ddown, Tensor "
        "dup, Tensor dcore)"
    ),
    "bradley_terry_loss": "(Tensor chosen, Tensor rejected, Tensor? margin, Tensor? labels, float center) -> Tensor",
    "bradley_terry_loss_backward": (
        "(Tensor g, Tensor chosen, Tensor rejected, Tensor? margin, Tensor? labels, float center) -> (Tensor "
        "dchosen, Tensor drejected)"
    ),
    "experts_linear": (
        "(Tensor x, Tensor weight, Tensor? weight_absmax, Tensor? weight_absmax2, Tensor? weight_offset, int "
        "weight_block, Tensor offsets, int out_features, int rank, Tensor? down, Tensor? down_absmax, Tensor? "
        "down_absmax2, Tensor? down_offset, int down_block, Tensor? up, Tensor? up_absmax, Tensor? up_absmax2, "
        "Tensor? up_offset, int up_block, Tensor? core, Tensor? core_index, Tensor? bias, float scale, float "
        "dropout, Tensor? seed, Tensor? branch_down=None, Tensor? "
        "branch_up=None) -> (Tensor y, Tensor h)"
    ),
    "experts_linear_backward": (
        "(Tensor g, Tensor? x, Tensor? h, Tensor weight, Tensor? weight_absmax, Tensor? weight_absmax2, Tensor? "
        "weight_offset, int weight_block, Tensor offsets, int in_features, int rank, Tensor? down, Tensor? "
        "down_absmax, Tensor? down_absmax2, Tensor? down_offset, int down_block, Tensor? up, Tensor? up_absmax, "
        "Tensor? up_absmax2, Tensor? up_offset, int up_block, Tensor? core, Tensor? core_index, float scale, "
        "float dropout, Tensor? seed, bool need_x, bool need_down, bool need_up, bool need_core, "
        "Tensor? branch_down=None, Tensor? branch_up=None) -> (Tensor dx, "
        "Tensor ddown, Tensor dup, Tensor dcore)"
    ),
    "nf4_quantize": "(Tensor w, int block_size) -> (Tensor, Tensor)",
    "absmax_quantize": "(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    "nf4_dequantize": (
        "(Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, int out_features, int in_features, int "
        "block_size, ScalarType dtype) -> Tensor"
    ),
    "routed_linear": (
        "(Tensor x, Tensor weight, Tensor? weight_absmax, Tensor? weight_absmax2, Tensor? weight_offset, int "
        "weight_block, int out_features, Tensor? bias, Tensor arena, Tensor table, Tensor slots, int "
        "capacity=512, Tensor? offsets=None, Tensor? branch_down=None, Tensor? branch_up=None, "
        "Tensor? strengths=None) -> Tensor"
    ),
    "svd_linear": (
        "(Tensor x, Tensor u, Tensor? u_absmax, Tensor? u_absmax2, Tensor? u_offset, int u_block, Tensor core, "
        "Tensor? core_index, Tensor vt, Tensor? vt_absmax, Tensor? vt_absmax2, Tensor? vt_offset, int vt_block, "
        "int out_features, int rank, Tensor? bias) -> (Tensor y, Tensor h)"
    ),
    "svd_linear_backward": (
        "(Tensor g, Tensor? h, Tensor u, Tensor? u_absmax, Tensor? u_absmax2, Tensor? u_offset, int u_block, "
        "Tensor core, Tensor? core_index, Tensor vt, Tensor? vt_absmax, Tensor? vt_absmax2, Tensor? vt_offset, "
        "int vt_block, int in_features, int rank, bool need_x, bool need_core) -> (Tensor dx, Tensor dcore)"
    ),
}


def test_the_list_of_schemas_is_the_list_of_ops() -> None:
    assert registered() == sorted(ops.SCHEMAS)


@pytest.mark.parametrize("op", SCHEMAS)
def test_schemas_stay_as_exported_programs_have_them(op: str) -> None:
    assert ops.SCHEMAS[op] == SCHEMAS[op]
    assert str(getattr(torch.ops.lowrank_ops, op).default._schema) == f"lowrank_ops::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_the_schemas_of_nf4(format: str, op: str) -> None:
    assert ops.SCHEMAS[f"{format}_{op}"] == SCHEMAS[f"nf4_{op}"]


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_flat_arguments_and_operands_are_the_same_thing(op: str) -> None:
    signature, names = ops.SIGNATURES[op], set(ops.SIGNATURES[op].arguments)
    packed, scales = torch.zeros(32, dtype=torch.uint8), tuple(torch.ones(n) for n in (1, 2, 3))
    values: dict[str, list[Any]] = {
        "Matrix": [
            None,
            Matrix(torch.ones(8, 8)),
            Matrix(packed, scales[:1], 64, NF4),
            Matrix(packed, scales, 4096, FP4),
            Matrix(packed, scales[:1], 32, MXFP4),
        ],
        "Core": [None, Core(torch.ones(3)), Core(torch.ones(3), torch.zeros(17, dtype=torch.int32))],
        "Branch": [None, Branch(torch.ones(2, 8), torch.ones(8, 2))],
    }
    for i in range(5):
        operands = [values[o.type][i % len(values[o.type])] if o.type in values else i for o in signature.operands]
        flat = signature.flatten(operands)
        assert len(flat) == len(names)
        assert signature.group(flat) == operands  # tuples compare tensors by identity first


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_every_op_is_whole(op: str) -> None:
    name = f"lowrank_ops::{op}"
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{op} has no {key} implementation"
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel, f"{op} has no fake"
    assert callable(getattr(reference, op, None)), f"{op} has no reference"
    assert {"=", "≈"} & set(inspect.getdoc(getattr(reference, op)) or ""), f"the reference of {op} states no equation"
    assert hasattr(_cpu.module(), of_every_format(op)), f"{op} has no compiled CPU kernel"
    family = ops.FAMILIES[op]
    for folder, name in (("tests", f"test_{family}.py"), ("bench", f"bench_{family}.py")):
        path = next((ROOT / folder).glob(f"*/{name}"), None)
        assert path is not None and op in path.read_text(), f"{op} is not in {folder}/*/{name}"
    assert op in regression.CASES, f"{op} has no case in bench/regression.py"
    assert f"`{op}`" in (ROOT / "docs" / "ops.md").read_text(), f"{op} has no row in docs/ops.md"


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_every_op_has_a_triton_launcher(op: str) -> None:
    """Called like the op, or else `forward` or `backward`: a family has one op and its backward."""
    launchers = _plan.launchers(ops.FAMILIES[op])
    names = (of_every_format(op), "backward" if op.endswith("_backward") else "forward")
    found = next((name for name in names if hasattr(launchers, name)), None)
    assert found, f"kernels/{ops.FAMILIES[op]}.py has no launcher {' or '.join(names)}"
    assert callable(getattr(launchers, found))


def test_public_names_have_docstrings() -> None:
    for name in lo.__all__:
        documented = inspect.getdoc(getattr(lo, name)) or ""
        assert len(documented) > 60, f"lowrank_ops.{name} has no docstring"
