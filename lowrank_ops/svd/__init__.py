"""Singular value decompositions of weights [N, K], and a store of them on disk (:mod:`.store`)."""

from .decompose import Triple, Weight, full_svd, is_packed_storage, magnitude, transposed_times, truncated_svd

__all__ = ["Triple", "Weight", "full_svd", "is_packed_storage", "magnitude", "transposed_times", "truncated_svd"]
