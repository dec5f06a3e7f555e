// The CPU side's entry points: one table of functions per instruction set, chosen at run time.
//
// nf4.cpp and adapted_linear.cpp are compiled once per instruction set, each time with other compiler flags and another
// LOWRANK_ISA, the namespace that keeps their symbols apart. This header is shared by all of them, so it holds plain
// data only: an inline function here could be kept by the linker in its AVX-512 version and run on a machine without.
#pragma once

#include <cstdint>

namespace lowrank::cpu {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kNf4 = 3 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// A matrix of floats with unit inner stride; `stride` counts elements.
struct Rows {
    const void* data;
    int dtype;
    int64_t stride;
};

// Block scales: float32 absmax, or uint8 indices with a second level (absmax2 and offset not null).
struct Scales {
    const void* absmax;
    const float* absmax2;
    const float* offset;
    int64_t block_size;
};

// W [N, K]: packed nibbles with scales, or dense rows of stride K.
struct Weight {
    const void* data;
    int dtype;
    Scales scales;
};

// y = W x + bias + scale * U h, h = D drop(x), and its gradients. Null pointers are absent operands or unwanted
// results.
struct AdaptedLinear {
    bool many; // form: decode a tile and feed a register-blocked product, or decode next to the multiply
    int64_t M, N, K, R;
    Rows x;
    Weight weight;
    Rows down, up; // D [R, K], U [N, R]
    const void* bias;
    int bias_dtype;
    float scale;
    double dropout;
    int64_t seed;
    void* y;  // [M, N], dtype of x
    float* h; // [M, R]
    int threads;
};

struct AdaptedLinearBackward {
    int64_t M, N, K, R;
    Rows g, x;
    const float* h; // [M, R]
    Weight weight;
    Rows down, up;
    float scale;
    double dropout;
    int64_t seed;
    void* dx;    // [M, K], dtype of g
    void* ddown; // [R, K], dtype of down
    void* dup;   // [N, R], dtype of up
    int threads;
};

struct Nf4Kernels {
    void (*quantize)(Rows w, int64_t numel, int64_t block_size, uint8_t* packed, float* absmax, int threads);
    void (*absmax_quantize)(const float* absmax, const float* offset, int64_t blocks, uint8_t* index, float* absmax2,
                            int threads);
    void (*dequantize)(const uint8_t* packed, Scales scales, int64_t numel, void* out, int out_dtype, int threads);
};

struct AdaptedLinearKernels {
    void (*forward)(const AdaptedLinear&);
    void (*backward)(const AdaptedLinearBackward&);
};

struct Isa {
    const char* name;
    const Nf4Kernels* nf4;
    const AdaptedLinearKernels* adapted_linear;
};

#if defined(__x86_64__)
#define LOWRANK_ISAS(APPLY) APPLY(avx512_bf16) APPLY(avx512) APPLY(avx2) APPLY(portable)
#else
#define LOWRANK_ISAS(APPLY) APPLY(portable)
#endif

#define LOWRANK_DECLARE(isa)                                                                                           \
    namespace isa {                                                                                                    \
    extern const Nf4Kernels nf4_kernels;                                                                               \
    extern const AdaptedLinearKernels adapted_linear_kernels;                                                          \
    }
LOWRANK_ISAS(LOWRANK_DECLARE)
#undef LOWRANK_DECLARE

// The instruction set in use: the best that the machine and the build have, or what LOWRANK_OPS_ISA or set_isa names.
const Isa& isa();
// The i-th usable instruction set, best first; null past the end.
const Isa* usable_isa(int i);
// "" = automatic. Throws std::invalid_argument if the machine or the build lacks `name`.
void set_isa(const char* name);

} // namespace lowrank::cpu
