"""functional.prepare and Linear.forward on top of it: the numbers of adapted_linear, whatever happens to the operands."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import lowrank_ops as lo
from lowrank_ops import functional
from lowrank_ops.ops import _cpu, _plan

KINDS = [None, lo.LoRA(5), lo.LoRA(4, alpha=4, init="pissa"), lo.LoRAXS(7), lo.SVF(), lo.SVFT(bandwidth=2),
         lo.SVFT("random", bandwidth=1), lo.LoRAXS(6, factors="nf4")]  # fmt: skip


def moved(layer: lo.Linear) -> lo.Linear:
    with torch.no_grad():
        for p in layer.trained():
            p.add_(torch.randn_like(p) * 0.1)
    return layer.eval()


def layer_of(adapter: object = None, **options: object) -> lo.Linear:
    torch.manual_seed(0)
    return moved(lo.Linear(48, 40, adapter=adapter, **options))  # type: ignore[arg-type]


def checked(layer: lo.Linear, x: Tensor) -> Tensor:
    """The layer's result through the checked functions."""
    assert layer.weight is not None
    return functional.adapted_linear(x, layer.weight, layer.update, layer.bias)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record for each call whether it was checked or prepared."""
    found: list[str] = []
    prepared, all_checks = functional._Bound.multiply, functional.adapted_linear

    def multiply(self: functional._Bound, x: Tensor) -> Tensor | None:
        if (y := prepared(self, x)) is not None:
            found.append("prepared")
        return y

    def adapted_linear(*operands: object, **branch: object) -> Tensor:
        found.append("checked")
        return all_checks(*operands, **branch)  # type: ignore[arg-type]

    monkeypatch.setattr(functional._Bound, "multiply", multiply)
    monkeypatch.setattr(functional, "adapted_linear", adapted_linear)
    return found


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("adapter", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(adapter: object, quantize: str | None, dtype: torch.dtype) -> None:
    layer = layer_of(adapter, quantize=quantize)
    run = functional.prepare(layer.weight, layer.bias, layer.update)
    for shape in [(1, 48), (3, 48), (48,), (2, 9, 48), (0, 48), (1, 40, 48)]:
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            assert torch.equal(run(x), checked(layer, x)) and torch.equal(layer(x), checked(layer, x))
    x = torch.randn(5, 96).to(dtype)[:, ::2]
    with torch.inference_mode():
        assert torch.equal(run(x), checked(layer, x.contiguous()))


def test_which_calls_go_past_the_checks(calls: list[str]) -> None:
    layer = layer_of(lo.LoRA(4))
    x = torch.randn(3, 48)
    with torch.no_grad():
        layer(x), layer(x.view(1, 3, 48))
    assert calls == ["prepared"] * 2
    layer(x)  # gradients
    with torch.no_grad():
        layer(torch.randn(3, 96)[:, ::2]), layer(x[:0])
        layer(torch._neg_view(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with lo.implementation("reference"):
            layer(x)
    assert calls == ["prepared"] * 2 + ["checked"] * 6
    noisy = lo.Linear(48, 40, adapter=lo.LoRA(4, dropout=0.5))
    with torch.no_grad():
        noisy(x), noisy.eval()(x)
    assert calls[-2:] == ["checked", "prepared"]


def replace_data(layer: lo.Linear) -> None:
    layer.down.data = torch.randn(4, 48)


def assign_parameter(layer: lo.Linear) -> None:
    layer.up = nn.Parameter(torch.randn(40, 4))


def write_in_place(layer: lo.Linear) -> None:
    with torch.no_grad():
        layer.up.mul_(3)
        layer.bias.add_(1)


def load(layer: lo.Linear) -> None:
    torch.manual_seed(5)
    layer.load_state_dict(moved(lo.Linear(48, 40, adapter=lo.LoRA(4))).state_dict())


def load_assigned(layer: lo.Linear) -> None:
    torch.manual_seed(5)
    layer.load_state_dict(moved(lo.Linear(48, 40, adapter=lo.LoRA(4))).state_dict(), assign=True)


def load_other_scales(layer: lo.Linear) -> None:
    weight = lo.NF4Weight.quantize(torch.randn(40, 48), block_size=128, double_quant=False)
    state = layer.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("weight")}
    layer.load_state_dict(state | weight.to_bitsandbytes())


def set_adapter(layer: lo.Linear) -> None:
    layer.set_adapter(lo.LoRAXS(6))
    moved(layer)


def remove_adapter(layer: lo.Linear) -> None:
    layer.set_adapter(None)


def change_scale(layer: lo.Linear) -> None:
    layer.adapter = lo.LoRA(4, alpha=64)


def replace_weight(layer: lo.Linear) -> None:
    layer.weight = lo.NF4Weight.quantize(torch.randn(40, 48))


def replace_buffer(layer: lo.Linear) -> None:
    layer.weight.packed = torch.randint(256, layer.weight.packed.shape, dtype=torch.uint8)


def write_packed(layer: lo.Linear) -> None:
    layer.weight.packed.copy_(torch.randint(256, layer.weight.packed.shape, dtype=torch.uint8))


def cast(layer: lo.Linear) -> None:
    layer.to(torch.bfloat16)


def cast_there_and_back(layer: lo.Linear) -> None:
    layer.half().float()


def transpose_in_place(layer: lo.Linear) -> None:
    layer.down.data = torch.randn(48, 4).t()


def remove_bias(layer: lo.Linear) -> None:
    layer.bias = None


CHANGES = [replace_data, assign_parameter, write_in_place, load, load_assigned, load_other_scales, set_adapter,
           remove_adapter, change_scale, replace_weight, replace_buffer, write_packed, cast, cast_there_and_back,
           transpose_in_place, remove_bias]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[lo.Linear], None]) -> None:
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    with torch.no_grad():
        before = layer(x)
        for _ in range(2):
            change(layer)
            now = layer(x)
            assert torch.equal(now, checked(layer, x))
            assert change is cast_there_and_back or not torch.equal(now, before)


@pytest.mark.parametrize("change", [replace_data, write_in_place, load, replace_buffer, write_packed, cast])
def test_a_prepared_call_follows_its_operands(change: Callable[[lo.Linear], None]) -> None:
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    run = functional.prepare(layer.weight, layer.bias, layer.update)
    with torch.no_grad():
        before = run(x)
        change(layer)
        assert torch.equal(run(x), checked(layer, x)) and not torch.equal(run(x), before)


def test_rows_of_the_same_memory_are_another_operand() -> None:
    """The rank changes although the address and the storage stay the same."""
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    with torch.no_grad():
        layer(x)
        layer.down.data, layer.up.data = layer.down.data[:2], layer.up.data[:, :2].contiguous()
        assert torch.equal(layer(x), checked(layer, x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_prepared_call_is_copied(copied: Callable[[object], functional.PreparedLinear]) -> None:
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    run = functional.prepare(layer.weight, layer.bias, layer.update)
    with torch.no_grad():
        y = run(x)
        assert torch.equal(copied(run)(x), y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_operands_of_their_own(copied: Callable[[lo.Linear], lo.Linear]) -> None:
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    with torch.no_grad():
        before = layer(x)
        other = copied(layer)
        write_in_place(layer)
        assert torch.equal(other(x), before) and torch.equal(layer(x), checked(layer, x))
        write_in_place(other)
        assert torch.equal(other(x), layer(x))


def test_threads_and_instruction_sets_are_asked_for_at_each_call() -> None:
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            for isa in _cpu.module().isas():
                _cpu.module().set_isa(isa)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    assert torch.equal(layer(x), checked(layer, x)), isa
            with pytest.raises(RuntimeError, match="cannot run this"), lo.implementation("cuda"):
                layer(x)
            assert _plan.forced() is None and torch.equal(layer(x), checked(layer, x))
    finally:
        torch.set_num_threads(threads)
        _cpu.module().set_isa("")


def test_gradients_are_those_of_the_checked_way() -> None:
    layer = layer_of(lo.LoRA(4)).train()
    x = torch.randn(3, 48, requires_grad=True)
    with torch.no_grad():
        layer(x)
    for of in (layer, lambda x: checked(layer, x)):
        of(x).square().sum().backward()
    with torch.no_grad():
        write_in_place(layer)
    grads = []
    for of in (layer, lambda x: checked(layer, x)):
        x.grad = layer.down.grad = layer.up.grad = None
        of(x).square().sum().backward()
        grads.append([x.grad, layer.down.grad, layer.up.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_changes_the_class_or_the_parameters_of_a_layer() -> None:
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    with torch.no_grad():
        layer(x)
        swapped = {"down": torch.randn(4, 48)}
        got = torch.func.functional_call(layer, swapped, (x,))
        right = functional.adapted_linear(
            x, layer.weight, lo.LowRankUpdate(swapped["down"], layer.up, None, layer.adapter.scale), layer.bias
        )
        assert torch.equal(got, right) and torch.equal(layer(x), checked(layer, x))

        class Twice(nn.Module):
            def forward(self, w: Tensor) -> Tensor:
                return 2 * w

        before = layer(x)
        nn.utils.parametrize.register_parametrization(layer, "up", Twice())
        assert not torch.equal(layer(x), before) and torch.equal(layer(x), checked(layer, x))


def test_a_part_that_torch_keeps_as_an_attribute_is_seen_to_change() -> None:
    """Pruning makes ``down`` an attribute, which is a new tensor at each call."""
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    with torch.no_grad():
        layer(x)
        prune.l1_unstructured(layer, "down", 0.5)
        for _ in range(2):
            before = layer(x)
            layer.down_orig.mul_(3)
            assert not torch.equal(layer(x), before) and torch.equal(layer(x), checked(layer, x))
    for _ in range(2):  # each time in a graph of its own
        layer(x).sum().backward()


def test_a_layer_keeps_no_graph() -> None:
    """Of parameters that another network made."""
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    down = torch.randn(4, 48, requires_grad=True) * 2
    seen = weakref.ref(down)
    torch.func.functional_call(layer, {"down": down}, (x,)).sum().backward()
    del down
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_parts_without_memory_go_the_checked_way(quantize: str | None) -> None:
    layer, x = layer_of(lo.LoRA(4), quantize=quantize), torch.randn(3, 48)
    parts = dict(layer.named_parameters()) | dict(layer.named_buffers())
    fakes = FakeTensorMode()
    fake = {name: fakes.from_tensor(t) for name, t in parts.items()}
    with warnings.catch_warnings(), fakes:
        warnings.simplefilter("error")  # torch's for an address that is none
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert torch.func.functional_call(layer, fake, (torch.empty(3, 48),)).shape == (3, 40)
                bias = fake.get("bias")
                assert functional.prepare(fake.get("weight", layer.weight), bias).weight is not None
    downs = torch.stack([layer.down.detach(), 2 * layer.down.detach()])
    y = torch.vmap(lambda down: torch.func.functional_call(layer, {"down": down}, (x,)))(downs)
    assert y.shape == (2, 3, 40) and torch.equal(y[0], layer(x))


def test_the_reference_runs_a_layer_in_float64() -> None:
    layer, x = layer_of(lo.LoRA(4), quantize=None).double(), torch.randn(3, 48, dtype=torch.float64)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            with lo.implementation("reference"):
                assert torch.equal(layer(x), checked(layer, x))
            with pytest.raises(TypeError, match="must be float32, bfloat16 or float16, got torch.float64"):
                layer(x)
            with pytest.raises(TypeError, match="must be float32, bfloat16 or float16, got torch.float64"):
                layer(x.float())


def test_a_compiled_layer_does_not_keep_a_prepared_call() -> None:
    torch.compiler.reset()  # other tests of the process have compiled Linear.forward up to torch's limit
    layer, x = layer_of(lo.LoRA(4)), torch.randn(3, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        layer(x)
        assert torch.equal(compiled(x), layer(x))
        assign_parameter(layer)
        assert torch.equal(compiled(x), checked(layer, x))


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((torch.randn(4, 6), torch.randn(5)), r"bias must be \[4\], got \[5\]"),
        ((torch.randn(6, 4).t(), None), "weight must be contiguous"),
        ((torch.randn(4, 6).double(), None), "weight must be float32, bfloat16 or float16"),
        (("weight", None), "weight must be a Tensor"),
        ((torch.randn(4, 6), None, "update"), "update must be a LowRankUpdate or None"),
        (
            (torch.randn(4, 6), None, lo.LowRankUpdate(torch.randn(2, 5), torch.randn(4, 2))),
            r"update.down must be \[2, 6\]",
        ),
    ],
)
def test_bad_operands_are_refused_at_once(operands: tuple[object, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        functional.prepare(*operands)  # type: ignore[arg-type]


def test_bad_x_is_refused_by_name() -> None:
    run = functional.prepare(torch.randn(4, 6))
    for x in (torch.randn(2, 5), torch.randn(2, 6).double(), torch.randn(()), [1.0]):
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match="x must be"):
            run(x)  # type: ignore[arg-type]


def test_an_x_that_is_not_strided_is_refused_by_name() -> None:
    run = functional.prepare(torch.randn(4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about its sparse formats
        xs = [torch.randn(2, 6).to_sparse(), torch.randn(2, 6).to_sparse_csr(), torch.randn(2, 6).to_mkldnn()]
    for x in xs:
        with torch.no_grad(), pytest.raises(ValueError, match="x must be a dense tensor"):
            run(x)
