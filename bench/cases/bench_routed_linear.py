"""routed_linear: a batch in which every row has its own adapter, over one NF4 W, against no adapter, PEFT and a loop.

Measures the time and the share of the base's speed for 1 … 128 rows over distinct adapters, over a single adapter and
over a Zipf mix, for ranks 8, 16 and mixed up to 128, and for LoRA-XS, whose adapters share their factors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ops import NF4Weight, cores
from lowrank_ops.formats import QuantizedWeight
from lowrank_ops.functional import LowRankUpdate, adapted_linear, routed
from lowrank_ops.kernels.operands import Core, Matrix
from lowrank_ops.ops import arena

from ..common import Provider, copies
from ..goals import BARE
from ..report import Report
from .bench_nf4 import bitsandbytes_linear

OPS = ("routed_linear",)
SHAPE = (4096, 4096)
ROWS = (1, 8, 32, 64, 128)
QUICK = (1, 32)
MIXED = (8, 16, 32, 64, 128)
DTYPE = torch.bfloat16
Updates = Sequence[LowRankUpdate]


def loras(count: int, ranks: Sequence[int], N: int, K: int, device: torch.device) -> Updates:
    """Make LoRA updates with the ranks in turn and factors in bfloat16, as when served."""

    def factor(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / 64).to(DTYPE)

    return [LowRankUpdate(factor(r, K), factor(N, r)) for r in (ranks[i % len(ranks)] for i in range(count))]


def loras_xs(count: int, rank: int, N: int, K: int, device: torch.device) -> Updates:
    """Make LoRA-XS updates that share D and U in NF4; each has R² numbers."""
    down, up = (NF4Weight.quantize(torch.randn(s, device=device) / 64) for s in ((rank, K), (N, rank)))
    return [LowRankUpdate(down, up, cores.Dense(torch.randn(rank, rank, device=device))) for _ in range(count)]


def zipf(rows: int, count: int) -> Tensor:
    """Draw slot i of each row with probability proportional to 1 / (i + 1)."""
    chances = 1 / torch.arange(1, count + 1, dtype=torch.float32)
    return torch.multinomial(chances, rows, replacement=True, generator=torch.Generator().manual_seed(0))


def mixes(M: int, N: int, K: int, device: torch.device) -> Mapping[str, tuple[Updates, Tensor]]:
    """Named mixes: updates, and the slot of each row."""
    rows = torch.arange(M)
    found = {
        f"ours, {M} x LoRA 16": (loras(M, (16,), N, K, device), rows),
        "ours, 1 x LoRA 16": (loras(1, (16,), N, K, device), rows * 0),
        f"ours, {M} x LoRA-XS 64": (loras_xs(M, 64, N, K, device), rows),
    }
    if M >= 8:
        found |= {
            "ours, 8 x LoRA 16": (loras(8, (16,), N, K, device), rows % 8),
            "ours, 8 x LoRA 8 to 128": (loras(8, MIXED, N, K, device), rows % 8),
            "ours, 32 x LoRA 16, Zipf": (loras(32, (16,), N, K, device), zipf(M, 32)),
            "ours, 4 x LoRA 16 and 4 x LoRA-XS 64": (
                [*loras(4, (16,), N, K, device), *loras_xs(4, 64, N, K, device)],
                rows % 8,
            ),
        }
    return found


def two_of(M: int, count: int) -> tuple[Tensor, Tensor]:
    """Two of count updates for each row, and their strengths."""
    rows = torch.arange(M)
    return torch.stack([rows % count, (rows + 1) % count], 1), torch.full((M, 2), 0.5)


def pooled(updates: Updates, device: torch.device) -> tuple[Tensor, Tensor]:
    """Put updates side by side in an arena, as a pool does."""

    def matrix(factor: Tensor | QuantizedWeight) -> Matrix:
        return factor.operand() if isinstance(factor, QuantizedWeight) else Matrix(factor)

    return arena.build(
        [
            (
                u.rank,
                matrix(u.down),
                matrix(u.up),
                None if u.core is None else Core(u.core.values, u.core.index),
                u.scale,
            )
            for u in updates
        ],
        device,
    )


def sorted_loop(x: Tensor, weight: NF4Weight, updates: Updates, rows: Sequence[Tensor]) -> Tensor:
    """Run our base, then for each adapter torch's products over its rows."""
    y = adapted_linear(x, weight)
    for update, mine in zip(updates, rows, strict=True):
        assert isinstance(update.down, Tensor) and isinstance(update.up, Tensor)
        y.index_add_(0, mine, x[mine] @ update.down.T @ update.up.T)
    return y


def peft_batch(weight: NF4Weight, updates: Updates) -> Callable[[Tensor, Sequence[str]], object]:
    """Make PEFT's batch with ``adapter_names`` over bitsandbytes' Linear4bit, with factors in bfloat16."""
    import peft

    config: Any = partial(peft.LoraConfig, target_modules=["0"], init_lora_weights=False)
    model: nn.Module = nn.Sequential(bitsandbytes_linear(weight, DTYPE))
    for i, update in enumerate(updates):
        model = peft.inject_adapter_in_model(config(r=update.rank, lora_alpha=update.rank), model, str(i))
    layer: Any = next(module for module in model.modules() if hasattr(module, "lora_A"))
    for i, update in enumerate(updates):
        layer.lora_A[str(i)].weight.data = update.down
        layer.lora_B[str(i)].weight.data = update.up
    layer.eval()
    return lambda x, names: layer(x, adapter_names=list(names))


def run(report: Report) -> None:
    settings = report.settings
    if OPS[0] not in settings.ops or report.skip("serving"):
        return
    N, K = shape = settings.shapes(SHAPE)[0]
    device = settings.device
    first = NF4Weight.quantize(torch.randn(N, K, device=device).to(DTYPE) / 64)
    weights = [first, *(copy.deepcopy(first) for _ in range(copies(first.nbytes, settings) - 1))]
    with torch.no_grad():
        for M in QUICK if settings.quick else ROWS:
            x = torch.randn(M, K, device=device).to(DTYPE)
            moved, flops = first.nbytes + 2 * M * (N + K), 2 * M * N * K

            def provider(calls: Sequence[Callable[[], object]]) -> Provider:
                return Provider(calls, moved, flops)  # noqa: B023

            providers = {BARE: provider([partial(adapted_linear, x, w) for w in weights])}
            for name, (updates, slots) in mixes(M, N, K, device).items():
                memory, table = pooled(updates, device)
                on_device = slots.to(device, torch.int32)
                providers[name] = provider([partial(routed, x, w, memory, table, on_device, None) for w in weights])
                if M >= 8 and name == "ours, 8 x LoRA 16":
                    both, strengths = two_of(M, 8)
                    mixed = partial(routed, strengths=strengths.to(device))
                    both = both.to(device, torch.int32)
                    providers["ours, 8 x LoRA 16, two a row"] = provider(
                        [partial(mixed, x, w, memory, table, both, None) for w in weights]
                    )
            distinct = loras(M, (16,), N, K, device)
            each = [torch.tensor([i], device=device) for i in range(M)]
            providers[f"sorted loop, {M} x LoRA 16"] = provider(
                [partial(sorted_loop, x, w, distinct, each) for w in weights]
            )
            few = weights[:3]  # each takes many megabytes in addition to the weight
            if peers := report.build("PEFT's mixed batch", lambda: [peft_batch(w, distinct) for w in few]):  # noqa: B023
                names = [str(i) for i in range(M)]
                providers[f"bitsandbytes + PEFT, {M} x LoRA 16"] = provider([partial(p, x, names) for p in peers])
            report.case(OPS[0], shape, M, DTYPE, providers)


SECTIONS = {20: run}
