"""lowrank_ops: frozen 4-bit linear layers with low-rank adapters, fused, on CPU and GPU.

    y = W x + bias + s · U (D x)        W frozen: NF4 or dense [N, K]     D "down" [R, K]     U "up" [N, R]

Four layers, each usable by itself: modules (:class:`Linear`, :func:`adapt`), :mod:`lowrank_ops.functional`, registered
ops (:mod:`lowrank_ops.ops`, ``torch.ops.lowrank_ops``), kernels (``csrc/`` and :mod:`lowrank_ops.kernels`).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import _aliases, cores, functional
from .adapters.checkpoint import load_adapter, save_adapter
from .adapters.combine import combine, convert
from .adapters.config import FP4Config, MXFP4Config, NF4Config
from .adapters.conv import Conv1d, Conv2d
from .adapters.embedding import Embedding
from .adapters.experts import Experts
from .adapters.explain import explain
from .adapters.kinds import SVF, SVFT, LoRA, LoRAXS
from .adapters.linear import Linear
from .adapters.model import adapt, adapter_parameters, merge, parameter_groups
from .adapters.parallelize import parallelize
from .adapters.reads import find_reads
from .adapters.references import callable_module as reference
from .adapters.references import disabled, set_strength, strength
from .adapters.sharded import make_shardable
from .adapters.tokens import train_tokens
from .calibration import calibrate
from .formats import FP4Weight, Int8Weight, Moments, MXFP4Weight, NF4Weight
from .functional import LowRankUpdate
from .integrations import accelerate as _accelerate  # noqa: F401  (it knows the hooks of dispatched models)
from .integrations import diffusers as _diffusers  # noqa: F401  (it marks models that adapt makes)
from .integrations import sentence_transformers as _sentence_transformers  # noqa: F401  (it marks models that adapt makes)
from .integrations import transformers as _transformers
from .integrations import transformers_experts as _transformers_experts  # noqa: F401  (it knows their experts)
from .integrations import trl as _trl  # noqa: F401  (it marks models that adapt makes)
from .ops._plan import implementation
from .svd.decompose import truncated_svd

if TYPE_CHECKING:  # imported on first use
    from . import preference, scaling_laws
    from .integrations import peft as peft
    from .serving import AdapterPool

try:
    __version__ = version("lowrank-ops")
except PackageNotFoundError:  # a checkout without installation
    __version__ = "0.0.0+checkout"

__all__ = [
    "AdapterPool",
    "Conv1d",
    "Conv2d",
    "Embedding",
    "Experts",
    "FP4Config",
    "FP4Weight",
    "Int8Weight",
    "Linear",
    "LoRA",
    "LoRAXS",
    "SVF",
    "SVFT",
    "LowRankUpdate",
    "MXFP4Config",
    "MXFP4Weight",
    "Moments",
    "NF4Config",
    "NF4Weight",
    "adapt",
    "adapter_parameters",
    "calibrate",
    "combine",
    "convert",
    "cores",
    "disabled",
    "explain",
    "functional",
    "implementation",
    "find_reads",
    "load_adapter",
    "make_shardable",
    "merge",
    "parallelize",
    "parameter_groups",
    "preference",
    "reference",
    "save_adapter",
    "scaling_laws",
    "set_strength",
    "strength",
    "train_tokens",
    "truncated_svd",
]

_aliases.install()
_transformers.follow_import()
_LAZY = {"preference", "scaling_laws", "serving", *_aliases.MOVED}


def __getattr__(name: str) -> Any:
    if name == "AdapterPool":
        from .serving import AdapterPool

        return AdapterPool
    if name == "peft":  # not in __all__, because a star import or a listing would need PEFT
        return import_module(".integrations.peft", __name__)
    if name in _LAZY:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
