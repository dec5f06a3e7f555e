"""The experts of transformers' models: their layouts and how they compute; transformers itself is not imported.

Most families follow transformers' interface for experts (``use_experts_implementation``): it sets flags on a block that
tell its layout, and its class has the activation ``_apply_gate``. A family made later that follows it needs nothing here.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.experts import FAMILIES, Experts, Layout, Matrix
from ..adapters.route import Rows

# What the decorator of the interface sets on a block.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


class FusedExperts(Experts):
    """Experts that follow transformers' interface, or look as if they did."""

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        block: Any = self
        gated = getattr(self, "has_gate", True)
        first, down = self.layers()
        h = first(x, rows)
        h = down(block._apply_gate(h) if gated else block.act_fn(h), rows)
        return block.post_expert_norm(h) if getattr(self, "has_post_expert_norm", False) else h


class LongcatFlashExperts(Experts):
    """Some indices beyond the experts with matrices mean the identity; they are the sentinels of the sorted rows."""

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        block: Any = self
        first, down = self.layers()
        # The stack of gates has matrices for the identities too, which nothing reads.
        unused = rows.offsets[-1:].expand(first.num_experts - down.num_experts)
        gate, up = first(x, rows._replace(offsets=torch.cat([rows.offsets, unused]))).chunk(2, dim=-1)
        identity = torch.arange(len(x), device=x.device) >= rows.offsets[-1]
        return torch.where(identity.unsqueeze(1), x, down(block.act_fn(gate) * up, rows))


class DbrxExperts(Experts):
    """Gate and up are two matrices, and down is kept as they are."""

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        block: Any = self
        gate, up, down = self.layers()
        return down(block.mlp.activation_fn(gate(x, rows)) * up(x, rows), rows)


class Llama4Experts(Experts):
    """The whole mixture, because its experts are not told which tokens are theirs: scores multiply their input."""

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        block: Any = self
        first, down = self.layers()
        gate, up = first(x, rows).chunk(2, dim=-1)
        return down(up * block.experts.act_fn(gate), rows)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        block: Any = self
        x = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(x)  # [T, E], 0 but for the top k
        weights, index = scores.topk(block.top_k, dim=1)
        shared: Tensor = block.shared_expert(x)
        return shared + self.mix(x, index, weights, weigh_input=True).to(shared.dtype), logits


class JetMoeExperts(Experts):
    """One stack, whose rows come sorted, with the number of rows of each expert."""

    knows_tokens = False

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        (layer,) = self.layers()
        offsets = torch.tensor([0, *accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
        y: Tensor = layer(inputs, Rows(offsets, None, 0))
        return y


def _layout(module: nn.Module) -> Layout | None:
    """Recognise a block by the flags of the interface, or by its class where the family has a forward of its own."""
    held = module._parameters
    if all(hasattr(module, flag) for flag in _FLAGS):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        names = (first, "down_proj")
        if not all(isinstance(held.get(name), nn.Parameter) for name in names):
            return None
        turned, biased = bool(module.is_transposed), module.has_bias
        return Layout(FusedExperts, tuple(Matrix(n, turned, f"{n}_bias" if biased else None) for n in names))
    if not type(module).__module__.startswith("transformers.models."):
        return None
    plain = (Matrix("gate_up_proj"), Matrix("down_proj"))
    match type(module).__name__:
        case "Llama4TextMoe":
            return Layout(Llama4Experts, (Matrix("experts.gate_up_proj", True), Matrix("experts.down_proj", True)))
        case "LongcatFlashExperts" if held.get("gate_up_proj") is not None:
            return Layout(LongcatFlashExperts, plain)
        case "Step3p7Experts":
            return Layout(FusedExperts, plain)
        case "DbrxExperts":
            E = int(module.num_experts)  # type: ignore[arg-type]
            return Layout(
                DbrxExperts, (Matrix("mlp.w1", experts=E), Matrix("mlp.v1", experts=E), Matrix("mlp.w2", True, None, E))
            )
        case "JetMoeParallelExperts":
            return Layout(JetMoeExperts, (Matrix("weight"),))
    return None


FAMILIES.append(_layout)
