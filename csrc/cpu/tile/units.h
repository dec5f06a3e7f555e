// What the operands of a tile are made of, "units" of 32 bits: a float, or a pair of bfloat16 of neighbouring t.
// Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/tile/floats.h"
#include "cpu/tile/tile.h"
#if defined(__AVX512BF16__)
#include "cpu/tile/bf16_pairs.h"
#endif
#if defined(__AMX_BF16__)
#include "cpu/tile/amx.h"
#endif

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
using Pairs = Floats;
#endif

#if defined(__AMX_BF16__)
constexpr bool kHasMatrixUnit = true;
#else
constexpr bool kHasMatrixUnit = false;
constexpr int64_t kUnitsAtOnce = 1;

class MatrixUnit {
public:
    explicit MatrixUnit(int) {}
};

inline void tall_tiles_of_pairs(int64_t rows, int vectors, int64_t units, Left left, const float* p, float* c,
                                int64_t c_stride, bool first) {
    tall_tiles<Pairs>(rows, vectors, units, left.data, p, c, c_stride, first);
}

inline void wide_tiles_of_pairs(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                                bool first) {
    wide_tiles<Pairs>(rows, units, left, p, c, c_stride, first);
}
#endif

bool use_pairs(int dtype) {
    return kHasPairs && dtype == kBFloat16;
}

// tall_tiles of either kind of units.
template <class Units>
LOWRANK_INLINE void tall(int64_t rows, int vectors, int64_t units, const float* left, int64_t stride, const float* p,
                         float* c, int64_t c_stride, bool first) {
    if constexpr (Units::kPerUnit == 2)
        tall_tiles_of_pairs(rows, vectors, units, {left, stride * 4}, p, c, c_stride, first);
    else
        tall_tiles<Units>(rows, vectors, units, left, p, c, c_stride, first);
}

// wide_tiles of either kind of units.
template <class Units>
LOWRANK_INLINE void wide(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                         bool first) {
    if constexpr (Units::kPerUnit == 2)
        wide_tiles_of_pairs(rows, units, left, p, c, c_stride, first);
    else
        wide_tiles<Units>(rows, units, left, p, c, c_stride, first);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
