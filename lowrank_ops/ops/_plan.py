"""Choose the kernel: a pure function of device, sizes and dtypes, printed by :func:`lowrank_ops.explain`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.operands import Format, Matrix
from . import _cpu

IMPLEMENTATIONS = {
    "cpp": "C++ kernels of lowrank_ops._C",
    "triton": "Triton kernels of lowrank_ops.kernels",
    "cuda": "CUDA kernels of lowrank_ops._C",
    "reference": "plain PyTorch of lowrank_ops.reference",
}

# What else a row's result depends on.
ROWS = {
    "cpp": "a row's result has the same bits in any batch that takes the same form, for any number of threads",
    "triton": "a row's result has the same bits in any batch that takes the same form and tile sizes",
    "cuda": "every element is decoded by itself",
    "reference": "a row's result may depend on the batch, as torch's products do",
}

# Up to this many tokens, decoding W in registers during the multiply beats decoding a tile first. CPU: measured, see
# docs/performance.md. CUDA: estimated from bytes and operations as the point where the vendor's GEMM gains more than a
# separate decoding pass costs. Two instruction sets have their own limit in bfloat16: "avx512_bf16" multiplies NF4 in
# pairs while decoding, eight tokens at a time; "amx" has a matrix unit, so nearly all of its time goes into decoding.
# "words" is for tokens of 16 bits as whole numbers, eight at a time, on the other instruction sets of x86.
# "neon" and "neon words" (ARM): where the counts of instructions in csrc/README.md cross; not measured.
# "experts" is the mean number of rows of an expert on a GPU, from which a tile of 64 rows is filled by the larger shares;
# estimated too.
FEW_TOKENS = {
    "cpu": 8,
    "words": 14,
    "avx512_bf16": 24,
    "amx": 3,
    "neon": 4,
    "neon words": 8,
    "cuda": 1024,
    "experts": 16,
}

# Up to this many tokens, each token of a routed batch reads the factors of its adapter by itself; beyond it, tokens of
# one adapter share what a tile reads, 16 at least. Estimated from the bytes; not measured on a GPU yet.
FEW_ROUTED = 64

_forced: str | None = os.environ.get("LOWRANK_OPS_IMPLEMENTATION") or None


class Plan(NamedTuple):
    """implementation: a key of IMPLEMENTATIONS; form: "few" or "many" tokens; reason: one sentence."""

    implementation: str
    form: str
    reason: str


@contextmanager
def implementation(name: str | None) -> Iterator[None]:
    """Force an implementation within a ``with`` block; one that cannot run raises, and nothing falls back.

    Args:
        name: "cpp", "triton", "cuda", "reference", or None for the planner's own choice. The environment variable
            LOWRANK_OPS_IMPLEMENTATION sets it for a whole process.

    The choice holds for the process, not for a thread: autograd runs backward passes in its own threads.
    """
    global _forced
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"name must be one of {', '.join(IMPLEMENTATIONS)} or None, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The implementation asked for by name, or None."""
    return _forced


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels, which lets them run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def plan_nf4(device: str, forced: str | None = None, cuda_kernel: bool = False) -> Plan:
    """Choose the implementation that quantises and dequantises on a device type, absmax_quantize included.

    Args:
        device: "cpu" or "cuda".
        forced: an implementation chosen by name, or None.
        cuda_kernel: whether this build has a CUDA kernel for the op.
    """
    native: tuple[str, ...] = ("cpp",)
    if device != "cpu":
        native = ("cuda", "triton") if cuda_kernel else ("triton",)
    chosen = forced or native[0]
    _check_forced(device, chosen, native)
    if forced is not None:
        return Plan(chosen, "many", f"{forced!r} was asked for by name")
    reasons = {
        "cpp": "the compiled kernels serve the CPU",
        "cuda": "the compiled kernel starts with less host work than a Triton launch",
        "triton": "this build has no CUDA kernel for the op",
    }
    return Plan(chosen, "many", reasons[chosen])


def plan_single(device: str, forced: str | None = None) -> Plan:
    """Choose the implementation of an op that has one kernel on each device type."""
    native = "cpp" if device == "cpu" else "triton"
    _check_forced(device, forced or native, (native,))
    reason = "the device has only this kernel" if forced is None else f"{forced!r} was asked for by name"
    return Plan(forced or native, "many", reason)


def plan_linear(
    device: str,
    M: int,
    K: int,
    dtype: torch.dtype,
    format: Format | None,
    block_size: int,
    forced: str | None = None,
    isa: str = "",
) -> Plan:
    """Choose the implementation and form of adapted_linear and its backward.

    Args:
        device: "cpu" or "cuda".
        M: tokens.
        K: columns of W.
        dtype: of x.
        format, block_size: of W; None and 0 if W is dense and needs no decoding.
        forced: an implementation chosen by name, or None.
        isa: the instruction set of the CPU kernels.
    """
    chosen = native = "cpp" if device == "cpu" else "triton"
    if forced is not None:
        _check_forced(device, forced, (native,))
        chosen = forced
    limit = FEW_TOKENS["cuda"] if chosen == "triton" else few_tokens_on_cpu(K, dtype, format, block_size, isa)
    if chosen == "reference":
        return Plan(chosen, "many", "'reference' was asked for by name")
    if device == "cuda" and format is None:
        return Plan(chosen, "many", "a dense W goes to the vendor's GEMM; the update is fused around it")
    form = "few" if M <= limit else "many"
    words = chosen == "cpp" and in_words(K, dtype, format, isa, form)
    unit = "; tokens are multiplied as whole numbers of 16 bits" if words else ""
    if form == "few":
        return Plan(chosen, form, f"M = {M} <= {limit} tokens: W is decoded in registers during the multiply{unit}")
    how = "into a workspace for the vendor's GEMM" if chosen == "triton" else "tile by tile into cache"
    return Plan(chosen, form, f"M = {M} > {limit} tokens: W is decoded {how}{unit}")


def few_tokens_on_cpu(K: int, dtype: torch.dtype, format: Format | None, block_size: int, isa: str) -> int:
    """The most tokens for which a CPU decodes W in registers; arguments as in :func:`plan_linear`."""
    in_pairs = format is not None and format.bits == 4 and block_size >= 64 and K % 64 == 0
    if dtype == torch.bfloat16 and (isa == "amx" or (isa == "avx512_bf16" and in_pairs)):
        return FEW_TOKENS[isa]
    words = in_words(K, dtype, format, isa, "few")
    if isa.startswith("neon"):
        return FEW_TOKENS["neon words" if words else "neon"]
    return FEW_TOKENS["words" if words else "cpu"]


# Instruction sets that multiply 16-bit tokens as whole numbers (csrc/cpu/tile/word_levels.h): all but "portable". Those
# with bfloat16 do so in float16 alone, "amx" in few tokens of bfloat16 too. Without VNNI, AVX-512 gains nothing from it
# for many tokens, and ARM does not.
_WITH_BFLOAT16 = {"avx512_bf16", "amx", "neon_bf16"}
_FEW_WORDS_ALONE = {"avx512", "neon", "neon_bf16"}


def in_words(K: int, dtype: torch.dtype, format: Format | None, isa: str, form: str) -> bool:
    """Tell whether a CPU multiplies the tokens as whole numbers of 16 bits; arguments as in :func:`plan_linear`."""
    if format is None or format.bits == 8 or K % 64 or isa in ("", "portable"):
        return False
    if form == "many" and isa in _FEW_WORDS_ALONE:
        return False
    own_bfloat16 = isa in _WITH_BFLOAT16 and not (isa == "amx" and form == "few")
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not own_bfloat16)


def plan_experts(
    device: str,
    P: int,
    E: int,
    K: int,
    dtype: torch.dtype,
    format: Format | None,
    block_size: int,
    forced: str | None = None,
    isa: str = "",
) -> Plan:
    """Choose the implementation and form of experts_linear and its backward.

    On a CPU each expert takes the form that its own rows call for. On a GPU the host does not know the rows of an
    expert, so the mean decides; either form is right for any rows.

    Args:
        P, E: rows and experts.
        others: as in :func:`plan_linear`.
    """
    native = "cpp" if device == "cpu" else "triton"
    chosen = forced or native
    _check_forced(device, chosen, (native,))
    if chosen == "reference":
        return Plan(chosen, "many", "'reference' was asked for by name")
    if chosen == "cpp":
        limit = few_tokens_on_cpu(K, dtype, format, block_size, isa)
        form = "few" if P <= limit else "many"
        return Plan(
            chosen, form, f"an expert with up to {limit} rows decodes W in registers, one with more tile by tile"
        )
    rows, limit = -(-P // E), FEW_TOKENS["experts"]
    if rows <= limit:
        return Plan(chosen, "few", f"P / E = {rows} <= {limit} rows an expert on average: W is decoded in registers")
    return Plan(
        chosen, "many", f"P / E = {rows} > {limit} rows an expert on average: tiles of W are decoded for many rows"
    )


def plan_routed(
    device: str,
    M: int,
    K: int,
    dtype: torch.dtype,
    format: Format | None,
    block_size: int,
    forced: str | None = None,
    isa: str = "",
    cuda_kernel: bool = False,
) -> Plan:
    """Choose the implementation of routed_linear and the form of its product with W; arguments as in
    :func:`plan_linear`.

    "cuda" refers to the updates; Triton's adapted_linear then computes the product with W.
    """
    if device == "cpu" or forced == "reference":
        return plan_linear(device, M, K, dtype, format, block_size, forced, isa)
    native = ("cuda", "triton") if cuda_kernel else ("triton",)
    chosen = forced or ("cuda" if cuda_kernel and M <= FEW_ROUTED else "triton")
    _check_forced(device, chosen, native)
    base = plan_linear(device, M, K, dtype, format, block_size, None, isa)
    if forced is not None:
        how = f"{forced!r} was asked for by name for the updates"
    elif chosen == "cuda":
        how = f"M = {M} <= {FEW_ROUTED} tokens: each adds its own update onto the product"
    elif cuda_kernel:
        how = f"M = {M} > {FEW_ROUTED} tokens: the updates go in tiles of tokens in the order of their slots"
    else:
        how = "this build has no CUDA kernels: the updates go in tiles of tokens in the order of their slots"
    return Plan(chosen, base.form, f"{base.reason}; {how}")


def _check_forced(device: str, name: str, native: tuple[str, ...]) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"LOWRANK_OPS_IMPLEMENTATION must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if name in native or name == "reference" or (name == "triton" and device == "cpu" and interpreted()):
        return
    hint = " (Triton runs on the CPU only with TRITON_INTERPRET=1)" if name == "triton" and device == "cpu" else ""
    raise RuntimeError(
        f"implementation {name!r} ({IMPLEMENTATIONS[name]}) cannot run this on device type {device!r}; "
        f"there it can be one of {', '.join((*native, 'reference'))}{hint}"
    )


# ---- the plan for given operands ----


def launchers(family: str) -> ModuleType:
    """Import the Triton launchers of a family of ops."""
    # Import at first use: importing the package must not need Triton, which reads TRITON_INTERPRET at import.
    return importlib.import_module(f"lowrank_ops.kernels.{family}")


def choose_nf4(device: torch.device, cuda_kernel: bool = False) -> str:
    """Call :func:`plan_nf4` for a device."""
    return plan_nf4(device.type, forced(), cuda_kernel).implementation


def choose_linear(x: Tensor, weight: Matrix, K: int) -> Plan:
    """Plan for x [M, K], or for its gradient [M, N], and W [N, K]."""
    _, _, block_size, format = weight
    return plan_linear(x.device.type, x.shape[0], K, x.dtype, format, block_size, _forced, _cpu.isa())


def choose_experts(x: Tensor, weight: Matrix, offsets: Tensor, K: int) -> Plan:
    """Plan for x [P, K], or for its gradient [P, N], and a stack W [E, N, K]."""
    _, _, block_size, format = weight
    P, E = x.shape[0], offsets.numel() - 1
    return plan_experts(x.device.type, P, E, K, x.dtype, format, block_size, _forced, _cpu.isa())


def few_tokens(x: Tensor, weight: Matrix, K: int) -> int:
    """The most rows of an expert for which the CPU kernels decode W in registers."""
    return few_tokens_on_cpu(K, x.dtype, weight.format, weight.block_size, _cpu.isa())


def choose_routed(x: Tensor, weight: Matrix, offsets: Tensor | None = None) -> Plan:
    """Plan for x [M, K] with rows routed to updates, and W [N, K], or with offsets a stack W [E, N, K]."""
    if offsets is not None:
        return choose_experts(x, weight, offsets, x.shape[1])  # the CUDA kernel knows no experts
    isa, cuda_kernel = _cpu.isa(), _cpu.has_cuda(x.device)
    (M, K), (_, _, block_size, format) = x.shape, weight
    return plan_routed(x.device.type, M, K, x.dtype, format, block_size, _forced, isa, cuda_kernel)
