// The CPU side's entry points: one table of functions per instruction set, chosen at run time.
//
// The families of ops (cpu/*.cpp) are compiled once per instruction set, each time with other compiler flags and
// another LOWRANK_ISA, the namespace that keeps their symbols apart. All of them share this header, so it holds plain
// data only: the linker could keep the AVX-512 version of an inline function, which would then run on a machine without
// AVX-512.
#pragma once

#include "cpu/operands.h"

namespace lowrank::cpu {

struct Isa {
    const char* name;
#define LOWRANK_TABLE(Kernels, family) const Kernels* family;
    LOWRANK_FAMILIES(LOWRANK_TABLE)
#undef LOWRANK_TABLE
};

#define LOWRANK_AVX(APPLY)                                                                                             \
    APPLY(avx512_bf16) APPLY(avx512_vnni) APPLY(avx512) APPLY(avx_vnni) APPLY(avx2) APPLY(portable)
#if defined(LOWRANK_OPS_ISA_ONLY)          // a build for tests of one instruction set
#define LOWRANK_ONE(APPLY, isa) APPLY(isa) // a name that is a macro becomes what the macro says
#define LOWRANK_ISAS(APPLY) LOWRANK_ONE(APPLY, LOWRANK_OPS_ISA_ONLY)
#elif defined(LOWRANK_OPS_AMX)
#define LOWRANK_ISAS(APPLY) APPLY(amx) LOWRANK_AVX(APPLY)
#elif defined(__x86_64__)
#define LOWRANK_ISAS(APPLY) LOWRANK_AVX(APPLY)
#elif defined(__aarch64__)
#define LOWRANK_ISAS(APPLY) APPLY(neon_bf16) APPLY(neon)
#else
#define LOWRANK_ISAS(APPLY) APPLY(portable)
#endif

#define LOWRANK_DECLARE_KERNELS(Kernels, family) extern const Kernels family##_kernels;
#define LOWRANK_DECLARE(isa)                                                                                           \
    namespace isa {                                                                                                    \
    LOWRANK_FAMILIES(LOWRANK_DECLARE_KERNELS)                                                                          \
    }
LOWRANK_ISAS(LOWRANK_DECLARE)
#undef LOWRANK_DECLARE
#undef LOWRANK_DECLARE_KERNELS

// The instruction set in use: the best that the machine and the build have, or what LOWRANK_OPS_ISA or set_isa names.
const Isa& isa();
// The i-th usable instruction set, best first; null past the end.
const Isa* usable_isa(int i);
// "" = automatic. Throws std::invalid_argument if the machine or the build lacks `name`.
void set_isa(const char* name);

} // namespace lowrank::cpu
