"""The module path of :class:`lowrank_ops.NF4Weight` in files that were pickled before there were other formats."""

from .formats.nf4 import NF4Weight as NF4Weight
