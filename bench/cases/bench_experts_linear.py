"""experts_linear (forward) and experts_linear_backward (a training step): the experts of a layer, NF4 with a LoRA of rank 16
on each, against transformers' implementations over dense experts, PEFT, and a loop over adapted_linear.

A call is what the experts of a layer do: rows sorted by expert, the gate and up product, SiLU, the down product, and the
weighted sum over the top k. A layer counts the bytes of the experts that have tokens; with balanced routing and few tokens
these are top k experts a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import NF4Weight
from lowrank_ops.functional import LowRankUpdate, adapted_linear, experts_linear

from ..common import Provider, copies
from ..goals import BARE, EAGER, GROUPED, LOOP, OURS
from ..peak import measurable, peak_bytes
from ..report import Report, Table

OPS = ("experts_linear", "experts_linear_backward")
RANK = 16
Stacks = tuple[NF4Weight, NF4Weight]  # gate and up [E, 2 I, H], down [E, H, I]
Routing = tuple[Tensor, Tensor]  # index [M, top] int64 and weights [M, top] of the experts of each token


@dataclass(frozen=True)
class Shape:
    """``E`` experts with hidden size ``H`` and intermediate size ``I``, ``top`` of them for each token."""

    E: int
    H: int
    I: int  # noqa: E741
    top: int

    def __str__(self) -> str:
        return f"{self.E} experts, top {self.top}"


FIRST = Shape(16, 1024, 512, 2)
# Shapes of models, with sizes divided by four, two and three; Qwen3-30B-A3B with a quarter of its experts' number, too.
MODELS = {
    "Mixtral-8x7B / 4": Shape(8, 1024, 3584, 2),
    "Qwen3-30B-A3B / 2": Shape(128, 1024, 384, 8),
    "gpt-oss-20b / 3": Shape(32, 960, 960, 4),
}
TOKENS = {"experts_linear": (1, 8, 64, 512, 4096), "experts_linear_backward": (64, 512)}
TOKENS_OF_MODELS = {"experts_linear": (1, 64, 1024), "experts_linear_backward": (64,)}
QUICK = {"experts_linear": (1, 64), "experts_linear_backward": (64,)}
# Slow providers run up to this many tokens, with balanced routing only.
SLOW = {"PEFT, dense": 64, EAGER: 512}
COMPARED = (OURS, LOOP, GROUPED)  # by goals


def balanced(M: int, shape: Shape) -> Tensor:
    """Give each expert as many tokens as any other; experts come in another order for each group of tokens."""
    order = torch.randperm(shape.E, generator=torch.Generator().manual_seed(0))
    return order[(torch.arange(M * shape.top) % shape.E).view(M, shape.top)]


def zipf(M: int, shape: Shape) -> Tensor:
    """Draw the experts of a token without repetition, expert i with probability proportional to 1 / (i + 1)."""
    chances = (1 / torch.arange(1, shape.E + 1, dtype=torch.float32)).expand(M, -1)
    return torch.multinomial(chances, shape.top, generator=torch.Generator().manual_seed(0))


def random_stacks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Stacks:
    def stack(N: int, K: int) -> NF4Weight:
        return NF4Weight.quantize(torch.randn(shape.E, N, K, device=device).to(dtype) / K**0.5)

    return stack(2 * shape.I, shape.H), stack(shape.H, shape.I)


# ---- providers


@dataclass(frozen=True)
class Layer:
    """y = forward(x, index, weights), the bytes of one expert, and the factors that get gradients in a training step."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    expert_bytes: int
    factors: Sequence[Tensor] = ()


Product = Callable[[Tensor, Tensor], Tensor]  # rows sorted by expert, and offsets
Maker = Callable[[Stacks, Shape, torch.dtype], Layer]


def block(up: Product, down: Product, E: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The experts of a layer over two products with rows sorted by expert."""

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        sorted_index, order = index.view(-1).sort()
        experts = torch.arange(E + 1, device=x.device)
        offsets = torch.searchsorted(sorted_index, experts, out_int32=True)
        tokens = order // index.shape[1]
        gate, value = up(x[tokens], offsets).chunk(2, dim=-1)
        y = down(F.silu(gate) * value, offsets) * weights.view(-1, 1)[order]
        return torch.zeros_like(x).index_add(0, tokens, y)

    return forward


def updates(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> list[LowRankUpdate]:
    sizes = ((shape.H, 2 * shape.I), (shape.I, shape.H))
    found = []
    for K, N in sizes:
        down, up = (torch.randn(shape.E, *size, device=device).to(dtype) / 64 for size in ((RANK, K), (N, RANK)))
        found.append(LowRankUpdate(down.requires_grad_(), up.requires_grad_()))
    return found


def ours(stacks: Stacks, shape: Shape, dtype: torch.dtype, adapter: bool = True) -> Layer:
    found = updates(shape, stacks[0].device) if adapter else [None, None]
    products = [partial(_product, weight, update) for weight, update in zip(stacks, found, strict=True)]
    return Layer(block(products[0], products[1], shape.E), nbytes(stacks) // shape.E, factors(found))


def _product(weight: NF4Weight, update: LowRankUpdate | None, x: Tensor, offsets: Tensor) -> Tensor:
    return experts_linear(x, weight, offsets, update)


def factors(found: Sequence[LowRankUpdate | None]) -> list[Tensor]:
    return [f for update in found if update for f in (update.down, update.up) if isinstance(f, Tensor)]


def nbytes(stacks: Stacks) -> int:
    return sum(stack.nbytes for stack in stacks)


def loop(stacks: Stacks, shape: Shape, dtype: torch.dtype) -> Layer:
    """Call adapted_linear for each expert that has rows, over weights and updates taken apart beforehand."""
    found = updates(shape, stacks[0].device)
    held = [list(stack) for stack in stacks]
    # Views of the stacked factors would gather their gradients in the stacks at every step.
    apart = [[LowRankUpdate(d, u) for d, u in zip(_leaves(o.down), _leaves(o.up), strict=True)] for o in found]

    def product(of: int, x: Tensor, offsets: Tensor) -> Tensor:
        counts = offsets.diff().tolist()
        parts = x.split(counts)
        hit = [e for e, count in enumerate(counts) if count]
        return torch.cat([adapted_linear(parts[e], held[of][e], apart[of][e]) for e in hit])

    trained = [f for of in apart for f in factors(of)]
    return Layer(block(partial(product, 0), partial(product, 1), shape.E), nbytes(stacks) // shape.E, trained)


def _leaves(stack: Any) -> list[Tensor]:
    return [part.clone().requires_grad_() for part in stack.detach()]


def transformers_experts(stacks: Stacks, shape: Shape, dtype: torch.dtype, implementation: str) -> Any:
    """The experts of transformers' Qwen3-MoE, dense, over the decoded weights."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=shape.E, num_experts_per_tok=shape.top, hidden_size=shape.H, moe_intermediate_size=shape.I
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(config)
    for name, stack in zip(("gate_up_proj", "down_proj"), stacks, strict=True):
        setattr(experts, name, nn.Parameter(stack.dequantize(dtype), requires_grad=False))
    return experts


def dense(stacks: Stacks, shape: Shape, dtype: torch.dtype, implementation: str) -> Layer:
    experts = transformers_experts(stacks, shape, dtype, implementation)
    return Layer(experts, 3 * shape.H * shape.I * dtype.itemsize)


def peft(stacks: Stacks, shape: Shape, dtype: torch.dtype) -> Layer:
    import peft

    model: Any = nn.Module()
    model.experts = transformers_experts(stacks, shape, dtype, "grouped_mm")
    config = peft.LoraConfig(
        r=RANK, target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False
    )
    model = peft.inject_adapter_in_model(config, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Layer(model.experts, 3 * shape.H * shape.I * dtype.itemsize, trained)


MAKERS: dict[str, Maker] = {
    OURS: ours,
    BARE: partial(ours, adapter=False),
    LOOP: loop,
    GROUPED: partial(dense, implementation="grouped_mm"),
    EAGER: partial(dense, implementation="eager"),
    "PEFT, dense": peft,
}


# ---- cases


def calls(layers: Sequence[Layer], shape: Shape, x: Tensor, routing: Routing, training: bool) -> Provider:
    """Forward, or forward and backward, of each copy of a layer. Weights and factors of the experts hit count once in each
    direction."""
    layer, (M, H) = layers[0], x.shape
    hit, rows = routing[0].unique().numel(), M * shape.top
    factor_bytes = sum(f.nbytes for f in layer.factors) // shape.E * hit
    R = RANK if layer.factors else 0
    moved = hit * layer.expert_bytes + factor_bytes + 2 * M * H * x.itemsize
    flops = 2 * rows * (3 * H * shape.I + R * (3 * H + 3 * shape.I))
    if training:
        moved += hit * layer.expert_bytes + 2 * factor_bytes + 2 * M * H * x.itemsize
        flops *= 2
    g = torch.randn_like(x)

    def step(layer: Layer) -> object:
        return torch.autograd.grad(layer.forward(x, *routing), [x, *layer.factors], g)

    made = [partial(step, one) if training else partial(one.forward, x, *routing) for one in layers]
    return Provider(made, moved, flops)


def make_layers(report: Report, make: Maker, shape: Shape, dtype: torch.dtype) -> list[Layer]:
    """So many copies that each leaves the caches before its next use."""
    stacks = random_stacks(shape, dtype, report.settings.device)
    first = make(stacks, shape, dtype)
    count = copies(shape.E * first.expert_bytes, report.settings)
    return [first, *(make(copy.deepcopy(stacks), shape, dtype) for _ in range(count - 1))]


def measure(
    report: Report,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    tokens: Mapping[str, Sequence[int]],
    makers: Sequence[str],
) -> None:
    settings = report.settings
    ops = [op for op in OPS if op in settings.ops]
    if not ops or report.skip(f"experts, {name or shape}"):
        return
    layers = {one: report.build(one, partial(make_layers, report, MAKERS[one], shape, dtype)) for one in makers}
    for op in ops:
        training = op == "experts_linear_backward"
        with torch.set_grad_enabled(training):
            for M in QUICK[op] if settings.quick else tokens[op]:
                for routing, draw in (("", balanced), (", Zipf", zipf)):
                    if routing and (M == 1 or name):
                        continue
                    index = draw(M, shape).to(settings.device)
                    weights = torch.rand(M, shape.top, device=settings.device).to(dtype)
                    x = torch.randn(M, shape.H, device=settings.device).to(dtype).requires_grad_(training)
                    providers = {
                        one: calls(found, shape, x, (index, weights), training)
                        for one, found in layers.items()
                        if found and M <= SLOW.get(one, M) and not (routing and one in SLOW)
                    }
                    what = f"{op}{f', {name}' if name else ''}{routing}"
                    report.case(what, (shape.H, shape.I), M, dtype, providers, scale=0.6 if routing or name else 1.0)


def run_first(report: Report) -> None:
    """The first layer, or one of the size asked for, in bfloat16 against everything, and in float32."""
    asked = report.settings.shape
    shape = Shape(4, asked[1], asked[0], 2) if asked else FIRST
    measure(report, "", shape, torch.bfloat16, TOKENS, list(MAKERS))
    measure(report, "", shape, torch.float32, TOKENS_OF_MODELS, COMPARED)


def run_models(report: Report) -> None:
    """Shapes of models, in bfloat16."""
    if report.settings.quick or report.settings.shape:
        return
    for name, shape in MODELS.items():
        measure(report, name, shape, torch.bfloat16, TOKENS_OF_MODELS, COMPARED)


def make(device: torch.device, system: str, shape: Shape, M: int) -> Callable[[], object]:
    """Make a training step of a system's experts in bfloat16 on M tokens."""
    layer = MAKERS[system](random_stacks(shape, torch.bfloat16, device), shape, torch.bfloat16)
    routing = balanced(M, shape).to(device), torch.rand(M, shape.top, device=device).bfloat16()
    x = torch.randn(M, shape.H, device=device).bfloat16().requires_grad_()
    return calls([layer], shape, x, routing, training=True).calls[0]


def run_memory(report: Report) -> None:
    """Measure the peak memory of a training step beyond weights and inputs."""
    settings, M = report.settings, 64
    if OPS[1] not in settings.ops or settings.quick or not measurable(settings):
        return
    lines: list[list[str]] = []
    first = 0
    for system in (OURS, GROUPED, "PEFT, dense"):
        arguments = (system, FIRST, M), (system, Shape(4, 128, 64, 2), 8)
        peak = report.build(f"memory, {system}", lambda: peak_bytes(settings, make, *arguments))  # noqa: B023
        if peak is not None:
            first = first or peak
            lines.append([system, str(M), f"{peak / 1e6:.0f} MB", f"{peak / first:.2f}"])
            print("memory of a training step of experts | " + " | ".join(lines[-1]), flush=True)
    text = f"{FIRST}, hidden {FIRST.H}, intermediate {FIRST.I}, bfloat16; the peak beyond weights and inputs."
    columns = ["system", "M", "peak", "over ours"]
    report.tables.append(Table("Memory of a training step of experts", columns, lines, text))


SECTIONS = {25: run_first, 55: run_models, 65: run_memory}
