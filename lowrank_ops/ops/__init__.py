"""The registered ops: schema, fake, implementation per device, autograd.

torch.compile, opcheck and the dispatcher see these ops; :mod:`lowrank_ops.functional` checks operands and then uses
:func:`call`, which takes the operands of an op as its declaration lists them: a matrix as ``Matrix(data, scales,
block_size, format)``, a core as ``Core(values, index)`` (:mod:`lowrank_ops.kernels.operands`), None if absent.
"""

import importlib
import pkgutil

from ._register import (
    KERNELS,
    LIBRARY,
    SCHEMAS,
    SIGNATURES,
    call,
    call_paths,
    dispatcher_is_idle,
    is_plain,
    run_eagerly,
)

__all__ = [
    "FAMILIES", "KERNELS", "LIBRARY", "SCHEMAS", "SIGNATURES", "call", "call_paths", "dispatcher_is_idle", "is_plain",
    "run_eagerly",
]  # fmt: skip

# A file without an underscore holds a family of ops and registers them when imported.
FAMILIES: dict[str, str] = {}  # op -> its family
for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("_"):
        importlib.import_module(f".{_file.name}", __name__)
        FAMILIES |= {op: _file.name for op in SCHEMAS if op not in FAMILIES}
