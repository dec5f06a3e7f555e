"""Layers with adapters: kinds, first states, the layer, whole models, files. Exports the kinds (:mod:`.kinds`)."""

from .kinds import (
    BASE_CHANGING,
    FACTORS,
    FORMS,
    INITS,
    PATTERNS,
    SVF,
    SVFT,
    Adapter,
    LoRA,
    LoRAXS,
    Spectral,
)

__all__ = [
    "BASE_CHANGING",
    "FACTORS",
    "FORMS",
    "INITS",
    "PATTERNS",
    "SVF",
    "SVFT",
    "Adapter",
    "LoRA",
    "LoRAXS",
    "Spectral",
]
