"""Tile sizes: an override, else the tuned table of the GPU, else a safe default. Host only, needs no GPU.

A table is ``configs/<gpu>.json``; ``<gpu>`` is the device name in lower case, where ``_`` replaces other signs:

    {"few_forward": [{"bits": 16, "N": 4096, "K": 4096, "M": 16, "R": 16, "config": {"BLOCK_M": 16, ...}}, ...], ...}

Entries must match kernel, bits, N and K exactly; the match nearest in M, then in R, both in log space, wins. Fields
missing in ``config`` keep their default for the shape.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

DIRECTORY = Path(__file__).parent / "configs"
KERNELS = (
    "few_forward",
    "few_backward",
    "few_forward_split",
    "few_backward_split",
    "experts_forward",
    "experts_backward",
    "shrink",
    "expand",
    "token_sum",
    "core_gradient",
)
SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")  # the fields of a Config that are parameters of kernels


class Arch(NamedTuple):
    """A GPU: the name of its tuned table, its capability (10 · major + minor), its number of multiprocessors."""

    name: str
    capability: int
    processors: int


@dataclass(frozen=True)
class Config:
    """Tile sizes (powers of two) and launch options of one kernel.

    A kernel uses only the BLOCK_* fields for its own dimensions. ``BLOCK_M == 1`` selects the matrix-vector form of
    ``few_forward``, ``few_backward`` and ``shrink``; otherwise every tile side is at least 16. ``SPLITS`` divides the
    tokens of ``token_sum`` and ``core_gradient``, and the summed dimension of ``few_forward_split`` and
    ``few_backward_split``, whose partial sums are then added in a fixed order; the last two do not run where it is 1.
    """

    BLOCK_M: int = 16
    BLOCK_N: int = 32
    BLOCK_K: int = 32
    BLOCK_R: int = 16
    SPLITS: int = 1
    num_warps: int = 4
    num_stages: int = 2


FLAT = Config(num_warps=4, num_stages=1)  # for kernels over flattened tensors, which fix their own sizes
Override = Config | Mapping[str, Config] | None


def power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that is at least ``value``, kept within [low, high]."""
    return min(high, max(low, 1 << (value - 1).bit_length()))


@functools.cache
def get_config(kernel: str, arch: Arch, M: int, N: int, K: int, R: int, bits: int, block_size: int = 0) -> Config:
    """The configuration of ``kernel`` for one shape.

    Args:
        kernel: one of ``KERNELS``.
        arch: the GPU.
        M: tokens; N: columns of the result (``few_backward``: the summed dimension; ``core_gradient``: entries of the
            core); K: the summed dimension (``few_backward``: columns of the result; ``expand``, ``token_sum`` and
            ``core_gradient`` do not read it); R: rank. Of ``experts_forward`` and ``experts_backward`` M is the mean
            number of rows of an expert, and the others are as for ``few_forward`` and ``few_backward``.
        bits: size of an element of x.
        block_size: block size of the NF4 weight (``shrink``: factor), 0 if dense.
    """
    config = default_config(kernel, arch, M, N, K, R, bits, block_size)
    source = "default"
    entries = [e for e in tuned_table(arch.name).get(kernel, []) if (e["bits"], e["N"], e["K"]) == (bits, N, K)]
    # Tables hold "shrink" for dense factors only.
    if entries and not (kernel == "shrink" and block_size):
        nearest = min(entries, key=lambda e: (abs(math.log(e["M"] / M)), abs(math.log(e.get("R", 1) / max(R, 1)))))
        config, source = replace(config, **nearest["config"]), f"tuned at M={nearest['M']}"
    if os.environ.get("LOWRANK_OPS_PRINT_CONFIG") == "1":
        shape = f"M={M} N={N} K={K} R={R} bits={bits} block_size={block_size}"
        print(f"lowrank_ops: {kernel} {shape} on {arch.name}: {config} ({source})", file=sys.stderr)
    return config


def choose(override: Override, kernel: str, *shape: Any) -> Config:
    """``override``, or its entry for ``kernel``, or :func:`get_config`."""
    if isinstance(override, Config):
        return override
    if override is not None and kernel in override:
        return override[kernel]
    return get_config(kernel, *shape)


@functools.cache
def tuned_table(name: str) -> dict[str, list[dict[str, Any]]]:
    """The table of the GPU called ``name``; empty if it has none."""
    path = DIRECTORY / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")
    if not path.is_file():
        return {}
    table: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return table


def default_config(kernel: str, arch: Arch, M: int, N: int, K: int, R: int, bits: int, block_size: int) -> Config:
    """A configuration that is right for every shape and compiles without spills on every target."""
    if kernel in ("experts_forward", "experts_backward"):
        return _experts(kernel, arch, M, N, K, R, bits, block_size)
    if kernel == "core_gradient":
        return Config(BLOCK_M=32, BLOCK_R=64, SPLITS=_splits(arch, M, N, 1, 64, 1))
    # Where a row may start inside a byte or a block, each weight is loaded by itself: use small tiles.
    aligned = block_size == 0 or K % block_size == 0
    if bits == 32:
        return _default_float32(kernel, arch, M, N, K, R, aligned, block_size)
    rank = power_of_two(R, 16, 64)
    tokens = power_of_two(M, 16, 64)
    if kernel == "few_forward" and M <= 2:
        return _vector_forward(arch, N, K, rank, aligned, block_size)
    if kernel == "few_backward" and M <= 2:
        return Config(BLOCK_M=1, BLOCK_N=64 if aligned else 32, BLOCK_K=64, BLOCK_R=rank)
    if kernel in ("few_forward", "few_backward"):
        if not aligned:
            warps = 8 if tokens > 32 else 4
            return Config(BLOCK_M=tokens, BLOCK_N=32, BLOCK_K=32, BLOCK_R=min(rank, 32), num_warps=warps)
        # Use narrow tiles where wide ones would leave multiprocessors idle.
        columns = 64 if M > 32 or (N if kernel == "few_forward" else K) >= 64 * arch.processors else 32
        # A longer tile loads scales and runs the loop less often; a long dense tile would exceed shared memory.
        length = 128 if block_size and (kernel == "few_forward" or tokens <= 32) else 64
        if kernel == "few_forward":
            return Config(BLOCK_M=tokens, BLOCK_N=columns, BLOCK_K=length, BLOCK_R=min(rank, 32), num_stages=3)
        return Config(BLOCK_M=tokens, BLOCK_N=length, BLOCK_K=columns, BLOCK_R=min(rank, 32), num_stages=3)
    if kernel in ("few_forward_split", "few_backward_split"):
        columns, size = (N, K) if kernel == "few_forward_split" else (K, N)
        tiles = -(-columns // 64) * -(-M // tokens)
        splits = min(2 * arch.processors // tiles, size // 512, size // (32 * M), 16)
        if M <= 2 or not aligned or block_size == 0 or tiles >= arch.processors:
            splits = 1
        N, K = (64, 128) if kernel == "few_forward_split" else (128, 64)
        return Config(BLOCK_M=tokens, BLOCK_N=N, BLOCK_K=K, SPLITS=max(1, splits), num_stages=3)
    if kernel == "shrink":
        if block_size:
            return _decoding_shrink(M, aligned)
        if M <= 64:
            return Config(BLOCK_M=1, BLOCK_K=512, BLOCK_R=4)
        # With the dropout mask, 128 columns and 64 ranks would spill.
        return Config(BLOCK_M=16, BLOCK_K=128 if rank < 64 else 64, BLOCK_R=rank, num_stages=3)
    if kernel == "expand":
        return Config(BLOCK_M=tokens, BLOCK_N=64, BLOCK_R=min(rank, 32), num_stages=3)
    splits = _splits(arch, M, N, R, 64, rank)
    # With a single tile of tokens there is nothing to prefetch.
    return Config(BLOCK_M=min(tokens, 32), BLOCK_N=64, BLOCK_R=rank, SPLITS=splits, num_stages=1 if M <= 32 else 3)


def _experts(kernel: str, arch: Arch, M: int, N: int, K: int, R: int, bits: int, block_size: int) -> Config:
    forward = kernel == "experts_forward"
    aligned = block_size == 0 or K % block_size == 0
    # Twice the mean, because experts have unlike shares.
    rows = 1 if M == 1 else power_of_two(2 * M, 16, 128)
    if rows == 1 or bits == 32 or not aligned:
        few = "few_forward" if forward else "few_backward"
        config = default_config(few, arch, min(rows, 32), N, K, R, bits, block_size)
        return config if forward else replace(config, BLOCK_K=min(config.BLOCK_K, power_of_two(K, 16, 128)))
    rank = power_of_two(R, 16, 32)
    if not forward and K <= 32:  # the gradient of h, with R for K
        return Config(BLOCK_M=min(rows, 32), BLOCK_N=64, BLOCK_K=power_of_two(K, 16, 32), BLOCK_R=rank)
    if block_size == 0:
        rows, rank = min(rows, 64), 16  # with a dense core more would spill
    # Many experts make many programs, so tiles need not be narrow for the multiprocessors' sake.
    columns, length, warps = (128, 64, 8) if rows >= 64 else (64, 128 if block_size else 64, 4)
    N, K = (columns, length) if forward else (length, min(columns, power_of_two(K, 16, 128)))
    return Config(BLOCK_M=rows, BLOCK_N=N, BLOCK_K=K, BLOCK_R=rank, num_warps=warps, num_stages=3)


def _vector_forward(arch: Arch, N: int, K: int, rank: int, aligned: bool, block_size: int) -> Config:
    if not aligned or block_size == 0:
        # Each element of the tile has its own partial sum.
        return Config(BLOCK_M=1, BLOCK_N=8, BLOCK_K=512 if aligned else 256, BLOCK_R=rank)
    # A warp covers 512 columns: each lane loads sixteen bytes of four rows, whose products share one x; of two rows
    # where there are few, so that every multiprocessor has enough loads in flight.
    rows, columns = (8, 2048) if N >= 16 * arch.processors else (4, 4096)
    columns = power_of_two(K, 512, columns)
    return Config(BLOCK_M=1, BLOCK_N=rows, BLOCK_K=columns, BLOCK_R=rank, num_warps=columns // 512)


def _decoding_shrink(M: int, aligned: bool) -> Config:
    # Every tile of tokens decodes the factor again, so a tile takes several tokens where it can; a step of these
    # programs decodes as many weights as a step of the programs that multiply a tile of W in the same launch.
    if M <= 2:
        return Config(BLOCK_M=1, BLOCK_R=4, BLOCK_K=2048 if aligned else 256)
    if not aligned:
        return Config(BLOCK_M=16, BLOCK_R=16, BLOCK_K=64)
    return Config(BLOCK_M=16, BLOCK_R=16, BLOCK_K=256) if M <= 64 else Config(BLOCK_M=64, BLOCK_R=16, BLOCK_K=128)


def _default_float32(kernel: str, arch: Arch, M: int, N: int, K: int, R: int, aligned: bool, block_size: int) -> Config:
    # IEEE float32 products do not use the tensor cores: small tiles keep the unrolled code short.
    if kernel == "few_forward" and M <= 2:
        return _vector_forward(arch, N, K, 16, aligned, block_size)
    if kernel == "few_backward" and M <= 2:
        return Config(BLOCK_M=1, BLOCK_N=64, BLOCK_K=64)
    if kernel == "few_forward" and block_size == 0:
        # With two stages and a core on its operand, ptxas spills for sm_80.
        return Config(num_stages=3)
    if kernel == "shrink" and M <= (2 if block_size else 64):
        return Config(BLOCK_M=1, BLOCK_K=512 if aligned else 256, BLOCK_R=4)
    if kernel == "token_sum":
        return Config(BLOCK_M=32, BLOCK_N=32, SPLITS=_splits(arch, M, N, R, 32, 16))
    return Config()


def _splits(arch: Arch, M: int, N: int, R: int, columns: int, ranks: int) -> int:
    # Few programs and many tokens: split the tokens, at least 256 each, until every multiprocessor has work.
    programs = -(-N // columns) * -(-R // ranks)
    return max(1, min(2 * arch.processors // programs, M // 256, 16))
