"""Reports on training: scaled losses in float16, checkpointed activations over a frozen base, dtypes that mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, randomised, tiny
from torch import Tensor, nn

import lowrank_ops as lo

TOKENS = torch.arange(1, 15).view(2, 7)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_scaled_loss_takes_the_same_step() -> None:
    """torch's scaler over a float16 base: it finds no overflow, and the step equals the one without a scale."""
    x, ends = torch.linspace(-1, 1, 320).view(5, 64).half(), []
    for scaled in (False, True):
        model = randomised(lo.adapt(plain().half(), lo.LoRA(4)))
        optimizer = torch.optim.SGD(lo.adapter_parameters(model), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        scaler.scale(model(x).float().square().mean()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(lo.adapter_parameters(model), 0.5)
        scaler.step(optimizer)
        scaler.update()
        assert norm.isfinite() and norm > 0 and scaler.get_scale() == (256.0 if scaled else 1.0)
        ends.append(torch.cat([p.detach().flatten() for p in lo.adapter_parameters(model)]))
    torch.testing.assert_close(*ends, rtol=2e-3, atol=2e-4)  # float16 gradients between the layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_over_a_frozen_base(reentrant: bool) -> None:
    model = randomised(lo.adapt(tiny(), lo.LoRA(4))).train()
    model.enable_input_require_grads()  # a re-entrant block passes a gradient only where its input has one
    model(TOKENS).logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(TOKENS).logits.square().mean().backward()
    got = gradients(model)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_adapted_layer_under_autocast(dtype: torch.dtype) -> None:
    """Its neighbours stay torch's own; all of them must agree on the dtype."""
    model: Any = randomised(lo.adapt(tiny(), lo.LoRA(4), ["q_proj"]))
    with torch.no_grad():
        exact = model(TOKENS).logits
    with torch.autocast("cpu", dtype):
        logits = model(TOKENS).logits
    logits.float().square().mean().backward()
    assert logits.dtype == dtype and all(g.isfinite().all() and g.any() for g in gradients(model).values())
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()  # eight bits, some layers
