"""Every op of the package in plain PyTorch, for any float dtype up to float64.

These functions judge the kernels: tests compare against them in float64, and benchmarks use them as the unfused
baseline. They are written to be read next to the equation, not to be fast. In use they run only if chosen by name
(``with lowrank_ops.implementation("reference")``).

Letters: ``M`` tokens, ``P`` rows sorted by expert, ``N`` out features, ``K`` in features, ``R`` rank, ``E`` experts.
"""

from .formats import (
    ABSMAX_BLOCK,
    BLOCK_SIZES,
    NF4_CODE,
    absmax_dequantize,
    absmax_quantize,
    dequantize,
    dynamic_code,
    fp4_dequantize,
    fp4_quantize,
    int8_dequantize,
    int8_quantize,
    levels,
    mxfp4_dequantize,
    mxfp4_quantize,
    nf4_code,
    nf4_dequantize,
    nf4_quantize,
    quantize,
)
from .linear import (
    adapted_linear,
    adapted_linear_backward,
    core_bandwidth,
    core_matrix,
    core_pattern,
    core_values,
    dropout_mask,
    dropout_threshold,
    experts_linear,
    experts_linear_backward,
    project,
    project_experts,
    routed_linear,
    routed_linear_backward,
    svd_linear,
    svd_linear_backward,
)
from .preference import bradley_terry_loss, bradley_terry_loss_backward
from .rounding import (
    dequantize_matrix,
    descend,
    feed_back,
    round_nearest,
    round_weighted,
    search_scales,
    weighted_errors,
)

__all__ = [
    "ABSMAX_BLOCK", "BLOCK_SIZES", "NF4_CODE", "absmax_dequantize", "absmax_quantize", "adapted_linear",
    "adapted_linear_backward", "bradley_terry_loss", "bradley_terry_loss_backward", "core_bandwidth", "core_matrix",
    "core_pattern", "core_values", "dequantize", "dequantize_matrix", "descend", "dropout_mask", "dropout_threshold",
    "dynamic_code", "experts_linear", "experts_linear_backward", "feed_back", "fp4_dequantize", "fp4_quantize",
    "int8_dequantize", "int8_quantize", "levels", "mxfp4_dequantize", "mxfp4_quantize", "nf4_code", "nf4_dequantize",
    "nf4_quantize", "project", "project_experts", "quantize", "round_nearest", "round_weighted", "routed_linear",
    "routed_linear_backward",
    "search_scales", "svd_linear", "svd_linear_backward", "weighted_errors",
]  # fmt: skip
