// Vectors of float32 for one instruction set, so that every kernel is written once.
//
// Included by files that are compiled once per instruction set; everything is in the namespace LOWRANK_ISA.
//   V, I           vectors of kLanes floats and of kLanes 32-bit integers
//   load<T>        T = float, BFloat16 or Float16, converted to float32; load_n: the first n lanes, zero in the others
//   store<T>       rounded to nearest even (NaN stays NaN); store_n: the first n lanes
//   lookup         16-entry table by the low four bits of every lane
#pragma once

#include "common/nf4.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LOWRANK_INLINE inline __attribute__((always_inline))

namespace lowrank::cpu::LOWRANK_ISA {

// ---- small things of std, kept in this namespace (see isa.h) --------------------------------------------------------

LOWRANK_INLINE int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
LOWRANK_INLINE int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
LOWRANK_INLINE int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
LOWRANK_INLINE int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// body(i) or body(i, thread) for every task i.
template <class F>
inline void parallel_for(int threads, int64_t tasks, const F& body) {
    const auto task = [](void* context, int64_t i, int thread) {
        const F& body = *static_cast<const F*>(context);
        if constexpr (std::is_invocable_v<const F&, int64_t, int>)
            body(i, thread);
        else
            body(i);
    };
    run_tasks(threads, tasks, task, const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
LOWRANK_INLINE T* scratch(int slot, int64_t count) {
    return static_cast<T*>(scratch_memory(slot, size_t(count + 1) * sizeof(T)));
}

// Calls body(T{}) with the element type of `dtype`.
template <class F>
LOWRANK_INLINE void with_type(int dtype, const F& body) {
    if (dtype == kFloat32)
        body(float{});
    else if (dtype == kBFloat16)
        body(BFloat16{});
    else
        body(Float16{});
}

LOWRANK_INLINE int64_t size_of(int dtype) {
    return dtype == kFloat32 ? 4 : 2;
}

#if defined(__AVX512F__)
// ---- AVX-512 --------------------------------------------------------------------------------------------------------

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
// Clamped to [-1, 1]; NaN stays NaN, because the second operand is returned where the first is no number.
LOWRANK_INLINE V clamp1(V v) {
    return _mm512_min_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_set1_ps(-1.0f), v));
}

LOWRANK_INLINE I to_int(V v) {
    return _mm512_cvttps_epi32(v);
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
// Entry i of 32.
LOWRANK_INLINE V lookup32(const float* entries, I i) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(entries), i, _mm512_loadu_ps(entries + 16));
}
LOWRANK_INLINE I lookup32(const int32_t* entries, I i) {
    return _mm512_permutex2var_epi32(_mm512_loadu_si512(entries), i, _mm512_loadu_si512(entries + 16));
}
constexpr bool kLooksUp32 = true;
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
// The halves of kDynamicCode, as words: a permutation looks up 32 among 64 of them.
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
    // In the order from which the interleaving below makes the first 16 and the second.
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

// Swaps, for two rows of a matrix whose numbers differ in one bit `Step`, the lanes of a whose number has that bit with
// the lanes of b whose number has not: log2(kLanes) such rounds transpose.
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

// 32 nibbles, one in each 32-bit integer, to 16 bytes.
LOWRANK_INLINE void pack_nibbles(uint8_t* p, const I* v) {
    const __m256i bytes = _mm256_setr_m128i(_mm512_cvtepi32_epi8(v[0]), _mm512_cvtepi32_epi8(v[1]));
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtepi16_epi8(pairs));
}

#elif defined(__AVX2__)
// ---- AVX2 -----------------------------------------------------------------------------------------------------------

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

LOWRANK_INLINE I to_int(V v) {
    return _mm256_cvttps_epi32(v);
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

LOWRANK_INLINE void pack_nibbles(uint8_t* p, const I* v) {
    const I words = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const I bytes = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

#else
// ---- plain C++ ------------------------------------------------------------------------------------------------------
// Four lanes as a vector type of GCC and Clang, which is one register on every machine with 128-bit vectors.

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

LOWRANK_INLINE V zero() {
    return V{};
}
LOWRANK_INLINE V set1(float v) {
    return V{v, v, v, v};
}
LOWRANK_INLINE V add(V a, V b) {
    return a + b;
}
LOWRANK_INLINE V sub(V a, V b) {
    return a - b;
}
LOWRANK_INLINE V mul(V a, V b) {
    return a * b;
}
LOWRANK_INLINE V fma(V a, V b, V c) {
    return a * b + c;
} // rounded twice: a fused one would be a library call
LOWRANK_INLINE float reduce_add(V v) {
    return (v[0] + v[2]) + (v[1] + v[3]);
}
LOWRANK_INLINE V clamp1(V v) {
    for (int i = 0; i < kLanes; ++i)
        v[i] = v[i] > 1.0f ? 1.0f : v[i] < -1.0f ? -1.0f : v[i];
    return v;
}

LOWRANK_INLINE I to_int(V v) {
    // Out of range and NaN give the lowest integer, as in the instruction that the other versions use.
    I i;
    for (int j = 0; j < kLanes; ++j)
        i[j] = v[j] >= -2147483648.0f && v[j] < 2147483648.0f ? int32_t(v[j]) : INT32_MIN;
    return i;
}
LOWRANK_INLINE I bits_abs(V v) {
    return (I)v & 0x7fffffff;
}
LOWRANK_INLINE I max(I a, I b) {
    const I greater = a > b;
    return (a & greater) | (b & ~greater);
}
LOWRANK_INLINE I zero_int() {
    return I{};
}
LOWRANK_INLINE void store_int(int32_t* p, I v) {
    std::memcpy(p, &v, sizeof v);
}
LOWRANK_INLINE I step_where_below(I i, int step, V t, V v) {
    return i + (~(t >= v) & step);
}
LOWRANK_INLINE I plus(I i, int n) {
    return i + n;
}

LOWRANK_INLINE float to_float(float v) {
    return v;
}
LOWRANK_INLINE float from_bits(uint32_t u) {
    float v;
    std::memcpy(&v, &u, sizeof v);
    return v;
}
LOWRANK_INLINE uint32_t to_bits(float v) {
    uint32_t u;
    std::memcpy(&u, &v, sizeof u);
    return u;
}
LOWRANK_INLINE float to_float(BFloat16 v) {
    return from_bits(uint32_t(v.bits) << 16);
}
LOWRANK_INLINE float to_float(Float16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) // infinity, NaN (made quiet)
        return from_bits(sign | 0x70000000 | rest | (rest > 0x0f800000 ? 0x400000 : 0));
    return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f)); // exact, subnormals too
}
LOWRANK_INLINE void from_float(float v, float* p) {
    *p = v;
}
LOWRANK_INLINE void from_float(float v, BFloat16* p) {
    const uint32_t u = to_bits(v);
    p->bits = uint16_t((v != v ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
LOWRANK_INLINE void from_float(float v, Float16* p) {
    const uint32_t sign = to_bits(v) & 0x80000000, u = to_bits(v) ^ sign;
    uint32_t half;
    if (u >= 0x47800000) // too large, infinity or NaN
        half = u > 0x7f800000 ? 0x7e00 | ((u >> 13) & 0x3ff) : 0x7c00;
    else if (u < 0x38800000) // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        half = to_bits(from_bits(u) + 0.5f) - 0x3f000000;
    else
        half = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    p->bits = uint16_t(half | sign >> 16);
}
template <class T>
LOWRANK_INLINE V load(const T* p) {
    return V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <>
LOWRANK_INLINE V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
LOWRANK_INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
template <class T>
LOWRANK_INLINE void store(T* p, V v) {
    for (int i = 0; i < kLanes; ++i)
        from_float(v[i], p + i);
}

struct Table {
    float entries[16];
};
LOWRANK_INLINE Table load_table(const float* entries) {
    Table t;
    std::memcpy(t.entries, entries, sizeof t.entries);
    return t;
}
LOWRANK_INLINE Table mul(Table t, float scale) {
    for (int i = 0; i < 16; i += kLanes)
        store(t.entries + i, load(t.entries + i) * scale);
    return t;
}
LOWRANK_INLINE V lookup(const Table& t, I i) {
    return V{t.entries[i[0] & 15], t.entries[i[1] & 15], t.entries[i[2] & 15], t.entries[i[3] & 15]};
}
LOWRANK_INLINE I load_words(const uint8_t* p) {
    I i;
    for (int j = 0; j < kLanes; ++j)
        i[j] = int32_t(uint32_t(p[4 * j]) | uint32_t(p[4 * j + 1]) << 8 | uint32_t(p[4 * j + 2]) << 16 |
                       uint32_t(p[4 * j + 3]) << 24);
    return i;
}
LOWRANK_INLINE I shift_right(I v, int bits) {
    return v >> bits;
} // the sign's copies are no nibble that is looked up
template <int kPiece>
LOWRANK_INLINE V spread(const float* p) {
    return set1(p[0]);
}

LOWRANK_INLINE I load_bytes(const uint8_t* p) {
    return I{p[0], p[1], p[2], p[3]};
}
LOWRANK_INLINE I high_nibble(I bytes) {
    return bytes >> 4;
}
LOWRANK_INLINE V lookup_dynamic(I i) {
    return V{kDynamicCode[i[0]], kDynamicCode[i[1]], kDynamicCode[i[2]], kDynamicCode[i[3]]};
}

LOWRANK_INLINE void interleave(V a, V b, V* low, V* high) {
    *low = V{a[0], b[0], a[1], b[1]};
    *high = V{a[2], b[2], a[3], b[3]};
}

template <int Step>
LOWRANK_INLINE void exchange(V& a, V& b) {
    const V x = a, y = b;
    if constexpr (Step == 1) {
        a = V{x[0], y[0], x[2], y[2]};
        b = V{x[1], y[1], x[3], y[3]};
    } else {
        a = V{x[0], x[1], y[0], y[1]};
        b = V{x[2], x[3], y[2], y[3]};
    }
}

LOWRANK_INLINE void pack_nibbles(uint8_t* p, const I* v) {
    for (int i = 0; i < 8; ++i) {
        p[2 * i] = uint8_t(v[i][0] << 4 | v[i][1]);
        p[2 * i + 1] = uint8_t(v[i][2] << 4 | v[i][3]);
    }
}
#endif

// ---- the same for every instruction set -----------------------------------------------------------------------------

#if !defined(__AVX512F__)
LOWRANK_INLINE int32_t reduce_max(I v) {
    int32_t lanes[kLanes];
    store_int(lanes, v);
    for (int j = 1; j < kLanes; ++j)
        lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    return lanes[0];
}
V lookup32(const float* entries, I i); // 32 entries are not looked up at once here
I lookup32(const int32_t* entries, I i);
constexpr bool kLooksUp32 = false;
#endif

#if !defined(__AVX512F__)
template <class T>
LOWRANK_INLINE V load_n(const T* p, int64_t n) {
    T full[kLanes] = {};
    std::memcpy(full, p, size_t(n) * sizeof(T));
    return load(static_cast<const T*>(full));
}
LOWRANK_INLINE I load_bytes_n(const uint8_t* p, int64_t n) {
    if (n == kLanes)
        return load_bytes(p);
    uint8_t full[kLanes] = {};
    std::memcpy(full, p, size_t(n));
    return load_bytes(full);
}
constexpr int kDynamicAtOnce = kLanes;
LOWRANK_INLINE void dynamic_codes(const uint8_t* index, int64_t count, V* to) {
    to[0] = lookup_dynamic(load_bytes_n(index, count));
}
template <class T>
LOWRANK_INLINE void store_n(T* p, V v, int64_t n) {
    T full[kLanes];
    store(full, v);
    std::memcpy(p, full, size_t(n) * sizeof(T));
}
#endif

// Lanes of a in place, reading rows of kLanes vectors and writing columns.
LOWRANK_INLINE void transpose_square(V (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2)
        exchange<1>(rows[i], rows[i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & 2))
            exchange<2>(rows[i], rows[i + 2]);
    if constexpr (kLanes > 4) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            if (!(i & 4))
                exchange<4>(rows[i], rows[i + 4]);
    }
    if constexpr (kLanes > 8) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            if (!(i & 8))
                exchange<8>(rows[i], rows[i + 8]);
    }
}

// ---- NF4 ------------------------------------------------------------------------------------------------------------

// Block scale b: index and second level where quantised twice; product and sum are rounded each (no contraction).
LOWRANK_INLINE float scale_at(const Scales& s, int64_t b) {
    if (!s.absmax2)
        return static_cast<const float*>(s.absmax)[b];
    return kDynamicCode[static_cast<const uint8_t*>(s.absmax)[b]] * s.absmax2[b / kAbsmaxBlock] + *s.offset;
}

// out[i] = scale of the elements f + i * piece …, i < pieces; f and the block size are multiples of `piece`. Writes
// whole vectors.
inline void scales_of(const Scales& s, int64_t f, int64_t pieces, int64_t piece, float* out) {
    const int piece_shift = __builtin_ctzll(uint64_t(piece));
    const int shift = __builtin_ctzll(uint64_t(s.block_size)) - piece_shift;
    const int64_t first = f >> piece_shift;
    for (int64_t i = 0; i < pieces; i += kDynamicAtOnce) {
        const int64_t count = min(kDynamicAtOnce, pieces - i), group = (first + i) / kAbsmaxBlock;
        if (count > kLanes / 2 && s.absmax2 && shift == 0 && group == (first + i + count - 1) / kAbsmaxBlock) {
            V codes[kDynamicAtOnce / kLanes];
            dynamic_codes(static_cast<const uint8_t*>(s.absmax) + first + i, count, codes);
#pragma GCC unroll 2
            for (int64_t j = 0; j < kDynamicAtOnce; j += kLanes)
                if (j < count)
                    store(out + i + j, add(mul(codes[j / kLanes], set1(s.absmax2[group])), set1(*s.offset)));
        } else {
            for (int64_t j = i; j < i + count; ++j)
                out[j] = scale_at(s, (first + j) >> shift);
        }
    }
}

// Decodes 32 weights of one block: the table holds code * scale, already rounded to T where that is cheaper.
template <class T>
struct Decoder {
    Table table;
    LOWRANK_INLINE explicit Decoder(float scale) : table(mul(load_table(kCode), scale)) {}
    LOWRANK_INLINE void decode32(const uint8_t* bytes, T* out) const {
        for (int i = 0; i < 32; i += 2 * kLanes) {
            const I pairs = load_bytes(bytes + i / 2);
            V low, high;
            interleave(lookup(table, high_nibble(pairs)), lookup(table, pairs), &low, &high);
            store(out + i, low);
            store(out + i + kLanes, high);
        }
    }
};

#if defined(__AVX512F__)
// 16-bit results: one permutation of words looks up 32 of them.
struct Decoder16 {
    __m512i table;
    LOWRANK_INLINE explicit Decoder16(__m256i entries)
        : table(_mm512_inserti64x4(_mm512_castsi256_si512(entries), entries, 1)) {}
    LOWRANK_INLINE void decode32(const uint8_t* bytes, void* out) const {
        // Every byte in two neighbouring words, its high nibble moved down in the even one. The table is there twice,
        // so that bit 4 of a word does not matter.
        const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i twice = _mm512_shuffle_epi8(
            all, _mm512_set_epi64(0x0f0f0f0f0e0e0e0e, 0x0d0d0d0d0c0c0c0c, 0x0b0b0b0b0a0a0a0a, 0x0909090908080808,
                                  0x0707070706060606, 0x0505050504040404, 0x0303030302020202, 0x0101010100000000));
        const __m512i index = _mm512_srlv_epi16(twice, _mm512_set1_epi32(4));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
    }
};
template <>
struct Decoder<BFloat16> : Decoder16 {
    LOWRANK_INLINE explicit Decoder(float scale) : Decoder16(to_bf16(mul(load_table(kCode), scale).v)) {}
};
template <>
struct Decoder<Float16> : Decoder16 {
    LOWRANK_INLINE explicit Decoder(float scale) : Decoder16(to_f16(mul(load_table(kCode), scale).v)) {}
};
#endif

// out[i] = weight f + i, i < count, all of one block; f is even.
template <class T>
inline void decode_some(const uint8_t* packed, const Scales& scales, int64_t f, int64_t count, T* out) {
    const Decoder<T> decoder(scale_at(scales, f / scales.block_size));
    const uint8_t* bytes = packed + f / 2;
    for (; count >= 32; count -= 32, bytes += 16, out += 32)
        decoder.decode32(bytes, out);
    if (count > 0) {
        uint8_t rest[16] = {};
        T decoded[32];
        std::memcpy(rest, bytes, size_t(count + 1) / 2);
        decoder.decode32(rest, decoded);
        std::memcpy(out, decoded, size_t(count) * sizeof(T));
    }
}

// The same for whole pieces of kPiece elements of one block.
template <int kPiece, class T>
inline void decode_pieces(const uint8_t* packed, const Scales& scales, int64_t f, int64_t pieces, T* out) {
    constexpr int64_t kAtOnce = 16;
    const uint8_t* bytes = packed + f / 2;
    for (int64_t done = 0; done < pieces; done += kAtOnce) {
        float scale[kAtOnce];
        const int64_t now = min(kAtOnce, pieces - done);
        scales_of(scales, f + done * kPiece, now, kPiece, scale);
        for (int64_t i = 0; i < now; ++i, bytes += kPiece / 2, out += kPiece) {
            const Decoder<T> decoder(scale[i]);
#pragma GCC unroll 2
            for (int j = 0; j < kPiece; j += 32)
                decoder.decode32(bytes + j / 2, out + j);
        }
    }
}

// out[i] = code[nibble(f + i)] * scale((f + i) / block_size), 0 <= i < count, rounded once to T.
template <class T>
inline void nf4_decode(const uint8_t* packed, const Scales& scales, int64_t f, int64_t count, T* out) {
    if (count > 0 && (f & 1)) {
        store_n(out, mul(set1(kCode[nibble_at(packed, f)]), set1(scale_at(scales, f / scales.block_size))), 1);
        ++f, ++out, --count;
    }
    const int64_t piece = min(scales.block_size, 64);
    const int64_t head = min(count, -f & (piece - 1)); // up to the first whole piece
    if (head > 0)
        decode_some(packed, scales, f, head, out);
    f += head, out += head, count -= head;
    const int64_t whole = count & -piece;
    if (piece == 64)
        decode_pieces<64>(packed, scales, f, whole / 64, out);
    else
        decode_pieces<32>(packed, scales, f, whole / 32, out);
    if (whole < count)
        decode_some(packed, scales, f + whole, count - whole, out + whole);
}

} // namespace lowrank::cpu::LOWRANK_ISA
