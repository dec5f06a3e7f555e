"""diffusers: models whose layers are ours refuse to fuse their projections, which reads weights and drops adapters."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from ..adapters import model as _model
from ..adapters.layer import AdaptedLayer

# Methods of diffusers' models and attention modules that join the weights of projections into a new nn.Linear.
_FUSING = ("fuse_qkv_projections", "fuse_projections")


def _refuse(name: str, *arguments: Any, **options: Any) -> NoReturn:
    raise ValueError(
        f"layer {name!r} is a layer of lowrank_ops, and fusing projections would read its weight and drop its adapter; fuse "
        "before lowrank_ops.adapt, and name the fused layers (to_qkv, to_kv) in targets, or lowrank_ops.merge first"
    )


def keep_apart(model: nn.Module) -> None:
    """Let the methods that fuse projections refuse where layers are ours, and work again where they are not."""
    for name, module in model.named_modules():
        for method in _FUSING:
            if not callable(getattr(type(module), method, None)):
                continue
            own = next((n for n, m in module.named_modules() if isinstance(m, AdaptedLayer)), None)
            vars(module).pop(method, None)
            if own is not None:
                vars(module)[method] = functools.partial(_refuse, f"{name}.{own}" if name else own)


_model.AFTER_REPLACING.append(keep_apart)
