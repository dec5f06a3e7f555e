// Vectors of AVX2; vector.h has the contract.
#pragma once

#include "cpu/vector/basics.h"

#include <immintrin.h>

namespace lowrank::cpu::LOWRANK_ISA {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using V = __m256;
using I = __m256i;

LOWRANK_INLINE V zero() {
    return _mm256_setzero_ps();
}
LOWRANK_INLINE V set1(float v) {
    return _mm256_set1_ps(v);
}
LOWRANK_INLINE V add(V a, V b) {
    return _mm256_add_ps(a, b);
}
LOWRANK_INLINE V sub(V a, V b) {
    return _mm256_sub_ps(a, b);
}
LOWRANK_INLINE V mul(V a, V b) {
    return _mm256_mul_ps(a, b);
}
LOWRANK_INLINE V fma(V a, V b, V c) {
    return _mm256_fmadd_ps(a, b, c);
}
LOWRANK_INLINE float reduce_add(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LOWRANK_INLINE V clamp1(V v) {
    return _mm256_min_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(_mm256_set1_ps(-1.0f), v));
}

LOWRANK_INLINE V magnitude(V v) {
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
LOWRANK_INLINE I with_sign(I i, V v) {
    return _mm256_or_si256(i, _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 28), _mm256_set1_epi32(8)));
}

LOWRANK_INLINE I to_int(V v) {
    return _mm256_cvttps_epi32(v);
}
LOWRANK_INLINE I to_nearest(V v) {
    return _mm256_cvtps_epi32(v);
}
LOWRANK_INLINE V to_float(I v) {
    return _mm256_cvtepi32_ps(v);
}
LOWRANK_INLINE I bits_abs(V v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
LOWRANK_INLINE I max(I a, I b) {
    return _mm256_max_epi32(a, b);
}
LOWRANK_INLINE I zero_int() {
    return _mm256_setzero_si256();
}
LOWRANK_INLINE void store_int(int32_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
LOWRANK_INLINE I step_where_below(I i, int step, V t, V v) {
    const I below = _mm256_castps_si256(_mm256_cmp_ps(t, v, _CMP_NGE_UQ));
    return _mm256_add_epi32(i, _mm256_and_si256(below, _mm256_set1_epi32(step)));
}
LOWRANK_INLINE I plus(I i, int n) {
    return _mm256_add_epi32(i, _mm256_set1_epi32(n));
}

template <class T>
V load(const T* p);
template <>
LOWRANK_INLINE V load(const float* p) {
    return _mm256_loadu_ps(p);
}
template <>
LOWRANK_INLINE V load(const BFloat16* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
template <>
LOWRANK_INLINE V load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
LOWRANK_INLINE V load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
LOWRANK_INLINE void store(float* p, V v) {
    _mm256_storeu_ps(p, v);
}
LOWRANK_INLINE void store(BFloat16* p, V v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const I quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
LOWRANK_INLINE void store(Float16* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

struct Table {
    V low, high;
};
LOWRANK_INLINE Table load_table(const float* entries) {
    return {load(entries), load(entries + 8)};
}
LOWRANK_INLINE Table mul(Table t, float scale) {
    return {mul(t.low, set1(scale)), mul(t.high, set1(scale))};
}
LOWRANK_INLINE V lookup(Table t, I i) {
    const V bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i), bit3);
}
LOWRANK_INLINE I load_words(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
LOWRANK_INLINE I shift_right(I v, int bits) {
    return _mm256_srli_epi32(v, bits);
}
template <int kPiece>
LOWRANK_INLINE V spread(const float* p) {
    return kPiece == 64 ? set1(p[0]) : _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
}

LOWRANK_INLINE I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
LOWRANK_INLINE I high_nibble(I bytes) {
    return _mm256_srli_epi32(bytes, 4);
}
LOWRANK_INLINE V lookup_dynamic(I i) {
    return _mm256_i32gather_ps(kDynamicCode, i, 4);
}

LOWRANK_INLINE void interleave(V a, V b, V* low, V* high) {
    const V x = _mm256_unpacklo_ps(a, b), y = _mm256_unpackhi_ps(a, b);
    *low = _mm256_permute2f128_ps(x, y, 0x20);
    *high = _mm256_permute2f128_ps(x, y, 0x31);
}

template <int Step>
LOWRANK_INLINE void exchange(V& a, V& b) {
    const V x = a, y = b;
    if constexpr (Step == 1) {
        a = _mm256_blend_ps(x, _mm256_moveldup_ps(y), 0xaa);
        b = _mm256_blend_ps(_mm256_movehdup_ps(x), y, 0xaa);
    } else if constexpr (Step == 2) {
        a = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
        b = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
    } else {
        a = _mm256_permute2f128_ps(x, y, 0x20);
        b = _mm256_permute2f128_ps(x, y, 0x31);
    }
}

LOWRANK_INLINE void store_nibbles(uint8_t* p, const I* v) {
    const I words = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const I bytes = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

// ---- tables of bytes ------------------------------------------------------------------------------------------------

// One instruction looks up 32 bytes in a table of 16. The entries of a table are therefore kept as planes, once in each
// half of a register: plane b has byte b of every entry.
struct Planes {
    I of[4];

    LOWRANK_INLINE explicit Planes(const Table& t) {
        const I bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13,
                                         2, 6, 10, 14, 3, 7, 11, 15);
        const I low = _mm256_shuffle_epi8(_mm256_castps_si256(t.low), bytes);
        const I high = _mm256_shuffle_epi8(_mm256_castps_si256(t.high), bytes);
        const I first = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5), second = _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7);
        of[0] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(low, high), first);
        of[1] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(low, high), second);
        of[2] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(low, high), first);
        of[3] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(low, high), second);
    }
    // The entries of 32 indices: each half of a vector has four neighbours from that half of the indices.
    LOWRANK_INLINE void lookup(I index, V* to) const {
        const I b0 = _mm256_shuffle_epi8(of[0], index), b1 = _mm256_shuffle_epi8(of[1], index);
        const I b2 = _mm256_shuffle_epi8(of[2], index), b3 = _mm256_shuffle_epi8(of[3], index);
        const I low[2] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
        const I high[2] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)};
        for (int i = 0; i < 2; ++i) {
            to[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
            to[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
        }
    }
};
// The high nibbles (half 0) or the low ones (half 1) of a vector of bytes.
LOWRANK_INLINE void lookup_words(const Planes& planes, I words, int half, V* to) {
    planes.lookup(_mm256_and_si256(half ? words : _mm256_srli_epi16(words, 4), _mm256_set1_epi8(15)), to);
}
// 32 entries times `scale`, in order.
LOWRANK_INLINE void decode32(const Planes& planes, V scale, const uint8_t* bytes, float* out) {
    // Every byte twice, so that its nibbles become neighbours; each half takes every other pair of bytes.
    const I order = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6, 7, 7, 10, 10,
                                     11, 11, 14, 14, 15, 15);
    const I twice = _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))), order);
    const I high = _mm256_and_si256(_mm256_srli_epi16(twice, 4), _mm256_set1_epi16(0x000f));
    V v[4];
    planes.lookup(_mm256_or_si256(high, _mm256_and_si256(twice, _mm256_set1_epi16(0x0f00))), v);
    for (int i = 0; i < 4; ++i)
        store(out + 8 * i, mul(v[i], scale));
}

} // namespace lowrank::cpu::LOWRANK_ISA
