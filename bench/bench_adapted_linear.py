"""adapted_linear (forward) and adapted_linear_backward (a training step), NF4 with double quantisation, LoRA of rank 16;
and the kinds with a core against a LoRA of the same rank.

Ours always includes the adapter, with float32 factors as they are trained. Peers get their best path: factors in the
dtype of x, which saves them casts, weights packed beforehand, and no adapter at all where a name says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ops import SVF, SVFT, LoRA, LoRAXS, NF4Weight, _plan, cores, init, reference
from lowrank_ops.adapters import Adapter
from lowrank_ops.functional import LowRankUpdate, adapted_linear

from .bench_nf4 import bitsandbytes_weight
from .common import Call, Provider, Report, copies, name_of

OPS = ("adapted_linear", "adapted_linear_backward", "crossover", "core")
RANK = 16
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
# Tokens: for the first shape in bfloat16, for the others in bfloat16, for the first in float32.
TOKENS: dict[tuple[str, str], tuple[Sequence[int], Sequence[int], Sequence[int]]] = {
    ("cpu", "adapted_linear"): ((1, 4, 8, 16, 64, 128, 512), (1, 16, 128), (1, 16, 128)),
    ("cpu", "adapted_linear_backward"): ((16, 128, 512, 2048), (128,), (128,)),
    ("cpu", "crossover"): ((1, 2, 4, 6, 8, 12, 16, 24, 32), (1, 4, 8, 16, 32), (1, 4, 8, 16, 32)),
    ("cuda", "adapted_linear"): ([2**i for i in range(14)], (1, 8, 16, 64, 256, 2048, 8192), (1, 16, 512)),
    ("cuda", "adapted_linear_backward"): ((64, 512, 2048, 4096, 8192), (512, 2048, 8192), (512,)),
    ("cuda", "crossover"): (
        (32, 64, 128, 256, 512, 768, 1024, 1536, 2048),
        (64, 256, 512, 1024, 2048),
        (64, 512, 2048),
    ),
}
QUICK = {"adapted_linear": (1, 16, 128), "adapted_linear_backward": (128,), "crossover": (1, 4, 8, 16), "core": (64,)}
# The kinds against a LoRA of the same rank, whose name comes first.
CORE_TOKENS = (1, 64, 512)
CORE_KINDS: dict[int, dict[str, Adapter]] = {
    256: {
        "LoRA": LoRA(256),
        "SVFT, bandwidth 8": SVFT(bandwidth=8, rank=256, factors="float32"),
        "SVFT, random, the same count": SVFT("random", bandwidth=8, rank=256, factors="float32"),
        "SVFT, bandwidth 8, factors in NF4": SVFT(bandwidth=8, rank=256),
        "SVF": SVF(rank=256, factors="float32"),
    },
    64: {
        "LoRA": LoRA(64),
        "LoRA-XS": LoRAXS(64, factors="float32"),
        "LoRA-XS, factors in NF4": LoRAXS(64),
    },
}


@dataclass(frozen=True)
class Layer:
    """y = forward(x), the bytes of its weight, and the factors that a training step gives gradients to."""

    forward: Callable[[Tensor], Tensor]
    weight_bytes: int
    factors: Sequence[Tensor] = ()


# ---- providers: a layer over the weight (the copy that it is given is its own)


def factors(weight: NF4Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    down, up = (torch.randn(size, device=weight.device) / 64 for size in ((RANK, K), (N, RANK)))
    return down.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


def ours(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    trained = factors(weight, torch.float32)
    update = LowRankUpdate(*trained)
    return Layer(lambda x: adapted_linear(x, weight, update), weight.nbytes, trained)


def dense(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    w = weight.dequantize(dtype)
    return Layer(lambda x: F.linear(x, w), w.nbytes)


def unfused(decode: Callable[[], Tensor], weight: NF4Weight, dtype: torch.dtype) -> Layer:
    down, up = factors(weight, dtype)
    return Layer(lambda x: F.linear(x, decode()) + F.linear(F.linear(x, down), up), weight.nbytes, (down, up))


def dense_lora(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    w = weight.dequantize(dtype)
    layer = unfused(lambda: w, weight, dtype)
    return Layer(layer.forward, w.nbytes, layer.factors)


def dequantise(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """Our decoding kernel into a fresh dense W, then the vendor's products."""
    return unfused(partial(weight.dequantize, dtype), weight, dtype)


def plain(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    parts = weight.packed, weight.absmax, weight.absmax2, weight.offset
    sizes = weight.out_features, weight.in_features, weight.block_size
    return unfused(lambda: reference.nf4_dequantize(*parts, *sizes, dtype), weight, dtype)


def int4(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """ATen's affine int4 kernel: another format of about the same size, in groups of 64, without an adapter."""
    N, K = weight.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (N, K), dtype=torch.int32), 1)
    scales = torch.rand(K // 64, N, 2).to(dtype)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Layer(lambda x: multiply(x, packed, 64, scales), packed.nbytes + scales.nbytes)


def peft_layer(
    weight: NF4Weight, dtype: torch.dtype, adapter: torch.dtype | None = None, repack: bool = False
) -> Layer:
    """PEFT's LoRA over bitsandbytes' Linear4bit. ``repack``: for its CPU kernel, which serves inference only."""
    import bitsandbytes
    import peft

    N, K = weight.shape
    base = bitsandbytes.nn.Linear4bit(K, N, False, compute_dtype=dtype, quant_type="nf4", device="meta")
    base.weight = theirs = bitsandbytes_weight(weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    model: nn.Module = peft.inject_adapter_in_model(config, nn.Sequential(base)).train(not repack)
    trained = [p for p in model.parameters() if p.requires_grad]
    for factor in trained:
        factor.data = factor.data.to(weight.device, adapter or dtype)
    if repack:
        with torch.no_grad():
            model(torch.zeros(1, K, dtype=dtype))
        if not getattr(theirs.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes does not repack this weight on this processor")
    return Layer(model, weight.nbytes, trained)


Maker = Callable[[NF4Weight, torch.dtype], Layer]
EVERYWHERE: dict[str, Maker] = {
    "ours": ours,
    "dense, no adapter": dense,
    "dequantise + dense + LoRA": dequantise,
    "bitsandbytes + PEFT": peft_layer,
}
INFERENCE_CPU: dict[str, Maker] = {
    "ATen int4, no adapter": int4,
    "bitsandbytes (repacked) + PEFT": partial(peft_layer, repack=True),
}
# PEFT's factors are float32 unless told otherwise.
TRAINING: dict[str, Maker] = {
    "dense + LoRA": dense_lora,
    "bitsandbytes + PEFT, float32 factors": partial(peft_layer, adapter=torch.float32),
}


def makers(op: str, device: str, dtype: torch.dtype, first: bool) -> dict[str, Maker]:
    if op == "crossover":
        return {"ours": ours}
    chosen = dict(EVERYWHERE)
    if op == "adapted_linear_backward":
        chosen |= TRAINING if dtype == torch.bfloat16 else {"dense + LoRA": dense_lora}
    elif device == "cpu" and dtype == torch.bfloat16:  # the dtype that these kernels compute in
        chosen |= INFERENCE_CPU
    # Slow enough that one shape says it all.
    return chosen | ({"plain torch": plain} if device == "cpu" and first else {})


# ---- cases


def run(report: Report) -> None:
    settings, device = report.settings, report.settings.device.type
    cases = [(torch.bfloat16, shape) for shape in settings.shapes(*SHAPES)]
    for i, (dtype, shape) in enumerate([*cases, (torch.float32, cases[0][1])]):
        weight = NF4Weight.quantize(torch.randn(shape, device=settings.device).to(dtype))
        if i == 0 and "core" in settings.ops:
            run_cores(report, weight, dtype)
        built: dict[str, list[Layer] | None] = {}
        for op in (op for op in OPS if op in settings.ops and op != "core"):
            names = makers(op, device, dtype, shape == cases[0][1])
            for name, make in names.items():
                if name not in built:
                    built[name] = report.build(name, partial(rotated, make, weight, dtype))
            layers = {name: found for name in names if (found := built[name])}
            tokens = QUICK[op] if settings.quick else TOKENS[device, op][2 if dtype == torch.float32 else min(i, 1)]
            if op == "crossover":
                crossover(report, layers, shape, dtype, tokens)
                continue
            training = op == "adapted_linear_backward"
            with torch.set_grad_enabled(training):
                for M in tokens:
                    report.case(op, shape, M, dtype, calls(layers, shape, M, dtype, settings.device, training))


def with_core(kind: Adapter, weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """The update of a kind with factors of random numbers: what it costs does not depend on what they are."""
    N, K = weight.shape
    R = kind.rank or min(N, K)
    down, up = (torch.randn(size, device=weight.device) / 64 for size in ((R, K), (N, R)))
    weight_bytes = weight.nbytes
    if isinstance(kind, LoRA):
        trained = [down.requires_grad_(), up.requires_grad_()]
        update = LowRankUpdate(down, up)
    else:
        core = init.empty_core(kind, R, weight.device)
        trained = [torch.randn_like(core.values).requires_grad_()]
        frozen = [init.pack(factor, kind.factors or "nf4") for factor in (down, up)]
        update = LowRankUpdate(frozen[0], frozen[1], cores.with_values(core, trained[0]))
        weight_bytes += frozen[0].nbytes + frozen[1].nbytes
    return Layer(lambda x: adapted_linear(x, weight, update), weight_bytes, trained)


def run_cores(report: Report, weight: NF4Weight, dtype: torch.dtype) -> None:
    """Forward, and a training step, of each kind against a LoRA of its rank."""
    N, K = weight.shape
    for R, kinds in CORE_KINDS.items():
        layers = {
            name: report.build(name, partial(rotated, partial(with_core, k), weight, dtype))
            for name, k in kinds.items()
        }
        found = {name: rotation for name, rotation in layers.items() if rotation}
        for training in (False, True):
            op = f"rank {R}, {'training step' if training else 'forward'}"
            with torch.set_grad_enabled(training):
                for M in QUICK["core"] if report.settings.quick else CORE_TOKENS:
                    providers = calls(found, (N, K), M, dtype, report.settings.device, training)
                    report.case(op, (N, K), M, dtype, providers)


def rotated(make: Maker, weight: NF4Weight, dtype: torch.dtype) -> list[Layer]:
    """As many layers as leave no cache a weight between two uses of it."""
    first = make(copy.deepcopy(weight), dtype)
    others = range(copies(first.weight_bytes + sum(factor.nbytes for factor in first.factors), weight.device) - 1)
    return [first, *(make(copy.deepcopy(weight), dtype) for _ in others)]


def calls(layers: Mapping[str, Sequence[Layer]], shape: tuple[int, int], M: int, dtype: torch.dtype,
          device: torch.device, training: bool) -> dict[str, Provider]:  # fmt: skip
    """Forward, or forward and backward, of every layer. Operands count once in each direction, a gradient once."""
    N, K = shape
    x, g = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
    x.requires_grad_(training)

    def step(layer: Layer) -> object:
        return torch.autograd.grad(layer.forward(x), [x, *layer.factors], g)

    providers = {}
    for name, rotation in layers.items():
        layer, R = rotation[0], RANK if rotation[0].factors else 0
        factor_bytes = sum(factor.nbytes for factor in layer.factors)
        moved = layer.weight_bytes + factor_bytes + M * (N + K) * x.itemsize
        flops = 2 * M * (N * K + (N + K) * R)
        if training:
            moved += layer.weight_bytes + 2 * factor_bytes + M * (N + K + (K if R else 0)) * x.itemsize
            flops += 2 * M * (N * K + 2 * (N + K) * R)
        providers[name] = Provider(
            [partial(step, i) if training else partial(i.forward, x) for i in rotation], moved, flops
        )
    return providers


def crossover(report: Report, layers: Mapping[str, Sequence[Layer]], shape: tuple[int, int], dtype: torch.dtype,
              tokens: Sequence[int]) -> None:  # fmt: skip
    """Both forms of ours against each other: up to how many tokens decoding in registers is the faster one."""
    for op in OPS[:2] if layers else ():
        training, last = op == "adapted_linear_backward", 0
        for M in tokens:
            with torch.set_grad_enabled(training):
                provider = calls(layers, shape, M, dtype, report.settings.device, training)["ours"]
                both = {
                    f"form {name}": replace(provider, calls=[partial(in_form, name, call) for call in provider.calls])
                    for name in ("few", "many")
                }
                times = report.case(f"crossover of {op}", shape, M, dtype, both)
            if len(times) == 2 and times["form few"] <= times["form many"]:
                last = M
        report.notes.append(
            f"- {op}, {shape[0]} x {shape[1]}, {name_of(dtype)}: form few was last the faster one at M = {last}."
        )


def in_form(name: str, call: Call) -> None:
    """Make the planner take a form whatever the number of tokens."""
    before = dict(_plan.FEW_TOKENS)
    _plan.FEW_TOKENS.update(dict.fromkeys(before, 2**40 if name == "few" else 0))
    try:
        call()
    finally:
        _plan.FEW_TOKENS.update(before)
