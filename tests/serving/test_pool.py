"""AdapterPool: storage, routes, errors, and concurrent use by threads."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import assert_bits_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import lowrank_ops as lo
from lowrank_ops.adapters.linear import Linear
from lowrank_ops.functional import adapted_linear
from lowrank_ops.ops import _plan

KINDS: dict[str, lo.LoRA | lo.LoRAXS | lo.SVF | lo.SVFT] = {
    "lora": lo.LoRA(4),
    "rslora": lo.LoRA(7, alpha=3, rslora=True),
    "xs": lo.LoRAXS(6),
    "svf": lo.SVF(rank=12),
    "svft": lo.SVFT(bandwidth=2, rank=9),
    "random": lo.SVFT("random", bandwidth=1, rank=8),
}


class Net(nn.Module):
    """Two linear layers with something between, over [B, T, K] or [B, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def with_adapter(kind: object, model: nn.Module | None = None) -> nn.Module:
    """The NF4 base with a fresh adapter in every layer."""
    model = lo.adapt(base(), None) if model is None else model
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.set_adapter(kind)  # type: ignore[arg-type]
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three adapters of every kind, made over the NF4 base."""
    root = tmp_path_factory.mktemp("adapters")
    for number in range(3):
        for name, kind in KINDS.items():
            model = with_adapter(kind)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(number)
                for p in lo.adapter_parameters(model):
                    p.copy_(torch.randn(p.shape, generator=generator) / 4)
            lo.save_adapter(model, root / f"{name}{number}", factors=("recipe", "stored")[number % 2])
    return root


def pool_of(saved: Path, **options: object) -> tuple[nn.Module, lo.AdapterPool]:
    model = lo.adapt(base(), None)
    return model, lo.AdapterPool(model, **({"capacity_bytes": 1 << 20, "root": saved} | options))  # type: ignore[arg-type]


def alone(saved: Path, name: str | None) -> nn.Module:
    """A model with this adapter alone."""
    model = lo.adapt(base(), None)
    return model if name is None else lo.load_adapter(model, saved / name)


ALL = [f"{name}{number}" for number in range(3) for name in KINDS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["few", "many"])
def test_every_row_is_what_it_is_alone(
    saved: Path, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "FEW_TOKENS", dict.fromkeys(_plan.FEW_TOKENS, 10**9 if form == "few" else 0))
    model, pool = pool_of(saved)
    for name in ALL:
        pool.load(name, saved / name)
    names: list[str | None] = [(*ALL, None)[i % 19] for i in range(64)]
    x = torch.randn(64, 3, 64).to(dtype)
    with torch.no_grad(), pool.route(names):
        y = model(x)
        assert_bits_equal(model(x), y)
        assert "routed_linear" in lo.explain(model.first, x)
    exact = {name: alone(saved, name) for name in (*ALL, None)}
    with torch.no_grad():
        for i, name in enumerate(names):
            expected = exact[name](x[i : i + 1])[0]
            error = (y[i] - expected).abs().max() / expected.abs().max()
            assert error < (2e-6 if dtype == torch.float32 else 2e-2), f"{name}: {error}"
            with pool.route([name]):
                # In one form the bits of a row do not depend on the batch.
                assert_bits_equal(model(x[i : i + 1])[0], y[i])
            if name is None:
                assert_bits_equal(y[i], expected)
    assert "adapted_linear" in lo.explain(model.first, x)


def test_the_base_alone_after_and_without_a_route(saved: Path) -> None:
    model, pool = pool_of(saved)
    plain, x = lo.adapt(base(), None), torch.randn(5, 64)
    pool.load("lora0", saved / "lora0")
    with torch.no_grad():
        assert_bits_equal(model(x), plain(x))
        with pool.route([None] * 5):
            assert_bits_equal(model(x), plain(x))
        with pytest.raises(RuntimeError, match="stop"), pool.route(["lora0"] * 5):
            raise RuntimeError("stop")
        assert_bits_equal(model(x), plain(x))
    assert pool.stats()["in_use"] == 0


def test_a_compiled_model_has_the_names_of_the_one_inside(saved: Path) -> None:
    model = torch.compile(lo.adapt(base(), None), backend="eager")
    pool, x = lo.AdapterPool(model, 1 << 20, root=saved), torch.randn(5, 64)
    pool.load("lora0", saved / "lora0")
    with torch.no_grad(), pool.route(["lora0"] * 5):
        y = model(x)
    assert_close(y, alone(saved, "lora0")(x).detach())


def test_tokens_of_packed_sequences(saved: Path) -> None:
    model, pool = pool_of(saved)
    for name in ("lora0", "svft1"):
        pool.load(name, saved / name)
    x, slots = torch.randn(1, 7, 64), torch.tensor([0, 0, 1, 1, -1, 1, 0])
    with torch.no_grad():
        with pool.route_tokens(["lora0", "svft1"], slots):
            y = model(x)[0]
        for t, slot in enumerate(slots.tolist()):
            with pool.route([(None, "lora0", "svft1")[slot + 1]]):
                assert_close(y[t], model(x[0, t : t + 1])[0])
        with (
            pool.route_tokens(["lora0"], torch.tensor([0, 0])),
            pytest.raises(ValueError, match="token_slots .* 7 tokens"),
        ):
            model(x)
        for wrong in (torch.tensor([2]), torch.tensor([-2])):
            with (
                pytest.raises(ValueError, match=r"slots must be in \[-1, 2\)"),
                pool.route_tokens(["lora0", None], wrong),
            ):
                pass
    with pytest.raises(TypeError, match="token_slots must be a Tensor"), pool.route_tokens(["lora0"], [0]):  # type: ignore[arg-type]
        pass


def test_wrong_names_stop_before_the_forward(saved: Path) -> None:
    model, pool = pool_of(saved)
    pool.load("lora0", saved / "lora0")
    ran = []
    model.first.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(KeyError, match="not loaded: bob, carol"), pool.route(["carol", "lora0", "bob"]):
        model(torch.randn(3, 64))
    with pytest.raises(TypeError, match="got the string"), pool.route("lora0"):
        model(torch.randn(5, 64))
    with pytest.raises(ValueError, match="one name for each of the 3 rows, got 2"), pool.route(["lora0", None]):
        model(torch.randn(3, 64))
    pool.unload("lora0")
    with pytest.raises(KeyError, match="not loaded: lora0"), pool.route(["lora0"]):
        model(torch.randn(1, 64))
    with pytest.raises(KeyError, match="not loaded: lora0"):
        pool.unload("lora0")
    with pytest.raises(KeyError, match="not loaded: lora0"):
        pool.pin("lora0")
    assert not ran and pool.stats()["in_use"] == 0


def test_unloading_gives_all_bytes_back(saved: Path) -> None:
    _, pool = pool_of(saved)
    for name in ALL:
        pool.load(name, saved / name)
    stats = pool.stats()
    assert stats["adapters"] == stats["resident"] == len(ALL) and stats["family_bytes"] > 0
    # Each of a family's three adapters adds only its core.
    assert stats["used_bytes"] - stats["family_bytes"] < sum((saved / n / "adapter_model.safetensors").stat().st_size
                                                             for n in ALL) + 64 * 8 * len(ALL)  # fmt: skip
    for name in random.Random(0).sample(ALL, len(ALL)):
        pool.unload(name)
    after = pool.stats()
    assert after["used_bytes"] == after["family_bytes"] == after["adapters"] == 0
    assert after["largest_free_bytes"] == after["capacity_bytes"]


def test_what_was_used_longest_ago_goes_and_comes_back(saved: Path) -> None:
    one = 4 * (4 * (64 + 96) + 4 * (96 + 32))  # bytes of a LoRA of rank 4
    model, pool = pool_of(saved, capacity_bytes=3 * one)
    for number in range(3):
        pool.load(f"lora{number}", saved / f"lora{number}")
    x = torch.randn(1, 64)

    def through(name: str) -> Tensor:
        with torch.no_grad(), pool.route([name]):
            return model(x)

    first = through("lora0")
    pool.load("other", saved / "lora1")
    assert pool.stats()["evictions"] == 1 and pool.stats()["resident"] == 3
    assert pool._known["lora1"].region is None, "lora1 was used longest ago"
    assert_bits_equal(through("lora1"), through("other"))
    assert pool._known["lora2"].region is None
    pool.pin("lora0")
    for name in ("lora2", "lora1", "other", "lora2"):
        through(name)
        assert pool._known["lora0"].region is not None
    assert_bits_equal(through("lora0"), first)
    pool.pin("other")
    # Two are pinned and one is in use: the load fails and evicts nothing.
    with pool.route(["lora2"]), pytest.raises(MemoryError, match="needs .* bytes in one piece"):
        pool.load("more", saved / "lora1")
    assert "more" not in pool and len(pool.names()) == 4
    with pytest.raises(MemoryError, match="adapter big needs"):
        pool_of(saved, capacity_bytes=one - 64)[1].load("big", saved / "lora0")


def test_a_reload_lets_rows_in_flight_finish(saved: Path) -> None:
    model, pool = pool_of(saved)
    x = torch.randn(2, 64)
    pool.load("a", saved / "lora0")
    with torch.no_grad():
        with pool.route(["a", "a"]):
            before = model(x)
            pool.load("a", saved / "svf1")
            assert_bits_equal(model(x), before)
            with pool.route(["a", "a"]):
                during = model(x)
            pool.unload("a")
            assert_bits_equal(model(x), before)
        expected = alone(saved, "svf1")(x)
    assert_close(during, expected)
    assert pool.stats()["used_bytes"] == 0


def test_what_was_read_is_loaded_later(saved: Path) -> None:
    """More than once, too, with shared factors that have come and gone meanwhile, and after it had no room."""
    model, pool = pool_of(saved)
    names = ALL
    read = {name: pool.read(saved / name) for name in names}
    assert pool.names() == [] and pool.stats()["used_bytes"] == 0
    x = torch.randn(len(names), 5, 64)
    for _ in range(2):
        for name in names:
            pool.load(name, read[name])
        with torch.no_grad(), pool.route(names):
            got = model(x)
        for i, name in enumerate(names):
            assert torch.allclose(got[i], alone(saved, name)(x[i]), atol=1e-5), name
        for name in names:
            pool.unload(name)
    pool.load("big", saved / "lora0")
    size = pool.stats()["used_bytes"]
    model, small = pool_of(saved, capacity_bytes=size)
    small.load("first", saved / "lora0")
    later = small.read(saved / "lora1")
    with small.route(["first"]), pytest.raises(MemoryError, match="in use"):
        small.load("second", later)
    small.load("second", later)
    assert small.names() == ["first", "second"]
    with pytest.raises(ValueError, match="source must be read by the pool that loads it"):
        pool.load("second", later)


def test_peft_tensors_with_a_config(saved: Path) -> None:
    model, pool = pool_of(saved)
    tensors = load_file(saved / "rslora1" / "adapter_model.safetensors")
    pool.load("a", tensors, {"r": 7, "lora_alpha": 3, "use_rslora": True})
    pool.load("b", saved / "rslora1")
    x = torch.randn(1, 64)
    with torch.no_grad():
        with pool.route(["a"]):
            a = model(x)
        with pool.route(["b"]):
            assert_bits_equal(model(x), a)
    for other in (saved / "lora0", str(saved / "lora0"), pool.read(saved / "lora0")):
        with pytest.raises(ValueError, match="leave config out"):
            pool.load("own", other, {"r": 4, "lora_alpha": 1})
    with pytest.raises(ValueError, match="leave config out"):
        pool.read(saved / "lora0", {"r": 4})
    assert "own" not in pool
    with pytest.raises(ValueError, match="config must say"):
        pool.load("c", tensors)
    with pytest.raises(ValueError, match="lacks first.lora_B.weight"):
        pool.load("c", {k: t for k, t in tensors.items() if "first.lora_B" not in k}, {"r": 7})
    assert pool.names() == ["a", "b"]


def test_a_changed_base_maps_onto_the_shared_one_or_is_refused(tmp_path: Path) -> None:
    model = lo.adapt(base(), lo.LoRA(4, alpha=4, init="pissa"), quantize=None)
    with torch.no_grad():
        for p in lo.adapter_parameters(model):
            p.add_(torch.randn_like(p) / 10)
    lo.save_adapter(model, tmp_path / "pissa")
    x = torch.randn(3, 64)
    dense = lo.adapt(base(), None, quantize=None)
    pool = lo.AdapterPool(dense, 1 << 20)
    pool.load("pissa", tmp_path / "pissa")
    with torch.no_grad(), pool.route(["pissa"] * 3):
        assert_close(dense(x), model(x))
    quantised, pool = pool_of(tmp_path)
    with pytest.raises(ValueError, match="base of its own.*convert"):
        pool.load("pissa", tmp_path / "pissa")
    assert pool.names() == [] and pool.stats()["used_bytes"] == 0


def edited(source: Path, target: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """A copy of an adapter with other tensors or other metadata."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    edit(tensors, metadata)
    save_file(tensors, file, metadata)
    return target


def test_stored_factors_of_another_shape_are_refused(saved: Path, tmp_path: Path) -> None:
    """Kernels trust the table and would read past the end of a tensor that is smaller than the layer needs."""

    def shrink(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for key in [key for key in tensors if ".first.lowrank_ops.down" in key or ".first.lowrank_ops.up" in key]:
            del tensors[key]
        tensors["base_model.model.first.lowrank_ops.down"] = torch.zeros(6, 1)
        tensors["base_model.model.first.lowrank_ops.up"] = torch.zeros(1, 6)

    path = edited(saved / "xs1", tmp_path / "small", shrink)
    _, pool = pool_of(tmp_path)
    with pytest.raises(ValueError, match=r"layer 'first': the stored down must be \[6, 64\]"):
        pool.load("a", path)
    with pytest.raises(ValueError, match="the stored down must be"):
        lo.load_adapter(lo.adapt(base(), None), path)
    assert pool.names() == [] and pool.stats()["used_bytes"] == 0


def test_another_base_is_refused_after_a_sibling_too(saved: Path, tmp_path: Path) -> None:
    dense = lo.adapt(base(), KINDS["xs"])  # factors of the unquantised W: the file holds a base next to the weight
    lo.save_adapter(dense, tmp_path / "right", factors="stored")

    def rename(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        records = json.loads(metadata["lowrank_ops"])
        for record in records.values():
            record["base"] = "0" * 64
        metadata["lowrank_ops"] = json.dumps(records)

    wrong = edited(tmp_path / "right", tmp_path / "wrong", rename)
    _, pool = pool_of(tmp_path)
    pool.load("right", tmp_path / "right")
    with pytest.raises(ValueError, match="another weight"):
        pool.load("wrong", wrong)
    assert pool.names() == ["right"]


def test_records_that_are_no_table_are_refused(saved: Path, tmp_path: Path) -> None:
    for i, text in enumerate(("[1]", '{"first": 1, "second": 2}', '{"first": {"type": "LoRAXS", "kind": []}}')):
        path = edited(
            saved / "xs0", tmp_path / str(i), lambda _, metadata, text=text: metadata.update(lowrank_ops=text)
        )
        with pytest.raises(ValueError, match="record|does not say of every layer"):
            pool_of(tmp_path)[1].load("a", path)


def test_numbers_that_the_pool_cannot_hold_are_refused(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "lora0" / "adapter_model.safetensors")
    _, pool = pool_of(saved, dtype=torch.float16)
    with pytest.raises(ValueError, match="first: .* too large for torch.float16"):
        pool.load("a", {key: t * 1e7 for key, t in tensors.items()}, {"r": 4, "lora_alpha": 4})
    with pytest.raises(ValueError, match="first: s = .* does not fit in float32"):
        pool.load("a", tensors, {"r": 4, "lora_alpha": 1e300})
    assert pool.names() == [] and pool.stats()["used_bytes"] == 0


def test_files_that_are_links_out_of_the_root_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in (saved / "lora0").iterdir():
        (tmp_path / "a" / file.name).symlink_to(file)
    _, pool = pool_of(tmp_path)
    with pytest.raises(ValueError, match="source must be inside"):
        pool.load("a", tmp_path / "a")


def test_factors_that_nobody_has_are_forgotten(saved: Path, tmp_path: Path) -> None:
    _, pool = pool_of(tmp_path)
    for i in range(3):

        def other(tensors: dict[str, Tensor], _: dict[str, str], i: int = i) -> None:
            for key in tensors:
                if key.endswith((".down", ".up")):
                    tensors[key] = tensors[key] ^ (i + 1)

        pool.load("a", edited(saved / "xs1", tmp_path / str(i), other))
        # Their replacements take their place, on the device and in host memory.
        assert len(pool._families) == len(pool._layout.laid) == 2
    with pytest.raises(FileNotFoundError):
        pool.load("b", tmp_path / "none")
    pool.unload("a")
    assert not pool._families and not pool._layout.laid and all(key[0] == "weight" for key in pool._made)


def test_a_copy_of_the_model_has_no_pool_and_a_pool_goes_when_it_is_dropped(saved: Path) -> None:
    model, pool = pool_of(saved)
    pool.load("lora0", saved / "lora0")
    copied, x = copy.deepcopy(model), torch.randn(2, 64)
    with torch.no_grad():
        plain = model(x)
        with pool.route(["lora0", None]):
            assert_bits_equal(copied(x), plain)
            assert not torch.equal(model(x), plain)
    memory = weakref.ref(pool._memory.bytes)
    del pool
    gc.collect()
    assert memory() is None
    lo.AdapterPool(model, 1 << 20)
    assert len(model._forward_pre_hooks) == 1


def test_tokens_whose_row_cannot_be_told_are_refused(saved: Path) -> None:
    """[tokens, K] of as many tokens as the batch has is a flattened batch; another number is a choice of them."""

    class Flat(Net):
        keep: int | None = None

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, x.shape[-1])[: self.keep]).view(-1, 32)

    torch.manual_seed(0)
    flat = Flat()
    pool = lo.AdapterPool(lo.adapt(flat, None), 1 << 20)
    pool.load("lora0", saved / "lora0")
    x = torch.randn(2, 4, 64)
    with torch.no_grad(), pool.route(["lora0", None]):
        y = flat(x)
        flat.keep = 6  # three for each name, were it the whole batch
        with pytest.raises(ValueError, match=r"one name for each row of \[6, 64\], got 2"):
            flat(x)
        flat.keep = None
    with torch.no_grad(), pool.route(["lora0"]):
        assert_close(flat(x[:1]), y[:4])
    with torch.no_grad(), pool.route([None]):
        assert_close(flat(x[1:]), y[4:])


def test_autocast(saved: Path) -> None:
    model, pool = pool_of(saved)
    pool.load("lora0", saved / "lora0")
    one, x = alone(saved, "lora0"), torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = one.first(x)
        with pool.route(["lora0"] * 3):
            routed = model.first(x)
    assert routed.dtype == expected.dtype == torch.bfloat16
    assert_close(routed, expected)


def test_what_can_never_fit_makes_nobody_leave(saved: Path) -> None:
    _, pool = pool_of(saved, capacity_bytes=6000)
    pool.load("lora0", saved / "lora0")
    wide = {"r": 12, "lora_alpha": 1}
    tensors = {f"base_model.model.first.lora_{f}.weight": torch.ones(s) for f, s in (("A", (12, 64)), ("B", (96, 12)))}
    with pytest.raises(MemoryError, match="adapter wide needs"):
        pool.load("wide", tensors, wide)
    assert pool.stats()["evictions"] == 0 and pool.stats()["resident"] == 1


def test_what_may_leave_and_host_memory_are_known_without_counting(saved: Path) -> None:
    """After any history, counters equal a recount: evictable adapters by last use, bytes in host memory, free blocks."""
    rng, used = random.Random(3), list[str]()
    model, pool = pool_of(saved, capacity_bytes=20_000, host_bytes=20_000)
    for _ in range(400):
        names = [rng.choice(ALL) for _ in range(rng.randint(1, 3))]
        act = rng.random()
        before = {name for name in names if name in pool}
        try:
            if act < 0.3:
                pool.load(names[0], saved / names[0])
                used = [n for n in used if n != names[0]] + names[:1]
            elif act < 0.4 and before:
                pool.unload(min(before))
            elif act < 0.5 and before:
                pool.pin(name := min(before), rng.random() < 0.3)
                used = [n for n in used if n != name] + [name]
            elif before:
                with pool.route(sorted(before)):
                    assert not any(pool._known[name] in pool._memory.idle for name in before)
                used = [n for n in used if n not in before] + sorted(before)
        except MemoryError:
            # Some of what it wanted was used, or was not: begin from what the pool says.
            used = [v.name for v in pool._memory.idle] + [
                n for n in used if pool._known.get(n) not in pool._memory.idle
            ]
        known = pool._known
        idle = [n for n in used if n in known and known[n].region is not None and not known[n].pinned]
        assert [version.name for version in pool._memory.idle] == idle
        host = sum(version.host.numel() for version in known.values() if version.host is not None)
        assert pool.stats()["host_bytes"] == host <= 20_000
        taken = [v.region for v in (*known.values(), *pool._families.values()) if v.region is not None]
        begin = 0
        for region in sorted((*taken, *pool._memory.free), key=lambda r: r.begin):
            assert region.begin == begin
            begin += region.size
        assert begin == pool.capacity_bytes
        assert all(a.begin + a.size < b.begin for a, b in zip(pool._memory.free, pool._memory.free[1:], strict=False))
    assert pool.stats()["evictions"] > 20 and pool.stats()["pinned"] < len(known)


def test_host_memory_has_a_limit(saved: Path) -> None:
    one = 4 * (4 * (64 + 96) + 4 * (96 + 32))
    model, pool = pool_of(saved, capacity_bytes=one, host_bytes=one)
    x = torch.randn(1, 64)
    pool.load("a", saved / "lora0")
    pool.load("b", saved / "lora1")
    with pytest.raises(MemoryError, match="no room in host memory"):
        pool.load("c", saved / "lora2")
    assert pool.names() == ["a", "b"] and pool.stats()["host_bytes"] == one
    # One adapter replaces the other: there is room for that every time.
    for name in "abab":
        with torch.no_grad(), pool.route([name]):
            assert_close(model(x), alone(saved, f"lora{'ab'.index(name)}")(x))
    pool.pin("b")
    with pytest.raises(MemoryError), pool.route(["a"]):
        pass
    pool.pin("b", False)
    with pool.route(["a"]):
        pass
    with pytest.raises(ValueError, match="host_bytes"):
        pool_of(saved, host_bytes=-1)


def broken(saved: Path, tmp_path: Path, how: str) -> tuple[str, object]:
    """(name, source) of an adapter that something is wrong with."""
    name, path = "a", tmp_path / "adapter"
    path.mkdir()
    for file in (saved / ("xs0" if how == "another base" else "lora0")).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = path / "adapter_model.safetensors"
    if how == "name with a path":
        name = "../a"
    elif how == "outside the root":
        return name, tmp_path.parent
    elif how == "missing":
        tensors.unlink()
    elif how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif how == "nan":
        held = load_file(tensors)
        next(iter(held.values()))[0, 0] = float("nan")
        save_file(held, tensors)
    elif how == "another model":
        save_file({k.replace("first", "third"): t for k, t in load_file(tensors).items()}, tensors)
    elif how == "rank":
        save_file({k: torch.zeros(200, 200) for k in load_file(tensors)}, tensors)
    elif how == "kind":
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    elif how == "pickled":
        tensors.unlink()
        torch.save({}, path / "adapter_model.bin")
    return name, path


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("name with a path", ValueError, "name must be letters"),
        ("outside the root", ValueError, "source must be inside"),
        ("missing", FileNotFoundError, "adapter_model.safetensors is missing"),
        ("truncated", ValueError, "not a complete safetensors"),
        ("nan", ValueError, "must be finite"),
        ("another model", ValueError, "'third', which is not a layer"),
        ("rank", ValueError, r"first.lora_A.weight must be \[4, 64\]"),
        ("kind", ValueError, "'IA3'"),
        ("pickled", FileNotFoundError, "adapter_model.safetensors is missing"),
        ("another base", ValueError, "another weight"),
    ],
)
def test_bad_adapters_leave_the_pool_as_it_was(
    saved: Path, tmp_path: Path, how: str, error: type[Exception], message: str
) -> None:
    model = lo.adapt(base(1 if how == "another base" else 0), None)
    pool = lo.AdapterPool(model, 1 << 20, root=tmp_path)
    before = pool.stats()
    name, source = broken(saved, tmp_path, how)
    with pytest.raises(error, match=message):
        pool.load(name, source)  # type: ignore[arg-type]
    assert pool.stats() == before and pool.names() == []


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="no lowrank_ops.Linear"):
        lo.AdapterPool(base())
    with pytest.raises(ValueError, match="layers have one already: first, second"):
        lo.AdapterPool(lo.adapt(base(), lo.LoRA(2)))
    with pytest.raises(ValueError, match="capacity_bytes"):
        lo.AdapterPool(lo.adapt(base(), None), 0)
    with pytest.raises(ValueError, match="dtype must be"):
        lo.AdapterPool(lo.adapt(base(), None), dtype=torch.int8)


def test_a_rank_that_no_workspace_has_room_for_is_refused() -> None:
    # Only a changed base makes an update of more ranks than the layer has: [D; D0] of 2R.
    model = nn.Sequential(nn.Linear(600, 600))
    dense = lo.adapt(copy.deepcopy(model), None, quantize=None)
    pool = lo.AdapterPool(dense, 1 << 23)
    wide = lo.functional.LowRankUpdate(torch.zeros(602, 600), torch.zeros(600, 602))
    with pytest.raises(ValueError, match="0: the update has rank 602, and at most 600"):
        pool._layout.lay_out({"0": (wide, None)}, {})


def test_gradients_are_refused(saved: Path) -> None:
    model, pool = pool_of(saved)
    pool.load("lora0", saved / "lora0")
    with pool.route(["lora0"]), pytest.raises(ValueError, match="no gradient"):
        model(torch.randn(1, 64, requires_grad=True))


def test_generate_with_a_causal_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    for i, kind in enumerate((lo.LoRA(4), lo.LoRAXS(4))):
        model = with_adapter(kind, lo.adapt(copy.deepcopy(llama), None))
        with torch.no_grad():
            for p in lo.adapter_parameters(model):
                p.add_(torch.randn_like(p))
        lo.save_adapter(model, tmp_path / str(i))
    model = lo.adapt(llama, None)
    pool = lo.AdapterPool(model, 1 << 22)
    for i in range(2):
        pool.load(str(i), tmp_path / str(i))
    ids = torch.randint(1, 50, (3, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pool.route(["0", None, "1"]):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for row, name in enumerate(("0", None, "1")):
        with pool.route([name]):
            mine = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 5), **options)
        assert torch.equal(together[row], mine[0])
    # Beams: transformers repeats every row, so every name is given as often.
    with pool.route(["0", "0", "1", "1"]), pytest.raises(ValueError, match="names must have"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def test_thousands_of_cores_over_shared_factors(saved: Path) -> None:
    """10,000 LoRA-XS of rank 16 of an 8B Llama are 224 cores each; here as many of this model, counted per layer."""
    model = lo.adapt(base(), None)
    lo.save_adapter(with_adapter(lo.LoRAXS(16)), saved / "xs16")
    pool = lo.AdapterPool(model, 1 << 22, dtype=torch.bfloat16)
    count = 2000
    for i in range(count):
        pool.load(f"n{i}", saved / "xs16")
    stats = pool.stats()
    assert stats["resident"] == count
    of_a_core = (stats["used_bytes"] - stats["family_bytes"]) / (count * 2)
    assert of_a_core == 2 * 16 * 16
    # D and U of the 8B Llama in bfloat16, larger than in NF4: sum of N + K over a block's seven layers, 32 blocks.
    factors = 32 * 81_920 * 16 * 2
    assert 10_000 * 224 * of_a_core + factors < 2 << 30
    assert len({id(v.rows) for v in pool._known.values()}) == 1, "rows of one layout are kept once"


def test_eight_threads_at_once(saved: Path) -> None:
    """Random loads, unloads, reloads and routed forwards: no wrong row, no leak, no deadlock."""
    seconds = float(os.environ.get("LOWRANK_OPS_STRESS_SECONDS", "10"))
    model, pool = pool_of(saved, capacity_bytes=60_000)
    x = torch.randn(1, 64)
    # A name stands for adapter 0 or 1 of its kind.
    with torch.no_grad():
        allowed = {kind: [alone(saved, f"{kind}{n}")(x)[0] for n in range(2)] for kind in KINDS}
        plain = model(x)[0]
    for kind in KINDS:
        pool.load(kind, saved / f"{kind}0")
    failures: list[str] = []
    forwards = [0] * 8
    end = time.monotonic() + seconds

    def work(thread: int) -> None:
        torch.set_num_threads(1)
        rng = random.Random(thread)
        try:
            while time.monotonic() < end and not failures:
                kind, act = rng.choice(list(KINDS)), rng.random()
                try:
                    if act < 0.1 or kind not in pool:
                        pool.load(kind, saved / f"{kind}{rng.randrange(2)}")
                    elif act < 0.12:
                        pool.unload(kind)
                    elif act < 0.15:
                        pool.pin(kind, rng.random() < 0.3)
                    else:
                        names = [rng.choice([*KINDS, None]) for _ in range(rng.randint(1, 5))]
                        with torch.no_grad(), pool.route(names):
                            y = model(x.expand(len(names), -1))
                        forwards[thread] += 1
                        for row, name in zip(y, names, strict=True):
                            expected = [plain] if name is None else allowed[name]
                            if not any(torch.allclose(row, e, atol=1e-4) for e in expected):
                                failures.append(f"wrong row of {name}")
                except KeyError:
                    pass  # another thread unloaded it in between; whoever next looks for it loads it
                except MemoryError:  # what others pin and use leaves no room: one pin less
                    with suppress(KeyError):
                        pool.pin(kind, False)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        assert not thread.is_alive(), "a thread hangs"
    assert not failures, failures[:3]
    assert min(forwards) > 10
    for name in pool.names():
        pool.unload(name)
    stats = pool.stats()
    assert stats["used_bytes"] == stats["in_use"] == stats["family_bytes"] == 0
    assert stats["largest_free_bytes"] == stats["capacity_bytes"]
    assert isinstance(model.first, Linear)
    assert_bits_equal(model(x)[0], plain)


def test_a_site_without_an_adapter_is_the_plain_op(saved: Path) -> None:
    model, pool = pool_of(saved)
    tensors = load_file(saved / "lora0" / "adapter_model.safetensors")
    pool.load("first-only", {k: t for k, t in tensors.items() if "first" in k}, {"r": 4, "lora_alpha": 8})
    with torch.no_grad(), pool.route(["first-only"]):
        h = torch.randn(1, 96)
        assert isinstance(model.second, Linear) and model.second.weight is not None
        assert "adapted_linear" in lo.explain(model.second, h) and "routed_linear" in lo.explain(model.first, h[:, :64])
        assert_bits_equal(model.second(h), adapted_linear(h, model.second.weight, None, model.second.bias))


# ---- routes side by side


def two_pools(saved: Path) -> tuple[list[nn.Module], list[lo.AdapterPool]]:
    """Two models with a pool each, and all adapters in both."""
    models, pools = zip(*(pool_of(saved) for _ in range(2)), strict=True)
    for pool in pools:
        for name in ("lora0", "svf1"):
            pool.load(name, saved / name)
    return list(models), list(pools)


@pytest.mark.parametrize("first_left", [0, 1])
def test_routes_of_two_pools_stand_side_by_side(saved: Path, first_left: int) -> None:
    models, pools = two_pools(saved)
    x, names = torch.randn(2, 5, 64), ("lora0", "svf1")
    right, plain = [alone(saved, name)(x) for name in names], alone(saved, None)(x)
    with torch.no_grad():
        routes = [pool.route([name] * 2) for pool, name in zip(pools, names, strict=True)]
        for route in routes:
            route.__enter__()
        for model, y in zip(models, right, strict=True):
            assert_close(model(x), y)
        assert all("routed_linear" in lo.explain(model.first, x) for model in models)
        routes[first_left].__exit__(None, None, None)
        assert_bits_equal(models[first_left](x), plain)
        assert "routed_linear" not in lo.explain(models[first_left].first, x)
        assert_close(models[1 - first_left](x), right[1 - first_left])
        routes[1 - first_left].__exit__(None, None, None)
        for model in models:
            assert_bits_equal(model(x), plain)
    assert [pool.stats()["in_use"] for pool in pools] == [0, 0]


def test_rows_are_counted_for_each_pool(saved: Path) -> None:
    (a, b), (outer, inner) = two_pools(saved)
    with torch.no_grad(), outer.route(["lora0"] * 3), inner.route(["svf1"]):
        a(torch.randn(3, 64)), b(torch.randn(1, 5, 64))
        with pytest.raises(ValueError, match="one name for each of the 1 rows, got 3"):
            a(torch.randn(1, 64))


def test_an_inner_route_of_the_same_pool_takes_the_place_of_the_outer(saved: Path, tmp_path: Path) -> None:
    half = lo.adapt(base(), lo.LoRA(2), targets=["second"])
    with torch.no_grad():
        half.second.up.normal_()
    lo.save_adapter(half, tmp_path / "half")
    model, pool = pool_of(saved, root=None)
    pool.load("lora0", saved / "lora0")
    pool.load("half", tmp_path / "half")
    x = torch.randn(2, 5, 64)
    whole, plain = alone(saved, "lora0")(x), alone(saved, None)(x)
    with torch.no_grad(), pool.route(["lora0"] * 2):
        with pool.route(["half"] * 2):  # nothing for the first layer, and not what the outer has there
            assert_close(model(x), lo.load_adapter(lo.adapt(base(), None), tmp_path / "half")(x))
        assert_close(model(x), whole)
        with suppress(KeyboardInterrupt), pool.route([None] * 2):
            assert_bits_equal(model(x), plain)
            raise KeyboardInterrupt
        assert_close(model(x), whole)


def test_tasks_have_routes_of_their_own(saved: Path) -> None:
    model, pool = pool_of(saved)
    x = torch.randn(2, 5, 64)
    right = {name: alone(saved, name)(x) for name in ("lora0", "svf1", "xs2")}
    for name in right:
        pool.load(name, saved / name)

    async def task(name: str) -> None:
        with pool.route([name] * 2):
            for _ in range(3):
                await asyncio.sleep(0)
                assert_close(model(x), right[name])

    async def all_tasks() -> None:
        await asyncio.gather(*(task(name) for name in right))
        assert_bits_equal(model(x), alone(saved, None)(x))

    with torch.no_grad():  # around all tasks: it is the thread's, and they leave it in any order
        asyncio.run(all_tasks())


def test_a_task_that_outlives_its_route_is_told(saved: Path) -> None:
    (model, other), (pool, _) = two_pools(saved)
    x = torch.randn(2, 5, 64)

    async def late(begin: asyncio.Event) -> None:
        assert_close(model(x), alone(saved, "lora0")(x))
        await begin.wait()
        with pytest.raises(RuntimeError, match="has been left; enter a route inside"):
            model(x)
        other(x)  # of another pool
        with pool.route(["svf1"] * 2):
            assert_close(model(x), alone(saved, "svf1")(x))
        assert_bits_equal(model(x), alone(saved, None)(x))

    async def start() -> None:
        begin = asyncio.Event()
        with pool.route(["lora0"] * 2):
            task = asyncio.create_task(late(begin))
            await asyncio.sleep(0)
        begin.set()
        await task

    with torch.no_grad():
        asyncio.run(start())


def test_pools_over_the_same_layers_are_routed_one_after_the_other(saved: Path) -> None:
    model, first = pool_of(saved)
    second = lo.AdapterPool(model, 1 << 20)
    first.load("a", saved / "lora0")
    second.load("a", saved / "svf1")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        with (
            first.route(["a"] * 2),
            pytest.raises(ValueError, match="another pool over the same layers is open"),
            second.route(["a"] * 2),
        ):
            pass
        assert second.stats()["in_use"] == 0
        for pool, name in ((second, "svf1"), (first, "lora0")):
            with pool.route(["a"] * 2):
                assert_close(model(x), alone(saved, name)(x))


def test_routes_of_compiled_models(saved: Path) -> None:
    models, pools = two_pools(saved)
    x = torch.randn(2, 5, 64)
    compiled = [torch.compile(model, backend="eager") for model in models]
    with torch.no_grad():
        for rounds in range(2):  # the second with what the first compiled
            assert_close(compiled[rounds](x), alone(saved, None)(x))
            with pools[0].route(["lora0"] * 2), pools[1].route(["svf1"] * 2):
                assert_close(compiled[0](x), alone(saved, "lora0")(x))
                assert_close(compiled[1](x), alone(saved, "svf1")(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, path: lo.merge(model),
        lambda model, path: lo.load_adapter(model, path),
        lambda model, path: model.first.set_adapter(lo.LoRA(4)),
    ],
    ids=["merge", "load_adapter", "set_adapter"],
)
def test_what_rows_would_pass_by_is_refused(saved: Path, change: Callable[[nn.Module, Path], object]) -> None:
    model, pool = pool_of(saved)
    pool.load("lora0", saved / "lora0")
    change(copy.deepcopy(model), saved / "svf1")  # it has no pool
    layers = dict(model.named_modules())
    with pytest.raises(ValueError, match="an AdapterPool routes the layer"):
        change(model, saved / "svf1")
    assert dict(model.named_modules()) == layers and model.first.adapter is None
    x = torch.randn(2, 5, 64)
    with torch.no_grad(), pool.route(["lora0"] * 2):
        assert_close(model(x), alone(saved, "lora0")(x))
    del pool
    gc.collect()
    change(model, saved / "svf1")
