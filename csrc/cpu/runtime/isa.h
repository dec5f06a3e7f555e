// The CPU side's entry points: one table of functions per instruction set, chosen at run time.
//
// nf4.cpp and the op families are compiled once per instruction set, each time with other compiler
// flags and another LOWRANK_ISA, the namespace that keeps their symbols apart. This header is shared by all of them, so
// it holds plain data only: an inline function here could be kept by the linker in its AVX-512 version and run on a
// machine without.
#pragma once

#include "cpu/operands.h"

namespace lowrank::cpu {

// Of the 4-bit formats; `format` is an element type.
struct FormatKernels {
    void (*quantize)(int format, Rows w, int64_t numel, int64_t block_size, uint8_t* packed, void* scales, int threads);
    void (*absmax_quantize)(const float* absmax, const float* offset, int64_t blocks, uint8_t* index, float* absmax2,
                            int threads);
    void (*dequantize)(Matrix w, int64_t numel, void* out, int out_dtype, int threads);
};

struct AdaptedLinearKernels {
    void (*forward)(const AdaptedLinear&);
    void (*backward)(const AdaptedLinearBackward&);
};

struct SvdLinearKernels {
    void (*forward)(const SvdLinear&);
    void (*backward)(const SvdLinearBackward&);
};

struct RoutedLinearKernels {
    void (*forward)(const RoutedLinear&);
};

struct PreferenceKernels {
    void (*forward)(const Preference&);
    void (*backward)(const Preference&);
};

struct Isa {
    const char* name;
    const FormatKernels* formats;
    const AdaptedLinearKernels* adapted_linear;
    const SvdLinearKernels* svd_linear;
    const RoutedLinearKernels* routed_linear;
    const PreferenceKernels* preference;
};

#if defined(LOWRANK_OPS_AMX)
#define LOWRANK_ISAS(APPLY) APPLY(amx) APPLY(avx512_bf16) APPLY(avx512) APPLY(avx2) APPLY(portable)
#elif defined(__x86_64__)
#define LOWRANK_ISAS(APPLY) APPLY(avx512_bf16) APPLY(avx512) APPLY(avx2) APPLY(portable)
#else
#define LOWRANK_ISAS(APPLY) APPLY(portable)
#endif

#define LOWRANK_DECLARE(isa)                                                                                           \
    namespace isa {                                                                                                    \
    extern const FormatKernels format_kernels;                                                                         \
    extern const AdaptedLinearKernels adapted_linear_kernels;                                                          \
    extern const SvdLinearKernels svd_linear_kernels;                                                                  \
    extern const RoutedLinearKernels routed_linear_kernels;                                                            \
    extern const PreferenceKernels preference_kernels;                                                                 \
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
