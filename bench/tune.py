"""Search tile sizes of the Triton kernels on this GPU and write the table that kernels/config.py reads.

Searches one field at a time from the default, because a full grid would spend hours in the compiler.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_ops import NF4Weight
from lowrank_ops.files import write_text
from lowrank_ops.kernels import adapted_linear, config
from lowrank_ops.kernels.launch import arch_of
from lowrank_ops.kernels.operands import Matrix

from .cases.bench_adapted_linear import RANK, SHAPES
from .common import Call, Sampler, Settings, copies, cuda_sampler, interleave, slug

# Tokens for each kernel, and values to try for each field in turn; "vector" is the form for one or two tokens.
TOKENS = {
    "few_forward": (1, 8, 16, 32, 64, 128, 256, 512, 1024),
    "few_backward": (1, 16, 64, 256, 1024),
    "few_forward_split": (8, 16, 32, 64, 128),
    "few_backward_split": (16, 64),
    "shrink": (1, 16, 64, 512, 2048, 8192),
    "expand": (512, 2048, 8192),
    "token_sum": (16, 64, 512, 2048, 4096, 8192),
}
TILE = {"BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128), "BLOCK_M": (16, 32, 64, 128)}
TRY: dict[str, dict[str, tuple[int, ...]]] = {
    "few_forward": TILE | {"num_stages": (2, 3, 4), "num_warps": (4, 8)},
    "few_forward vector": {"BLOCK_K": (512, 1024, 2048, 4096), "BLOCK_N": (4, 8, 16), "num_warps": (2, 4, 8)},
    "few_forward_split": TILE | {"SPLITS": (1, 2, 4, 8, 16), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
    "few_backward_split": TILE | {"SPLITS": (1, 2, 4, 8, 16), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
    "few_backward": TILE | {"num_stages": (2, 3, 4), "num_warps": (4, 8)},
    "few_backward vector": {"BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128), "num_warps": (2, 4, 8)},
    "shrink": {"BLOCK_M": (16, 32, 64), "BLOCK_K": (64, 128, 256), "num_stages": (2, 3, 4), "num_warps": (2, 4, 8)},
    "shrink vector": {"BLOCK_R": (1, 2, 4, 8), "BLOCK_K": (256, 512, 1024, 2048), "num_warps": (2, 4, 8)},
    "expand": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128, 256), "num_warps": (4, 8)},
    "token_sum": {"SPLITS": (1, 2, 4, 8, 16), "BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)},
}
# The first searches when time is limited: a token, a small batch, and a training step on one long sequence.
FIRST = {
    ("few_forward", 1),
    ("few_forward", 16),
    ("few_forward", 64),
    ("shrink", 2048),
    ("expand", 2048),
    ("token_sum", 2048),
}
WORTH = 0.98  # a candidate must be faster than this times the best so far


def run(settings: Settings, left: Callable[[], float] | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Tune every kernel for every shape; return the path of the table, whose other entries stay unchanged.

    Args:
        settings: the device and the shapes.
        left: tells the seconds left, if they are limited: ``FIRST`` comes first, and a search starts only if as much
            time is left as the longest search took.
        dtype: of x.
    """
    arch = arch_of(settings.device)
    path = config.DIRECTORY / f"{slug(arch.name)}.json"
    before: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}
    table = {kernel: {_key(entry): entry for entry in before.get(kernel, [])} for kernel in TOKENS}
    shapes = settings.shapes(*SHAPES)
    jobs = [(s, kernel, M) for s in shapes for kernel, tokens in TOKENS.items() for M in tokens]
    if settings.quick:
        jobs = [(s, kernel, M) for s, kernel, M in jobs if M in TOKENS[kernel][:2]]
    if left:
        jobs.sort(key=lambda job: job[1:] not in FIRST)
    weights: dict[tuple[int, int], list[NF4Weight]] = {}
    done, longest = set(), 20.0
    for shape, kernel, M in jobs:
        sizes = _sizes(kernel, *shape, M)
        if (kernel, *sizes, M) in done:
            continue
        if left and left() < longest:
            break
        done.add((kernel, *sizes, M))
        began = time.monotonic()
        if shape not in weights:
            weight = NF4Weight.quantize(torch.randn(shape, device=settings.device).to(dtype))
            weights = {shape: [copy.deepcopy(weight) for _ in range(copies(weight.nbytes, settings))]}
        entry = {"bits": 8 * dtype.itemsize, "N": sizes[0], "K": sizes[1], "M": M, "R": RANK}
        # The entry nearest in M is used, so entries that are not searched yet are written with the default.
        for other in TOKENS[kernel]:
            table[kernel].setdefault(_key(entry | {"M": other}), entry | {"M": other, "config": {}})
        table[kernel][_key(entry)] = entry | {"config": _tune(kernel, arch, weights[shape], M, dtype)}
        print(kernel, table[kernel][_key(entry)], flush=True)
        # Write after every entry, so that an interrupted run leaves its results.
        path.parent.mkdir(exist_ok=True)
        rows = (f' "{k}": [\n  ' + ",\n  ".join(map(json.dumps, e.values())) + "\n ]" for k, e in table.items() if e)
        write_text(path, "{\n" + ",\n".join(rows) + "\n}\n")
        longest = max(longest, time.monotonic() - began)
    return path


def _key(entry: dict[str, Any]) -> tuple[int, ...]:
    return tuple(entry[name] for name in ("bits", "N", "K", "M", "R"))


def _sizes(kernel: str, N: int, K: int, M: int) -> tuple[int, int]:
    """N and K with which this kernel calls get_config."""
    return {"shrink": (RANK, K), "expand": (N, RANK), "token_sum": (N, 0)}.get(kernel, (N, K))


def _tune(kernel: str, arch: config.Arch, weights: list[NF4Weight], M: int, dtype: torch.dtype) -> dict[str, int]:
    """The fields of the fastest configuration; empty for the default."""
    sizes = _sizes(kernel, weights[0].out_features, weights[0].in_features, M)
    default = best = config.default_config(kernel, arch, M, *sizes, RANK, 8 * dtype.itemsize, weights[0].block_size)
    vector = " vector" if best.BLOCK_M == 1 else ""
    for name, values in TRY[kernel + vector].items():
        samplers: dict[str, Sampler] = {}
        for value in {getattr(best, name): None} | dict.fromkeys(values):
            candidate = replace(best, **{name: value})
            try:
                samplers[str(value)] = cuda_sampler([_call(kernel, w, M, dtype, candidate) for w in weights])
            except Exception as error:  # a tile too large for this GPU
                print(f"{kernel} {sizes} M={M} {name}={value}: {type(error).__name__}", flush=True)
        medians = {value: statistics.median(times) for value, times in interleave(samplers, 0.01).items()}
        fastest = min(medians, key=lambda value: medians[value])
        if medians[fastest] < WORTH * medians.get(str(getattr(best, name)), float("inf")):
            best = replace(best, **{name: int(fastest)})
    return {} if best == default else asdict(best)


def _call(kernel: str, weight: NF4Weight, M: int, dtype: torch.dtype, candidate: config.Config) -> Call:
    """Make a call of the launcher that runs this kernel with as few other kernels as possible."""
    N, K = weight.shape
    matrix = weight.operand()
    form = "few"
    if kernel in ("shrink", "expand"):
        # A dense W that is thin along the dimension this kernel does not read.
        N, K, form = (16, K, "many") if kernel == "shrink" else (N, 16, "many")
        matrix = Matrix(torch.randn(N, K, device=weight.device).to(dtype))
    x, g, down, up = (torch.randn(s, device=weight.device) for s in ((M, K), (M, N), (RANK, K), (N, RANK)))
    factors = (RANK, Matrix(down), Matrix(up), None)
    launchers: Any = adapted_linear
    override = {kernel: candidate}
    if kernel in ("few_forward", "few_backward"):
        override[f"{kernel}_split"] = config.Config(SPLITS=1)  # otherwise the split kernel would run in its place
    if "backward" not in kernel and kernel != "token_sum":
        return partial(launchers.forward, x.to(dtype), matrix, N, *factors, None, 1.0, 0.0, None, form, override)
    h, dx = torch.randn(M, RANK, device=weight.device), kernel.startswith("few_backward")
    needs = (dx, False, not dx, False)
    return partial(
        launchers.backward, g.to(dtype), None, h, matrix, K, *factors, 1.0, 0.0, None, form, *needs, override
    )
