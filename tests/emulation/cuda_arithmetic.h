// Vector types, number formats and rounding of CUDA C++ for kernels that cuda_emulation.h runs on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using std::max;
using std::min;

template <typename T>
T __ldg(const T* address) {
    return *address;
}

// These intrinsics keep nvcc from contracting a * b + c. With -ffp-contract=fast g++ contracts too; the empty assembly
// prevents it here.
inline float lowrank_rounded(float x) {
    asm volatile("" : "+m"(x));
    return x;
}
inline float __fmul_rn(float a, float b) {
    return lowrank_rounded(a * b);
}
inline float __fadd_rn(float a, float b) {
    return lowrank_rounded(lowrank_rounded(a) + lowrank_rounded(b));
}
inline float __fsub_rn(float a, float b) {
    return lowrank_rounded(lowrank_rounded(a) - lowrank_rounded(b));
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fsqrt_rn(float a) {
    return std::sqrt(a);
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float rsqrtf(float a) {
    return 1.0f / std::sqrt(a);
}

template <typename To, typename From>
To lowrank_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned bits) {
    return lowrank_bits<float>(bits);
}
inline float __int_as_float(int bits) {
    return lowrank_bits<float>(bits);
}
inline unsigned __float_as_uint(float x) {
    return lowrank_bits<unsigned>(x);
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

#define LOWRANK_VECTOR(type, element, bytes)                                                                           \
    struct alignas(bytes) type##2 {                                                                                    \
        element x, y;                                                                                                  \
    };                                                                                                                 \
    struct alignas(2 * bytes) type##4 {                                                                                \
        element x, y, z, w;                                                                                            \
    };                                                                                                                 \
    inline type##2 make_##type##2(element x, element y) {                                                              \
        return {x, y};                                                                                                 \
    }                                                                                                                  \
    inline type##4 make_##type##4(element x, element y, element z, element w) {                                        \
        return {x, y, z, w};                                                                                           \
    }
LOWRANK_VECTOR(float, float, 8)
LOWRANK_VECTOR(int, int, 8)
LOWRANK_VECTOR(uint, unsigned, 8)
#undef LOWRANK_VECTOR

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (std::isnan(x))
        return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
    return __uint_as_float(uint32_t{x.bits} << 16);
}

inline __half __float2half_rn(float x) {
    const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(x) & 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000)
        return {0x7fff}; // NaN
    if (bits >= 0x477ff000)
        half = 0x7c00; // 65520 and larger numbers round to infinity
    else if (bits < 0x38800000)
        half = __float_as_uint(std::fabs(x) + 0.5f) - 0x3f000000; // subnormal: adding 0.5 rounds to multiples of 2^-24
    else
        half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    return {static_cast<uint16_t>(sign | half)};
}
inline float __half2float(__half x) {
    const uint32_t exponent = x.bits & 0x7c00, magnitude = uint32_t{x.bits} << 13 & 0x0fffe000;
    const float value = exponent == 0x7c00 ? __uint_as_float(magnitude | 0x7f800000)
                                           : __uint_as_float(magnitude) * 0x1p112f; // moves the exponent's bias
    return std::copysign(value, __int_as_float(x.bits & 0x8000 ? INT32_MIN : 0));
}

inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
    return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __half2 __floats2half2_rn(float a, float b) {
    return {__float2half_rn(a), __float2half_rn(b)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
    return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline float2 __half22float2(__half2 v) {
    return {__half2float(v.x), __half2float(v.y)};
}
