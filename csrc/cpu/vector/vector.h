// Vectors of float32 for one instruction set, so that every kernel is written once.
//
// Included by files that are compiled once per instruction set; everything is in the namespace LOWRANK_ISA.
//   V, I           vectors of kLanes floats and of kLanes 32-bit integers
//   load<T>        T = float, BFloat16, Float16 or int8_t, converted to float32; load_n: the first n lanes, zero in the
//   others store<T>       rounded to nearest even (NaN stays NaN); store_n: the first n lanes lookup         16-entry
//   table by the low four bits of every lane
#pragma once

#if defined(__AVX512F__)
#include "cpu/vector/avx512.h"
#elif defined(__AVX2__)
#include "cpu/vector/avx2.h"
#define LOWRANK_AVX2
#elif defined(__aarch64__)
#include "cpu/vector/neon.h"
#define LOWRANK_NEON
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LOWRANK_NEON_PAIRS
#endif
#else
#include "cpu/vector/portable.h"
#endif

namespace lowrank::cpu::LOWRANK_ISA {

// ---- the same for every instruction set -----------------------------------------------------------------------------

#if !defined(__AVX512F__) && !defined(LOWRANK_NEON)
LOWRANK_INLINE int32_t reduce_max(I v) {
    int32_t lanes[kLanes];
    store_int(lanes, v);
    for (int j = 1; j < kLanes; ++j)
        lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    return lanes[0];
}
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

// The column, within the 8 kLanes nibbles of a vector of bytes, of lane i of the vector j that its entries are decoded
// to. NEON and AVX2 look up four vectors together; the other sets look up one at a time, so `lookup_words` is declared
// for them and never called.
#if defined(LOWRANK_NEON) || defined(LOWRANK_AVX2)
constexpr bool kLooksUpWords = true;
using WordLookup = Planes;
constexpr int column_of(int j, int i) {
    return 32 * (i / 4) + 8 * (j % 4) + 2 * (i % 4) + j / 4;
}
#else
constexpr bool kLooksUpWords = false;
using WordLookup = Table;
constexpr int column_of(int j, int i) {
    return 8 * i + (j ^ 1);
}
void lookup_words(const Table& table, I words, int half, V* to);
#endif

// Transposes a square of kLanes vectors in place.
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

} // namespace lowrank::cpu::LOWRANK_ISA
