// The unit of two bfloat16 of neighbouring t on ARM: BFDOT multiplies and sums them, and BFMMLA multiplies two rows by
// two lanes over two units.
#pragma once

#include "cpu/tile/pair_levels.h"
#include "cpu/tile/tile.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

LOWRANK_INLINE bfloat16x8_t as_pairs(V v) {
    return vreinterpretq_bf16_f32(v);
}

// The right operand is packed for Pairs; each pair meets two floats on the left.
struct FloatsByPairs {
    static constexpr int kLeft = 2;
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return fma(l, p, c); }
    static LOWRANK_INLINE V lanes(const float* p, int which) {
        const uint32x4_t pairs = vreinterpretq_u32_f32(load(p));
        return vreinterpretq_f32_u32(which == 0 ? vshlq_n_u32(pairs, 16) : vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
    }
};

struct Pairs {
    using WithFloats = FloatsByPairs;
    using Element = BFloat16;
    static constexpr int kPerUnit = 2;
    static constexpr int kLeft = 1;
    static LOWRANK_INLINE V lanes(const float* p, int) { return load(p); }
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return vbfdotq_f32(c, as_pairs(l), as_pairs(p)); }
    static LOWRANK_INLINE void units_of(const BFloat16* row, const BFloat16* next, float* to) {
        const uint16x4_t even = vld1_u16(&row->bits), odd = vld1_u16(&next->bits);
        store(to, vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd))));
    }

    // Columns per group of fours. Within a group the even columns come first, then the odd ones: the order in which the
    // nibbles of 16 bytes are decoded without a shuffle.
    static constexpr int64_t kFours = 32;

    static LOWRANK_INLINE void decode_four(const WordTable& table, const uint8_t* bytes, uint16x8_t* to) {
        const Nibbles n(vld1q_u8(bytes));
        table.lookup(n.high, to);
        table.lookup(n.low, to + 2);
    }

    // Decodes `groups` (an even number) times kFours columns, scales[i] for columns 64 i and on.
    static LOWRANK_INLINE void decode_fours(const float* levels, const uint8_t* bytes, const float* scales,
                                            int64_t groups, BFloat16* to) {
        const Table table = load_table(levels);
        for (int64_t i = 0; i < groups; i += 2, bytes += kFours, to += 2 * kFours) {
            const WordTable words = words_of<BFloat16>(mul(table, scales[i / 2]));
            uint16x8_t eight[8];
            decode_four(words, bytes, eight);
            decode_four(words, bytes + kFours / 2, eight + 4);
            for (int j = 0; j < 8; ++j)
                vst1q_u16(&to[8 * j].bits, eight[j]);
        }
    }

    // Packs two rows as units of one t. Each panel holds half a group; panels are `stride` floats apart.
    static LOWRANK_INLINE void pack_fours(const float* levels, const uint8_t* row, const uint8_t* next,
                                          const float* scales, const float* next_scales, int64_t groups, int64_t stride,
                                          float* to) {
        static_assert(kFours == 2 * kPanel);
        const Table table = load_table(levels);
        for (int64_t i = 0; i < groups; ++i) {
            uint16x8_t even[4], odd[4];
            decode_four(words_of<BFloat16>(mul(table, scales[i / 2])), row + i * kFours / 2, even);
            decode_four(words_of<BFloat16>(mul(table, next_scales[i / 2])), next + i * kFours / 2, odd);
            for (int j = 0; j < 4; ++j) {
                float* panel = to + (2 * i + j / 2) * stride + j % 2 * 8;
                store(panel, vreinterpretq_f32_u16(vzip1q_u16(even[j], odd[j])));
                store(panel + 4, vreinterpretq_f32_u16(vzip2q_u16(even[j], odd[j])));
            }
        }
    }

    // Restores the order of columns that pack_fours packed.
    static LOWRANK_INLINE void unpack_fours(float* row, int64_t groups) {
        for (int64_t i = 0; i < groups; ++i, row += kFours) {
            V v[8];
            for (int j = 0; j < 8; ++j)
                v[j] = load(row + 4 * j);
            for (int j = 0; j < 4; ++j) {
                store(row + 8 * j, vzip1q_f32(v[j], v[j + 4]));
                store(row + 8 * j + 4, vzip2q_f32(v[j], v[j + 4]));
            }
        }
    }

    static LOWRANK_INLINE void order_fours(const BFloat16* from, int64_t groups, BFloat16* to) {
        for (int64_t i = 0; i < groups; ++i, from += kFours, to += kFours)
            for (int j = 0; j < 2; ++j) {
                const uint16x8x2_t pairs = vld2q_u16(&from[16 * j].bits);
                vst1q_u16(&to[8 * j].bits, pairs.val[0]);
                vst1q_u16(&to[16 + 8 * j].bits, pairs.val[1]);
            }
    }
    static LOWRANK_INLINE void order_fours(const float* from, int64_t groups, float* to) {
        for (int64_t i = 0; i < groups; ++i, from += kFours, to += kFours)
            for (int j = 0; j < 4; ++j) {
                const float32x4x2_t pairs = vld2q_f32(from + 8 * j);
                store(to + 4 * j, pairs.val[0]);
                store(to + 16 + 4 * j, pairs.val[1]);
            }
    }

    struct Levels {
        WordTable of[2];
        float unstretch;

        LOWRANK_INLINE Levels(int type, const float* levels)
            : of{words_of<BFloat16>(pair_levels(type, levels, 0)), words_of<BFloat16>(pair_levels(type, levels, 1))},
              unstretch(unstretch_of(type)) {}
        // The weights of vector j of the four that kFours columns are decoded to.
        LOWRANK_INLINE V at(I words, int j) const {
            const Nibbles n(vreinterpretq_u8_s32(words));
            uint16x8_t two[2];
            of[j / 2].lookup(j < 2 ? n.high : n.low, two);
            return vreinterpretq_f32_u16(two[j % 2]);
        }
    };

    // The bytes of kFours columns, or of the first half of them.
    template <bool kHalf>
    static LOWRANK_INLINE I load_words(const uint8_t* bytes) {
        return vreinterpretq_s32_u8(kHalf ? vcombine_u8(vld1_u8(bytes), vdup_n_u8(0)) : vld1q_u8(bytes));
    }
};

// ---- BFMMLA ---------------------------------------------------------------------------------------------------------

constexpr int64_t kUnitsAtOnce = 2;

// C of kRows rows over kVectors vectors of lanes. A sum holds two rows of two lanes.
template <int kRows, int kVectors>
LOWRANK_INLINE void square_tile(int64_t units, Left left, const float* p, int64_t p_stride, float* c, int64_t c_stride,
                                bool first) {
    constexpr int kTwos = (kRows + 1) / 2;
    V sum[kTwos][kVectors][2];
#pragma GCC unroll 12
    for (int i = 0; i < kTwos; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j)
            sum[i][j][0] = sum[i][j][1] = zero();
    for (int64_t t = 0; t < units; t += kUnitsAtOnce) {
        V rows[kTwos];
#pragma GCC unroll 12
        for (int i = 0; i < kTwos; ++i) {
            const char* row = left.row(2 * i) + t * 4;
            const char* next = 2 * i + 1 < kRows ? left.row(2 * i + 1) + t * 4 : row; // an odd last row stands twice
            rows[i] = vcombine_f32(vld1_f32(reinterpret_cast<const float*>(row)),
                                   vld1_f32(reinterpret_cast<const float*>(next)));
        }
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            const V unit = load(p + t * p_stride + j * kLanes), next = load(p + (t + 1) * p_stride + j * kLanes);
            const bfloat16x8_t lanes[2] = {as_pairs(vzip1q_f32(unit, next)), as_pairs(vzip2q_f32(unit, next))};
#pragma GCC unroll 12
            for (int i = 0; i < kTwos; ++i)
                for (int half = 0; half < 2; ++half)
                    sum[i][j][half] = vbfmmlaq_f32(sum[i][j][half], as_pairs(rows[i]), lanes[half]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kTwos; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            exchange<2>(sum[i][j][0], sum[i][j][1]);
            for (int r = 0; r < 2 && 2 * i + r < kRows; ++r) {
                float* to = c + (2 * i + r) * c_stride + j * kLanes;
                store(to, first ? sum[i][j][r] : add(load(to), sum[i][j][r]));
            }
        }
}

template <int kVectors>
void tall_square_tiles(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride, bool first) {
    constexpr int kRows = rows_of_tile(kVectors);
    for (int64_t i = 0; i < rows; i += kRows)
        square_tile<kRows, kVectors>(units, {left.row(i), left.stride}, p, kVectors * kLanes, c + i * c_stride,
                                     c_stride, first);
}

// C of any number of rows (padded to a whole number of tiles) over `vectors` vectors of lanes.
inline void tall_tiles_of_pairs(int64_t rows, int vectors, int64_t units, Left left, const float* p, float* c,
                                int64_t c_stride, bool first) {
    constexpr decltype(&tall_square_tiles<1>) kTiles[] = {tall_square_tiles<1>, tall_square_tiles<2>,
                                                          tall_square_tiles<3>, tall_square_tiles<kWidest>};
    kTiles[vectors - 1](rows, units, left, p, c, c_stride, first);
}

// C of exactly `rows` rows over a full panel of lanes.
template <int kRows>
void wide_square_tiles(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride, bool first) {
    for (; rows >= kRows; rows -= kRows, left.data = left.row(kRows), c += kRows * c_stride)
        square_tile<kRows, kWidest>(units, left, p, kPanel, c, c_stride, first);
    if constexpr (kRows > 1)
        if (rows > 0)
            wide_square_tiles<kRows - 1>(rows, units, left, p, c, c_stride, first);
}

inline void wide_tiles_of_pairs(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                                bool first) {
    wide_square_tiles<rows_of_tile(kWidest)>(rows, units, left, p, c, c_stride, first);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
