"""FP4Weight: bitsandbytes' levels with a sign, two bits of exponent and one of mantissa."""

import torch

from ..kernels.operands import FP4
from .absmax import AbsmaxWeight


class FP4Weight(AbsmaxWeight):
    """w[n, k] = level[nibble(f)] · scale[f // block_size], f = n·K + k, with 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their
    negatives as levels.

    Bytes, attributes and entries are as in :class:`AbsmaxWeight`. NF4's levels suit weights better; this format exists
    to read checkpoints that use it.

    Source: bitsandbytes, ``quant_type="fp4"``.
    """

    format = FP4


torch.serialization.add_safe_globals([FP4Weight])
