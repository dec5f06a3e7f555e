"""Cores: the small matrix C [R, R] between the factors of ΔW = s · U C D, with a fixed pattern.

A core holds only the entries of its pattern; ops, kernels and gradients work on these and never build R × R for a
diagonal, banded or sparse core. Every class has ``values`` (the trained tensor), ``size`` R and ``dense()``; ``index``
is the pattern as the kernels read it (None except for a sparse core).

The cores of a stack of experts are one object: its ``values`` have a leading E, its pattern is shared, ``experts`` is E
(0 for one core) and ``dense()`` is [E, R, R].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference


@dataclass(frozen=True)
class Diagonal:
    """C[i, i] = values[i].

    Args:
        values: [R], or [E, R] of a stack, a float dtype.
    """

    values: Tensor

    def __post_init__(self) -> None:
        _check_values(self.values, 1, "[R]")

    @property
    def size(self) -> int:
        """R."""
        return self.values.shape[-1]

    @property
    def experts(self) -> int:
        """E of a stack, else 0."""
        return _experts(self.values, 1)

    @property
    def index(self) -> None:
        return None

    def dense(self) -> Tensor:
        """C [R, R], differentiable."""
        return _dense(self)


@dataclass(frozen=True)
class Banded:
    """C[i, i + b − d] = values[b, i] for b = 0 … 2d: the diagonals from the lowest to the highest, each in row order.

    Args:
        values: [2d + 1, R], entries outside C are ignored; or, with ``size``, only the R(2d+1) − d(d+1) entries inside
            C, 1-D in the same order. After construction ``values`` has the 1-D form, which is the one to train. A core
            built from 2-D values serves one backward pass: create a new core for each. A stack takes ``size`` and
            [E, entries].
        size: R, for values of the entries inside C.

    Raises:
        ValueError: an even number of diagonals, a band wider than the matrix, a length that fits no band.
    """

    values: Tensor
    size: int = 0

    def __post_init__(self) -> None:
        values = self.values
        if self.size:
            _check_values(values, 1, "[entries]")
        else:
            _check_values(values, 2, "[2d + 1, R]", stacks=False)
            count, size = values.shape
            if count % 2 == 0 or count > 2 * size - 1:
                raise ValueError(
                    f"values [2d + 1, R] of a banded core need an odd number of diagonals, at most 2R − 1, got "
                    f"{list(values.shape)}"
                )
            object.__setattr__(self, "values", values[_inside(count // 2, size, values.device)])
            object.__setattr__(self, "size", size)
        reference.core_bandwidth(self.values.shape[-1], self.size)

    @property
    def bandwidth(self) -> int:
        """d: C[i, j] may be nonzero where |i − j| <= d."""
        return reference.core_bandwidth(self.values.shape[-1], self.size)

    @property
    def experts(self) -> int:
        """E of a stack, else 0."""
        return _experts(self.values, 1)

    @property
    def index(self) -> None:
        return None

    def dense(self) -> Tensor:
        """C [R, R], differentiable."""
        return _dense(self)


class Sparse:
    """C[rows[e], cols[e]] = values[e], 0 elsewhere.

    Args:
        rows, cols: integers [entries] in [0, R), without repeated pairs.
        values: [entries], or [E, entries] of a stack, a float dtype, in the order of the pairs.
        size: R.

    Attributes:
        values: in row-major order of the pairs. If the pairs came in this order, this is the given tensor; otherwise it
            is reordered differentiably, and a new core must be created for each backward pass.
        rows, cols: int64, in the same order.
        index: the pattern as the kernels read it, see :func:`sparse_index`.

    Raises:
        ValueError: lengths differ, a pair is outside C or repeated.
    """

    def __init__(self, rows: Tensor, cols: Tensor, values: Tensor, size: int) -> None:
        _check_values(values, 1, "[entries]")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be at least 1, got {size!r}")
        for name, pairs in (("rows", rows), ("cols", cols)):
            if not isinstance(pairs, Tensor) or pairs.is_floating_point() or pairs.shape != values.shape[-1:]:
                got = f"{pairs.dtype} {list(pairs.shape)}" if isinstance(pairs, Tensor) else type(pairs).__name__
                raise ValueError(f"{name} must be integers {list(values.shape[-1:])} as values has, got {got}")
            if not (0 <= int(pairs.min()) and int(pairs.max()) < size):
                raise ValueError(f"{name} must be in [0, {size}), got {int(pairs.min())} to {int(pairs.max())}")
        flat, order = (rows.long() * size + cols.long()).sort()
        repeated = (flat.diff() == 0).nonzero()
        if repeated.numel():
            pair = divmod(int(flat[int(repeated[0])]), size)
            raise ValueError(f"rows and cols hold the pair {pair} twice; every entry needs one value")
        # Values already in order stay the leaf tensor they are, so that one core serves every training step.
        sorted_already = bool((order.diff() > 0).all())
        self.values, self.size = values if sorted_already else values[..., order], size
        self.index = sparse_index(flat // size, flat % size, size)

    @classmethod
    def from_index(cls, index: Tensor, values: Tensor, size: int) -> Sparse:
        """A core with the pattern of an earlier core's ``index``; nothing is checked or sorted again."""
        core = cls.__new__(cls)
        core.values, core.size, core.index = values, size, index
        return core

    @property
    def experts(self) -> int:
        """E of a stack, else 0."""
        return _experts(self.values, 1)

    @property
    def rows(self) -> Tensor:
        return pattern(self)[0]

    @property
    def cols(self) -> Tensor:
        return pattern(self)[1]

    def dense(self) -> Tensor:
        """C [R, R], differentiable."""
        return _dense(self)


@dataclass(frozen=True)
class Dense:
    """C = values.

    Args:
        values: [R, R], or [E, R, R] of a stack, a float dtype.
    """

    values: Tensor

    def __post_init__(self) -> None:
        _check_values(self.values, 2, "[R, R]")
        if self.values.shape[-2] != self.values.shape[-1]:
            raise ValueError(f"values of a dense core must be [R, R], got {list(self.values.shape)}")

    @property
    def size(self) -> int:
        """R."""
        return self.values.shape[-1]

    @property
    def experts(self) -> int:
        """E of a stack, else 0."""
        return _experts(self.values, 2)

    @property
    def index(self) -> None:
        return None

    def dense(self) -> Tensor:
        """C [R, R]."""
        return self.values


Core = Diagonal | Banded | Sparse | Dense


def sparse_index(rows: Tensor, cols: Tensor, size: int) -> Tensor:
    """The pattern for the kernels: int32 row_start | columns | column_start | rows_by_column | order_by_column.

    C by rows for C h, and by columns, with the position of each value, for Cᵀ g.

    Args:
        rows, cols: int64 [entries] in row-major order.
        size: R.
    """
    by_column = (cols * size + rows).argsort()

    def starts(numbers: Tensor) -> Tensor:
        return torch.cat([numbers.new_zeros(1), torch.bincount(numbers, minlength=size).cumsum(0)])

    parts = (starts(rows), cols, starts(cols), rows[by_column], by_column)
    return torch.cat([part.to(torch.int32) for part in parts])


def pattern(core: Core) -> tuple[Tensor, Tensor]:
    """(rows, cols) of the values of a core that is not dense, int64, in order of the values; a stack shares them."""
    return reference.core_pattern(core.values[0] if core.experts else core.values, core.index, core.size)


def with_values(core: Core, values: Tensor) -> Core:
    """A core with the same pattern and other values, in the order of ``core.values``."""
    if isinstance(core, Sparse):
        return Sparse.from_index(core.index, values, core.size)
    return Banded(values, core.size) if isinstance(core, Banded) else type(core)(values)


def _inside(d: int, size: int, device: torch.device) -> Tensor:
    """Mark which entries of a band lie inside the matrix: bool [2d + 1, R]."""
    columns = torch.arange(size, device=device) + torch.arange(-d, d + 1, device=device).unsqueeze(1)
    return (columns >= 0) & (columns < size)


def _experts(values: Tensor, dim: int) -> int:
    """E of values with a leading E in front of ``dim`` dimensions, else 0."""
    return values.shape[0] if values.dim() > dim else 0


def _dense(core: Diagonal | Banded | Sparse) -> Tensor:
    if not core.experts:
        return reference.core_matrix(core.values, core.index, core.size)
    return torch.stack([reference.core_matrix(values, core.index, core.size) for values in core.values])


def _check_values(values: Tensor, dim: int, shape: str, stacks: bool = True) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a Tensor {shape}, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"values must be floats, got {values.dtype}")
    if values.layout is not torch.strided or values.is_nested:
        raise ValueError(f"values must be a dense tensor, got {'a nested one' if values.is_nested else values.layout}")
    if values.dim() not in ((dim, dim + 1) if stacks else (dim,)) or not values.numel():
        raise ValueError(f"values must be a non-empty {shape}, got {list(values.shape)}")
