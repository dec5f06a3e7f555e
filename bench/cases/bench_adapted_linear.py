"""adapted_linear (forward) and adapted_linear_backward (a training step) over NF4 with double quantisation and a LoRA
of rank 16; and the kinds with a core against a LoRA of the same rank.

Ours always includes the adapter, with float32 factors as in training. Peers get their best path: factors in the dtype
of x, which saves them casts, weights packed beforehand, and no adapter at all if the name says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ops import SVF, SVFT, Linear, LoRA, LoRAXS, NF4Weight, cores, reference
from lowrank_ops.adapters import Adapter
from lowrank_ops.adapters import start as init
from lowrank_ops.functional import LowRankUpdate, adapted_linear, prepare
from lowrank_ops.ops import _contract, _plan

from ..common import Call, Provider, Settings, copies, name_of, products_in, torch_threads
from ..goals import BARE, BRANCH, DECODED, DENSE, DENSE_LORA, DOUBLE, IN_FLOAT32, INT4, OURS, PEFT
from ..report import Report
from .bench_nf4 import bitsandbytes_linear

OPS = ("adapted_linear", "adapted_linear_backward", "crossover", "core", "call")
RANK = 16
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
FLOAT32_SHAPES = {"cpu": 4, "cuda": 1}
# Tokens of the first shape in bfloat16 on all threads, and of everything else. Goals also use the others.
TOKENS: dict[tuple[str, str], tuple[Sequence[int], Sequence[int]]] = {
    ("cpu", "adapted_linear"): ((1, 4, 8, 16, 64, 128, 512), (1, 4, 16, 128, 512)),
    ("cpu", "adapted_linear_backward"): ((16, 128, 512, 2048), (128, 512)),
    ("cuda", "adapted_linear"): ([2**i for i in range(14)], (1, 8, 16, 64, 256, 2048, 8192)),
    ("cuda", "adapted_linear_backward"): ((64, 512, 2048, 4096, 8192), (512, 2048, 8192)),
}
# Tokens of the first shape in bfloat16, of the other shapes, and of the first shape in float32.
CROSSOVER: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {
    "cpu": ((1, 2, 4, 6, 8, 12, 16, 24, 32), (1, 8, 16, 24, 32), (1, 4, 8, 16, 32)),
    "cuda": ((32, 64, 128, 256, 512, 768, 1024, 1536, 2048), (64, 256, 512, 1024, 2048), (64, 512, 2048)),
}
QUICK = {"adapted_linear": (1, 16, 128), "adapted_linear_backward": (128,), "crossover": (1, 4, 8, 16), "core": (64,)}
# The kinds to compare with a LoRA of the same rank, whose name comes first.
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
    """y = forward(x), the bytes of its weight, and the factors that get gradients in a training step.

    ``again`` copies a layer that took long to prepare.
    """

    forward: Callable[[Tensor], Tensor]
    weight_bytes: int
    factors: Sequence[Tensor] = ()
    again: Callable[[], Layer] | None = None


# ---- providers: each makes a layer over its own copy of the weight


def factors(weight: NF4Weight, dtype: torch.dtype, rank: int = RANK) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    down, up = (torch.randn(size, device=weight.device) / 64 for size in ((rank, K), (N, rank)))
    return down.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


def ours(weight: NF4Weight, dtype: torch.dtype, rank: int = RANK) -> Layer:
    trained = factors(weight, torch.float32, rank)
    return Layer(prepare(weight, None, LowRankUpdate(*trained)), weight.nbytes, trained)


def beside_branch(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """A LoRA beside a frozen branch of the same rank."""
    trained = factors(weight, torch.float32)
    down, up = (factor.detach() for factor in factors(weight, torch.float32))
    run = prepare(weight, None, LowRankUpdate(*trained), branch=LowRankUpdate(down, up))
    return Layer(run, weight.nbytes + down.nbytes + up.nbytes, trained)


def bare(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    return Layer(prepare(weight), weight.nbytes)


def in_dtype_of(w: Tensor, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``forward`` on x in the dtype of W, with the result in the dtype of x."""
    return lambda x: forward(x.to(w.dtype)).to(x.dtype)


def dense(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    w = weight.dequantize(products_in(dtype, weight.device.type))
    return Layer(in_dtype_of(w, lambda x: F.linear(x, w)), w.nbytes)


def unfused(decode: Callable[[], Tensor], weight: NF4Weight, dtype: torch.dtype) -> Layer:
    down, up = factors(weight, dtype)
    forward = in_dtype_of(down, lambda x: F.linear(x, decode()) + F.linear(F.linear(x, down), up))
    return Layer(forward, weight.nbytes, (down, up))


def dense_lora(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    w = weight.dequantize(products_in(dtype, weight.device.type))
    layer = unfused(lambda: w, weight, w.dtype)
    return Layer(layer.forward, w.nbytes, layer.factors)


def dequantise(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """Decode with our kernel into a fresh dense W, then use the vendor's products."""
    fast = products_in(dtype, weight.device.type)
    return unfused(partial(weight.dequantize, fast), weight, fast)


def decoded(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """Do the same without an adapter."""
    fast = products_in(dtype, weight.device.type)
    decode = partial(weight.dequantize, fast)
    return Layer(lambda x: F.linear(x.to(fast), decode()).to(x.dtype), weight.nbytes)


def plain(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    parts = weight.packed, weight.absmax, weight.absmax2, weight.offset
    sizes = weight.out_features, weight.in_features, weight.block_size
    return unfused(lambda: reference.nf4_dequantize(*parts, *sizes, dtype), weight, dtype)


def int4(weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """ATen's affine int4 kernel: a different format of about the same size, in groups of 64, without an adapter."""
    N, K = weight.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (N, K), dtype=torch.int32), 1)
    return int4_layer(packed, torch.rand(K // 64, N, 2).to(dtype))


def int4_layer(packed: Tensor, scales: Tensor) -> Layer:
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Layer(
        lambda x: multiply(x, packed, 64, scales),
        packed.nbytes + scales.nbytes,
        again=lambda: int4_layer(packed.clone(), scales.clone()),
    )


def peft_layer(
    weight: NF4Weight, dtype: torch.dtype, adapter: torch.dtype | None = None, repack: bool = False
) -> Layer:
    """PEFT's LoRA over bitsandbytes' Linear4bit. ``repack``: for its CPU kernel, which serves inference only."""
    import peft

    base = bitsandbytes_linear(weight, dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    model: nn.Module = peft.inject_adapter_in_model(config, nn.Sequential(base)).train(not repack)
    for factor in model.parameters():
        if factor.requires_grad:
            factor.data = factor.data.to(weight.device, adapter or dtype)
    if repack:
        with torch.no_grad():
            model(torch.zeros(1, weight.in_features, dtype=dtype))
        if not getattr(base.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes does not repack this weight on this processor")
    return module_layer(model, weight.nbytes)


def module_layer(model: nn.Module, weight_bytes: int) -> Layer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return Layer(model, weight_bytes, trained, lambda: module_layer(copy.deepcopy(model), weight_bytes))


Maker = Callable[[NF4Weight, torch.dtype], Layer]
# Providers that goals compare.
DECISIVE: dict[str, dict[str, Maker]] = {
    "adapted_linear": {OURS: ours, DENSE: dense, PEFT: peft_layer},
    "adapted_linear_backward": {OURS: ours, DENSE_LORA: dense_lora, PEFT: peft_layer},
}
# Providers measured with other numbers of threads.
COMPARED = (OURS, DENSE, DENSE_LORA, PEFT, INT4, *IN_FLOAT32.values())
# The cost of decoding into memory, and of the adapter alone; on a GPU for every shape, on the CPU for the first.
EVERYWHERE: dict[str, Maker] = {
    "dequantise + dense + LoRA": dequantise,
    BARE: bare,
    DOUBLE: partial(ours, rank=2 * RANK),
    BRANCH: beside_branch,
    DECODED: decoded,
}
INFERENCE_CPU: dict[str, Maker] = {
    "bitsandbytes (repacked) + PEFT": partial(peft_layer, repack=True),
    "plain torch": plain,
}
# PEFT's factors are float32 by default.
TRAINING: dict[str, Maker] = {
    DENSE: dense,
    "bitsandbytes + PEFT, float32 factors": partial(peft_layer, adapter=torch.float32),
}


def makers(op: str, kind: str, dtype: torch.dtype, first: bool) -> dict[str, Maker]:
    chosen, bfloat16 = dict(DECISIVE[op]), dtype == torch.bfloat16
    if kind == "cpu" and op == "adapted_linear" and bfloat16:  # these kernels compute in this dtype
        chosen |= {INT4: int4} | (INFERENCE_CPU if first else {})
    if (first or kind == "cuda") and bfloat16:
        chosen |= EVERYWHERE | (TRAINING if op == "adapted_linear_backward" else {})
    if products_in(dtype, kind) != dtype:
        chosen = {IN_FLOAT32.get(name, name): make for name, make in chosen.items()}
    return chosen


# ---- cases


def run_first(report: Report) -> None:
    """The first shape in bfloat16."""
    run_shape(report, report.settings.shapes(*SHAPES)[0], torch.bfloat16, True)


def run_others(report: Report) -> None:
    """The other shapes in bfloat16, then float32."""
    shapes = report.settings.shapes(*SHAPES)
    for shape in shapes[1:]:
        run_shape(report, shape, torch.bfloat16, False)
    for shape in shapes[: FLOAT32_SHAPES[report.settings.kind]]:
        run_shape(report, shape, torch.float32, False)


def run_shape(report: Report, shape: tuple[int, int], dtype: torch.dtype, first: bool) -> None:
    """Time forward and training step on each number of threads; only the first number gets every row."""
    settings = report.settings
    ops = [op for op in OPS[:2] if op in settings.ops]
    if not ops or report.skip(f"{' and '.join(ops)}, {shape[0]} x {shape[1]}, {name_of(dtype)}"):
        return
    weight = NF4Weight.quantize(torch.randn(shape, device=settings.device).to(dtype))
    built: dict[str, list[Layer] | None] = {}
    for op in ops:
        names = makers(op, settings.kind, dtype, first)
        # Free the layers of the other op first: all layers together may take many gigabytes.
        built = {name: layers for name, layers in built.items() if name in names}
        for name, make in names.items():
            if name not in built:
                built[name] = report.build(name, partial(rotated, make, weight, dtype, settings))
        layers = {name: found for name in names if (found := built[name])}
        training = op == "adapted_linear_backward"
        for threads in settings.threads:
            main = threads == settings.threads[0]
            tokens = QUICK[op] if settings.quick else TOKENS[settings.kind, op][0 if first and main else 1]
            timed = {name: rotation for name, rotation in layers.items() if main or name in COMPARED}
            with torch_threads(threads), torch.set_grad_enabled(training):
                for M in tokens:
                    providers = calls(timed, shape, M, dtype, settings.device, training)
                    report.case(op, shape, M, dtype, providers, scale=1.0 if first else 0.6)


def with_core(kind: Adapter, weight: NF4Weight, dtype: torch.dtype) -> Layer:
    """An update of a kind with random factors, because its cost does not depend on their values."""
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
        frozen = [init.keep_factor(factor, kind.factors or "nf4") for factor in (down, up)]
        update = LowRankUpdate(frozen[0], frozen[1], cores.with_values(core, trained[0]))
        weight_bytes += frozen[0].nbytes + frozen[1].nbytes
    return Layer(lambda x: adapted_linear(x, weight, update), weight_bytes, trained)


class Seen(TorchDispatchMode):
    """Keeps the last op that ran, and its arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.last = func, args
        return func(*args, **(kwargs or {}))


def run_call(report: Report) -> None:
    """Time a call with almost nothing to compute: 64 x 64, one token, no gradients, one thread.

    The last three are calls by way of the dispatcher: with a check of the arguments where the op is entered; past it, as
    the modules call with gradients; and what it takes to pass by, without the op.
    """
    settings, dtype, shape = report.settings, torch.float32, (64, 64)
    if "call" not in settings.ops or report.skip("call"):
        return
    layer = Linear(*shape, adapter=LoRA(8), device=settings.device, dtype=dtype).eval()
    plain, x = nn.Linear(*shape, device=settings.device, dtype=dtype), torch.randn(1, 64, device=settings.device)
    weight, update, bias = layer.weight, layer.update, layer.bias
    assert weight is not None
    with torch.no_grad(), Seen() as seen:
        adapted_linear(x, weight, update, bias)
    op, arguments = seen.last
    providers: dict[str, Call] = {
        "Linear": partial(layer, x),
        "functional.prepare": partial(prepare(weight, bias, update), x),
        "functional.adapted_linear": lambda: adapted_linear(x, weight, update, bias),
        "nn.Linear, dense": partial(plain, x),
        "torch.ops, with the check of its arguments": lambda: op(*arguments),
        "torch.ops, past the check": lambda: _contract.checked(op, arguments),
        "passing by the check": lambda: _contract.checked(_contract.enter, ()),
    }
    with torch_threads(1), torch.no_grad():
        cases = {name: Provider([call], 0, 2 * 64 * (64 + 2 * 8)) for name, call in providers.items()}
        report.case("call", shape, 1, dtype, cases)


def run_cores(report: Report) -> None:
    """Time forward and a training step of each kind against a LoRA of its rank."""
    settings, dtype = report.settings, torch.bfloat16
    N, K = settings.shapes(*SHAPES)[0]
    if "core" not in settings.ops or report.skip("core"):
        return
    weight = NF4Weight.quantize(torch.randn(N, K, device=settings.device).to(dtype))
    for R, kinds in CORE_KINDS.items():
        if R > min(N, K):
            continue
        layers = {
            name: report.build(name, partial(rotated, partial(with_core, k), weight, dtype, settings))
            for name, k in kinds.items()
        }
        found = {name: rotation for name, rotation in layers.items() if rotation}
        for training in (False, True):
            op = f"rank {R}, {'training step' if training else 'forward'}"
            with torch.set_grad_enabled(training):
                for M in QUICK["core"] if settings.quick else CORE_TOKENS:
                    providers = calls(found, (N, K), M, dtype, settings.device, training)
                    report.case(op, (N, K), M, dtype, providers, scale=0.6)


def rotated(make: Maker, weight: NF4Weight, dtype: torch.dtype, settings: Settings) -> list[Layer]:
    """Make so many layers that each weight leaves every cache before its next use; weights are quantised as for users."""

    def own() -> NF4Weight:
        return NF4Weight.quantize(weight.dequantize(), weight.block_size, weight.double_quant)

    first = make(own(), dtype)
    others = range(copies(first.weight_bytes + sum(factor.nbytes for factor in first.factors), settings) - 1)
    return [first, *(first.again() if first.again else make(own(), dtype) for _ in others)]


def calls(layers: Mapping[str, Sequence[Layer]], shape: tuple[int, int], M: int, dtype: torch.dtype,
          device: torch.device, training: bool) -> dict[str, Provider]:  # fmt: skip
    """Providers of forward, or forward and backward. Operands count once in each direction, a gradient once."""
    N, K = shape
    x, g = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
    x.requires_grad_(training)

    def step(layer: Layer) -> object:
        return torch.autograd.grad(layer.forward(x), [x, *layer.factors], g)

    providers = {}
    for name, rotation in layers.items():
        layer, R = rotation[0], rotation[0].factors[0].shape[0] if rotation[0].factors else 0
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


def run_crossover(report: Report) -> None:
    """Compare both forms of ours: find up to how many tokens decoding in registers is faster."""
    settings, tokens = report.settings, CROSSOVER[report.settings.kind]
    if "crossover" not in settings.ops:
        return
    shapes = settings.shapes(*SHAPES)
    cases = [(shape, torch.bfloat16, tokens[min(i, 1)]) for i, shape in enumerate(shapes)]
    for shape, dtype, of_case in [*cases, (shapes[0], torch.float32, tokens[2])]:
        if report.skip(f"crossover, {shape[0]} x {shape[1]}, {name_of(dtype)}"):
            return
        weight = NF4Weight.quantize(torch.randn(shape, device=settings.device).to(dtype))
        found = report.build(OURS, partial(rotated, ours, weight, dtype, settings))
        layers = {OURS: found}
        for op in OPS[:2] if found else ():
            training, last = op == "adapted_linear_backward", 0
            for M in QUICK["crossover"] if settings.quick else of_case:
                with torch.set_grad_enabled(training):
                    provider = calls(layers, shape, M, dtype, settings.device, training)[OURS]
                    both = {
                        f"form {name}": replace(
                            provider, calls=[partial(in_form, name, call) for call in provider.calls]
                        )
                        for name in ("few", "many")
                    }
                    times = report.case(f"crossover of {op}", shape, M, dtype, both, scale=0.5)
                if len(times) == 2 and times["form few"] <= times["form many"]:
                    last = M
            report.notes.append(
                f"- {op}, {shape[0]} x {shape[1]}, {name_of(dtype)}: form few was faster up to M = {last}."
            )


def in_form(name: str, call: Call) -> None:
    """Make the planner choose a form for any number of tokens."""
    before = dict(_plan.FEW_TOKENS)
    _plan.FEW_TOKENS.update(dict.fromkeys(before, 2**40 if name == "few" else 0))
    try:
        call()
    finally:
        _plan.FEW_TOKENS.update(before)


SECTIONS = {10: run_first, 15: run_call, 50: run_others, 80: run_crossover, 90: run_cores}
