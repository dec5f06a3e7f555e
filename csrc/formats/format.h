// Element types and the formats of 4 and 8 bits, shared by the CPU and the CUDA side.
//
// A packed matrix is w[n, k] = level[nibble(f)] * scale(f / block_size), f = n * K + k: blocks run over the row-major
// flattened matrix. Byte f / 2 holds the even element in its high nibble and the odd one in its low nibble. The format
// defines the levels and whether a scale is an absmax or a power of two.
//
// A matrix in int8 has a signed byte for an element: w[n, k] = byte[f] * scale(f / block_size). int8.h says how they
// are made.
//
// Functions are static, because files compiled for different machines must not share them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOWRANK_HD __host__ __device__
#else
#define LOWRANK_HD
#endif

#include "formats/absmax.h"
#include "formats/fp4.h"
#include "formats/int8.h"
#include "formats/mxfp4.h"
#include "formats/nf4.h"

namespace lowrank {

// kernels/operands.py and an arena's table use the same numbers.
enum ElementType : int {
    kFloat32 = 0,
    kBFloat16 = 1,
    kFloat16 = 2,
    kNf4 = 3,
    kFloat64 = 4,
    kFp4 = 5,
    kMxfp4 = 6,
    kInt8 = 7,
};

LOWRANK_HD static constexpr bool is_packed(int64_t type) {
    return type == kNf4 || type == kFp4 || type == kMxfp4;
}
// Whether an element is a code with a scale, so that no float of memory is a weight.
LOWRANK_HD static constexpr bool is_quantized(int64_t type) {
    return is_packed(type) || type == kInt8;
}
LOWRANK_HD static constexpr bool has_exponents(int64_t type) {
    return type == kMxfp4;
}

// The levels of a packed type are at [format_index(type)].
constexpr int kFormats = 3;
#define LOWRANK_LEVELS                                                                                                 \
    {                                                                                                                  \
        {LOWRANK_NF4_LEVELS}, {LOWRANK_FP4_LEVELS}, {                                                                  \
            LOWRANK_MXFP4_LEVELS                                                                                       \
        }                                                                                                              \
    }
LOWRANK_HD static constexpr int format_index(int64_t type) {
    return type == kMxfp4 ? 2 : type == kFp4 ? 1 : 0;
}

// The nibble of flat element f.
LOWRANK_HD static inline int nibble_at(const uint8_t* packed, int64_t f) {
    return (packed[f >> 1] >> ((f & 1) ? 0 : 4)) & 15;
}

} // namespace lowrank
