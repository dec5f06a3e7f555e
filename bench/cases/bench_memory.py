"""Peak memory of a training step of a Llama-shaped block beyond its weights, against PEFT over bitsandbytes.

Forward, and the gradients of the block's input and of all factors; LoRA of rank 16 on all seven linear layers over
NF4 with double quantisation, in bfloat16, norms frozen. Ours keeps its factors in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lo

from ..goals import OURS, PEFT
from ..peak import measurable, peak_bytes
from ..report import Report, Table
from .bench_nf4 import bitsandbytes_linear

OPS = ("memory",)
RANK, HEAD = 16, 128
# Sizes (hidden, intermediate, keys and values) of Llama 3 8B, and of a small block.
SIZES, SMALL = (4096, 14336, 1024), (256, 512, 128)
TOKENS = {"cpu": (512,), "cuda": (512, 2048, 8192)}
SYSTEMS = (OURS, PEFT, PEFT + ", float32 factors")


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the gated MLP; x [M, hidden]. Position embeddings have no weights."""

    def __init__(self, hidden: int, intermediate: int, keys: int, device: torch.device) -> None:
        super().__init__()

        def linear(K: int, N: int) -> nn.Linear:
            return nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)

        self.q_proj, self.o_proj = linear(hidden, hidden), linear(hidden, hidden)
        self.k_proj, self.v_proj = linear(hidden, keys), linear(hidden, keys)
        self.gate_proj, self.up_proj = linear(hidden, intermediate), linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, device=device, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (
            p(h).unflatten(-1, (-1, HEAD)).transpose(0, 1)[None] for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended[0].transpose(0, 1).flatten(1))
        h = self.norms[1](x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def make(device: torch.device, system: str, sizes: tuple[int, int, int], M: int) -> Callable[[], object]:
    """Make a training step of a system's block on M tokens."""
    block: nn.Module = Block(*sizes, device).requires_grad_(False)
    if system == OURS:
        lo.adapt(block, lo.LoRA(RANK, alpha=RANK), targets="all-linear", quantize="nf4")
    else:
        block = with_peft(block, device, torch.float32 if "float32" in system else torch.bfloat16)
    trained = [p for p in block.parameters() if p.requires_grad]
    x, g = (torch.randn(M, sizes[0], device=device).bfloat16() for _ in range(2))
    x.requires_grad_()
    return lambda: torch.autograd.grad(block(x), [x, *trained], g)


def with_peft(block: nn.Module, device: torch.device, factors: torch.dtype) -> nn.Module:
    import peft

    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        linear: Any = block.get_submodule(name)
        weight = lo.NF4Weight.quantize(linear.weight)
        setattr(block, name, bitsandbytes_linear(weight, torch.bfloat16))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=False)
    block = peft.inject_adapter_in_model(config, block).train()
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device, factors)
    return block


def run(report: Report) -> None:
    settings = report.settings
    if "memory" not in settings.ops:
        return
    if not measurable(settings):
        report.absent["peak memory"] = "only Linux reports the peak of a process"
        return
    sizes = SMALL if settings.quick else SIZES
    lines: list[list[str]] = []
    first: dict[int, int] = {}
    for M in TOKENS[settings.kind][: 1 if settings.quick else None]:
        for system in SYSTEMS:
            if report.skip(f"memory of a training step, {system}, M = {M}"):
                continue
            peak = report.build(system, lambda: peak_bytes(settings, make, (system, sizes, M), (system, SMALL, 16)))  # noqa: B023
            if peak is not None:
                first.setdefault(M, peak)
                lines.append([system, str(M), f"{peak / 1e6:.0f} MB", f"{peak / first[M]:.2f}"])
                print("memory of a training step | " + " | ".join(lines[-1]), flush=True)
    text = (
        f"Hidden {sizes[0]}, intermediate {sizes[1]}, keys and values {sizes[2]}; the peak beyond weights and inputs."
    )
    report.tables.append(
        Table("Memory of a training step of a block", ["system", "M", "peak", "over ours"], lines, text)
    )


SECTIONS = {60: run}
