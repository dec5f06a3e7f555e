// Vectors in plain C++; vector.h has the contract.
#pragma once

#include "cpu/vector/basics.h"

namespace lowrank::cpu::LOWRANK_ISA {

// A vector type of GCC and Clang with four lanes, which is one register on every machine with 128-bit vectors.

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
} // rounds twice: std::fma would be a library call
LOWRANK_INLINE float reduce_add(V v) {
    return (v[0] + v[2]) + (v[1] + v[3]);
}
LOWRANK_INLINE V clamp1(V v) {
    for (int i = 0; i < kLanes; ++i)
        v[i] = v[i] > 1.0f ? 1.0f : v[i] < -1.0f ? -1.0f : v[i];
    return v;
}

LOWRANK_INLINE V magnitude(V v) {
    return (V)((I)v & 0x7fffffff);
}
LOWRANK_INLINE I with_sign(I i, V v) {
    return i | (((I)v >> 28) & 8);
}

LOWRANK_INLINE I to_int(V v) {
    // Numbers out of range and NaN give the lowest integer, as the instructions of AVX do.
    I i;
    for (int j = 0; j < kLanes; ++j)
        i[j] = v[j] >= -2147483648.0f && v[j] < 2147483648.0f ? int32_t(v[j]) : INT32_MIN;
    return i;
}
LOWRANK_INLINE I to_nearest(V v) {
    for (int j = 0; j < kLanes; ++j)
        v[j] = __builtin_rintf(v[j]);
    return to_int(v);
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
template <>
LOWRANK_INLINE V load(const int8_t* p) {
    return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
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
} // the copies of the sign fall outside the nibbles that are looked up
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

LOWRANK_INLINE void store_nibbles(uint8_t* p, const I* v) {
    for (int i = 0; i < 8; ++i) {
        p[2 * i] = uint8_t(v[i][0] << 4 | v[i][1]);
        p[2 * i + 1] = uint8_t(v[i][2] << 4 | v[i][3]);
    }
}

} // namespace lowrank::cpu::LOWRANK_ISA
