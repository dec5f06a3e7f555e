// AVX-512: vectors as vector.h says.
#pragma once

#include "cpu/vector/basics.h"

#include <immintrin.h>

namespace lowrank::cpu::LOWRANK_ISA {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using V = __m512;
using I = __m512i;

LOWRANK_INLINE V zero() {
    return _mm512_setzero_ps();
}
LOWRANK_INLINE V set1(float v) {
    return _mm512_set1_ps(v);
}
LOWRANK_INLINE V add(V a, V b) {
    return _mm512_add_ps(a, b);
}
LOWRANK_INLINE V sub(V a, V b) {
    return _mm512_sub_ps(a, b);
}
LOWRANK_INLINE V mul(V a, V b) {
    return _mm512_mul_ps(a, b);
}
LOWRANK_INLINE V fma(V a, V b, V c) {
    return _mm512_fmadd_ps(a, b, c);
}
LOWRANK_INLINE float reduce_add(V v) {
    return _mm512_reduce_add_ps(v);
}
// Clamps to [-1, 1]. NaN stays NaN, because min and max return the second operand if either is NaN.
LOWRANK_INLINE V clamp1(V v) {
    return _mm512_min_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_set1_ps(-1.0f), v));
}

LOWRANK_INLINE V magnitude(V v) {
    return _mm512_abs_ps(v);
}
// Sets bit 3 of i where v is negative.
LOWRANK_INLINE I with_sign(I i, V v) {
    return _mm512_or_si512(i, _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(v), 28), _mm512_set1_epi32(8)));
}

LOWRANK_INLINE I to_int(V v) {
    return _mm512_cvttps_epi32(v);
}
LOWRANK_INLINE I to_nearest(V v) {
    return _mm512_cvtps_epi32(v);
}
LOWRANK_INLINE V to_float(I v) {
    return _mm512_cvtepi32_ps(v);
}
LOWRANK_INLINE I bits_abs(V v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}
LOWRANK_INLINE I max(I a, I b) {
    return _mm512_max_epi32(a, b);
}
LOWRANK_INLINE I zero_int() {
    return _mm512_setzero_si512();
}
LOWRANK_INLINE void store_int(int32_t* p, I v) {
    _mm512_storeu_si512(p, v);
}
LOWRANK_INLINE int32_t reduce_max(I v) {
    return _mm512_reduce_max_epi32(v);
}
// i + step where t < v or v is NaN.
LOWRANK_INLINE I step_where_below(I i, int step, V t, V v) {
    return _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(t, v, _CMP_NGE_UQ), i, _mm512_set1_epi32(step));
}
LOWRANK_INLINE I plus(I i, int n) {
    return _mm512_add_epi32(i, _mm512_set1_epi32(n));
}

template <class T>
V load(const T* p);
template <>
LOWRANK_INLINE V load(const float* p) {
    return _mm512_loadu_ps(p);
}
LOWRANK_INLINE V from_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
template <>
LOWRANK_INLINE V load(const BFloat16* p) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
LOWRANK_INLINE V load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
LOWRANK_INLINE V load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

LOWRANK_INLINE __mmask16 first(int64_t n) {
    return __mmask16((1u << n) - 1);
}
LOWRANK_INLINE V load_n(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first(n), p);
}
LOWRANK_INLINE V load_n(const BFloat16* p, int64_t n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
LOWRANK_INLINE V load_n(const Float16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
LOWRANK_INLINE V load_n(const int8_t* p, int64_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}

LOWRANK_INLINE __m256i to_bf16(V v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
LOWRANK_INLINE __m256i to_f16(V v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
LOWRANK_INLINE void store(float* p, V v) {
    _mm512_storeu_ps(p, v);
}
LOWRANK_INLINE void store(BFloat16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v));
}
LOWRANK_INLINE void store(Float16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(v));
}
LOWRANK_INLINE void store_n(float* p, V v, int64_t n) {
    _mm512_mask_storeu_ps(p, first(n), v);
}
LOWRANK_INLINE void store_n(BFloat16* p, V v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), to_bf16(v));
}
LOWRANK_INLINE void store_n(Float16* p, V v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), to_f16(v));
}

struct Table {
    V v;
};
LOWRANK_INLINE Table load_table(const float* entries) {
    return {_mm512_loadu_ps(entries)};
}
LOWRANK_INLINE Table mul(Table t, float scale) {
    return {mul(t.v, set1(scale))};
}
LOWRANK_INLINE V lookup(Table t, I i) {
    return _mm512_permutexvar_ps(i, t.v);
}
// Lane i has bytes 4 i … 4 i + 3.
LOWRANK_INLINE I load_words(const uint8_t* p) {
    return _mm512_loadu_si512(p);
}
LOWRANK_INLINE I shift_right(I v, int bits) {
    return _mm512_srli_epi32(v, unsigned(bits));
}
// Lane i has p[8 * i / kPiece].
template <int kPiece>
LOWRANK_INLINE V spread(const float* p) {
    static_assert(kPiece == 32 || kPiece == 64);
    const I lanes = kPiece == 64 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                 : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

LOWRANK_INLINE I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LOWRANK_INLINE I high_nibble(I bytes) {
    return _mm512_srli_epi32(bytes, 4);
}
// The upper and lower 16 bits of kDynamicCode: a permutation looks up 32 words in a table of 64.
struct DynamicCodeHalves {
    alignas(64) uint16_t of[2][256];
};
constexpr DynamicCodeHalves kDynamicCodeHalves = [] {
    DynamicCodeHalves halves{};
    for (int i = 0; i < 256; ++i) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, kDynamicCode[i]);
        halves.of[0][i] = uint16_t(bits), halves.of[1][i] = uint16_t(bits >> 16);
    }
    return halves;
}();
// to[i] = kDynamicCode[index[i]], i < count <= kDynamicAtOnce, in vectors.
constexpr int kDynamicAtOnce = 32;
LOWRANK_INLINE void dynamic_codes(const uint8_t* index, int64_t count, V* to) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(uint32_t((uint64_t(1) << count) - 1), index);
    // Ordered such that the interleaving below yields the first 16 codes, then the second 16.
    const __m512i i =
        _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __mmask32 bit6 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64)),
                    bit7 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(128));
    __m512i half[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const uint16_t* words = kDynamicCodeHalves.of[h] + 64 * j;
            v[j] = _mm512_permutex2var_epi16(_mm512_load_si512(words), i, _mm512_load_si512(words + 32));
        }
        half[h] = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(v[0], bit6, v[1]), bit7,
                                        _mm512_mask_mov_epi16(v[2], bit6, v[3]));
    }
    to[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(half[0], half[1]));
    to[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(half[0], half[1]));
}

// a0 b0 a1 b1 …
LOWRANK_INLINE void interleave(V a, V b, V* low, V* high) {
    const I low_index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *low = _mm512_permutex2var_ps(a, low_index, b);
    *high = _mm512_permutex2var_ps(a, _mm512_add_epi32(low_index, _mm512_set1_epi32(8)), b);
}

// One step of a transpose, for two rows whose numbers differ in bit `Step`: swaps the lanes of a whose number has the
// bit set with the lanes of b whose number has it clear. log2(kLanes) such rounds transpose a square.
template <int Step>
LOWRANK_INLINE void exchange(V& a, V& b) {
    const V x = a, y = b;
    if constexpr (Step == 1) {
        a = _mm512_mask_moveldup_ps(x, 0xaaaa, y);
        b = _mm512_mask_movehdup_ps(y, 0x5555, x);
    } else if constexpr (Step == 2) {
        a = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
        b = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    } else if constexpr (Step == 4) {
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        a = _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(x), low, _mm512_castps_pd(y)));
        b = _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(x), high, _mm512_castps_pd(y)));
    } else {
        a = _mm512_shuffle_f32x4(x, y, 0x44);
        b = _mm512_shuffle_f32x4(x, y, 0xee);
    }
}

// Stores 32 nibbles, one in each 32-bit integer, as 16 bytes.
LOWRANK_INLINE void store_nibbles(uint8_t* p, const I* v) {
    const __m256i bytes = _mm256_setr_m128i(_mm512_cvtepi32_epi8(v[0]), _mm512_cvtepi32_epi8(v[1]));
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtepi16_epi8(pairs));
}

// A table of 16-bit entries; one permutation of words looks up 32.
struct WordTable {
    __m512i table;
    LOWRANK_INLINE explicit WordTable(__m256i entries)
        : table(_mm512_inserti64x4(_mm512_castsi256_si512(entries), entries, 1)) {}
    LOWRANK_INLINE void decode32(const uint8_t* bytes, void* out) const {
        // Every byte goes into two neighbouring words; in the even word its high nibble is shifted down. The table is
        // stored twice, so that bit 4 of a word does not matter.
        const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i twice = _mm512_shuffle_epi8(
            all, _mm512_set_epi64(0x0f0f0f0f0e0e0e0e, 0x0d0d0d0d0c0c0c0c, 0x0b0b0b0b0a0a0a0a, 0x0909090908080808,
                                  0x0707070706060606, 0x0505050504040404, 0x0303030302020202, 0x0101010100000000));
        const __m512i index = _mm512_srlv_epi16(twice, _mm512_set1_epi32(4));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
    }
};
// The entries rounded to T.
template <class T>
LOWRANK_INLINE WordTable words_of(const Table& t) {
    return WordTable(std::is_same_v<T, BFloat16> ? to_bf16(t.v) : to_f16(t.v));
}

} // namespace lowrank::cpu::LOWRANK_ISA
