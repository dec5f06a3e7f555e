"""Singular value decompositions of weights: the largest singular values without a dense copy, or all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..formats import FLOAT_DTYPES, QuantizedWeight
from ..kernels.operands import Matrix
from ..ops import _cpu

Weight = Tensor | QuantizedWeight
Triple = tuple[Tensor, Tensor, Tensor]

# A right vector whose singular value is below this share of the largest is orthogonal to the others only after another
# QR: the eigenvectors of the Gram matrix have an error of 2^-53 / share^2.
_POLISH_BELOW = 1e-4
# Number of squarings of the inverse Gram matrix; its trace then bounds the smallest eigenvalue: q^(1/64), 8 % for q =
# 128.
_SQUARINGS = 6
# How far Q Qᵀ may differ from I before the second Cholesky-QR, which makes it exact.
_NEARLY_ORTHONORMAL = 0.1
_NOT_CONVERGED = (
    "the eigenvalues of the weight's Gram matrix did not converge; try it on another device, or truncated_svd with another "
    "seed or oversample"
)
# The largest size that the kernels of csrc/cuda/svd.cu take.
_KERNEL_SIZE = 512


def truncated_svd(
    weight: Weight | Sequence[Weight],
    rank: int,
    oversample: int | None = None,
    power_iterations: int = 4,
    seed: int = 0,
) -> Triple:
    """W ≈ U diag(S) Vᵀ, the ``rank`` largest singular values and their vectors.

    With A = W, or Wᵀ if W is tall, and a Gaussian Q [n, q], q = rank + oversample::

        repeat:  P R = Aᵀ Q, P orthonormal;  Q = orth(A P - a Q R⁻¹), which spans (A Aᵀ - a I) Q
        then:    Qᵀ A = X diag(S) Vᵀ;  U = Q X

    The shifts ``a`` are the zeros of a Chebyshev polynomial on [0, b], where b is a lower bound of σ_q² from P's Gram
    matrix: with the same products it damps values below σ_q far more than a power does. It takes 2 · power_iterations +
    1 products
    with W, which is read as stored: no dense copy of a 4-bit or 16-bit W is made, except if q reaches min(N, K): then
    the range is everything and W itself is decomposed. A 16-bit W that is not contiguous is copied.

    Args:
        weight: W [N, K], float32, bfloat16 or float16, or a 4-bit weight such as :class:`NF4Weight`; or a list
            of such weights of one shape on one device, which are decomposed together.
        rank: R, from 1 to min(N, K).
        oversample: additional directions; default ``rank``, at most as many as there are.
        power_iterations: rounds of the loop above; 0 uses the range of W times a Gaussian matrix.
        seed: of the Gaussian matrix, drawn on the CPU, so that it is the same on every device.

    Returns:
        U [N, R], S [R] descending, Vt [R, K] in float32, on the weight's device; for a list each with a leading
        dimension. In every column of U the entry of largest absolute value (the first if several are equal) is positive.

    Raises:
        TypeError: weight has another type or dtype, or is bitsandbytes' packed 4-bit storage; another argument is not
            an integer.
        ValueError: weight is not 2-D, empty, not finite or on the meta device; rank, oversample or power_iterations is out
            of range; the weights of a list differ in shape or device.
        RuntimeError: the small eigenproblem does not converge.

    Numerics: products with W in float32; Gram matrices, their Cholesky factors and the eigenproblem in float64. U and Vt
    are orthonormal to float32 rounding, even if the rank of W is below R. On one machine with one number of threads the
    result has the same bits every time; on a CPU the result for a list equals the results for its members.

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1, with a Chebyshev polynomial in
    place of the power, and Cholesky-QR in place of Householder's.
    """
    weights = _check_weights(weight)
    n, k = sorted(weights[0].shape)
    _check_integer("rank", rank, 1)
    if rank > n:
        raise ValueError(f"rank must be at most min(N, K) = {n} for a weight {_shape(weights[0])}, got {rank}")
    oversample = rank if oversample is None else oversample
    _check_integer("oversample", oversample, 0)
    _check_integer("power_iterations", power_iterations, 0)
    _check_integer("seed", seed, -(2**63))
    size = min(rank + oversample, n)
    magnitudes = [magnitude(w) for w in weights]
    device = weights[0].device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator("cpu").manual_seed(seed)
        start = torch.randn(size, n if power_iterations else k, generator=generator, device="cpu", dtype=torch.float32)
        # On a CPU a product fills the machine by itself, and one at a time no layer's bits depend on its neighbours.
        groups = [range(len(weights))] if device.type != "cpu" else [range(i, i + 1) for i in range(len(weights))]
        parts = []
        for group in groups:
            stack = _Stack([weights[i] for i in group], [magnitudes[i] for i in group])
            parts.append(_decompose(stack, start.to(device), rank, power_iterations))
        U, S, Vt = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return (U, S, Vt) if isinstance(weight, Sequence) else (U[0], S[0], Vt[0])


def full_svd(weight: Weight) -> Triple:
    """W = U diag(S) Vᵀ, every singular value and vector, n = min(N, K), from W Wᵀ = U diag(S²) Uᵀ (WᵀW if W is tall).

    Args:
        weight: W [N, K], float32, bfloat16 or float16, or a 4-bit weight such as :class:`NF4Weight`, which is
            decoded first.

    Returns:
        U [N, n], S [n] descending, Vt [n, K] in float32, with the sign rule of :func:`truncated_svd`.

    Raises:
        TypeError, ValueError: as :func:`truncated_svd`.
        RuntimeError: LAPACK's or cuSOLVER's iteration for the eigenvalues does not converge.

    Numerics: everything in float64, rounded once to float32. Squaring W leaves an error of about 1e-8 of the largest
    singular value in the smallest ones, below the rounding of a float32 W. LAPACK's SVD in float32 has a larger error
    and takes longer.
    """
    if isinstance(weight, Sequence):
        raise TypeError("weight must be one Tensor [N, K] or 4-bit weight, got a list")
    (w,) = _check_weights(weight)
    with torch.no_grad(), torch.autocast(w.device.type, enabled=False):
        stack = _Stack([w], [magnitude(w)])
        U, S, Vt = _fix_signs(stack, *_project(stack.rows(), None, stack.n))
        return U[0], S[0], Vt[0]


# ---- the checks ----


def is_packed_storage(weight: object) -> bool:
    """Tell whether this is bitsandbytes' Params4bit; by class, because its bytes may be stored as a float dtype."""
    return any(kind.__name__ == "Params4bit" for kind in type(weight).__mro__)


def _check_weights(weight: Any) -> list[Weight]:
    weights = list(weight) if isinstance(weight, Sequence) else [weight]
    if not weights:
        raise ValueError("weight must be a weight or a non-empty list of weights, got an empty list")
    for w in weights:
        if is_packed_storage(w):
            raise TypeError(
                "weight is packed 4-bit storage (Params4bit), whose bytes are not W; decompose the weight before it is "
                "quantised, or lowrank_ops.Linear.from_linear(layer).weight"
            )
        if isinstance(w, QuantizedWeight):
            if w.device.type == "meta":
                raise ValueError("weight is on the meta device and holds no numbers; load or materialise it first")
            continue
        if not isinstance(w, Tensor):
            raise TypeError(
                "weight must be a Tensor [N, K], a 4-bit weight such as NF4Weight or a list of these, got "
                f"{type(w).__name__}"
            )
        if w.dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight must be float32, bfloat16 or float16, got {w.dtype}")
        if w.dim() != 2 or not w.numel():
            raise ValueError(f"weight must be a non-empty [N, K], got {list(w.shape)}")
        if w.layout != torch.strided:
            raise ValueError(f"weight must be a dense tensor, got layout {w.layout}")
        if w.device.type == "meta":
            raise ValueError("weight is on the meta device and holds no numbers; load or materialise it first")
    first = weights[0]
    for i, w in enumerate(weights):
        if w.shape != first.shape or w.device != first.device:
            raise ValueError(
                f"weights of a list must have one shape and device, got {_shape(first)} on {first.device} and, at "
                f"{i}, {_shape(w)} on {w.device}"
            )
    return weights


def _shape(weight: Weight) -> str:
    N, K = weight.shape
    return f"{N} x {K}"


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def magnitude(weight: Weight) -> float:
    """An upper bound of |w|, tight to a small factor; ValueError if W is not finite."""
    if isinstance(weight, QuantizedWeight):
        magnitude = weight.bound()
    else:
        magnitude = max(abs(float(extreme)) for extreme in torch.aminmax(weight.detach()))
    if not math.isfinite(magnitude):
        raise ValueError("weight must be finite, got NaN or infinity in it")
    return magnitude


def _power_of_two(magnitude: float) -> float:
    """The power of two that scales numbers of this magnitude to about 1, exactly."""
    return 2.0 ** -max(-100, min(100, math.frexp(magnitude)[1])) if magnitude else 1.0


# ---- products with W ----


# The op's arguments after the rows of W: rank 0, no down, no up, no core.
_NO_UPDATE = (0, None, None, None)


def _matrix(weight: Weight) -> Matrix:
    return weight.operand() if isinstance(weight, QuantizedWeight) else Matrix(weight.contiguous().resolve_neg())


def _times(weight: Weight, x: Tensor) -> Tensor:
    """y = W x for every row of x: float32 [q, K] -> [q, N]."""
    if isinstance(weight, Tensor) and weight.dtype == torch.float32:
        return x @ weight.T
    y: Tensor = ops.call(
        "adapted_linear", x, _matrix(weight), weight.shape[0], *_NO_UPDATE, None, 1.0, 0.0, None, None
    )[0]
    return y


def transposed_times(weight: Weight, g: Tensor) -> Tensor:
    """x = Wᵀ g for every row of g: float32 [q, N] -> [q, K]."""
    if isinstance(weight, Tensor) and weight.dtype == torch.float32:
        return g @ weight
    arguments = (_matrix(weight), weight.shape[1], *_NO_UPDATE, 1.0, 0.0, None, True, False, False, False, None)
    x: Tensor = ops.call("adapted_linear_backward", g, None, None, *arguments)[0]
    return x


class _Stack:
    """A = c · W, or its transpose if W is tall, so that n <= k; c scales its numbers to about 1. Takes and returns rows."""

    def __init__(self, weights: Sequence[Weight], magnitudes: Sequence[float]) -> None:
        self.weights = [w.detach() if isinstance(w, Tensor) else w for w in weights]
        N, K = weights[0].shape
        self.tall, self.n, self.k = N > K, min(N, K), max(N, K)
        self.scales = [_power_of_two(magnitude) for magnitude in magnitudes]

    def times(self, x: Tensor) -> Tensor:
        """A x, [B, q, k] -> [B, q, n]."""
        return self._apply(transposed_times if self.tall else _times, x)

    def transposed_times(self, x: Tensor) -> Tensor:
        """Aᵀ x, [B, q, n] -> [B, q, k]."""
        return self._apply(_times if self.tall else transposed_times, x)

    def rows(self) -> Tensor:
        """A, [B, n, k] float32."""
        dense = [w.dequantize(torch.float32) if isinstance(w, QuantizedWeight) else w.float() for w in self.weights]
        return torch.stack([(w.T if self.tall else w) * c for w, c in zip(dense, self.scales, strict=True)])

    def _apply(self, product: Callable[[Weight, Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.stack([product(w, rows * c) for w, c, rows in zip(self.weights, self.scales, x, strict=True)])


# ---- the decomposition ----


class _DependentError(Exception):
    """A Gram matrix has no Cholesky factor: the directions are linearly dependent."""


class _Cholesky:
    """Orthonormalise rows by the inverse Cholesky factor of their Gram matrix, in float64.

    Failures are recorded on the device and read once, at the end, so that the host does not stall the GPU.
    """

    def __init__(self) -> None:
        self.failed: list[Tensor] = []

    def inverse(self, x: Tensor) -> Tensor:
        """L⁻¹ [B, q, q] float64 with L Lᵀ = X Xᵀ for the rows X [B, q, ·]."""
        inverse, failed = _inverse_cholesky(_gram(x))
        self.note(failed)
        return inverse

    def note(self, failed: Tensor) -> None:
        if failed.device.type == "cpu":
            if bool(failed.any()):
                raise _DependentError
        else:
            self.failed.append(failed)

    def check(self) -> None:
        if self.failed and bool(torch.stack([f.any() for f in self.failed]).any()):
            raise _DependentError
        self.failed.clear()


def _decompose(stack: _Stack, start: Tensor, rank: int, power_iterations: int) -> Triple:
    """U [B, N, R], S [B, R], Vt [B, R, K] of a stack."""
    if len(start) == stack.n:  # the range is everything
        return _fix_signs(stack, *_project(stack.rows(), None, rank))
    start = start.expand(len(stack.weights), *start.shape)
    try:
        q = _chebyshev(stack, start, power_iterations)
    except _DependentError:
        q = _householder(stack, start, power_iterations)
    return _fix_signs(stack, *_project(stack.transposed_times(q), q, rank))


def _chebyshev(stack: _Stack, start: Tensor, power_iterations: int) -> Tensor:
    """Orthonormal rows [B, q, n] that nearly span the top left singular vectors of A."""
    cholesky = _Cholesky()

    def orthonormal(x: Tensor) -> Tensor:
        return cholesky.inverse(x).float() @ x

    q = orthonormal(start if power_iterations else stack.times(start))
    bound: Tensor | None = None
    for i in range(power_iterations):
        b = stack.transposed_times(q)
        inverse = cholesky.inverse(b)
        # b never exceeds σ_q², which bounds the q-th Ritz value from above; it is tightest when it comes last.
        least = _smallest_eigenvalue(inverse)
        bound = least if bound is None else torch.maximum(bound, least)
        shift = bound * (0.5 - 0.5 * math.cos((2 * i + 1) * math.pi / (2 * power_iterations)))
        p = inverse.float() @ b
        q = orthonormal(torch.baddbmm(stack.times(p), (shift[:, None, None] * inverse).float(), q, alpha=-1))
    # Repeat on the nearly orthonormal rows: this restores the accuracy lost to the condition of the Gram matrix.
    gram = _gram(q)
    error = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax((-2, -1))
    inverse, failed = _inverse_cholesky(gram)
    cholesky.note(failed | ~(error < _NEARLY_ORTHONORMAL))
    cholesky.check()
    return inverse.float() @ q


def _householder(stack: _Stack, start: Tensor, power_iterations: int) -> Tensor:
    """Do the same by plain powers and Householder's QR, for any A, including linearly dependent rows and zeros."""

    def orthonormal(x: Tensor) -> Tensor:
        return torch.linalg.qr(x.mT.double())[0].mT.float()

    q = orthonormal(start if power_iterations else stack.times(start))
    for _ in range(power_iterations):
        q = orthonormal(stack.times(orthonormal(stack.transposed_times(q))))
    return q


def _project(b: Tensor, q: Tensor | None, rank: int) -> Triple:
    """The top singular triples of Q B for B = Qᵀ A [B, q, k]: left [B, R, n], S [B, R], right [B, R, k]; None: Q = I."""
    b = b.double()
    x, failed = _eigenvectors(b @ b.mT)
    x = x[:, :rank]
    left, right = x if q is None else x @ q.double(), x @ b
    S = right.norm(dim=-1)
    right = right / S.clamp(min=torch.finfo(S.dtype).tiny)[..., None]
    polish, failures = torch.stack([(S[:, -1] <= _POLISH_BELOW * S[:, 0]).any(), failed.any()]).tolist()
    if failures:
        raise RuntimeError(_NOT_CONVERGED)
    if polish:
        # Householder's QR keeps the leading rows up to sign and completes the basis where rows are zero.
        basis, triangle = torch.linalg.qr(right.mT)
        right = basis.mT * _signs(triangle.diagonal(dim1=-2, dim2=-1))[..., None]
    return left.float(), S.cummin(-1).values.float(), right.float()


def _fix_signs(stack: _Stack, left: Tensor, S: Tensor, right: Tensor) -> Triple:
    """Turn signs so that the entry of largest absolute value in each column of U (the first of equals) is positive."""
    u, v = (right, left) if stack.tall else (left, right)
    signs = _signs(u.gather(-1, u.abs().argmax(dim=-1, keepdim=True)))
    return (u * signs).mT.contiguous(), S / S.new_tensor(stack.scales)[:, None], v * signs


def _signs(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _gram(x: Tensor) -> Tensor:
    wide = x.double()
    return wide @ wide.mT


def _smallest_eigenvalue(inverse: Tensor) -> Tensor:
    """A lower bound [B], within q^(1/64), of the smallest eigenvalue of G = L Lᵀ from L⁻¹: trace(G⁻⁶⁴)^(-1/64)."""
    power = inverse.mT @ inverse
    trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
    logarithm = trace.log()
    for _ in range(_SQUARINGS):
        power = power / trace[:, None, None]
        power = power @ power
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        logarithm = 2 * logarithm + trace.log()
    return torch.exp(-logarithm / 2**_SQUARINGS)


# ---- small dense problems, [B, q, q] float64 ----


def _has_kernels(gram: Tensor) -> bool:
    return gram.shape[-1] <= _KERNEL_SIZE and _cpu.has_cuda(gram.device)


def _inverse_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹, lower triangular, with L Lᵀ = G, and flags [B] of failures."""
    if _has_kernels(gram):
        return _cpu.inverse_cholesky_cuda(gram)
    lower, failed = torch.linalg.cholesky_ex(gram)
    # A failed factor has zeros on its diagonal; its numbers are never used.
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(lower, identity, upper=False), failed != 0


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of G as rows [B, q, q], largest eigenvalue first, and flags [B] of failures."""
    if _has_kernels(gram):
        return _cpu.eigenvectors_cuda(gram)
    try:
        _, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as error:
        raise RuntimeError(f"{_NOT_CONVERGED} ({error})") from error
    return vectors.mT.flip(-2), torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
