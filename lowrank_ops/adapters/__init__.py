"""Layers with adapters: kinds, how they start, the layer, whole models, files; here are the kinds (:mod:`.kinds`)."""

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
