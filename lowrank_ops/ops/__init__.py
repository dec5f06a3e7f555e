"""The registered ops: schema, fake, implementation per device, autograd.

They are what torch.compile, opcheck and the dispatcher see; :mod:`lowrank_ops.functional` is the checked way in, through
:func:`call`. A matrix is (data, scales, block size): the tensor itself, no scales and 0 where it is dense; the packed bytes,
(absmax,) or (absmax, absmax2, offset), and the block size where it is NF4. A core is (values, index), the index that of a
sparse one (:mod:`lowrank_ops.cores`). Both are None where they are absent.

A schema has no such groups. There a matrix is five arguments (data, absmax, absmax2, offset, block size) and a core two: a
list of scales would cost more than all the rest where autograd has to take it apart. The schemas are registered with the
low-level Library because a call through it costs less than one through a custom_op.
"""

from __future__ import annotations

from . import adapted_linear, bradley_terry, nf4, routed_linear, svd_linear
from ._register import KERNELS, LIBRARY, SCHEMAS, call

__all__ = [
    "KERNELS",
    "LIBRARY",
    "SCHEMAS",
    "adapted_linear",
    "bradley_terry",
    "call",
    "nf4",
    "routed_linear",
    "svd_linear",
]
