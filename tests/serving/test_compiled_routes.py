"""Pooled models under torch.compile: one graph for every route."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import assert_bits_equal
from models import llama, perturb
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.ops import _register

IDS = torch.arange(28).view(4, 7)
MIXES = [["a", "b", None, "c"], ["b", "b", "b", "a"], ["c", None, "a", "a"], [None] * 4, None]


class Flat(nn.Module):
    """Layers that see the batch as [B · T, K]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.reshape(-1, 64)).relu()).view(*x.shape[:-1], 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pool_of(make: Callable[[], nn.Module], root: Path) -> tuple[nn.Module, lo.AdapterPool]:
    model = lo.adapt(make(), None)
    pool = lo.AdapterPool(model, 1 << 22)
    for name, kind in (("a", lo.LoRA(4)), ("b", lo.LoRA(8)), ("c", lo.LoRAXS(6))):
        other = lo.adapt(make(), kind)
        for layer in other.modules():
            if isinstance(layer, lo.Linear):
                perturb(layer)
        lo.save_adapter(other, root / name, factors="stored")
        pool.load(name, root / name)
    return model, pool


def run(model: nn.Module, pool: lo.AdapterPool, names: Sequence[str | None] | None, x: Tensor) -> Tensor:
    with torch.no_grad():
        if names is None:
            return model(x)
        with pool.route(names):
            return model(x)


class Logits(nn.Module):
    """A model around the pooled one, whose check is traced with it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids, use_cache=False).logits


@pytest.mark.parametrize("outer", [False, True], ids=["pooled", "within"])
def test_one_graph_for_every_route(outer: bool, tmp_path: Path) -> None:
    model, pool = pool_of(llama, tmp_path)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    whole = Logits(model)
    if outer:
        compiled: nn.Module = torch.compile(whole, backend=backend, fullgraph=True)  # type: ignore[assignment]
    else:
        compiled = Logits(torch.compile(model, backend=backend, fullgraph=True))  # type: ignore[arg-type]
    for names in MIXES:
        assert_bits_equal(run(compiled, pool, names, IDS), run(whole, pool, names, IDS))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="one name for each of the 4 rows, got 3"):
        run(compiled, pool, ["a"] * 3, IDS)
    assert not torch.equal(run(compiled, pool, ["a"] * 4, IDS), run(compiled, pool, ["b"] * 4, IDS))

    def task(number: int) -> Tensor:
        return run(compiled, pool, MIXES[number], IDS)

    expected = [task(number) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for number, y in enumerate(threads.map(task, [0, 1, 2, 3] * 5)):
            assert_bits_equal(y, expected[number % 4])
    assert len(graphs) == 1


def test_equal_blocks_share_a_graph(tmp_path: Path) -> None:
    model, pool = pool_of(llama, tmp_path)
    expected = run(Logits(model), pool, MIXES[0], IDS)
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_bits_equal(run(Logits(model), pool, MIXES[0], IDS), expected)


def test_a_flattened_batch_autocast_and_gradients(tmp_path: Path) -> None:
    model, pool = pool_of(Flat, tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    for shape in ((4, 5, 64), (4, 64)):
        x = torch.randn(shape)
        for names in MIXES:
            assert_bits_equal(run(compiled, pool, names, x), run(model, pool, names, x))
    with torch.autocast("cpu", torch.bfloat16):
        y = run(compiled, pool, MIXES[0], x)
        assert y.dtype == torch.bfloat16
        assert_bits_equal(y, run(model, pool, MIXES[0], x))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert_bits_equal(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)
    with pool.route(["a"] * 4), pytest.raises(ValueError, match="no gradient"):
        compiled(x)


def test_a_copy_is_in_no_route(tmp_path: Path) -> None:
    model, pool = pool_of(Flat, tmp_path)
    copied, x = copy.deepcopy(model), torch.randn(4, 64)
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pool.route(["a"] * 4):
        plain = lo.adapt(Flat(), None)
        plain.load_state_dict(copied.state_dict())
        assert_bits_equal(compiled(x), plain(x))
        assert_bits_equal(compiled(x[:3]), plain(x[:3]))


def test_a_torch_that_makes_a_graph_of_every_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_register.MISSING, "frames", "torch._C._dynamo.eval_frame")

    def hook(x: Tensor) -> Tensor:
        return x + 1

    assert _register.run_eagerly(hook) is hook
    compiled = torch.compile(hook, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    compiled(torch.ones(1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_thread_that_compiles_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = pool_of(Flat, tmp_path)
    x = torch.randn(4, 3, 64)
    want = run(model, pool, MIXES[0], x)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # as while another thread compiles
    assert_bits_equal(run(model, pool, MIXES[0], x), want)
