"""NF4Weight: the bytes against bitsandbytes, every shape, and how it moves, saves and loads."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_bits_equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.kernels.operands import FORMATS, FP4, Format
from lowrank_ops.ops import _cpu, _plan

SHAPES = [(1, 1), (1, 2), (3, 5), (64, 64), (7, 33), (17, 100), (5, 4096), (129, 257)]
BLOCK_SIZES = [32, 64, 128, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w.view(-1)[: w.numel() // 7] = 0  # blocks of zeros, too
    return w.to(dtype)


def bitsandbytes_entries(w: torch.Tensor, block_size: int, double_quant: bool, storage: torch.dtype = torch.uint8):  # type: ignore[no-untyped-def]
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    )
    return {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bytes_equal_bitsandbytes(block_size: int, double_quant: bool) -> None:
    for shape in [*SHAPES, (300, 1000)]:
        for dtype in DTYPES:
            w = weight(shape, dtype)
            theirs = bitsandbytes_entries(w, block_size, double_quant)
            ours = lo.NF4Weight.quantize(w, block_size, double_quant).to_bitsandbytes()
            assert list(ours) == [k for k in theirs if k in ours] and set(ours) == set(theirs)
            for key in theirs:
                assert_bits_equal(ours[key], theirs[key])


def test_bytes_equal_bitsandbytes_on_a_large_weight() -> None:
    w = weight((1024, 2048), torch.bfloat16, seed=1)
    theirs = bitsandbytes_entries(w, 64, True)
    ours = lo.NF4Weight.quantize(w).to_bitsandbytes()
    for key in theirs:
        assert_bits_equal(ours[key], theirs[key])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_bitsandbytes_entries_survive_both_ways(storage: torch.dtype) -> None:
    w = weight((64, 96), torch.bfloat16)
    for double_quant in (True, False):
        theirs = {f"q.{k}": v for k, v in bitsandbytes_entries(w, 64, double_quant, storage).items()}
        loaded = lo.NF4Weight.from_bitsandbytes(theirs, "q.")
        again = loaded.to_bitsandbytes("q.")
        assert set(again) == set(theirs)
        for key in theirs:
            assert_bits_equal(again[key], theirs[key])
        assert_bits_equal(loaded.dequantize(), lo.NF4Weight.quantize(w, 64, double_quant).dequantize())


def test_dequantize_equals_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    for dtype in DTYPES:
        w = weight((33, 70), dtype)
        packed, state = bnb.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
        assert_bits_equal(lo.NF4Weight.quantize(w).dequantize(), bnb.dequantize_4bit(packed, state))


def test_tables_equal_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    assert_bits_equal(reference.nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))
    assert_bits_equal(reference.dynamic_code(), bnb.create_dynamic_map())
    assert_bits_equal(reference.levels(FP4), bnb.get_4bit_type("fp4", device="cpu"))


def of_every_kind() -> torch.Tensor:
    """Every tie between levels of every format and its neighbours, zeros of both signs, tiny and huge numbers."""
    parts = [torch.zeros(64), -torch.zeros(64)]
    for format in FORMATS.values():
        levels = reference.levels(format).sort()[0]
        ties = (levels[:-1] + levels[1:]) / 2
        near = torch.cat([ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-9.0)), levels, -levels])
        for size in (1.0, 0.7, 2.0**-126, 2.0**-140, 2.0**120):
            block = torch.cat([near[:63], levels.abs().max().view(1)])
            parts += [size * block, size * -block]
    return torch.cat(parts)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_fp4_quantize_makes_the_bytes_of_bitsandbytes(block_size: int) -> None:
    import bitsandbytes.functional as bnb

    for w in (of_every_kind(), *(weight(shape, dtype) for shape in SHAPES for dtype in DTYPES)):
        theirs, state = bnb.quantize_4bit(w, blocksize=block_size, compress_statistics=False, quant_type="fp4")
        with lo.implementation("reference"):
            packed, absmax = torch.ops.lowrank_ops.fp4_quantize(w, block_size)
            decoded = torch.ops.lowrank_ops.fp4_dequantize(
                packed, absmax, None, None, 1, w.numel(), block_size, torch.float32
            )
        assert_bits_equal(packed, theirs.view(-1))
        assert_bits_equal(absmax, state.absmax)
        # bitsandbytes' formula; its CPU kernel uses wrong blocks for some shapes, see docs/ops.md.
        nibbles = torch.stack([theirs.view(-1) >> 4, theirs.view(-1) & 15], 1).view(-1)[: w.numel()].long()
        scales = state.absmax.repeat_interleave(block_size)[: w.numel()]
        assert_bits_equal(decoded.view(-1), bnb.get_4bit_type("fp4", device="cpu")[nibbles] * scales)


def test_mxfp4_quantize_follows_the_rule_of_ocp() -> None:
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for w in (of_every_kind(), *(weight(shape, dtype) for shape in SHAPES for dtype in DTYPES)):
        with lo.implementation("reference"):
            packed, exponents = torch.ops.lowrank_ops.mxfp4_quantize(w, 32)
        bytes_, flat = packed.tolist(), w.flatten().tolist()
        for b in range(0, len(flat), 32):
            block = flat[b : b + 32]
            largest = max(map(abs, block))
            exponent = max(-127, math.frexp(largest)[1] - 1 - 2) if largest else -127
            assert exponents[b // 32] == exponent + 127
            for i, number in enumerate(block, b):
                nibble = bytes_[i // 2] >> (0 if i % 2 else 4) & 15
                scaled = Fraction(abs(number)) / Fraction(2) ** exponent
                # The nearest level; a tie goes to the even mantissa, which has the even nibble.
                expected = min(range(8), key=lambda n: (abs(Fraction(sizes[n]) - scaled), n % 2))
                assert nibble == expected + 8 * (math.copysign(1, number) < 0), (number, exponent)


def test_int8_quantize_follows_its_rule() -> None:
    for w in (of_every_kind(), *(weight(shape, dtype) for shape in SHAPES for dtype in DTYPES)):
        with lo.implementation("reference"):
            data, scales = torch.ops.lowrank_ops.int8_quantize(w, 64)
            decoded = torch.ops.lowrank_ops.int8_dequantize(data, scales, None, None, 1, w.numel(), 64, torch.float32)
        flat, signed = w.flatten().float().numpy(), data.view(torch.int8).numpy()
        for b in range(0, len(flat), 64):
            block = flat[b : b + 64]
            largest = np.maximum(np.abs(block).max(), np.float32(2.0**-119))
            expected = np.rint(block * (np.float32(127) / largest))
            assert (signed[b : b + 64] == expected).all() and np.abs(expected).max() <= 127
            scale = largest / np.float32(127)
            assert float(scales[b // 64]) == scale and (decoded[0, b : b + 64].numpy() == expected * scale).all()


def test_mxfp4_marks_blocks_that_are_not_finite() -> None:
    w = torch.ones(4, 32)
    w[1, 3], w[2, 0], w[3, 31] = torch.nan, torch.inf, -torch.inf
    with lo.implementation("reference"):
        packed, exponents = torch.ops.lowrank_ops.mxfp4_quantize(w, 32)
        decoded = torch.ops.lowrank_ops.mxfp4_dequantize(packed, exponents, None, None, 4, 32, 32, torch.float32)
    assert exponents.tolist() == [125, 255, 255, 255]
    assert torch.equal(decoded[0], w[0]) and decoded[1:].isnan().all()


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_every_format_on_the_device_is_the_reference_bit_for_bit(format: Format, device: torch.device) -> None:
    quantize, dequantize = (getattr(torch.ops.lowrank_ops, f"{format.name}_{op}") for op in ("quantize", "dequantize"))
    block_size = format.block_sizes[0]
    few = device.type == "cpu" and _plan.interpreted()
    for w in (of_every_kind(), *(weight(shape) for shape in (SHAPES[:4] if few else SHAPES))):
        with lo.implementation("reference"):
            packed, scales = quantize(w, block_size)
            decoded = dequantize(packed, scales, None, None, 1, w.numel(), block_size, torch.float32)
        got = quantize(w.to(device), block_size)
        assert_bits_equal(got[0].cpu(), packed)
        assert_bits_equal(got[1].cpu(), scales)
        parts = packed.to(device), scales.to(device), None, None, 1, w.numel(), block_size
        assert_bits_equal(dequantize(*parts, torch.float32).cpu(), decoded)
        assert_bits_equal(dequantize(*parts, torch.float16).cpu(), decoded.half())
    torch.library.opcheck(quantize.default, (w.to(device), block_size))
    torch.library.opcheck(dequantize.default, (*parts, torch.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_and_dequantize(shape: tuple[int, int], block_size: int, device: torch.device) -> None:
    for dtype in DTYPES[:: 2 if device.type == "cpu" and _plan.interpreted() else 1]:
        w = weight(shape, dtype)
        packed, absmax = torch.ops.lowrank_ops.nf4_quantize(w.to(device), block_size)
        expected_packed, expected_absmax = reference.nf4_quantize(w, block_size)
        assert_bits_equal(absmax.cpu(), expected_absmax)
        if device.type == "cuda":  # the GPU's reciprocal may move an element that lies on a threshold
            assert (packed.cpu() != expected_packed).float().mean() < 1e-4
            packed = expected_packed.to(device)
        assert_bits_equal(packed.cpu(), expected_packed)
        offset = expected_absmax.mean()
        index, absmax2 = reference.absmax_quantize(expected_absmax, offset)
        for out in (torch.float32, torch.float16) if _plan.interpreted() else DTYPES:
            for scales in ((expected_absmax, None, None), (index, absmax2, offset)):
                moved = [None if s is None else s.to(device) for s in scales]
                got = torch.ops.lowrank_ops.nf4_dequantize(packed, *moved, *shape, block_size, out)
                assert_bits_equal(
                    got.cpu(), reference.nf4_dequantize(expected_packed, *scales, *shape, block_size, out)
                )


def test_absmax_quantize(device: torch.device) -> None:
    for blocks in (1, 255, 256, 257, 5000):
        absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) + 0.01
        offset = absmax.mean()
        index, absmax2 = torch.ops.lowrank_ops.absmax_quantize(absmax.to(device), offset.to(device))
        expected, expected2 = reference.absmax_quantize(absmax, offset)
        assert_bits_equal(absmax2.cpu(), expected2)
        if device.type == "cpu" and not _plan.interpreted():
            assert_bits_equal(index, expected)
        else:  # the nearest level, as bitsandbytes chooses on a GPU, not the nearest point of a grid
            assert (index.cpu().int() - expected.int()).abs().max() <= 1
            assert (index.cpu() != expected).float().mean() < 0.01


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    block_size=st.sampled_from(BLOCK_SIZES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_weight(shape: tuple[int, int], block_size: int, scale: float, seed: int, device: torch.device) -> None:
    if device.type == "cuda":
        return
    w = weight(shape, seed=seed) * scale
    packed, absmax = torch.ops.lowrank_ops.nf4_quantize(w, block_size)
    expected = reference.nf4_quantize(w, block_size)
    assert_bits_equal(packed, expected[0])
    assert_bits_equal(absmax, expected[1])
    got = torch.ops.lowrank_ops.nf4_dequantize(packed, absmax, None, None, *shape, block_size, torch.float32)
    assert_bits_equal(got, reference.nf4_dequantize(packed, absmax, None, None, *shape, block_size, torch.float32))


def test_every_instruction_set(isa: str) -> None:
    for shape in SHAPES:
        for block_size in BLOCK_SIZES:
            for dtype in DTYPES:
                w = weight(shape, dtype)
                nf4 = lo.NF4Weight.quantize(w, block_size)
                packed, absmax = reference.nf4_quantize(w, block_size)
                index, absmax2 = reference.absmax_quantize(absmax, absmax.mean())
                for mine, theirs in ((nf4.packed, packed), (nf4.absmax, index), (nf4.absmax2, absmax2)):
                    assert_bits_equal(mine, theirs)
                expected = reference.nf4_dequantize(packed, index, absmax2, absmax.mean(), *shape, block_size, dtype)
                assert_bits_equal(nf4.dequantize(dtype), expected)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("format", [FORMATS["nf4"], FP4], ids=lambda format: format.name)
def test_numbers_at_a_threshold(format: Format, block_size: int, isa: str) -> None:
    levels = torch.tensor(sorted(format.levels))
    middles = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (-math.inf, math.inf)]
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 0.5, 1 / 32768, -1 / 32768, 0.99999])
    numbers = torch.cat([middles, *near, levels, special]).repeat(3)
    numbers = numbers[: numbers.numel() // (block_size - 1) * (block_size - 1)].view(-1, block_size - 1)
    w = torch.cat([numbers, torch.ones(len(numbers), 1)], dim=1)  # the scale of every block is 1
    for scale in (1.0, 3.0, 2.0**-120, 2.0**120):
        got = _cpu.quantize(format, w * scale, block_size)
        for mine, expected in zip(got, reference.quantize(format, w * scale, block_size), strict=True):
            assert_bits_equal(mine, expected)


def test_the_compiled_tables_are_the_references() -> None:
    # One-hot bytes show every level, one-hot indices every entry of the dynamic map.
    packed = torch.arange(16, dtype=torch.uint8) * 17
    got = torch.ops.lowrank_ops.nf4_dequantize(packed, torch.ones(1), None, None, 16, 2, 32, torch.float32)
    assert_bits_equal(got[:, 0].contiguous(), reference.nf4_code())
    index = torch.arange(256, dtype=torch.uint8)
    ones = torch.full((256 * 16,), 255, dtype=torch.uint8)
    got = torch.ops.lowrank_ops.nf4_dequantize(
        ones, index, torch.ones(1), torch.tensor(0.0), 256, 32, 32, torch.float32
    )
    assert_bits_equal(got[:, 0] + 0.0, reference.dynamic_code() + 0.0)


@pytest.mark.parametrize("schema", ["nf4_quantize", "absmax_quantize", "nf4_dequantize"])
def test_opcheck(schema: str, device: torch.device) -> None:
    w = weight((6, 70)).to(device)
    packed, absmax = torch.ops.lowrank_ops.nf4_quantize(w, 64)
    arguments = {
        "nf4_quantize": (w, 64),
        "absmax_quantize": (absmax, absmax.mean()),
        "nf4_dequantize": (packed, absmax, None, None, 6, 70, 64, torch.float32),
    }[schema]
    torch.library.opcheck(getattr(torch.ops.lowrank_ops, schema).default, arguments)


def test_attributes() -> None:
    w = lo.NF4Weight.quantize(weight((48, 128), torch.bfloat16))
    assert w.shape == (48, 128) and w.block_size == 64 and w.double_quant and w.dtype == torch.bfloat16
    assert w.nbytes == 48 * 128 // 2 + 96 + 4 + 4
    assert lo.NF4Weight.quantize(weight((48, 128)), double_quant=False).nbytes == 48 * 128 // 2 + 4 * 96
    assert not list(w.parameters()) and "48 x 128" in repr(w)
    big = lo.NF4Weight.quantize(weight((512, 1024)))
    assert 8 * big.nbytes / (512 * 1024) == pytest.approx(4.127, abs=1e-3)


def same(a: lo.NF4Weight, b: lo.NF4Weight) -> None:
    assert (a.shape, a.block_size, a.dtype, a.storage) == (b.shape, b.block_size, b.dtype, b.storage)
    for (key, left), (other, right) in zip(a.to_bitsandbytes().items(), b.to_bitsandbytes().items(), strict=True):
        assert key == other
        assert_bits_equal(left, right)


@pytest.mark.parametrize("double_quant", [True, False])
def test_copies_and_files(double_quant: bool, tmp_path: Path) -> None:
    w = lo.NF4Weight.quantize(weight((9, 70), torch.float16), double_quant=double_quant)
    same(copy.deepcopy(w), w)
    assert copy.deepcopy(w).packed.data_ptr() != w.packed.data_ptr()
    same(pickle.loads(pickle.dumps(w)), w)
    buffer = io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    same(torch.load(buffer), w)  # weights_only is torch's default
    save_file(w.to_bitsandbytes("l."), tmp_path / "w.safetensors")
    same(lo.NF4Weight.from_bitsandbytes(load_file(tmp_path / "w.safetensors"), "l."), w)
    other = lo.NF4Weight.quantize(weight((9, 70), torch.float16, seed=5), double_quant=double_quant)
    other.load_state_dict(w.state_dict())
    same(other, w)


def test_moving_and_casting_keep_the_bytes() -> None:
    w = lo.NF4Weight.quantize(weight((9, 70)), double_quant=False)
    before = copy.deepcopy(w)
    for moved in (w.half(), w.to(torch.bfloat16), w.double(), w.to("cpu")):
        same(moved, before)
    meta = copy.deepcopy(w).to("meta")
    assert meta.device.type == "meta" and meta.packed.dtype == torch.uint8
    meta.load_state_dict(w.state_dict(), assign=True)
    same(meta, w)


def test_strided_entries_of_a_checkpoint() -> None:
    w = lo.NF4Weight.quantize(weight((9, 70)), double_quant=False)
    entries = {key: torch.stack([v, v], dim=-1)[..., 0] if v.dim() else v for key, v in w.to_bitsandbytes().items()}
    assert not entries["weight.absmax"].is_contiguous()
    same(lo.NF4Weight.from_bitsandbytes(entries), w)


def test_compile() -> None:
    w = lo.NF4Weight.quantize(weight((16, 64)))
    x = torch.randn(3, 64)

    def function(x: torch.Tensor, w: lo.NF4Weight) -> torch.Tensor:
        return torch.relu(lo.functional.adapted_linear(x, w)) + w.dequantize(torch.float32).sum()

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x, w), function(x, w))


def test_torch_functions_refuse_it_by_name() -> None:
    with pytest.raises(TypeError, match="packed.*dequantize"):
        torch.nn.functional.linear(torch.randn(2, 64), lo.NF4Weight.quantize(weight((4, 64))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "weight must be a Tensor", ([1.0],)),
        (TypeError, "weight must be float32.*int32", (torch.ones(2, 2, dtype=torch.int32),)),
        (TypeError, "weight must be float32.*float64", (torch.ones(2, 2, dtype=torch.float64),)),
        (ValueError, r"non-empty \[N, K\] or .*, got \[4\]", (torch.ones(4),)),
        (ValueError, r"non-empty \[N, K\] or .*, got \[0, 4\]", (torch.ones(0, 4),)),
        (ValueError, "meta device", (torch.ones(2, 2, device="meta"),)),
        (ValueError, "finite", (torch.tensor([[1.0, float("nan")]]),)),
        (ValueError, "finite", (torch.tensor([[1.0, float("-inf")]]),)),
        (ValueError, "block_size must be one of 32.*got 48", (torch.ones(2, 2), 48)),
        (ValueError, "block_size must be one of 32.*got 8192", (torch.ones(2, 2), 8192)),
        (ValueError, "block_size must be one of 32.*got 64.0", (torch.ones(2, 2), 64.0)),
        (ValueError, "dense tensor", (torch.ones(2, 2).to_sparse(),)),
        (ValueError, "absmax2 of an NF4 weight must be finite", (torch.full((256, 256), 3e38),)),
    ],
)
def test_bad_weight(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        lo.NF4Weight.quantize(*arguments)


def test_dequantize_to_a_foreign_dtype() -> None:
    with pytest.raises(TypeError, match="dtype must be float32"):
        lo.NF4Weight.quantize(weight((4, 64))).dequantize(torch.int8)


def _edit_state(entries: dict[str, torch.Tensor], **changes: object) -> None:
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(entries[key].tolist())) | changes
    entries[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "message, damage",
    [
        ("lacks 'weight.absmax'", lambda e: e.pop("weight.absmax")),
        ("lacks 'weight'", lambda e: e.pop("weight")),
        ("lacks 'weight.nested_absmax'", lambda e: e.pop("weight.nested_absmax")),
        ("lacks 'weight.quant_state", lambda e: e.pop("weight.quant_state.bitsandbytes__nf4")),
        ("packed of an NF4 weight", lambda e: e.update({"weight": e["weight"][:-1]})),
        ("absmax of an NF4 weight", lambda e: e.update({"weight.absmax": e["weight.absmax"].float()})),
        ("not the standard table", lambda e: e["weight.quant_map"].add_(0.01)),
        ("quant_type 'int4'", lambda e: _edit_state(e, quant_type="int4")),
        ("block_size must be one of", lambda e: _edit_state(e, blocksize=63)),
        ("is not a bitsandbytes quant_state", lambda e: _edit_state(e, shape=None)),
        ("quantised from torch.int8", lambda e: _edit_state(e, dtype="int8")),
        ("is not a bitsandbytes quant_state", lambda e: _edit_state(e, shape=[8.5, 64])),
        ("offset of an NF4 weight must be finite", lambda e: _edit_state(e, nested_offset=float("nan"))),
        ("nested_blocksize 128", lambda e: _edit_state(e, nested_blocksize=128)),
        ("is FP4", lambda e: e.update({"weight.quant_state.bitsandbytes__fp4": torch.zeros(1)})),
        (
            "is not a bitsandbytes quant_state",
            lambda e: e.update({"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        ),
    ],
)
def test_damaged_checkpoint(message: str, damage) -> None:  # type: ignore[no-untyped-def]
    w = lo.NF4Weight.quantize(weight((8, 64)))
    entries = {key: value.clone() for key, value in w.to_bitsandbytes().items()}
    damage(entries)
    with pytest.raises(ValueError, match=message):
        lo.NF4Weight.from_bitsandbytes(entries)
    before = copy.deepcopy(w)
    with pytest.raises(RuntimeError):
        w.load_state_dict(entries)
    same(w, before)
