"""Mixes of adapters for the tests of routed_linear's kernels, and their results in plain torch."""

from __future__ import annotations

import torch
from helpers import make_core
from torch import Tensor

from lowrank_ops import NF4Weight, reference
from lowrank_ops.kernels.operands import FORMATS, Core, Matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of their codes
F32, BF16, F16 = DTYPES
KINDS = ("", "diagonal", "band1", "sparse", "dense")

Dense = tuple[Tensor, Tensor, Tensor | None, float]


class Mix:
    """Adapters in an arena, and the same adapters in float64."""

    def __init__(self, N: int, K: int) -> None:
        self.N, self.K = N, K
        self.packed: list[tuple | None] = [None]  # the first slot holds nothing
        self.dense: list[Dense | None] = [None]
        self.generator = torch.Generator().manual_seed(N)

    def _matrix(self, rows: int, columns: int, of: torch.dtype | str) -> tuple[Matrix, Tensor]:
        m = torch.randn(rows, columns, generator=self.generator) * columns**-0.5
        if isinstance(of, torch.dtype):
            m = m.to(of)
            return Matrix(m), m.double()
        if of in FORMATS:
            format = FORMATS[of]
            data, scales = reference.quantize(format, m, 32)
            dense = reference.dequantize(format, data, scales, None, None, rows, columns, 32)
            return Matrix(data, (scales,), 32, format), dense.double()
        q = NF4Weight.quantize(m, 32, of == "double")
        return q.operand(), q.dequantize(F32).double()

    def add(self, rank: int, kind: str, of: torch.dtype | str) -> None:
        """of: the dtype of factors and core, a format of the factors, or "single" or "double" for NF4 factors."""
        down, dense_down = self._matrix(rank, self.K, of)
        up, dense_up = self._matrix(self.N, rank, of)
        core = make_core(kind, rank, of if isinstance(of, torch.dtype) else F32, self.generator)
        scale = 0.5 + 0.25 * len(self.packed)
        self.packed.append((rank, down, up, None if core is None else Core(core.values, core.index), scale))
        self.dense.append((dense_down, dense_up, None if core is None else core.dense().double(), scale))

    def tokens(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, slots with every adapter and none among them, and y before the updates."""
        slots = [-1, 0, *range(1, len(self.packed)), 1]
        x, y = (torch.randn(len(slots), width, generator=self.generator).to(dtype) for width in (self.K, self.N))
        return x, torch.tensor(slots, dtype=torch.int32), y

    def mixed_tokens(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, slots and strengths of 0 to 4 updates of a token, and y before them; one update alone has strength 1."""
        count = len(self.packed)
        rows = [[-1] * 4, [0] + [-1] * 3, *([slot] + [-1] * 3 for slot in range(1, count))]
        for size in (2, 3, 4, 2, 4, 3, 4):
            chosen = (torch.randperm(count - 1, generator=self.generator)[:size] + 1).tolist()
            rows.append(chosen + [-1] * (4 - size))
        slots = torch.tensor(rows, dtype=torch.int32)
        strengths = torch.rand(slots.shape, generator=self.generator) * 2 - 0.5
        strengths[slots[:, 1] < 0] = 1
        x, y = (torch.randn(len(slots), width, generator=self.generator).to(dtype) for width in (self.K, self.N))
        return x, slots, strengths, y

    def add_updates(
        self, x: Tensor, slots: Tensor, y: Tensor, dtype: torch.dtype, strengths: Tensor | None = None
    ) -> Tensor:
        y = y.to(dtype).clone()
        strengths = torch.ones(slots.shape) if strengths is None else strengths
        of_rows = zip(slots.view(len(x), -1).tolist(), strengths.view(len(x), -1).tolist(), strict=True)
        for t, row in enumerate(of_rows):
            for slot, strength in zip(*row, strict=True):
                update = self.dense[slot] if slot >= 0 else None
                if update is not None:
                    down, up, core, scale = update
                    h = down.to(dtype) @ x[t].to(dtype)
                    y[t] += strength * scale * (up.to(dtype) @ (h if core is None else core.to(dtype) @ h))
        return y
