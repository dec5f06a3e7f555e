// Vectors of NEON (64-bit ARM); vector.h has the contract.
#pragma once

#include "cpu/vector/basics.h"

#include <arm_neon.h>

namespace lowrank::cpu::LOWRANK_ISA {

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
using V = float32x4_t;
using I = int32x4_t;

LOWRANK_INLINE V zero() {
    return vdupq_n_f32(0);
}
LOWRANK_INLINE V set1(float v) {
    return vdupq_n_f32(v);
}
LOWRANK_INLINE V add(V a, V b) {
    return vaddq_f32(a, b);
}
LOWRANK_INLINE V sub(V a, V b) {
    return vsubq_f32(a, b);
}
LOWRANK_INLINE V mul(V a, V b) {
    return vmulq_f32(a, b);
}
LOWRANK_INLINE V fma(V a, V b, V c) {
    return vfmaq_f32(c, a, b);
}
LOWRANK_INLINE float reduce_add(V v) {
    return vaddvq_f32(v);
}
LOWRANK_INLINE V clamp1(V v) { // min and max keep NaN
    return vminq_f32(vdupq_n_f32(1.0f), vmaxq_f32(vdupq_n_f32(-1.0f), v));
}

LOWRANK_INLINE V magnitude(V v) {
    return vabsq_f32(v);
}
LOWRANK_INLINE I with_sign(I i, V v) {
    return vorrq_s32(i, vandq_s32(vshrq_n_s32(vreinterpretq_s32_f32(v), 28), vdupq_n_s32(8)));
}

LOWRANK_INLINE I to_int(V v) { // numbers out of range become the nearest integer, NaN becomes 0
    return vcvtq_s32_f32(v);
}
LOWRANK_INLINE I to_nearest(V v) {
    return vcvtnq_s32_f32(v);
}
LOWRANK_INLINE V to_float(I v) {
    return vcvtq_f32_s32(v);
}
LOWRANK_INLINE I bits_abs(V v) {
    return vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7fffffff));
}
LOWRANK_INLINE I max(I a, I b) {
    return vmaxq_s32(a, b);
}
LOWRANK_INLINE I zero_int() {
    return vdupq_n_s32(0);
}
LOWRANK_INLINE void store_int(int32_t* p, I v) {
    vst1q_s32(p, v);
}
LOWRANK_INLINE int32_t reduce_max(I v) {
    return vmaxvq_s32(v);
}
LOWRANK_INLINE I step_where_below(I i, int step, V t, V v) {
    return vaddq_s32(i, vbicq_s32(vdupq_n_s32(step), vreinterpretq_s32_u32(vcgeq_f32(t, v))));
}
LOWRANK_INLINE I plus(I i, int n) {
    return vaddq_s32(i, vdupq_n_s32(n));
}

template <class T>
V load(const T* p);
template <>
LOWRANK_INLINE V load(const float* p) {
    return vld1q_f32(p);
}
template <>
LOWRANK_INLINE V load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
template <>
LOWRANK_INLINE V load(const Float16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
template <>
LOWRANK_INLINE V load(const int8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes))))));
}
LOWRANK_INLINE uint16x4_t to_bits(BFloat16, V v) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
#endif
}
LOWRANK_INLINE uint16x4_t to_bits(Float16, V v) {
    return vreinterpret_u16_f16(vcvt_f16_f32(v));
}
LOWRANK_INLINE void store(float* p, V v) {
    vst1q_f32(p, v);
}
template <class T>
LOWRANK_INLINE void store(T* p, V v) {
    vst1_u16(&p->bits, to_bits(T{}, v));
}

struct Table {
    V of[4];
};
LOWRANK_INLINE Table load_table(const float* entries) {
    return {{load(entries), load(entries + 4), load(entries + 8), load(entries + 12)}};
}
LOWRANK_INLINE Table mul(Table t, float scale) {
    for (V& v : t.of)
        v = mul(v, set1(scale));
    return t;
}
LOWRANK_INLINE uint8x16_t bytes_of(V v) {
    return vreinterpretq_u8_f32(v);
}
LOWRANK_INLINE V lookup(Table t, I i) {
    const uint8x16x4_t bytes = {{bytes_of(t.of[0]), bytes_of(t.of[1]), bytes_of(t.of[2]), bytes_of(t.of[3])}};
    const I entry = vandq_s32(i, vdupq_n_s32(15));
    const I index = vmlaq_s32(vdupq_n_s32(0x03020100), entry, vdupq_n_s32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32(index)));
}
LOWRANK_INLINE I load_words(const uint8_t* p) {
    return vreinterpretq_s32_u8(vld1q_u8(p));
}
template <int kPiece>
LOWRANK_INLINE V spread(const float* p) {
    return set1(p[0]);
}

LOWRANK_INLINE I load_bytes(const uint8_t* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const uint8x8_t v = vreinterpret_u8_u32(vdup_n_u32(bytes));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(v))));
}
LOWRANK_INLINE I high_nibble(I bytes) {
    return vshrq_n_s32(bytes, 4);
}
LOWRANK_INLINE V lookup_dynamic(I i) {
    const float entries[4] = {kDynamicCode[i[0]], kDynamicCode[i[1]], kDynamicCode[i[2]], kDynamicCode[i[3]]};
    return vld1q_f32(entries);
}

LOWRANK_INLINE void interleave(V a, V b, V* low, V* high) {
    *low = vzip1q_f32(a, b);
    *high = vzip2q_f32(a, b);
}

template <int Step>
LOWRANK_INLINE void exchange(V& a, V& b) {
    const V x = a, y = b;
    if constexpr (Step == 1) {
        a = vtrn1q_f32(x, y);
        b = vtrn2q_f32(x, y);
    } else {
        a = vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
        b = vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
    }
}

LOWRANK_INLINE void store_nibbles(uint8_t* p, const I* v) {
    uint16x8_t words[4];
    for (int i = 0; i < 4; ++i)
        words[i] = vuzp1q_u16(vreinterpretq_u16_s32(v[2 * i]), vreinterpretq_u16_s32(v[2 * i + 1]));
    const uint8x16_t low = vuzp1q_u8(vreinterpretq_u8_u16(words[0]), vreinterpretq_u8_u16(words[1]));
    const uint8x16_t high = vuzp1q_u8(vreinterpretq_u8_u16(words[2]), vreinterpretq_u8_u16(words[3]));
    vst1q_u8(p, vsliq_n_u8(vuzp2q_u8(low, high), vuzp1q_u8(low, high), 4));
}

// ---- tables of bytes ------------------------------------------------------------------------------------------------

// One instruction looks up 16 bytes in a table of 16. The entries of a table are therefore kept as planes: plane b has
// byte b of every entry.
struct Nibbles {
    uint8x16_t high, low; // of 16 bytes: the even columns and the odd ones
    LOWRANK_INLINE explicit Nibbles(uint8x16_t bytes)
        : high(vshrq_n_u8(bytes, 4)), low(vandq_u8(bytes, vdupq_n_u8(15))) {}
};

struct Planes {
    uint8x16_t of[4];

    LOWRANK_INLINE explicit Planes(const Table& t) {
        const uint8x16_t a = bytes_of(t.of[0]), b = bytes_of(t.of[1]), c = bytes_of(t.of[2]), d = bytes_of(t.of[3]);
        const uint8x16_t even[2] = {vuzp1q_u8(a, b), vuzp1q_u8(c, d)}, odd[2] = {vuzp2q_u8(a, b), vuzp2q_u8(c, d)};
        of[0] = vuzp1q_u8(even[0], even[1]), of[2] = vuzp2q_u8(even[0], even[1]);
        of[1] = vuzp1q_u8(odd[0], odd[1]), of[3] = vuzp2q_u8(odd[0], odd[1]);
    }
    // The entries of 16 indices, in order.
    LOWRANK_INLINE void lookup(uint8x16_t index, V* to) const {
        const uint8x16_t b0 = vqtbl1q_u8(of[0], index), b1 = vqtbl1q_u8(of[1], index);
        const uint8x16_t b2 = vqtbl1q_u8(of[2], index), b3 = vqtbl1q_u8(of[3], index);
        const uint16x8_t low[2] = {vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), vreinterpretq_u16_u8(vzip2q_u8(b0, b1))};
        const uint16x8_t high[2] = {vreinterpretq_u16_u8(vzip1q_u8(b2, b3)), vreinterpretq_u16_u8(vzip2q_u8(b2, b3))};
        for (int i = 0; i < 2; ++i) {
            to[2 * i] = vreinterpretq_f32_u16(vzip1q_u16(low[i], high[i]));
            to[2 * i + 1] = vreinterpretq_f32_u16(vzip2q_u16(low[i], high[i]));
        }
    }
    LOWRANK_INLINE void decode32(const uint8_t* bytes, float* out) const {
        const Nibbles n(vld1q_u8(bytes));
        V v[8];
        lookup(vzip1q_u8(n.high, n.low), v);
        lookup(vzip2q_u8(n.high, n.low), v + 4);
        for (int i = 0; i < 8; ++i)
            store(out + 4 * i, v[i]);
    }
};
// The high nibbles (half 0) or the low ones (half 1) of a vector of bytes.
LOWRANK_INLINE void lookup_words(const Planes& planes, I words, int half, V* to) {
    const Nibbles nibbles(vreinterpretq_u8_s32(words));
    planes.lookup(half ? nibbles.low : nibbles.high, to);
}

// The same for entries of 16 bits.
struct WordTable {
    uint8x16_t of[2];

    LOWRANK_INLINE WordTable(uint16x8_t first, uint16x8_t second) {
        const uint8x16_t a = vreinterpretq_u8_u16(first), b = vreinterpretq_u8_u16(second);
        of[0] = vuzp1q_u8(a, b), of[1] = vuzp2q_u8(a, b);
    }
    LOWRANK_INLINE void lookup(uint8x16_t index, uint16x8_t* to) const {
        const uint8x16_t low = vqtbl1q_u8(of[0], index), high = vqtbl1q_u8(of[1], index);
        to[0] = vreinterpretq_u16_u8(vzip1q_u8(low, high));
        to[1] = vreinterpretq_u16_u8(vzip2q_u8(low, high));
    }
    LOWRANK_INLINE void decode32(const uint8_t* bytes, void* out) const {
        const Nibbles n(vld1q_u8(bytes));
        uint16x8_t v[4];
        lookup(vzip1q_u8(n.high, n.low), v);
        lookup(vzip2q_u8(n.high, n.low), v + 2);
        for (int i = 0; i < 4; ++i)
            vst1q_u16(static_cast<uint16_t*>(out) + 8 * i, v[i]);
    }
};
// The entries rounded to T.
template <class T>
LOWRANK_INLINE WordTable words_of(const Table& t) {
    return {vcombine_u16(to_bits(T{}, t.of[0]), to_bits(T{}, t.of[1])),
            vcombine_u16(to_bits(T{}, t.of[2]), to_bits(T{}, t.of[3]))};
}

} // namespace lowrank::cpu::LOWRANK_ISA
