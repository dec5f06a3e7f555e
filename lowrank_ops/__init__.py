"""lowrank_ops: frozen 4-bit linear layers with low-rank adapters, fused, on CPU and GPU.

    y = W x + bias + s · U (D x)        W frozen: NF4 or dense [N, K]     D "down" [R, K]     U "up" [N, R]

Four floors, each usable by itself: modules (:class:`Linear`, :func:`adapt`), :mod:`lowrank_ops.functional`, registered
ops (:mod:`lowrank_ops.ops`, ``torch.ops.lowrank_ops``), kernels (``csrc/`` and :mod:`lowrank_ops.kernels`).
"""

from importlib.metadata import PackageNotFoundError, version

from . import functional
from ._plan import implementation
from .adapters import LoRA
from .checkpoint import load_adapter, save_adapter
from .functional import LowRankUpdate
from .linear import Linear, explain
from .model import adapt, adapter_parameters, merge
from .nf4 import NF4Weight

try:
    __version__ = version("lowrank-ops")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0+checkout"

__all__ = [
    "Linear",
    "LoRA",
    "LowRankUpdate",
    "NF4Weight",
    "adapt",
    "adapter_parameters",
    "explain",
    "functional",
    "implementation",
    "load_adapter",
    "merge",
    "save_adapter",
]
