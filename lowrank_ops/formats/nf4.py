"""NF4Weight: QLoRA's levels, the quantiles of a normal distribution."""

import torch

from ..kernels.operands import NF4
from .absmax import AbsmaxWeight


class NF4Weight(AbsmaxWeight):
    """w[n, k] = code[nibble(f)] · scale[f // block_size], f = n·K + k: 4.127 bits a weight with double quantisation.

    Bytes, attributes and entries are as in :class:`AbsmaxWeight`.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    format = NF4


# The second path is the one in files pickled before there were other formats.
torch.serialization.add_safe_globals([NF4Weight, (NF4Weight, "lowrank_ops.nf4.NF4Weight")])
