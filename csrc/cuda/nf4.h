// Decodes the formats on CUDA into a dense workspace. All pointers are device pointers; no torch, no Python.
#pragma once

#include <cstdint>

namespace lowrank::cuda {

// out[f] = level[nibble(f)] * scale(f / block_size) for the flat elements f < numel; int8 has byte[f] for a level.
//
// format      the element type: 3 nf4, 5 fp4, 6 mxfp4, 7 int8
// packed      uint8 [ceil(numel / 2)], of int8 [numel], any alignment (16-byte aligned is the fast case)
// absmax      float32 [blocks] where absmax2 is null, else uint8 [blocks], blocks = ceil(numel / block_size);
//             of mxfp4 the exponents, uint8 [blocks]
// absmax2     float32 [ceil(blocks / 256)] or null; offset float32 [1], read where absmax2 is given
// block_size  a power of two, at least 32
// out         [numel] of out_dtype: 0 float32, 1 bfloat16, 2 float16
// stream      cudaStream_t; the call returns when the kernel is queued
//
// Throws std::invalid_argument for another format, block size or dtype, std::runtime_error if the launch fails.
// Numerics: scale and weight are computed in float32, the product and the sum of a scale are rounded separately, and
// the weight is rounded once to out_dtype. For finite scales the bits equal reference.dequantize.
void dequantize(int format, const uint8_t* packed, const void* absmax, const float* absmax2, const float* offset,
                int64_t numel, int64_t block_size, void* out, int out_dtype, void* stream);

} // namespace lowrank::cuda
