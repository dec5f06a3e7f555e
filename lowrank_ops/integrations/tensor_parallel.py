"""Styles for torch's parallelize_module that also split 4-bit layers: torch's own know dense ones only.

They do to our layers what :func:`lowrank_ops.parallelize` does, and to others what torch's styles of the same name do. The
method ``_apply`` of torch's styles is private.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel as _Colwise
from torch.distributed.tensor.parallel import RowwiseParallel as _Rowwise

from ..adapters.linear import AdaptedLayer
from ..adapters.parallelize import split_layer

if not all(hasattr(style, "_apply") for style in (_Colwise, _Rowwise)):
    raise ImportError("torch's parallel styles have no _apply in this version of torch; use lowrank_ops.parallelize")


class ColwiseParallel(_Colwise):
    """torch's ColwiseParallel, for our layers too: W, its bias and U are split by rows, D and C are in every process."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if not isinstance(module, AdaptedLayer):
            return super()._apply(module, device_mesh)
        split_layer(module, device_mesh, self)
        return module


class RowwiseParallel(_Rowwise):
    """torch's RowwiseParallel, for our layers too: W and D are split by columns, the bias, U and C are in every process."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if not isinstance(module, AdaptedLayer):
            return super()._apply(module, device_mesh)
        split_layer(module, device_mesh, self)
        return module
