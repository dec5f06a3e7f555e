"""Types of the compiled side, csrc/bindings.cpp: addresses (0 = absent), sizes and strides in elements, no checks.

Element types are numbers: float32 0, bfloat16 1, float16 2, nf4 3, float64 4, fp4 5, mxfp4 6. ``form`` is 0 for few
tokens, 1 for many.
A matrix is (address, element type, absmax, absmax2, offset, block size), a branch (rank, address and element type of D,
address and element type of U), a core (address, element type, kind, entries,
bandwidth, address of its index).
"""

from collections.abc import Sequence

version: str
compiler: str
arena_fields: tuple[str, ...]

def cuda_targets() -> str: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def index_fault(index: int, R: int, entries: int) -> str: ...
def arena_fault(
    arena: int, bytes: int, table: int, table_rows: int, slots: int, M: int, N: int, K: int, E: int
) -> str: ...
def prefer_huge_pages(memory: int, bytes: int) -> None: ...
def quantize(
    format: int, w: int, w_dtype: int, numel: int, block_size: int, packed: int, scales: int, threads: int
) -> None: ...
def absmax_quantize(absmax: int, offset: int, blocks: int, index: int, absmax2: int, threads: int) -> None: ...
def dequantize(
    format: int,
    packed: int,
    absmax: int,
    absmax2: int,
    offset: int,
    numel: int,
    block_size: int,
    out: int,
    out_dtype: int,
    threads: int,
) -> None: ...
def search_scales(
    format: int, w: int, N: int, K: int, importance: int, block_size: int, scales: int, threads: int
) -> None: ...
def round_nearest(w: int, numel: int, weight: Sequence[int], threads: int) -> None: ...
def weighted_errors(
    N: int, K: int, w: int, weight: Sequence[int], factor: int, order: int, work: int, errors: int, threads: int
) -> None: ...
def round_weighted(
    N: int,
    K: int,
    w: int,
    weight: Sequence[int],
    moment: int,
    factor: int,
    order: int,
    choose: int,
    passes: int,
    work: int,
    errors: int,
    threads: int,
) -> None: ...
def dequantize_cuda(
    format: int,
    packed: int,
    absmax: int,
    absmax2: int,
    offset: int,
    numel: int,
    block_size: int,
    out: int,
    out_dtype: int,
    stream: int,
) -> None: ...  # only in a build with CUDA
def routed_update_cuda(
    M: int,
    N: int,
    K: int,
    x: int,
    dtype: int,
    x_stride: int,
    arena: int,
    table: int,
    slot_count: int,
    S: int,
    slots: int,
    strengths: int,
    h: int,
    capacity: int,
    y: int,
    stream: int,
) -> None: ...  # only in a build with CUDA
def inverse_cholesky_cuda(
    gram: int, batch: int, q: int, inverse: int, failed: int, stream: int
) -> None: ...  # only in a build with CUDA
def eigenvectors_cuda(
    gram: int, batch: int, q: int, work: int, values: int, vectors: int, failed: int, stream: int
) -> None: ...  # only in a build with CUDA
def routed_linear(
    form: int,
    few: int,
    M: int,
    N: int,
    K: int,
    E: int,
    offsets: int,
    x: int,
    dtype: int,
    x_stride: int,
    weight: Sequence[int],
    branch: Sequence[int] | None,
    bias: int,
    bias_dtype: int,
    arena: int,
    table: int,
    S: int,
    slots: int,
    strengths: int,
    y: int,
    threads: int,
) -> None: ...
def bradley_terry_loss(
    n: int, chosen: int, rejected: int, dtype: int, margin: int, labels: int, center: float, loss: int, threads: int
) -> None: ...
def bradley_terry_loss_backward(
    n: int,
    g: int,
    chosen: int,
    rejected: int,
    dtype: int,
    margin: int,
    labels: int,
    center: float,
    dchosen: int,
    drejected: int,
    threads: int,
) -> None: ...
def adapted_linear(
    form: int,
    M: int,
    N: int,
    K: int,
    R: int,
    x: int,
    dtype: int,
    x_stride: int,
    weight: Sequence[int],
    branch: Sequence[int] | None,
    down: Sequence[int],
    up: Sequence[int],
    core: Sequence[int],
    bias: int,
    bias_dtype: int,
    scale: float,
    dropout: float,
    seed: int,
    y: int,
    h: int,
    threads: int,
) -> None: ...
def adapted_linear_backward(
    M: int,
    N: int,
    K: int,
    R: int,
    g: int,
    dtype: int,
    g_stride: int,
    x: int,
    x_stride: int,
    h: int,
    weight: Sequence[int],
    branch: Sequence[int] | None,
    down: Sequence[int],
    up: Sequence[int],
    core: Sequence[int],
    scale: float,
    dropout: float,
    seed: int,
    dx: int,
    ddown: int,
    dup: int,
    dcore: int,
    threads: int,
) -> None: ...
def experts_linear(
    few: int,
    P: int,
    N: int,
    K: int,
    R: int,
    E: int,
    x: int,
    dtype: int,
    x_stride: int,
    offsets: int,
    weight: Sequence[int],
    branch: Sequence[int] | None,
    down: Sequence[int],
    up: Sequence[int],
    core: Sequence[int],
    bias: int,
    bias_dtype: int,
    scale: float,
    dropout: float,
    seed: int,
    y: int,
    h: int,
    threads: int,
) -> None: ...
def experts_linear_backward(
    P: int,
    N: int,
    K: int,
    R: int,
    E: int,
    g: int,
    dtype: int,
    g_stride: int,
    x: int,
    x_stride: int,
    h: int,
    offsets: int,
    weight: Sequence[int],
    branch: Sequence[int] | None,
    down: Sequence[int],
    up: Sequence[int],
    core: Sequence[int],
    scale: float,
    dropout: float,
    seed: int,
    dx: int,
    ddown: int,
    dup: int,
    dcore: int,
    threads: int,
) -> None: ...
def svd_linear(
    form: int,
    M: int,
    N: int,
    K: int,
    R: int,
    x: int,
    dtype: int,
    x_stride: int,
    u: Sequence[int],
    core: Sequence[int],
    vt: Sequence[int],
    bias: int,
    bias_dtype: int,
    y: int,
    h: int,
    threads: int,
) -> None: ...
def svd_linear_backward(
    M: int,
    N: int,
    K: int,
    R: int,
    g: int,
    dtype: int,
    g_stride: int,
    h: int,
    u: Sequence[int],
    core: Sequence[int],
    vt: Sequence[int],
    b: int,
    dx: int,
    dcore: int,
    threads: int,
) -> None: ...
