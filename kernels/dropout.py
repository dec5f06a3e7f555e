"""The dropout mask: a pure function of the seed and the position of an element, recomputed wherever it is needed."""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Dropout(NamedTuple):
    """Dropout as one argument of a kernel; the kernel must not be specialised on it.

    Attributes:
        seed: int64 [1]; None if nothing is dropped.
        threshold: the smallest 32-bit word that is kept.
    """

    seed: Any = None
    threshold: Any = 0


@triton.jit
def keep_tile(dropout, rows, column0, COLUMNS: tl.constexpr):
    """keep[m, k] = philox(key=seed, counter=(k // 4, m, 0, 0))[k % 4] >= threshold, a tile [len(rows), COLUMNS].

    ``column0`` must be a multiple of four: all four words of a counter are used.
    """
    quad = (column0 // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    row = rows.to(tl.int32)[:, None]
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed), zero + quad, zero + row, zero, zero, 10)
    # Two joins put word 2a + b at [..., a, b].
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return words >= dropout.threshold.to(tl.uint32)


def dropout_argument(probability: float, seed: Tensor | None) -> Dropout:
    """The kernel argument for dropping each element with this probability."""
    return Dropout(seed, min(round(probability * 2**32), 2**32 - 1)) if probability else Dropout()
