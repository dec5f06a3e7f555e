"""Stacks [E, N, K] of 4-bit weights: each expert has the bytes that it has alone."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.formats import WEIGHTS, QuantizedWeight, from_state_dict
from lowrank_ops.kernels.operands import FORMATS

ABSMAX = [name for name, format in FORMATS.items() if not format.exponents]


@pytest.fixture(params=list(WEIGHTS))
def kind(request: pytest.FixtureRequest) -> type[Any]:
    return WEIGHTS[request.param]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert type(a) is type(b) and (a.shape, a.block_size, a.dtype) == (b.shape, b.block_size, b.dtype)
    for (name, left), (other, right) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert name == other
        assert_bits_equal(left, right)


def test_each_expert_as_if_quantised_alone(kind: type[Any]) -> None:
    # 5 · 96 is a multiple neither of 64 nor of 256 · 64: blocks of both levels would run across experts.
    w = normal(3, 5, 96, dtype=torch.bfloat16) * torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1).bfloat16()
    stack = kind.quantize(w.transpose(1, 2).contiguous().transpose(1, 2))
    assert stack.shape == (3, 5, 96) and stack.numel() == 3 * 5 * 96 and stack.ndim == stack.dim() == 3
    assert stack.experts == 3 and (stack.out_features, stack.in_features) == (5, 96) and "3 x 5 x 96" in repr(stack)
    alone = [kind.quantize(expert) for expert in w]
    assert stack.nbytes == sum(one.nbytes for one in alone) and stack.bound() == max(one.bound() for one in alone)
    for expert, (one, held) in enumerate(zip(alone, stack, strict=True)):
        same(held, one)
        assert held.packed.data_ptr() == stack.packed[expert].data_ptr()
        assert_bits_equal(stack.dequantize()[expert], one.dequantize())
        assert_bits_equal(stack.dequantize(torch.float32)[expert], one.dequantize(torch.float32))
    same(stack[-1], alone[2])
    same(kind.stack(alone), stack)
    same(kind.stack(list(stack)), stack)


@pytest.mark.parametrize("format", ABSMAX)
def test_rows_of_any_length(format: str) -> None:
    kind: Any = WEIGHTS[format]
    w = normal(4, 3, 7)  # an odd number of weights: each expert begins a byte
    for double_quant in (True, False):
        stack = kind.quantize(w, 32, double_quant)
        assert stack.packed.shape == (4, kind.format.bytes_of(21)) and stack.double_quant == double_quant
        for held, expert in zip(stack, w, strict=True):
            same(held, kind.quantize(expert, 32, double_quant))
        again = kind.quantize(w + 1, 32, double_quant)
        again.load_state_dict(stack.state_dict())
        same(again, stack)


def test_copies_and_files(kind: type[Any], tmp_path: Path) -> None:
    stack = kind.quantize(normal(3, 5, 96, dtype=torch.float16))
    other = kind.quantize(normal(3, 5, 96, dtype=torch.float16, seed=5))
    same(copy.deepcopy(stack), stack)
    assert copy.deepcopy(stack).packed.data_ptr() != stack.packed.data_ptr()
    same(pickle.loads(pickle.dumps(stack)), stack)
    buffer = io.BytesIO()
    torch.save(stack, buffer)
    buffer.seek(0)
    same(torch.load(buffer), stack)
    save_file(stack.state_dict(), tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    assert set(state) == set(kind.quantize(normal(5, 96)).state_dict())
    other.load_state_dict(state)
    same(other, stack)
    if kind is not lo.MXFP4Weight:  # whose entries do not hold the dtype
        same(from_state_dict(state, "weight"), stack)
    for moved in (stack.half(), stack.to(torch.bfloat16), stack.double()):
        same(moved, kind.stack(list(stack)))
    meta = copy.deepcopy(stack).to("meta")
    assert meta.shape == (3, 5, 96) and meta.dequantize().is_meta and meta[1].packed.is_meta and meta.state_dict()
    meta.load_state_dict(stack.state_dict(), assign=True)
    same(meta, stack)


def test_mxfp4_has_the_layout_of_gpt_oss() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8, generator=generator)
    stack = lo.MXFP4Weight.from_blocks(blocks, scales)
    assert stack.shape == (2, 6, 96)
    for expert in range(2):
        same(stack[expert], lo.MXFP4Weight.from_blocks(blocks[expert], scales[expert]))
    for got, given in zip(stack.to_blocks(), (blocks, scales), strict=True):
        assert_bits_equal(got, given)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [3, 128])  # 6 or 256 blocks an expert: the second level takes 256
def test_a_parameter_that_bitsandbytes_quantised(double_quant: bool, rows: int) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    layer = nn.Module()
    layer.w = nn.Parameter(normal(3, rows, 128))
    ours = lo.NF4Weight.quantize(layer.w.detach(), double_quant=double_quant)
    replace_parameter_4bit(layer, "w", compress_statistics=double_quant, quant_type="nf4", blocksize=64)
    theirs: Any = {key.replace("w", "weight", 1): value for key, value in layer.state_dict().items()}
    taken = lo.NF4Weight.from_bitsandbytes(theirs)
    assert taken.shape == (3, rows, 128) and taken.double_quant == (double_quant and rows == 128)
    assert_bits_equal(taken.dequantize(), layer.w.detach())
    if not double_quant:
        same(taken, ours)
        entries = ours.to_bitsandbytes()
        assert set(entries) == set(theirs)
        for key, value in theirs.items():
            assert_bits_equal(entries[key], value)


def test_blocks_across_experts_are_refused() -> None:
    entries = lo.NF4Weight.quantize(normal(2, 3, 50), double_quant=False).to_bitsandbytes()
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(entries[key].tolist()))
    del state["expert_blocks"]
    entries[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'weight' is a stack \[2, 3, 50\] whose blocks of 64 run across experts"):
        lo.NF4Weight.from_bitsandbytes(entries)


def test_bad_input(kind: type[Any]) -> None:
    stack, one = kind.quantize(normal(2, 4, 64)), kind.quantize(normal(4, 64))
    with pytest.raises(ValueError, match=r"non-empty \[N, K\] or \[E, N, K\], got \[0, 4, 64\]"):
        kind.quantize(normal(0, 4, 64))
    with pytest.raises(ValueError, match=r"non-empty \[N, K\] or \[E, N, K\], got \[1, 2, 4, 64\]"):
        kind.quantize(normal(1, 2, 4, 64))
    with pytest.raises(ValueError, match="must be finite"):
        kind.quantize(torch.cat([normal(1, 4, 64), torch.full((1, 4, 64), torch.nan)]))
    with pytest.raises(TypeError, match=r"only a stack \[E, N, K\] can be indexed, and this weight is \[4, 64\]"):
        one[0]
    with pytest.raises(IndexError, match="expert 2 of a stack of 2"):
        stack[2]
    with pytest.raises(TypeError, match="index of a stack must be an integer, got slice"):
        stack[:1]
    with pytest.raises(ValueError, match="must hold at least one weight"):
        kind.stack([])
    with pytest.raises(TypeError, match=r"weights\[1\] must be an .*Weight, got Tensor"):
        kind.stack([one, normal(4, 64)])
    with pytest.raises(ValueError, match=r"weights\[0\] must be \[N, K\], got \[2, 4, 64\]"):
        kind.stack([stack])
    with pytest.raises(ValueError, match=r"weights\[1\] is 2 x 64.* but weights\[0\] is 4 x 64"):
        kind.stack([one, kind.quantize(normal(2, 64))])
    with pytest.raises(ValueError, match=r"packed of an .* weight 2 x 4 x 64 .* must be torch.uint8 \[2, \d+\]"):
        kind(
            *(None if b is None else b[:1] for b in stack._buffers.values()), stack.shape, stack.block_size, stack.dtype
        )
    with pytest.raises(RuntimeError, match=r"'weight' is \[2, 4, 64\] in the state dict and \[4, 64\] here"):
        one.load_state_dict(stack.state_dict())
    with pytest.raises(TypeError, match="packed"):
        torch.nn.functional.linear(normal(1, 64), stack)
