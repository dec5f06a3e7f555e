"""Frozen weights [N, K] in 4 or 8 bits, one module per format."""

from collections.abc import Mapping

from torch import Tensor

from .base import FLOAT_DTYPES, MARKS, QuantizedWeight, check_format
from .fp4 import FP4Weight
from .int8 import Int8Weight
from .moments import Moment, Moments
from .mxfp4 import MXFP4Weight
from .nf4 import NF4Weight
from .rounding import Curvature, Rounding, curvature

__all__ = [
    "FLOAT_DTYPES",
    "WEIGHTS",
    "Curvature",
    "FP4Weight",
    "Int8Weight",
    "MXFP4Weight",
    "Moment",
    "Moments",
    "NF4Weight",
    "QuantizedWeight",
    "Rounding",
    "check_format",
    "check_quantize",
    "curvature",
    "from_state_dict",
]

# Names by which layers ask for a format.
WEIGHTS: dict[str, type[QuantizedWeight]] = {
    kind.format.name: kind for kind in (NF4Weight, FP4Weight, MXFP4Weight, Int8Weight)
}


def check_quantize(quantize: str | None) -> None:
    """Raise ValueError unless this is the name of a format or None."""
    if quantize is not None and quantize not in WEIGHTS:
        raise ValueError(f"quantize must be {', '.join(map(repr, WEIGHTS))} or None, got {quantize!r}")


def from_state_dict(state_dict: Mapping[str, Tensor], base: str) -> QuantizedWeight:
    """The quantised weight, of whichever format, that a state dict holds under the name ``base``."""
    for name, kind in WEIGHTS.items():
        if base + MARKS[name] in state_dict:
            return kind._from_entries(state_dict, base)
    raise ValueError(f"the state dict has no quantised weight {base!r} in one of the formats {', '.join(WEIGHTS)}")
