// Operands of the tile, packed: tokens, rows of two 16-bit numbers, and the low-rank part of a product. Included by
// files that are compiled once per instruction set.
#pragma once

#include "cpu/product/product.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Vectors of lanes in a panel of tokens: kWidest, fewer in the last panel. Panel p begins p * kPanel * units floats
// into the operand.
LOWRANK_INLINE int panel_vectors(int64_t tokens, int64_t panel) {
    return int(min(kWidest, ceil_div(tokens - panel * kPanel, kLanes)));
}

// True if products in pairs split a float32 matrix into three parts (Pairs::split): on the matrix unit that is exact
// and faster than float32.
template <class Units>
constexpr bool kSplits = Units::kPerUnit == 2 && kHasMatrixUnit;

// Packs units of kLanes rows m, m + 1, … of x, columns k … k + count, as to[unit][lane].
template <class Units>
void pack_tokens(const Rows& x, int64_t m, int64_t rows, int64_t k, int64_t count, const Dropout* dropout, float* to,
                 int64_t to_stride, bool fours = false) {
    const Scratch scratch;
    float* part = scratch.take<float>(kLanes * kTallStride<Units>);
    const int64_t units = ceil_div(count, Units::kPerUnit), padded = round_up(units, kLanes);
    for (int64_t i = 0; i < kLanes; ++i) {
        float* row = part + i * kTallStride<Units>;
        if (i >= rows)
            std::memset(row, 0, size_t(padded) * 4);
        else if constexpr (Units::kPerUnit == 2) {
            const auto* from = static_cast<const BFloat16*>(at(x, m + i, k));
            std::memset(row + count / 2, 0, size_t(padded - count / 2) * 4);
            if (dropout && dropout->on) {
                float masked[kChunk<Units>];
                load_row(x, m + i, k, count, masked, count, dropout);
                store_row(masked, count, row, kBFloat16, 0);
            } else if (fours)
                Units::order_fours(from, count / Units::kFours, reinterpret_cast<BFloat16*>(row));
            else
                std::memcpy(row, from, size_t(count) * 2);
        } else
            load_row(x, m + i, k, count, row, padded, dropout);
    }
    transpose(part, kTallStride<Units>, kLanes, padded, to, to_stride);
}

// A low-rank term of a product, sum_r U[n, r] c[m, r], is added as if K went on, kLowRank of r at a time. If float32
// is split, U = a + b + c times a' + b' + c' is a (a' + b' + c') + b (a' + b') + c a', up to 2^-25 of it.
template <class Units>
constexpr int64_t kLowRank = kSplits<Units> ? 32 : kChunkUnits;
template <class Units>
constexpr int64_t low_rank_units(int64_t R) {
    return kSplits<Units> ? round_up(6 * R, 2 * kUnitsAtOnce) / 2 : R;
}
// The parts that are multiplied: all three of a factor with 16-bit numbers; part kLeftParts[i] of U with part
// kRightParts[i] of c.
constexpr int kParts[3] = {0, 1, 2}, kLeftParts[6] = {0, 0, 0, 1, 1, 2}, kRightParts[6] = {0, 1, 2, 0, 1, 0};

// One row of at most kLowRank numbers as units, then zeros up to `padded` units.
template <class Units, bool kLeft>
LOWRANK_INLINE void low_rank_row(const float* from, int64_t R, float* to, int64_t padded) {
    if constexpr (kSplits<Units>) {
        auto* out = reinterpret_cast<BFloat16*>(to);
        for (int64_t r = 0; r < R; r += kLanes) {
            const int64_t now = min(kLanes, R - r);
            Units::split(load_n(from + r, now), now, kLeft ? kLeftParts : kRightParts, out + r, R);
        }
        for (int64_t i = 6 * R; i < 2 * padded; ++i)
            out[i] = BFloat16{};
    } else {
        std::memcpy(to, from, size_t(R) * 4);
        for (int64_t i = R; i < padded; ++i)
            to[i] = 0;
    }
}

// Packs columns r … r + count of the rows m … m + tokens of c [M, R] as panels [units][tokens].
template <class Units>
void pack_low_rank(int threads, const Rows& c, int64_t m, int64_t tokens, int64_t r, int64_t count, float* to) {
    const int64_t units = round_up(low_rank_units<Units>(count), kLanes);
    parallel_for(threads, ceil_div(tokens, kLanes), [&](int64_t task) {
        const int64_t i = task * kLanes, panel = i / kPanel, width = panel_vectors(tokens, panel) * kLanes;
        const Scratch scratch;
        float* part = scratch.take<float>(kLanes * units);
        for (int64_t j = 0; j < kLanes; ++j) {
            if (i + j < tokens) {
                const float* row = static_cast<const float*>(at(c, m + i + j, r));
                low_rank_row<Units, false>(row, count, part + j * units, units);
            } else
                std::memset(part + j * units, 0, size_t(units) * 4);
        }
        transpose(part, units, kLanes, units, to + panel * kPanel * units + i % kPanel, width);
    });
}

// Tokens per block: as many as fit, packed, into a share of the caches.
LOWRANK_INLINE int64_t tokens_at_once(int64_t units) {
    return max(kPanel, min(512, (int64_t(2) << 20) / max(1, units) / kPanel * kPanel));
}

// Packs two rows of bfloat16 as units of one t; panels are `stride` floats apart.
template <class Units>
LOWRANK_INLINE void pack_pair(const BFloat16* row, const BFloat16* next, int64_t columns, int64_t stride, float* to) {
    for (int64_t c = 0; c < columns; c += kLanes)
        Units::units_of(row + c, next + c, to + c / kPanel * stride + c % kPanel);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
