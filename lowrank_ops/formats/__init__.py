"""Frozen 4-bit weights [N, K], one module per format."""

from .nf4 import FLOAT_DTYPES, NF4Weight

__all__ = ["FLOAT_DTYPES", "NF4Weight"]
