"""adapt called again: over layers of ours, beside adapters, over layers of a pool; what it freezes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import gpt2, llama, plain
from torch import nn

import lowrank_ops as lo


def test_in_two_calls_with_two_ranks() -> None:
    model = lo.adapt(llama(), lo.LoRA(2), targets=["q_proj"])
    model.lm_head.requires_grad_()
    model.model.layers[0].self_attn.q_proj.down.requires_grad_(False)
    model.value_head = nn.Linear(64, 1)
    lo.adapt(model, lo.LoRA(4), targets=["up_proj"])
    assert len(lo.adapter_parameters(model)) == 8
    others = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith((".down", ".up"))}
    assert others == {
        "lm_head.weight",
        "value_head.weight",
        "value_head.bias",
    }  # unfrozen or added since the first call
    assert not model.model.layers[0].self_attn.q_proj.down.requires_grad
    with pytest.raises(ValueError, match="q_proj' has an adapter already"):
        lo.adapt(model, lo.LoRA(4))
    lo.merge(model).requires_grad_()
    lo.adapt(model, lo.LoRA(2), targets=["q_proj"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lo.adapter_parameters(model)}


def test_a_part_that_was_adapted_alone_keeps_what_was_unfrozen() -> None:
    model = plain()
    lo.adapt(model[2], lo.LoRA(2), ["0"])
    model[2][1].bias.requires_grad_()
    lo.adapt(model, lo.LoRA(2), ["0"])
    assert model[2][1].bias.requires_grad and not model[2][1].weight.requires_grad


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize(
    "kind", [lo.LoRA(4, init="nystrom"), lo.LoRAXS(4), lo.SVF(), lo.SVFT(bandwidth=1), lo.SVF(form="replace")], ids=str
)
def test_over_layers_of_ours_without_an_adapter(kind: Any, quantize: str | None) -> None:
    x, twice = torch.randn(5, 64), lo.adapt(plain(), None, quantize=quantize)
    bias = twice[0].bias
    bias.requires_grad_()
    lo.adapt(twice, kind, quantize=quantize)
    assert twice[0].bias is bias and bias.requires_grad
    base = lo.adapt(plain(), None, quantize=quantize)
    # In the replace form two factors of 4 bits stand in for W.
    off = 0.3 if quantize and kind == lo.SVF(form="replace") else 1e-5
    torch.testing.assert_close(twice(x), base(x), rtol=off, atol=off)
    twice(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (twice[0].trained()[-1], bias))
    assert (twice[0].weight is None) == (kind == lo.SVF(form="replace"))


def test_a_base_of_four_bits_is_kept_and_one_that_must_change_is_refused() -> None:
    model = lo.adapt(plain(), None)
    layers = [model[0], model[2][0], model[2][1]]
    assert [lo.adapt(model, None)[0], model[2][0], model[2][1]] == layers
    with pytest.raises(ValueError, match="layer '0': init='pissa' changes the base.*adapt the dense model"):
        lo.adapt(model, lo.LoRA(4, init="pissa"))
    assert model[0] is layers[0]
    with warnings.catch_warnings(action="error"):  # the parts of a layer of ours are no layers that adapt leaves out
        lo.adapt(model, lo.LoRA(4))
    assert model[0] is not layers[0] and model[0].weight is layers[0].weight
    dense = lo.adapt(lo.adapt(plain(), None, quantize=None), lo.LoRA(4, init="pissa"))
    assert_bits_equal(dense[0].base_down, lo.adapt(plain(), lo.LoRA(4, init="pissa"))[0].base_down)


def test_a_conv1d_of_ours_stays_one() -> None:
    model = lo.adapt(lo.adapt(gpt2(), None), lo.LoRA(2))
    assert type(lo.merge(model).transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_a_layer_of_a_pool_is_refused() -> None:
    model = lo.adapt(plain(), None)
    pool = lo.AdapterPool(model, 1 << 16)
    with pytest.raises(ValueError, match="layer '0': an AdapterPool routes the layer"):
        lo.adapt(model, lo.LoRA(2))
    assert pool.holds(lo.adapt(model, None)[0])
