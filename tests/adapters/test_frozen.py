"""Linear layers that stay dense, where the processor has no products of bfloat16: they run in our kernels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_ops as lo
from lowrank_ops import functional
from lowrank_ops.adapters.frozen import FrozenLinear
from lowrank_ops.commands import info
from lowrank_ops.ops import _cpu
from tests import models
from tests.helpers import assert_bits_equal, assert_within_baseline


@pytest.fixture
def without_bfloat16() -> Iterator[None]:
    """The instruction set AVX2, as LOWRANK_OPS_ISA chooses it."""
    if "avx2" not in _cpu.module().isas():
        pytest.skip("the machine has no AVX2")
    before = _cpu.isa()
    _cpu.module().set_isa("avx2")
    yield
    _cpu.module().set_isa(before)


def halved(tied: bool = True) -> Any:
    return models.tiny(tied=tied).bfloat16()


def step(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(models.TOKENS, labels=models.TOKENS).loss
    return loss, list(torch.autograd.grad(loss, lo.adapter_parameters(model)))


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_head_runs_in_our_kernel(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = halved(tied)
    names, held = list(model.state_dict()), model.lm_head.weight
    lo.adapt(model, lo.LoRA(4), quantize=None)
    head = model.lm_head
    assert isinstance(head, nn.Linear) and type(head) is FrozenLinear and head.weight is held
    assert (head.weight is model.model.embed_tokens.weight) == tied
    assert [name for name in names if "proj" not in name] == [name for name in model.state_dict() if "proj" not in name]
    exact = copy.deepcopy(model).double()
    plain = copy.deepcopy(model)
    plain.lm_head.__class__ = exact.lm_head.__class__ = nn.Linear
    for made in (model, exact, plain):
        for layer in made.modules():
            if isinstance(layer, lo.Linear):
                layer.up.data.copy_(torch.linspace(-1, 1, layer.up.numel()).view_as(layer.up) / 9)
    x = torch.randn(15, 32).bfloat16().requires_grad_()
    y = head(x)
    (dx,) = torch.autograd.grad(y, x, g := torch.randn_like(y))
    assert_bits_equal(y, functional.adapted_linear(x, head.weight))
    x64 = x.detach().double().requires_grad_()
    y64 = F.linear(x64, head.weight.double())
    baseline = F.linear(x, head.weight)
    assert_within_baseline(y, y64, baseline)
    assert_within_baseline(dx, torch.autograd.grad(y64, x64, g.double())[0], torch.autograd.grad(baseline, x, g)[0])
    monkeypatch.setattr(nn.Linear, "forward", None)  # torch's product is called nowhere
    loss, grads = step(model)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("without_bfloat16")
def test_what_torch_computes_well_goes_to_torch() -> None:
    model = lo.adapt(models.tiny(), lo.LoRA(4))
    head: Any = model.lm_head
    x = torch.randn(3, 32)
    assert type(head) is FrozenLinear and not head.runs_here(x)
    assert_bits_equal(head(x), F.linear(x, head.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert head.runs_here(x) and head(x).dtype == torch.bfloat16
    head.weight.requires_grad_()
    half = head.bfloat16()
    x = x.bfloat16().requires_grad_()
    y = half(x)
    assert y.dtype == torch.bfloat16
    assert_bits_equal(y, F.linear(x.float(), half.weight.float()).bfloat16())
    y.sum().backward()
    assert half.weight.grad.dtype == x.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x.float()).dtype == torch.bfloat16


def test_every_instruction_set_of_x86_is_one_or_the_other(isa: str) -> None:
    if isa.startswith(("avx", "amx")):
        assert _cpu.has_bfloat16() == (isa in ("amx", "avx512_bf16"))


def test_with_bfloat16_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "has_bfloat16", lambda: True)
    assert type(lo.adapt(halved(), lo.LoRA(4)).lm_head) is nn.Linear


@pytest.mark.usefixtures("without_bfloat16")
def test_copies_files_merging_and_adapting_again(tmp_path: Path) -> None:
    model = lo.adapt(halved(), lo.LoRA(4), targets=["q_proj"], quantize=None)
    o_proj = model.model.layers[0].self_attn.o_proj
    assert type(o_proj) is FrozenLinear
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.up.normal_()
        expected = model(models.TOKENS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lo.reference(model)):
            assert type(other.lm_head) is FrozenLinear
            assert other.lm_head.weight is other.model.embed_tokens.weight
            assert_bits_equal(other(models.TOKENS).logits, expected)
        with lo.disabled(model):
            before = model(models.TOKENS).logits
        assert_bits_equal(before, lo.adapt(halved(), None, targets=["q_proj"], quantize=None)(models.TOKENS).logits)
    lo.save_adapter(model, tmp_path / "adapter")
    loaded = halved()
    lo.load_adapter(loaded, tmp_path / "adapter")
    assert type(loaded.lm_head) is FrozenLinear
    lo.adapt(model, lo.LoRA(2), targets=["o_proj"], quantize=None)
    assert type(model.model.layers[0].self_attn.o_proj) is lo.Linear, "a dense layer can be adapted later"
    merged = lo.merge(model)
    linear = [module for module in merged.modules() if isinstance(module, nn.Linear)]
    assert linear and all(type(module) is nn.Linear for module in linear)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.usefixtures("without_bfloat16")
def test_it_is_told() -> None:
    head: Any = lo.adapt(halved(), lo.LoRA(4)).lm_head
    x = torch.randn(2, 32).bfloat16()
    said = lo.explain(head, x)
    assert "adapted_linear" in said and "W dense" in said and "no products of bfloat16" in said
    with pytest.raises(TypeError, match="torch computes it"):
        lo.explain(head, x.float())
    head.weight.requires_grad_()
    assert "in float32" in lo.explain(head, x)
    assert info.collect()["bfloat16 products"].startswith("none")


@pytest.mark.usefixtures("without_bfloat16")
def test_torch_compile_takes_it_whole() -> None:
    model = FrozenLinear(64, 8).bfloat16().requires_grad_(False)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), model(x)
    assert_bits_equal(y, expected)
    g = torch.randn_like(y)
    assert_bits_equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0])
