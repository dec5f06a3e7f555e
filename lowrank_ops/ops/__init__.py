"""The registered ops: schema, fake, implementation per device, autograd.

They are what torch.compile, opcheck and the dispatcher see; :mod:`lowrank_ops.functional` is the checked way in, through
:func:`call`. It takes the operands of an op as its declaration has them: a matrix as ``Matrix(data, scales, block_size,
format)``, a core as ``Core(values, index)`` (:mod:`lowrank_ops.kernels.operands`), either None where it is absent.
"""

from . import adapted_linear, bradley_terry, nf4, routed_linear, svd_linear
from ._register import KERNELS, LIBRARY, SCHEMAS, SIGNATURES, call, call_paths, dispatcher_is_idle, is_plain

__all__ = [
    "KERNELS", "LIBRARY", "SCHEMAS", "SIGNATURES", "adapted_linear", "bradley_terry", "call", "call_paths",
    "dispatcher_is_idle", "is_plain", "nf4", "routed_linear", "svd_linear",
]  # fmt: skip
