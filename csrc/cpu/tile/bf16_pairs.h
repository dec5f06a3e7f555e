// The unit of two bfloat16 of neighbouring t, which AVX-512 BF16 multiplies and sums in one instruction, and the unit
// that multiplies the same right operand by float32.
#pragma once

#include "cpu/tile/pair_levels.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// The right operand is packed for Pairs; each pair meets two floats on the left.
struct FloatsByPairs {
    static constexpr int kLeft = 2;
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return fma(l, p, c); }
    static LOWRANK_INLINE V lanes(const float* p, int which) {
        const __m512i pairs = _mm512_loadu_si512(p);
        return _mm512_castsi512_ps(which == 0 ? _mm512_slli_epi32(pairs, 16)
                                              : _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
    }
};

struct Pairs {
    using WithFloats = FloatsByPairs;
    using Element = BFloat16;
    static constexpr int kPerUnit = 2;
    static constexpr int kLeft = 1;
    static LOWRANK_INLINE V lanes(const float* p, int) { return load(p); }
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return _mm512_dpbf16_ps(c, (__m512bh)l, (__m512bh)p); }
    static LOWRANK_INLINE void units_of(const BFloat16* row, const BFloat16* next, float* to) {
        const __m512i even = _mm512_castps_si512(load(row)),
                      odd = _mm512_castps_si512(load(next)); // bits in the upper half
        _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
    }

    // Columns per group of fours. Within a group their order is 0, 4, 8, …, 1, 5, 9, …, 2, …, 3, …, in which the
    // nibbles of 16-bit words are decoded without a shuffle. A sum over columns stays the same if both operands have
    // the order.
    static constexpr int64_t kFours = 128;

    // Decodes kFours columns, with a scale for each half, to four vectors.
    static LOWRANK_INLINE void decode_four(V levels, const uint8_t* bytes, const float* scales, __m512i* to) {
        // Entries 0 to 15 are for the block in the lower half of the bytes, 16 to 31 for the block in the upper half.
        constexpr int kAndThenOr = 0xEA;
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(mul(levels, set1(scales[1])), mul(levels, set1(scales[0])));
        const __m512i words = _mm512_loadu_si512(bytes), nibble = _mm512_set1_epi8(15);
        const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
        const __m512i entries[2] = {
            _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, second, kAndThenOr),
            _mm512_ternarylogic_epi32(words, nibble, second, kAndThenOr),
        };
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512i entry = entries[j % 2];
            to[j] = _mm512_permutexvar_epi16(j < 2 ? entry : _mm512_srli_epi16(entry, 8), table);
        }
    }

    // Decodes `groups` times kFours columns, scales[i] for columns 64 i and on.
    static LOWRANK_INLINE void decode_fours(const float* levels, const uint8_t* bytes, const float* scales,
                                            int64_t groups, BFloat16* to) {
        const V table = load(levels);
        for (int64_t i = 0; i < groups; ++i, bytes += kFours / 2, scales += 2, to += kFours) {
            __m512i four[4];
            decode_four(table, bytes, scales, four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                _mm512_storeu_si512(to + 32 * j, four[j]);
        }
    }

    // Packs two rows as units of one t. Each panel holds half a group; panels are `stride` floats apart. The columns
    // are in the order of fours, and within each of the four runs the numbers with bit 2 clear come first.
    static LOWRANK_INLINE void pack_fours(const float* levels, const uint8_t* row, const uint8_t* next,
                                          const float* scales, const float* next_scales, int64_t groups, int64_t stride,
                                          float* to) {
        const V table = load(levels);
        for (int64_t i = 0; i < groups; ++i) {
            __m512i even[4], odd[4];
            decode_four(table, row + i * kFours / 2, scales + 2 * i, even);
            decode_four(table, next + i * kFours / 2, next_scales + 2 * i, odd);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                float* panel = to + (2 * i + j / 2) * stride + j % 2 * 32;
                _mm512_storeu_si512(panel, _mm512_unpacklo_epi16(even[j], odd[j]));
                _mm512_storeu_si512(panel + 16, _mm512_unpackhi_epi16(even[j], odd[j]));
            }
        }
    }

    // Restores the order of columns that pack_fours packed.
    static LOWRANK_INLINE void unpack_fours(float* row, int64_t groups) {
        for (int64_t i = 0; i < groups; ++i, row += kFours) {
            __m512 v[2][4];
            for (int half = 0; half < 2; ++half) {
                // Lane 4 l + t of vector j holds column 32 l + 16 half + 4 t + j.
                const __m512 a = load(row + 16 * half), b = load(row + 32 + 16 * half), c = load(row + 64 + 16 * half),
                             d = load(row + 96 + 16 * half);
                const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b);
                const __m512 cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
                const auto pairs = [](__m512 x) { return _mm512_castps_pd(x); };
                // Quarter l of vector t holds columns 32 l + 16 half + 4 t + (0 … 3).
                const __m512 t0 = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(ab0), pairs(cd0)));
                const __m512 t1 = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(ab0), pairs(cd0)));
                const __m512 t2 = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(ab1), pairs(cd1)));
                const __m512 t3 = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(ab1), pairs(cd1)));
                const __m512 low01 = _mm512_shuffle_f32x4(t0, t1, 0x44), high01 = _mm512_shuffle_f32x4(t0, t1, 0xee);
                const __m512 low23 = _mm512_shuffle_f32x4(t2, t3, 0x44), high23 = _mm512_shuffle_f32x4(t2, t3, 0xee);
                v[half][0] = _mm512_shuffle_f32x4(low01, low23, 0x88);
                v[half][1] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
                v[half][2] = _mm512_shuffle_f32x4(high01, high23, 0x88);
                v[half][3] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
            }
            for (int l = 0; l < 4; ++l)
                for (int half = 0; half < 2; ++half)
                    store(row + 32 * l + 16 * half, v[half][l]);
        }
    }

    struct Levels {
        __m512i of[2];
        float unstretch;

        LOWRANK_INLINE Levels(int type, const float* levels) : unstretch(unstretch_of(type)) {
            for (int i = 0; i < 2; ++i) {
                const V row = pair_levels(type, levels, i).v;
                of[i] = (__m512i)_mm512_cvtne2ps_pbh(row, row);
            }
        }
        // The weights of vector j of the four that kFours columns are decoded to.
        LOWRANK_INLINE V at(__m512i words, int j) const {
            constexpr unsigned kShift[4] = {4, 0, 12, 8};
            return _mm512_castsi512_ps(
                _mm512_permutexvar_epi16(kShift[j] ? _mm512_srli_epi16(words, kShift[j]) : words, of[j % 2]));
        }
    };

    // The bytes of kFours columns, or of the first half of them.
    template <bool kHalf>
    static LOWRANK_INLINE __m512i load_words(const uint8_t* bytes) {
        return kHalf ? _mm512_maskz_loadu_epi64(0x0f, bytes) : _mm512_loadu_si512(bytes);
    }

    // Splits v = a + b + c into bfloat16: each part is the remainder, rounded once; the parts after an infinity are 0.
    // Part which[i] is stored at to + i * stride.
    template <int kCount>
    static LOWRANK_INLINE void split(V v, int64_t count, const int (&which)[kCount], BFloat16* to, int64_t stride) {
        __m256i parts[3];
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part) {
            parts[part] = (__m256i)_mm512_cvtneps_pbh(v);
            const V taken = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts[part]), 16));
            constexpr int kInfinity = 0x18;
            v = _mm512_maskz_sub_ps(__mmask16(~_mm512_fpclass_ps_mask(taken, kInfinity)), v, taken);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kCount; ++i)
            _mm256_mask_storeu_epi16(to + i * stride, __mmask16((1 << count) - 1), parts[which[i]]);
    }

    // Brings numbers that are not packed into the order of fours.
    static LOWRANK_INLINE void order_fours(const BFloat16* from, int64_t groups, BFloat16* to) {
        alignas(64) uint16_t even[32];
        for (int i = 0; i < 32; ++i)
            even[i] = uint16_t(2 * i);
        const __m512i evens = _mm512_load_si512(even), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
        for (int64_t i = 0; i < groups; ++i, from += kFours, to += kFours) {
            const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32),
                          c = _mm512_loadu_si512(from + 64), d = _mm512_loadu_si512(from + 96);
            const __m512i even0 = _mm512_permutex2var_epi16(a, evens, b), odd0 = _mm512_permutex2var_epi16(a, odds, b);
            const __m512i even1 = _mm512_permutex2var_epi16(c, evens, d), odd1 = _mm512_permutex2var_epi16(c, odds, d);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even0, evens, even1));
            _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(odd0, evens, odd1));
            _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(even0, odds, even1));
            _mm512_storeu_si512(to + 96, _mm512_permutex2var_epi16(odd0, odds, odd1));
        }
    }
    static LOWRANK_INLINE void order_fours(const float* from, int64_t groups, float* to) {
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        for (int64_t i = 0; i < groups; ++i, from += kFours, to += kFours) {
            V even[4], odd[4];
            for (int j = 0; j < 4; ++j) {
                const V a = load(from + 32 * j), b = load(from + 32 * j + 16);
                even[j] = _mm512_permutex2var_ps(a, evens, b), odd[j] = _mm512_permutex2var_ps(a, odds, b);
            }
            for (int j = 0; j < 2; ++j) {
                store(to + 16 * j, _mm512_permutex2var_ps(even[2 * j], evens, even[2 * j + 1]));
                store(to + 32 + 16 * j, _mm512_permutex2var_ps(odd[2 * j], evens, odd[2 * j + 1]));
                store(to + 64 + 16 * j, _mm512_permutex2var_ps(even[2 * j], odds, even[2 * j + 1]));
                store(to + 96 + 16 * j, _mm512_permutex2var_ps(odd[2 * j], odds, odd[2 * j + 1]));
            }
        }
    }
};

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
