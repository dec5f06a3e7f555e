// Nibbles of 32 scaled weights at a time with the byte shuffles of AVX2, also on processors with AVX-512.
//
// n = round(32768 v) as a 16-bit integer keeps the order of the scaled weights v, and each of 32 cells of n holds at
// most one threshold. Where n is not the n of that threshold, comparing the two integers compares v with it.
#pragma once

#include "cpu/vector/basics.h"

#include <immintrin.h>

namespace lowrank::cpu::LOWRANK_ISA {

LOWRANK_INLINE __m256 load8(const float* p) {
    return _mm256_loadu_ps(p);
}
LOWRANK_INLINE __m256 load8(const BFloat16* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
LOWRANK_INLINE __m256 load8(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Tables by cell, those from 0 on first: the bytes of n, and the number of thresholds below the cell.
struct NibbleTables {
    int8_t low[2][16], high[2][16], below[2][16], nibbles[16];
    bool has_zero = false;

    // `thresholds` ascend; `nibbles` has the nibble of each rank from 0 to 15.
    NibbleTables(const float (&thresholds)[15], const int (&nibbles)[16]) {
        for (int cell = -16; cell < 16; ++cell) {
            int rank = 0, n = cell < 0 ? INT16_MAX : INT16_MIN; // an n that no number of the cell has
            bool empty = true;
            for (float t : thresholds) {
                if (t == 0) { // n tells numbers above 0 from those below
                    has_zero = true, rank += cell >= 0;
                    continue;
                }
                const int at = _mm_cvtss_si32(_mm_set_ss(32768 * t));
                rank += at >> 11 < cell;
                if (at >> 11 == cell)
                    n = at, empty = false;
            }
            const int i = cell & 15, half = cell < 0;
            low[half][i] = int8_t(n), high[half][i] = int8_t(n >> 8);
            below[half][i] = int8_t(empty && cell >= 0 ? rank - 1 : rank); // such a cell's n is below all numbers
        }
        for (int rank = 0; rank < 16; ++rank)
            this->nibbles[rank] = int8_t(nibbles[rank]);
    }
};

// The tables in registers: a store of nibbles could change what is in memory.
class NibbleFinder {
public:
    LOWRANK_INLINE explicit NibbleFinder(const NibbleTables& tables)
        : low_{table(tables.low[0]), table(tables.low[1])}, high_{table(tables.high[0]), table(tables.high[1])},
          below_{table(tables.below[0]), table(tables.below[1])}, nibbles_(table(tables.nibbles)),
          has_zero_(tables.has_zero) {}

    // Whether numbers can be scaled by 32768 / absmax without overflow.
    LOWRANK_INLINE static bool takes(float absmax) { return absmax >= 1e-30f && absmax <= 3e38f; }

    // Writes the nibbles of w[0 ... 31] / absmax, or returns false where one is too near to a threshold.
    template <class T>
    LOWRANK_INLINE bool store(const T* w, float reciprocal, uint8_t* packed) const {
        const __m256 scale = _mm256_set1_ps(32768 * reciprocal);
        __m256i whole[4];
        for (int j = 0; j < 4; ++j)
            whole[j] = _mm256_cvtps_epi32(_mm256_mul_ps(load8(w + 8 * j), scale));
        const __m256i n0 = _mm256_packs_epi32(whole[0], whole[1]), n1 = _mm256_packs_epi32(whole[2], whole[3]);
        // A shuffle gives 0 where the index is negative, so one of two tables answers.
        const __m256i cells = _mm256_packs_epi16(_mm256_srai_epi16(n0, 11), _mm256_srai_epi16(n1, 11));
        const __m256i others = _mm256_xor_si256(cells, _mm256_set1_epi8(-128));
        const __m256i low = find(low_, cells, others), high = find(high_, cells, others);
        const __m256i t0 = _mm256_unpacklo_epi8(low, high), t1 = _mm256_unpackhi_epi8(low, high);
        __m256i near = _mm256_or_si256(_mm256_cmpeq_epi16(n0, t0), _mm256_cmpeq_epi16(n1, t1));
        if (has_zero_) {
            const __m256i zero = _mm256_setzero_si256();
            near = _mm256_or_si256(near, _mm256_or_si256(_mm256_cmpeq_epi16(n0, zero), _mm256_cmpeq_epi16(n1, zero)));
        }
        if (!_mm256_testz_si256(near, near))
            return false;
        const __m256i above = _mm256_packs_epi16(_mm256_cmpgt_epi16(n0, t0), _mm256_cmpgt_epi16(n1, t1));
        const __m256i ranks = _mm256_sub_epi8(find(below_, cells, others), above);
        const __m256i nibbles = _mm256_shuffle_epi8(nibbles_, ranks);
        const __m256i bytes = _mm256_permutevar8x32_epi32(nibbles, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed),
                         _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
        return true;
    }

private:
    LOWRANK_INLINE static __m256i table(const int8_t* entries) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    LOWRANK_INLINE static __m256i find(const __m256i (&entries)[2], __m256i cells, __m256i others) {
        return _mm256_or_si256(_mm256_shuffle_epi8(entries[0], cells), _mm256_shuffle_epi8(entries[1], others));
    }

    __m256i low_[2], high_[2], below_[2], nibbles_;
    bool has_zero_;
};

#if defined(__AVX512BW__)
// The same for 64 weights.
class WideNibbleFinder {
public:
    LOWRANK_INLINE explicit WideNibbleFinder(const NibbleTables& tables)
        : low_{table(tables.low[0]), table(tables.low[1])}, high_{table(tables.high[0]), table(tables.high[1])},
          below_{table(tables.below[0]), table(tables.below[1])}, nibbles_(table(tables.nibbles)),
          has_zero_(tables.has_zero) {}

    template <class T>
    LOWRANK_INLINE bool store(const T* w, float reciprocal, uint8_t* packed) const {
        const __m512 scale = _mm512_set1_ps(32768 * reciprocal);
        __m512i whole[4];
        for (int j = 0; j < 4; ++j)
            whole[j] = _mm512_cvtps_epi32(_mm512_mul_ps(load16(w + 16 * j), scale));
        const __m512i n0 = _mm512_packs_epi32(whole[0], whole[1]), n1 = _mm512_packs_epi32(whole[2], whole[3]);
        const __m512i cells = _mm512_packs_epi16(_mm512_srai_epi16(n0, 11), _mm512_srai_epi16(n1, 11));
        const __m512i others = _mm512_xor_si512(cells, _mm512_set1_epi8(-128));
        const __m512i low = find(low_, cells, others), high = find(high_, cells, others);
        const __m512i t0 = _mm512_unpacklo_epi8(low, high), t1 = _mm512_unpackhi_epi8(low, high);
        __mmask32 near = _mm512_cmpeq_epi16_mask(n0, t0) | _mm512_cmpeq_epi16_mask(n1, t1);
        if (has_zero_)
            near |= _mm512_testn_epi16_mask(n0, n0) | _mm512_testn_epi16_mask(n1, n1);
        if (near)
            return false;
        const __m512i above = _mm512_packs_epi16(_mm512_movm_epi16(_mm512_cmpgt_epi16_mask(n0, t0)),
                                                 _mm512_movm_epi16(_mm512_cmpgt_epi16_mask(n1, t1)));
        const __m512i ranks = _mm512_sub_epi8(find(below_, cells, others), above);
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(nibbles_, ranks));
        const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi16_epi8(pairs));
        return true;
    }

private:
    LOWRANK_INLINE static __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
    LOWRANK_INLINE static __m512 load16(const BFloat16* p) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    }
    LOWRANK_INLINE static __m512 load16(const Float16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    LOWRANK_INLINE static __m512i table(const int8_t* entries) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
    }
    LOWRANK_INLINE static __m512i find(const __m512i (&entries)[2], __m512i cells, __m512i others) {
        return _mm512_or_si512(_mm512_shuffle_epi8(entries[0], cells), _mm512_shuffle_epi8(entries[1], others));
    }

    __m512i low_[2], high_[2], below_[2], nibbles_;
    bool has_zero_;
};
#endif

// The bits of the largest magnitude of w[0 ... count); count is a multiple of 32.
LOWRANK_INLINE int32_t largest_bits(const BFloat16* w, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 16)
        most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i)),
                                                       _mm256_set1_epi16(0x7fff)));
    const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
    return int32_t(0xffff & ~_mm_cvtsi128_si32(least)) << 16;
}
template <class T>
LOWRANK_INLINE int32_t largest_bits(const T* w, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 8)
        most =
            _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load8(w + i)), _mm256_set1_epi32(0x7fffffff)));
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtsi128_si32(half);
}

} // namespace lowrank::cpu::LOWRANK_ISA
