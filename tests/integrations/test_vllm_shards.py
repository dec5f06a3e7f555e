"""What the plugin of vLLM does without vLLM: parts of matrices, checkpoints, joined weights, and adapters in slots."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal, assert_within_baseline
from models import perturb, random_branch

import lowrank_ops as lo
from lowrank_ops.formats import FP4Weight, NF4Weight
from lowrank_ops.integrations.vllm import VERSIONS, unsupported
from lowrank_ops.integrations.vllm.shards import (
    Carrier,
    Part,
    Shard,
    ShardedLinear,
    gather,
    join,
    take_matrix,
    whole_of,
)
from lowrank_ops.integrations.vllm.slots import Slots

KINDS: list[Any] = [lo.LoRA(4, alpha=8), lo.LoRAXS(5), lo.SVF(rank=9), lo.SVFT("banded", bandwidth=2, rank=11)]
OVER_DENSE: list[Any] = [lo.LoRA(4, alpha=8, init="pissa"), lo.LoRA(3, init="milora"), lo.LoRAXS(5), lo.SVF(rank=9)]
NAMES = ("attention.q", "attention.k")


def matrix(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def test_other_versions_of_vllm_are_refused() -> None:
    assert all(unsupported(version) is None and unsupported(f"{version}+cpu") is None for version in VERSIONS)
    for version in ("0.33.0", "0.3.2", "dev"):
        assert version in str(unsupported(version))


@pytest.mark.parametrize("double", [True, False])
def test_parts_have_the_numbers_of_the_whole_matrix(double: bool) -> None:
    W = matrix(96, 128)
    weight = NF4Weight.quantize(W, double_quant=double)
    whole = weight.dequantize()
    for rows, columns in (
        (((0, 48),), (0, 128)),
        (((48, 96),), (0, 128)),
        (((0, 96),), (64, 128)),
        (((16, 32), (48, 64), (80, 96)), (0, 128)),  # q, k and v of one process, which the file has in one matrix
    ):
        part = Part((96, 128), rows, columns)
        expected = torch.cat([whole[begin:end] for begin, end in rows])[:, slice(*columns)]
        taken, dense = part.take(weight), part.take(whole)
        assert isinstance(taken, NF4Weight) and isinstance(dense, torch.Tensor)
        assert_bits_equal(taken.dequantize(), expected)
        assert_bits_equal(dense, expected)
        assert_bits_equal(part.up(W[:, :3]) @ part.down(W[:3]), (W[:, :3] @ W[:3])[torch.cat([torch.arange(*r) for r in rows])][:, slice(*columns)])  # fmt: skip  # noqa: E501
    assert Part.of_rows((96, 128), [(0, 32), (32, 96)]).take(weight) is weight
    with pytest.raises(ValueError, match="columns 0 to 31 of a weight 96 x 128 are not whole blocks of 64 weights"):
        Part((96, 128), ((0, 96),), (0, 32)).take(weight)


def test_checkpoints_give_weights_with_the_bytes_of_the_files() -> None:
    weights = {
        "a.weight": NF4Weight.quantize(matrix(48, 64)),
        "b.weight": NF4Weight.quantize(matrix(16, 64), double_quant=False),
        "c.weight": FP4Weight.quantize(matrix(16, 64)),
    }
    plain = {"norm.weight": torch.ones(64), "column.weight": torch.ones(5, 1), "head.weight": matrix(8, 64)}
    entries = [
        (key, t) for name, w in weights.items() for key, t in w.to_bitsandbytes(name.removesuffix("weight")).items()
    ]
    mixed = [*reversed(entries), *plain.items()]  # the entries of a weight may be in several files
    got = dict(gather(mixed))
    assert got.keys() == weights.keys() | plain.keys()
    for name, weight in weights.items():
        held = got[name]
        assert type(held) is type(weight) and held.double_quant == weight.double_quant
        for key, buffer in weight.named_buffers():
            assert_bits_equal(getattr(held, key), buffer)
    assert all(got[name] is tensor for name, tensor in plain.items())
    with pytest.raises(ValueError, match=r"b.weight.*lacks 'b.weight.absmax'"):
        list(gather([entry for entry in entries if entry[0] != "b.weight.absmax"]))


def test_joined_weights_are_views_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [NF4Weight.quantize(matrix(N, 64, N)) for N in (48, 16, 16)]
    whole, views = join(weights)
    assert isinstance(whole, NF4Weight) and not whole.double_quant
    assert_bits_equal(whole.dequantize(), torch.cat([w.dequantize() for w in weights]))
    for view, weight in zip(views, weights, strict=True):
        assert isinstance(view, NF4Weight)
        assert_bits_equal(view.dequantize(), weight.dequantize())
        assert view.packed.untyped_storage().data_ptr() == whole.packed.untyped_storage().data_ptr()
    # One offset, and whole groups of scales: the bytes stay.
    large = NF4Weight.quantize(matrix(512, 64))
    halves = [large.cut(0, 0, 256), large.cut(0, 256, 512)]
    whole, views = join(halves)
    assert isinstance(whole, NF4Weight) and whole.double_quant
    assert_bits_equal(whole.absmax, large.absmax)
    assert all(isinstance(view, NF4Weight) for view in views)
    assert_bits_equal(torch.cat([view.dequantize() for view in views]), large.dequantize())  # type: ignore[union-attr]
    # Large matrices keep their 8-bit scales.
    monkeypatch.setattr("lowrank_ops.integrations.vllm.shards._JOINED", 1000)
    assert join(weights) == (None, weights)
    dense = [matrix(4, 6), matrix(2, 6)]
    whole, views = join(dense)
    assert isinstance(whole, torch.Tensor) and torch.equal(whole, torch.cat(dense)) and len(views) == 2
    assert join([weights[0], dense[0]]) == (None, [weights[0], dense[0]])


def layer_of(shapes: dict[str, tuple[int, int]], dense: bool = False, branch: bool = False) -> ShardedLinear:
    shards = []
    for seed, (name, shape) in enumerate(shapes.items()):
        W = matrix(*shape, seed) / 8
        weight = W if dense else NF4Weight.quantize(W)
        part = Part(shape, ((0, shape[0]),), (0, shape[1]))
        shards.append(Shard(name, part, weight, random_branch(*shape, seed=seed) if branch else None))
    return ShardedLinear(shards)


@pytest.mark.parametrize("branch", [False, True])
@torch.no_grad()
def test_a_layer_multiplies_as_its_matrices_do(branch: bool) -> None:
    layer = layer_of({"q": (48, 64), "k": (16, 64)}, branch=branch)
    x, bias = matrix(5, 64, 9), matrix(1, 64, 10)[0]
    W = torch.cat([s.weight.dequantize() + (0 if s.branch is None else s.branch.delta()) for s in layer.shards])  # type: ignore[union-attr]
    for b in (None, bias, None):
        expected = x.double() @ W.double().T + (0 if b is None else b.double())
        assert_within_baseline(layer(x.view(1, 5, 64), b)[0], expected, x @ W.T + (0 if b is None else b))


def numbers(weight: Any) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, NF4Weight) else weight.detach()


def trained(
    kind: Any, layer: ShardedLinear, directory: Path, seed: int, factors: str = "stored"
) -> dict[str, torch.Tensor]:
    """Save an adapter of a kind over the matrices; W' − W by name, W' being the matrix with the adapter."""
    model, made = torch.nn.Module(), {}
    model.attention = torch.nn.Module()
    for shard, site in zip(layer.shards, layer.sites, strict=True):
        assert isinstance(site, lo.Linear)
        torch.manual_seed(seed)
        adapted = perturb(lo.Linear.from_linear(site, kind, quantize=None), 0.3)
        model.attention.add_module(shard.name.removeprefix("attention."), adapted)
        made[shard.name] = adapted(torch.eye(site.in_features)).T.detach() - numbers(site.weight)
    lo.save_adapter(model, directory, factors=factors)
    return made


@pytest.mark.parametrize("kinds, dense", [(KINDS, False), (OVER_DENSE, True)], ids=["nf4", "dense"])
@torch.no_grad()
def test_slots_route_every_kind_and_change_in_place(kinds: list[Any], dense: bool, tmp_path: Path) -> None:
    layer = layer_of({NAMES[0]: (48, 64), NAMES[1]: (24, 64)}, dense)
    with torch.enable_grad():
        deltas = [trained(kind, layer, tmp_path / str(i), i) for i, kind in enumerate(kinds)]
    slots = Slots([layer], 2, 16, 1 << 20, 8, torch.float32)
    addresses = [t.data_ptr() for t in (slots.memory, slots.table, slots.slots)]
    reads = [slots.read(tmp_path / str(i)) for i in range(len(kinds))]
    W = torch.cat([numbers(s.weight) for s in layer.shards])
    x = matrix(5, 64, 3)

    def check(of_tokens: list[int | None], held: dict[int, int]) -> None:
        tokens = [-1 if kind is None else next(s for s, k in held.items() if k == kind) for kind in of_tokens]
        slots.route(torch.tensor(tokens), {slot for slot in tokens if slot >= 0})
        matrices = [W if kind is None else W + torch.cat([deltas[kind][name] for name in NAMES]) for kind in of_tokens]
        expected = torch.stack([w.double() @ row.double() for w, row in zip(matrices, x, strict=True)])
        assert torch.allclose(layer(x).double(), expected, atol=2e-5)

    check([None] * 5, {})
    slots.put(0, reads[0])
    slots.put(1, reads[1])
    check([None, 0, 1, None, 0], {0: 0, 1: 1})  # all slots are taken, and rows without an adapter stay the base's
    assert layer.whole is not None and slots.covers(range(2))
    slots.clear(0)
    slots.put(0, reads[2])
    check([2, 1, None, 2, 2], {0: 2, 1: 1})
    slots.clear(1)
    slots.put(1, reads[3])
    check([2, 3, None, 3, 2], {0: 2, 1: 3})
    check([None] * 5, {})
    assert not slots.covers(range(2))
    assert [t.data_ptr() for t in (slots.memory, slots.table, slots.slots)] == addresses
    assert slots.store.names() == ["slot-0", "slot-1"]


@torch.no_grad()
def test_adapters_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    layer = layer_of({NAMES[0]: (48, 64), NAMES[1]: (24, 64)})
    with torch.enable_grad():
        for i, kind in enumerate((lo.LoRA(9), lo.LoRA(2, dora=True), lo.LoRAXS(3))):
            trained(kind, layer, tmp_path / str(i), i)
    slots = Slots([layer], 2, 16, 1 << 16, 8, torch.float32)
    with pytest.raises(ValueError, match="rank 9, and max_lora_rank is 8"):
        slots.read(tmp_path / "0")
    with pytest.raises(ValueError, match=r"more than the updates of attention\.k, attention\.q \(DoRA"):
        slots.read(tmp_path / "1")
    half = [Shard(s.name, Part.of_rows(s.part.shape, [(0, s.part.shape[0] // 2)]), s.weight) for s in layer.shards]
    split = ShardedLinear([Shard(s.name, s.part, s.part.take(s.weight)) for s in half])
    with pytest.raises(ValueError, match="another process could not read the adapter"):
        Slots([split], 2, 16, 1 << 16, 8, torch.float32, exchange=lambda own: [own, None]).read(tmp_path / "2")
    with pytest.raises(ValueError, match="two layers of the model have the matrix 'attention.q'"):
        Slots([layer, layer], 2, 16, 1 << 16, 8, torch.float32)


def exchange_of(count: int) -> Any:
    """What the processes of a model do with a value, for threads."""
    barrier, values = threading.Barrier(count, timeout=60), [None] * count

    def exchange(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        barrier.wait()
        told = list(values)
        barrier.wait()
        return told

    return exchange


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("kinds, dense", [(KINDS, False), (OVER_DENSE, True)], ids=["nf4", "dense"])
@torch.no_grad()
def test_parts_with_an_adapter_add_up_to_the_whole(
    kinds: list[Any], dense: bool, columns: bool, tmp_path: Path
) -> None:
    whole = layer_of({NAMES[0]: (48, 128), NAMES[1]: (32, 128)}, dense, branch=not dense)
    with torch.enable_grad():
        for i, kind in enumerate(kinds):
            trained(kind, whole, tmp_path / str(i), i, "stored" if i % 2 else "recipe")
    x, shapes, exchange = matrix(3, 128, 5), {shard.name: shard.part.shape for shard in whole.shards}, exchange_of(2)

    @torch.no_grad()
    def run(parts: dict[str, Part], x: torch.Tensor, rank: int | None = None) -> list[torch.Tensor]:
        layer = ShardedLinear([Shard(s.name, part := parts[s.name], part.take(s.weight), part_of(s.branch, part)) for s in whole.shards])  # fmt: skip  # noqa: E501
        asked: list[Any] = []
        told = None if rank is None else lambda value: asked.append(value) or exchange(rank, value)
        slots = Slots([layer], 1, 8, 1 << 20, 8, torch.float32, exchange=told)
        made = []
        for i in range(len(kinds)):
            slots.put(0, slots.read(tmp_path / str(i)))
            slots.route(torch.tensor([0, -1, 0]), [0])
            made.append(layer(x))
            if rank is not None and i == len(kinds) - 1:  # its factors are there
                asked.clear()
                slots.read(tmp_path / str(i))
                assert asked == [[]]
            slots.clear(0)
        return made

    expected = run({name: Part(s, ((0, s[0]),), (0, s[1])) for name, s in shapes.items()}, x)

    def part(rank: int) -> list[torch.Tensor]:
        cut = slice(64 * rank, 64 * rank + 64) if columns else slice(None)
        of_rows = {n: [(0, s[0]) if columns else (rank * s[0] // 2, (rank + 1) * s[0] // 2)] for n, s in shapes.items()}
        return run({n: Part(s, tuple(of_rows[n]), (cut.start or 0, cut.stop or 128)) for n, s in shapes.items()}, x[:, cut], rank)  # fmt: skip  # noqa: E501

    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(part, (0, 1)))
    for left, right, y in zip(*made, expected, strict=True):
        joined = left + right if columns else torch.cat([left[:, :24], right[:, :24], left[:, 24:], right[:, 24:]], 1)
        assert torch.allclose(joined, y, atol=1e-5)


def part_of(branch: lo.LowRankUpdate | None, part: Part) -> lo.LowRankUpdate | None:
    return None if branch is None else part.update(branch)


def test_a_matrix_is_made_again_of_its_parts() -> None:
    W = matrix(96, 128)
    for weight in (W, NF4Weight.quantize(W), NF4Weight.quantize(W, double_quant=False, block_size=32)):
        for parts in (
            [Part((96, 128), ((0, 16), (32, 64)), (0, 128)), Part((96, 128), ((16, 32), (64, 96)), (0, 128))],
            [Part((96, 128), ((0, 96),), span) for span in ((64, 128), (0, 64))],
        ):
            made = whole_of([(part, part.take(weight)) for part in parts])
            assert_bits_equal(numbers(made), numbers(weight))


def test_a_carrier_stays_with_its_weight() -> None:
    weight = NF4Weight.quantize(matrix(16, 64))
    (view,) = Carrier.of(weight).unsqueeze(0).unbind()
    param = torch.empty(0, dtype=torch.bfloat16)
    assert take_matrix(view, param) is weight
    assert take_matrix(torch.ones(2, 3), param).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"one matrix is needed, and the files have a stack \[2, 16, 64\]"):
        take_matrix(Carrier.of(NF4Weight.stack([weight, weight])), param)
