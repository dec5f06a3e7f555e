"""All formats encode, decode, move, save, load, and compute inside layers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.formats import WEIGHTS, QuantizedWeight
from lowrank_ops.kernels.operands import FORMATS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ABSMAX = ["nf4", "fp4"]  # the formats that bitsandbytes has


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


def codes(weight: QuantizedWeight) -> Tensor:
    packed = weight.packed
    if weight.format.bits == 8:
        return packed.long()
    return torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: weight.numel()].long()


def test_every_format_has_a_class() -> None:
    assert list(WEIGHTS) == list(FORMATS)
    assert all(kind.format is FORMATS[name] for name, kind in WEIGHTS.items())


# ---- encoding and decoding ----


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (17, 96), (5, 4096)], ids=str)
def test_round_trip(kind: type[Any], shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        w = normal(*shape, dtype=dtype)
        w.view(-1)[: w.numel() // 7] = 0
        made = kind.quantize(w)
        assert made.shape == shape and made.dtype == dtype and made.dequantize().dtype == dtype
        blocks = torch.nn.functional.pad(w.float().view(-1), (0, -w.numel() % made.block_size)).view(
            -1, made.block_size
        )
        # Half the widest gap between levels, or the loss of a number that is cut from 8 to 6; double quantisation
        # moves scales too.
        allowed = (blocks.abs().amax(1) * 0.26).repeat_interleave(made.block_size)[: w.numel()] + 0.05
        error = (made.dequantize(torch.float32) - w.float()).abs().view(-1)
        assert (error <= allowed).all()
        assert (made.dequantize(torch.float32)[w == 0].abs() <= 1e-6).all()


def test_decoding_is_exact(kind: type[Any]) -> None:
    made = kind.quantize(normal(64, 96, seed=3) * torch.logspace(-6, 3, 64).unsqueeze(1))
    made.packed.copy_(torch.randint(0, 256, made.packed.shape, dtype=torch.uint8))
    if made.format.exponents:
        scales = torch.exp2(made.exponents.double() - 127)
    elif made.double_quant:
        scales = reference.absmax_dequantize(made.absmax, made.absmax2, made.offset).double()
    else:
        scales = made.absmax.double()
    levels = torch.tensor(made.format.levels, dtype=torch.float32).double()
    exact = (levels[codes(made)] * scales.repeat_interleave(made.block_size)[: made.numel()]).view(made.shape)
    for dtype in DTYPES:
        assert_bits_equal(made.dequantize(dtype), exact.float().to(dtype))


def edges(format: str) -> Tensor:
    """[N, 32]: every threshold between levels, its float32 neighbours, zeros of both signs, and tiny and huge numbers."""
    levels = torch.tensor(FORMATS[format].levels).sort()[0]
    ties = (levels[:-1] + levels[1:]) / 2
    inf = torch.tensor(float("inf"))
    rows = [ties, ties.nextafter(inf), ties.nextafter(-inf), levels]
    rows += [torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e-30, -1e-30, 0.5, -0.5])]
    rows = [torch.nn.functional.pad(row, (1, 31 - len(row)), value=float(levels.max())) for row in rows]
    return torch.stack([row * scale for row in rows for scale in (1.0, -1.0, 3e-39, 1e-20, 0.3, 1e30)] + [rows[0] * 0])


def their_entries(
    w: Tensor, format: str, block_size: int, double_quant: bool, storage: torch.dtype
) -> dict[str, Tensor]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type=format, quant_storage=storage
    )
    return {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ABSMAX)
def test_bytes_equal_bitsandbytes(format: str, double_quant: bool) -> None:
    kind: Any = WEIGHTS[format]
    weights = [edges(format), edges(format)[:, :31]]
    weights += [normal(*shape, dtype=dtype) for shape in [(1, 1), (3, 5), (17, 100), (300, 500)] for dtype in DTYPES]
    for block_size in FORMATS[format].block_sizes:
        for w in weights:
            storage = torch.bfloat16 if w.numel() % 4 == 0 else torch.uint8
            theirs = their_entries(w.contiguous(), format, block_size, double_quant, storage)
            ours = kind.quantize(w, block_size, double_quant)
            ours.storage = storage
            entries = ours.to_bitsandbytes()
            assert set(entries) == set(theirs)
            for key in theirs:
                assert_bits_equal(entries[key], theirs[key])
            loaded = kind.from_bitsandbytes(theirs)
            same(loaded, ours)
            assert loaded.storage == storage


@pytest.mark.parametrize("format", ABSMAX)
def test_decoding_equals_bitsandbytes(format: str) -> None:
    import bitsandbytes.functional as bnb

    for dtype in DTYPES:
        w = normal(33, 70, dtype=dtype)
        packed, state = bnb.quantize_4bit(w, compress_statistics=True, quant_type=format)
        # Adding 0 turns -0 into +0: bitsandbytes decodes FP4's second zero to either, depending on its code path.
        assert_bits_equal(WEIGHTS[format].quantize(w).dequantize() + 0.0, bnb.dequantize_4bit(packed, state) + 0.0)
    assert_bits_equal(torch.tensor(FORMATS[format].levels), bnb.get_4bit_type(format, device="cpu"))


def test_mxfp4_encodes_by_the_rule_of_ocp() -> None:
    # max |w| = 5: the exponent is floor(log2 5) - 2 = 0. Ties take the even mantissa, beyond 6 is 6.
    row = torch.zeros(32)
    for i, (w, expected) in enumerate(
        [(5, 4), (2.5, 2), (3.5, 4), (1.75, 2), (1.25, 1), (0.75, 1), (0.25, 0), (-0.25, -0.0), (-5, -4), (3.1, 3)]
    ):
        row[i] = w
        row[16 + i] = expected
    w, expected = torch.stack([row[:16], row[:16] * 2**-20]), torch.stack([row[16:], row[16:] * 2**-20])
    pad = torch.zeros(2, 16)
    made = lo.MXFP4Weight.quantize(torch.cat([w, pad], 1))
    assert made.exponents.tolist() == [127, 107]
    assert_bits_equal(made.dequantize(torch.float32), torch.cat([expected, pad], 1))
    # 7.9 has the same exponent and is cut to 6; 8 has the next one.
    big = torch.zeros(2, 32)
    big[0, 0], big[1, 0] = 7.9, 8.0
    made = lo.MXFP4Weight.quantize(big)
    assert made.exponents.tolist() == [127, 128] and made.dequantize()[:, 0].tolist() == [6.0, 8.0]
    # Numbers that the format can represent are exact, from the smallest scale to the largest.
    packed = torch.randint(0, 256, (253, 16), dtype=torch.uint8)
    packed[:, 0] = 0x77  # a 6 in each block, which determines the exponent
    made = lo.MXFP4Weight(packed.view(-1), torch.arange(253, dtype=torch.uint8), (253, 32), dtype=torch.float32)
    same(lo.MXFP4Weight.quantize(made.dequantize()), made)


def test_int8_encodes_by_its_rule() -> None:
    # A scale of 1: the bytes are the numbers, half to even, from -127 to 127.
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.4, -127.0, -0.0] + [0.0] * 22)
    made = lo.Int8Weight.quantize(torch.stack([row, row * 2.0**-20, row * 2.0**100, row * 0]), 32)
    expected = torch.tensor([127, 0, 2, 2, 0, -2, 126, -126, -127, 0] + [0] * 22, dtype=torch.int8)
    assert torch.equal(made.packed.view(torch.int8).view(4, 32), torch.stack([expected] * 3 + [expected * 0]))
    w = normal(40, 64, seed=8)
    for double_quant, most in ((False, 1.0 + 1e-5), (True, 40.0)):
        made = lo.Int8Weight.quantize(w, 32, double_quant)
        error = (made.dequantize() - w).view(-1, 32).abs().amax(1)
        assert (error <= most * w.view(-1, 32).abs().amax(1) / 254).all()
    for refused in (made.to_bitsandbytes, lambda: lo.Int8Weight.from_bitsandbytes(made.state_dict())):
        with pytest.raises(TypeError, match="bitsandbytes has no format with signed bytes"):
            refused()
    with pytest.raises(ValueError, match="factors in an arena must be dense or in 4 bits, got int8"):
        update = lo.LowRankUpdate(made, lo.Int8Weight.quantize(w[:, :40].contiguous()))
        lo.functional.routed_linear(w[:2], w, [update], torch.zeros(2, dtype=torch.long))


def test_mxfp4_is_what_transformers_reads_from_gpt_oss() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (48, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (48, 3), dtype=torch.uint8, generator=generator)
    made = lo.MXFP4Weight.from_blocks(blocks, scales)
    assert made.shape == (48, 96) and made.dtype == torch.bfloat16
    for ours, theirs in zip(made.to_blocks(), (blocks, scales), strict=True):
        assert_bits_equal(ours, theirs)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = mxfp4.convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].T
        assert_bits_equal(made.dequantize(dtype), theirs.contiguous())
    # From a file, by name; the layer keeps its dtype, because the file does not store one.
    layer = lo.Linear(96, 48, bias=False, adapter=None, quantize="mxfp4", dtype=torch.float16)
    layer.load_state_dict({"weight_blocks": blocks, "weight_scales": scales})
    assert layer.weight.dtype == torch.float16
    for key, value in layer.state_dict().items():
        assert_bits_equal(value, {"weight_blocks": blocks, "weight_scales": scales}[key])


# ---- copies and files ----


def test_copies_and_files(kind: type[Any], tmp_path: Path) -> None:
    w = kind.quantize(normal(9, 96, dtype=torch.float16))
    same(copy.deepcopy(w), w)
    assert copy.deepcopy(w).packed.data_ptr() != w.packed.data_ptr()
    same(pickle.loads(pickle.dumps(w)), w)
    buffer = io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    same(torch.load(buffer), w)  # weights_only is torch's default
    save_file(w.state_dict(), tmp_path / "w.safetensors")
    other = kind.quantize(normal(9, 96, dtype=torch.float16, seed=5))
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    same(other, w)


def test_moving_and_casting_keep_the_bytes(kind: type[Any]) -> None:
    w = kind.quantize(normal(9, 96))
    before = copy.deepcopy(w)
    for moved in (w.half(), w.to(torch.bfloat16), w.double(), w.to("cpu")):
        same(moved, before)
    meta = copy.deepcopy(w).to("meta")
    assert meta.device.type == "meta" and meta.packed.dtype == torch.uint8
    meta.load_state_dict(w.state_dict(), assign=True)
    same(meta, w)


def test_a_layer_saves_and_loads(kind: type[Any]) -> None:
    name = kind.format.name
    made, other = (lo.Linear(96, 48, adapter=lo.LoRA(4), quantize=name) for _ in range(2))
    assert (
        type(made.weight) is kind and f"weight={name}" in repr(made) and kind.name() in lo.explain(made, normal(2, 96))
    )
    x = normal(3, 96)
    assert str(other.load_state_dict(made.state_dict())) == "<All keys matched successfully>"
    same(other.weight, made.weight)
    assert_bits_equal(other(x), made(x))
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_bits_equal(again(x), made(x))
    before = {key: value.clone() for key, value in made.state_dict().items() if key.startswith("weight")}
    made(x).sum().backward()
    made.to(torch.bfloat16)
    for key, value in before.items():
        assert_bits_equal(made.state_dict()[key], value)
    parent, fresh = nn.Sequential(nn.ReLU(), other), nn.Sequential(nn.ReLU(), lo.Linear(96, 48, True, lo.LoRA(4), name))
    fresh.load_state_dict(parent.state_dict())
    assert_bits_equal(fresh(x), parent(x))
    broken = {k: v for k, v in parent.state_dict().items() if not k.startswith("1.weight")} | {"1.extra": x}
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*1\.weight.*Unexpected.*\"1\.extra\"\. *$"):
        fresh.load_state_dict(broken)


@pytest.mark.parametrize("here", [*FORMATS, None])
@pytest.mark.parametrize("there", [*FORMATS, None])
def test_another_format_is_refused_by_name(here: str | None, there: str | None) -> None:
    layer, other = (lo.Linear(64, 32, adapter=None, quantize=name) for name in (here, there))
    if here == there:
        layer.load_state_dict(other.state_dict())
        return
    names = [(name or "dense") if name is None else name.upper() for name in (there, here)]
    before = {key: value.clone() for key, value in layer.state_dict().items() if key != "bias"}
    with pytest.raises(RuntimeError, match=f"'weight' is {names[0]} in the state dict and {names[1]} here") as raised:
        layer.load_state_dict(other.state_dict())
    assert "nexpected" not in str(raised.value) and "issing" not in str(raised.value)
    for key, value in before.items():
        assert_bits_equal(layer.state_dict()[key], value)
    if here is not None:
        with pytest.raises(RuntimeError, match=f"'weight' is {names[0]} in the state dict and {names[1]} here"):
            layer.weight.load_state_dict(
                {key: value for key, value in other.state_dict().items() if key.startswith("weight")}
            )


@pytest.mark.parametrize("format", ABSMAX)
def test_a_layer_of_bitsandbytes_is_taken_over(format: str) -> None:
    import bitsandbytes

    theirs = bitsandbytes.nn.Linear4bit(96, 48, quant_type=format, compute_dtype=torch.float32)
    model = nn.Sequential(theirs.to("cpu"))
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    lo.adapt(model, lo.LoRA(4))
    assert type(model[0].weight) is WEIGHTS[format]
    for key, value in state.items():
        assert_bits_equal(model[0].state_dict()[key], value)
    fresh = lo.Linear(96, 48, adapter=None, quantize=format)
    fresh.load_state_dict(state)
    same(fresh.weight, model[0].weight)


def test_a_pickle_of_before_the_folder() -> None:
    w = lo.NF4Weight.quantize(normal(4, 64))
    text = pickle.dumps(w, protocol=0).replace(b"lowrank_ops.formats.nf4", b"lowrank_ops.nf4")
    assert b"clowrank_ops.nf4\nNF4Weight" in text
    same(pickle.loads(text), w)


# ---- computing ----


def check_linear(got: Any, inputs: dict[str, Tensor], compute: Any) -> None:
    """Compare the output and the gradients of a layer with float64 and with plain torch."""
    results = []
    for dtype in (torch.float64, None):
        leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
        y = compute(leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), cotangent(y))
        results.append([y.detach(), *grads])
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y = got(leaves)
    made = [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent(y))]
    for mine, exact, plain in zip(made, *results, strict=True):
        assert_within_baseline(mine, exact, plain)


def cotangent(y: Tensor) -> Tensor:
    return normal(*y.shape, seed=9).to(y.dtype)


@pytest.mark.parametrize("M", [1, 3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapted_linear(kind: type[Any], dtype: torch.dtype, M: int) -> None:
    N, K, R = 48, 96, 5
    weight = kind.quantize(normal(N, K, dtype=dtype) * K**-0.5)
    inputs = {"x": normal(M, K, dtype=dtype, seed=1), "down": normal(R, K, dtype=dtype, seed=2) * K**-0.5}
    inputs |= {"up": normal(N, R, dtype=dtype, seed=3)}

    def ours(t: dict[str, Tensor]) -> Tensor:
        return lo.functional.adapted_linear(t["x"], weight, lo.LowRankUpdate(t["down"], t["up"], scale=0.5))

    def plain(t: dict[str, Tensor]) -> Tensor:
        w = weight.dequantize(torch.float32).to(t["x"].dtype)
        return t["x"] @ w.T + 0.5 * (t["x"] @ t["down"].T) @ t["up"].T

    check_linear(ours, inputs, plain)


@pytest.mark.parametrize("M", [1, 33])
def test_svd_linear(kind: type[Any], M: int) -> None:
    N, K, R = 48, 96, 32
    u, vt = kind.quantize(normal(N, R) * R**-0.5), kind.quantize(normal(R, K, seed=1) * K**-0.5)
    inputs = {"x": normal(M, K, seed=2), "values": normal(R, seed=3)}

    def ours(t: dict[str, Tensor]) -> Tensor:
        return lo.functional.svd_linear(t["x"], u, lo.cores.Diagonal(t["values"]), vt)

    def plain(t: dict[str, Tensor]) -> Tensor:
        left, right = (f.dequantize(torch.float32).to(t["x"].dtype) for f in (u, vt))
        return (t["x"] @ right.T * t["values"]) @ left.T

    check_linear(ours, inputs, plain)


@pytest.mark.parametrize("M", [2, 40])
def test_routed_linear(kind: type[Any], M: int) -> None:
    N, K, R = 48, 96, 32
    weight = kind.quantize(normal(N, K) * K**-0.5)
    of = kind if kind.format.bits == 4 else lo.NF4Weight
    packed = lo.LowRankUpdate(of.quantize(normal(R, K) * K**-0.5), of.quantize(normal(N, R) * R**-0.5), scale=0.5)
    dense = lo.LowRankUpdate(normal(3, K, seed=1) * K**-0.5, normal(N, 3, seed=2))
    x, slots = normal(M, K, seed=3), torch.arange(M) % 3 - 1
    got = lo.functional.routed_linear(x, weight, [packed, dense], slots)

    def plain(dtype: torch.dtype) -> Tensor:
        w, deltas = weight.dequantize(torch.float32).to(dtype), [None, packed, dense]
        rows = []
        for row, slot in zip(x.to(dtype), slots.tolist(), strict=True):
            y = w @ row
            if (update := deltas[slot + 1]) is not None:
                down, up = (
                    (f.dequantize(torch.float32) if isinstance(f, QuantizedWeight) else f).to(dtype)
                    for f in (update.down, update.up)
                )
                y = y + update.scale * (up @ (down @ row))
            rows.append(y)
        return torch.stack(rows)

    assert_within_baseline(got, plain(torch.float64), plain(torch.float32))


ADAPTERS = [
    lo.LoRA(4),
    lo.LoRA(4, init="pissa", iterations=2),
    lo.LoRA(4, init="loftq", iterations=3),
    lo.LoRAXS(8),
    lo.SVF(16),
    lo.SVF(form="replace"),
    lo.SVFT(bandwidth=1, rank=16),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_every_kind_of_adapter(kind: type[Any], adapter: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 50))
    dense = copy.deepcopy(model)
    lo.adapt(model, adapter, quantize=kind.format.name)
    x = normal(5, 64)
    replaced = getattr(adapter, "form", "") == "replace"
    for layer, plain in zip((model[0], model[2]), (dense[0], dense[2]), strict=True):
        assert layer.weight is None if replaced else type(layer.weight) is kind
        start = layer.merged_weight(torch.float32)
        decoded = kind.quantize(plain.weight.detach()).dequantize(torch.float32)
        lost = (start - plain.weight).norm()
        if isinstance(adapter, lo.LoRA) and adapter.init in ("pissa", "loftq"):
            # It compensates this format's quantisation error, of which 8 bits leave next to nothing.
            assert lost < (decoded - plain.weight).norm() * (1 if kind.format.bits == 4 else 1.2)
        elif not replaced:
            assert torch.equal(start, decoded)
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in lo.adapter_parameters(model):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
            parameter.add_(normal(*parameter.shape, seed=4), alpha=0.05)
    y = model(x)
    lo.save_adapter(model, tmp_path, factors="stored")
    if not replaced and not (isinstance(adapter, lo.LoRA) and adapter.init != "kaiming"):
        again = lo.adapt(copy.deepcopy(dense), None, quantize=kind.format.name)
        lo.load_adapter(again, tmp_path)
        torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-5)
    merged = lo.merge(model)
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-4)


def test_a_pool_serves_over_it(kind: type[Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = lo.adapt(nn.Sequential(nn.Linear(64, 32)), lo.LoRA(4), quantize=kind.format.name)
    nn.init.normal_(trained[0].up)
    lo.save_adapter(trained, tmp_path / "a")
    served = lo.adapt(nn.Sequential(nn.Linear(64, 32)), None, quantize=kind.format.name)
    served[0].load_state_dict({k: v for k, v in trained[0].state_dict().items() if k not in ("down", "up")})
    pool = lo.AdapterPool(served, capacity_bytes=1 << 20)
    pool.load("a", tmp_path / "a")
    x = normal(2, 64)
    with torch.no_grad(), pool.route(["a", None]):
        y = served(x)
    torch.testing.assert_close(y[0], trained(x)[0].detach())
    torch.testing.assert_close(y[1], torch.nn.functional.linear(x, trained[0].weight.dequantize(), trained[0].bias)[1])


def test_singular_vectors(kind: type[Any]) -> None:
    weight = kind.quantize(normal(96, 64) * 1e-3)
    dense = weight.dequantize(torch.float32)
    for ours, theirs in zip(lo.truncated_svd(weight, 4), lo.truncated_svd(dense, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert dense.abs().max() <= weight.bound() < 16 * dense.abs().max()


def test_compile(kind: type[Any]) -> None:
    weight, x = kind.quantize(normal(16, 64)), normal(3, 64)

    def function(x: Tensor, w: QuantizedWeight) -> Tensor:
        return torch.relu(lo.functional.adapted_linear(x, w)) + w.dequantize(torch.float32).sum()

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x, weight), function(x, weight))


# ---- bad input ----


def test_bad_weight(kind: type[Any]) -> None:
    for error, message, weight in [
        (TypeError, "weight must be a Tensor", [1.0]),
        (TypeError, "weight must be float32.*int32", torch.ones(2, 32, dtype=torch.int32)),
        (ValueError, r"non-empty \[N, K\] or .*, got \[32\]", torch.ones(32)),
        (ValueError, r"non-empty \[N, K\] or .*, got \[0, 32\]", torch.ones(0, 32)),
        (ValueError, "meta device", torch.ones(2, 32, device="meta")),
        (ValueError, "finite", torch.full((2, 32), float("nan"))),
        (ValueError, "finite", torch.tensor([[float("-inf")] + [1.0] * 31])),
        (ValueError, "dense tensor", torch.ones(2, 32).to_sparse()),
    ]:
        with pytest.raises(error, match=message):
            kind.quantize(weight)
    made = kind.quantize(torch.ones(2, 32))
    with pytest.raises(TypeError, match="dtype must be float32"):
        made.dequantize(torch.int8)
    with pytest.raises(TypeError, match=f"{kind.__name__}, whose numbers are packed.*dequantize"):
        nn.functional.linear(torch.ones(1, 32), made)
    _, (packed, *others) = made.__reduce__()
    with pytest.raises(ValueError, match=f"packed of an {kind.name()} weight 2 x 32 .* must be torch.uint8"):
        kind(packed[:-1], *others)


def test_mxfp4_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="K a multiple of 32, got K=40"):
        lo.MXFP4Weight.quantize(torch.ones(2, 40))
    model = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 32))
    with pytest.raises(ValueError, match="layer '1': an MXFP4 weight .* got K=40"):
        lo.adapt(model, lo.LoRA(4), quantize="mxfp4")
    assert type(model[0]) is nn.Linear


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="quantize must be 'nf4', 'fp4', 'mxfp4', 'int8' or None, got 'int4'"):
        lo.Linear(32, 32, quantize="int4")


@pytest.mark.parametrize(
    "message, damage",
    [
        ("Missing.*weight_scales", lambda e: e.pop("weight_scales")),
        ("Missing.*weight_blocks", lambda e: e.pop("weight_blocks")),
        (
            r"weight_blocks.*\[N, K/32, 16\] or .*, got \[8, 2, 15\]",
            lambda e: e.update(weight_blocks=e["weight_blocks"][..., 1:]),
        ),
        (
            r"weight_scales.*scales must be \[8, 2\].*got \[7, 2\]",
            lambda e: e.update(weight_scales=e["weight_scales"][1:]),
        ),
        (
            "blocks must be a uint8 Tensor, got torch.float32",
            lambda e: e.update(weight_blocks=e["weight_blocks"].float()),
        ),
        ("at most 252 .*got 255", lambda e: e["weight_scales"].fill_(255)),
        ("at most 252 .*got 253", lambda e: e["weight_scales"].fill_(253)),
        (r"is \[4, 64\] in the state dict and \[8, 64\] here", lambda e: e.update({k: v[:4] for k, v in e.items()})),
    ],
)
def test_damaged_mxfp4(message: str, damage: Any) -> None:
    weight = lo.MXFP4Weight.quantize(normal(8, 64))
    before = copy.deepcopy(weight)
    entries = {key: value.clone() for key, value in weight.state_dict().items()}
    damage(entries)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        weight.load_state_dict(entries)
    same(weight, before)


@pytest.mark.parametrize("format", ABSMAX)
def test_foreign_tables(format: str) -> None:
    other = "fp4" if format == "nf4" else "nf4"
    weight = WEIGHTS[format].quantize(normal(8, 64))
    entries = {key: value.clone() for key, value in weight.state_dict().items()}
    key = f"weight.quant_state.bitsandbytes__{format}"
    renamed = {k: v for k, v in entries.items() if k != key} | {key.replace(format, other): entries[key]}
    with pytest.raises(RuntimeError, match=f"is {other.upper()} in the state dict and {format.upper()} here"):
        weight.load_state_dict(renamed)
    kind: Any = WEIGHTS[other]
    with pytest.raises(ValueError, match=f"has quant_type '{format}', where .*__{other}' needs '{other}'"):
        kind.from_bitsandbytes(renamed)
    entries["weight.quant_map"] = torch.tensor(FORMATS[other].levels)
    with pytest.raises(RuntimeError, match=f"'weight.quant_map' is not the standard table of {format.upper()}"):
        weight.load_state_dict(entries)


@pytest.mark.parametrize("kind", [lo.NF4Weight, lo.FP4Weight])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("N", [12, 512])
def test_rows_of_a_weight_join_again(kind: Any, double_quant: bool, N: int) -> None:
    weight = kind.quantize(torch.randn(N + 3, 64), 32, double_quant)
    parts = [weight.cut(0, 0, N), weight.cut(0, N, N + 3)]
    assert_bits_equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())
    again = kind.join(parts)
    assert_bits_equal(again.dequantize(), weight.dequantize())
    # With whole groups of 256 blocks the scales stay as they are.
    assert again.double_quant == (double_quant and N == 512)
    other = kind.quantize(torch.randn(3, 64), 32, double_quant)
    joined = kind.join([weight, other])
    assert_bits_equal(joined.dequantize(), torch.cat([weight.dequantize(), other.dequantize()]))
    with pytest.raises(ValueError, match="whole blocks of 64"):
        kind.join([kind.quantize(torch.randn(1, 40))] * 2)
