// Number formats of the CUDA kernels: levels, block scales, conversions from float32.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "formats/format.h"

namespace lowrank::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// In global memory, not __constant__, because the lanes of a warp read different entries.
__device__ const float kLevels[kFormats][16] = LOWRANK_LEVELS;
__device__ const float kDynamicLevels[256] = {LOWRANK_DYNAMIC_CODE};

struct Scales {
    const void* absmax;
    const float* absmax2; // null: absmax is float32
    const float* offset;
    bool exponents; // absmax holds uint8 exponents
};

__device__ __forceinline__ float block_scale(const Scales& scales, int64_t block) {
    if (scales.exponents)
        return __uint_as_float(exponent_bits(__ldg(static_cast<const uint8_t*>(scales.absmax) + block)));
    if (scales.absmax2 == nullptr)
        return __ldg(static_cast<const float*>(scales.absmax) + block);
    const float level = kDynamicLevels[__ldg(static_cast<const uint8_t*>(scales.absmax) + block)];
    // The intrinsics keep the compiler from contracting the two roundings into one.
    return __fadd_rn(__fmul_rn(level, __ldg(scales.absmax2 + block / kAbsmaxBlock)), __ldg(scales.offset));
}

__device__ __forceinline__ void convert(float w, float* out) {
    *out = w;
}
__device__ __forceinline__ void convert(float w, __nv_bfloat16* out) {
    *out = __float2bfloat16_rn(w);
}
__device__ __forceinline__ void convert(float w, __half* out) {
    *out = __float2half_rn(w);
}

} // namespace
} // namespace lowrank::cuda
