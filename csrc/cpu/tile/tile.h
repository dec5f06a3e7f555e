// The register-blocked tile C[i][lane] += sum_t L[i][t] P[t][lane] of all products, on the vector unit. Its operands
// consist of units: see units.h. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/vector/vector.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Rows and vectors of lanes of a tile: accumulators, one row of P and one broadcast fill the registers.
constexpr int kWidest = kRegisters == 32 ? 4 : 2;
constexpr int kPanel = kWidest * kLanes;
constexpr int rows_of_tile(int vectors) {
    return (kRegisters == 32 ? 24 : 12) / vectors;
}

// Units whose products are summed in registers before the sum is added to C.
constexpr int kChunkUnits = 512;
template <class Units>
constexpr int kChunk = kChunkUnits * Units::kPerUnit;
// Floats added between rows of scratch, so that rows do not fall on the same few lines of the first-level cache.
constexpr int kSkew = 16;

// The left operand: rows of units, `stride` bytes apart.
struct Left {
    const void* data;
    int64_t stride;
    LOWRANK_INLINE const char* row(int64_t i) const { return static_cast<const char*>(data) + i * stride; }
};

template <class Units, int kRows, int kVectors>
LOWRANK_INLINE void tile(int64_t units, Left left, const float* p, int64_t p_stride, float* c, int64_t c_stride,
                         bool first) {
    V sum[kRows][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j)
            sum[i][j] = zero();
    for (int64_t t = 0; t < units; ++t)
#pragma GCC unroll 2
        for (int which = 0; which < Units::kLeft; ++which) {
            V lanes[kVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j)
                lanes[j] = Units::lanes(p + t * p_stride + j * kLanes, which);
#pragma GCC unroll 32
            for (int i = 0; i < kRows; ++i) {
                float unit;
                std::memcpy(&unit, left.row(i) + (t * Units::kLeft + which) * 4, 4);
                const V l = set1(unit);
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j)
                    sum[i][j] = Units::multiply_add(l, lanes[j], sum[i][j]);
            }
        }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            float* to = c + i * c_stride + j * kLanes;
            store(to, first ? sum[i][j] : add(load(to), sum[i][j]));
        }
}

// Floats between rows of the left operand of tall tiles. It is a constant because there are no registers for 24
// addresses.
template <class Units>
constexpr int64_t kTallStride = kChunkUnits * Units::kLeft + kSkew;

template <class Units, int kVectors>
void tall_tile(int64_t units, const void* left, const float* p, float* c, int64_t c_stride, bool first) {
    tile<Units, rows_of_tile(kVectors), kVectors>(units, {left, kTallStride<Units> * 4}, p, kVectors * kLanes, c,
                                                  c_stride, first);
}

// C of any number of rows (padded to a whole number of tiles) over `vectors` vectors of lanes.
template <class Units>
void tall_tiles(int64_t rows, int vectors, int64_t units, const void* left, const float* p, float* c, int64_t c_stride,
                bool first) {
    constexpr int k3 = kWidest < 3 ? kWidest : 3; // no wider than the registers allow
    constexpr decltype(&tall_tile<Units, 1>) kTiles[] = {tall_tile<Units, 1>, tall_tile<Units, 2>, tall_tile<Units, k3>,
                                                         tall_tile<Units, kWidest>};
    const int step = rows_of_tile(vectors);
    for (int64_t i = 0; i < rows; i += step)
        kTiles[vectors - 1](units, static_cast<const char*>(left) + i * kTallStride<Units> * 4, p, c + i * c_stride,
                            c_stride, first);
}

// One tile over a full panel of lanes; its left operand may have any stride.
template <class Units, int kRows>
void wide_tile(int64_t units, Left left, const float* p, float* c, int64_t c_stride, bool first) {
    tile<Units, kRows, kWidest>(units, left, p, kPanel, c, c_stride, first);
}

// C of exactly `rows` rows over a full panel of lanes.
template <class Units, int kRows = rows_of_tile(kWidest)>
void wide_tiles(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride, bool first) {
    for (; rows >= kRows; rows -= kRows, left.data = left.row(kRows), c += kRows * c_stride)
        wide_tile<Units, kRows>(units, left, p, c, c_stride, first);
    if constexpr (kRows > 1)
        if (rows > 0)
            wide_tiles<Units, kRows - 1>(rows, units, left, p, c, c_stride, first);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
