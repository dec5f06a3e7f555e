"""FP4Weight: bitsandbytes' levels of a sign, two bits of exponent and one of mantissa."""

import torch

from ..kernels.operands import FP4
from .absmax import AbsmaxWeight


class FP4Weight(AbsmaxWeight):
    """w[n, k] = level[nibble(f)] · scale[f // block_size], f = n·K + k, with 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their
    negatives as levels.

    Its bytes, attributes and entries are those of :class:`AbsmaxWeight`. NF4's levels suit weights better; this format is
    there for checkpoints that have it.

    Source: bitsandbytes, ``quant_type="fp4"``.
    """

    format = FP4


torch.serialization.add_safe_globals([FP4Weight])
