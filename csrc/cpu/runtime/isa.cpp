// Chooses an instruction set. Compiled with baseline flags.
#include "cpu/runtime/isa.h"

#if defined(LOWRANK_OPS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace lowrank::cpu {

namespace {

#if defined(LOWRANK_OPS_AMX)
// True if the processor has tiles of bfloat16 and Linux grants this process and its threads their use.
bool matrix_unit_granted() {
#if defined(LOWRANK_OPS_EMULATE_AMX)
    return true;
#endif
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile))
        return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(__aarch64__)
bool arm_has_bf16() {
#if defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
    constexpr unsigned long kBf16 = 1ul << 14;
    return getauxval(AT_HWCAP2) & kBf16;
#endif
}
#endif

bool machine_has(const char* name) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!std::strcmp(name, "avx2"))
        return avx2;
    if (!std::strcmp(name, "avx_vnni"))
        return avx2 && __builtin_cpu_supports("avxvnni");
    if (!std::strcmp(name, "avx512"))
        return avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (!std::strcmp(name, "avx512_vnni"))
        return vnni;
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (!std::strcmp(name, "avx512_bf16"))
        return bf16;
#if defined(LOWRANK_OPS_AMX)
    if (!std::strcmp(name, "amx"))
        return bf16 && matrix_unit_granted();
#endif
#endif
#if defined(__aarch64__)
    if (!std::strcmp(name, "neon_bf16"))
        return arm_has_bf16();
    return !std::strcmp(name, "neon");
#else
    return !std::strcmp(name, "portable");
#endif
}

const std::vector<Isa>& usable_isas() {
    static const std::vector<Isa> usable = [] {
        std::vector<Isa> found;
#define LOWRANK_ADDRESS(Kernels, family) , &family##_kernels
#define LOWRANK_FIND(isa)                                                                                              \
    if (machine_has(#isa)) {                                                                                           \
        using namespace isa;                                                                                           \
        found.push_back({#isa LOWRANK_FAMILIES(LOWRANK_ADDRESS)});                                                     \
    }
        LOWRANK_ISAS(LOWRANK_FIND)
#undef LOWRANK_FIND
#undef LOWRANK_ADDRESS
#if defined(__x86_64__)
        // Intel's processors multiply pairs of bfloat16 at half the rate of whole numbers of 16 bits.
        const auto pairs = std::find_if(found.begin(), found.end(),
                                        [](const Isa& isa) { return !std::strcmp(isa.name, "avx512_bf16"); });
        if (__builtin_cpu_is("intel") && pairs != found.end() && pairs + 1 != found.end())
            std::iter_swap(pairs, pairs + 1);
#endif
        return found;
    }();
    return usable;
}

const Isa* find_isa(const char* name) {
    if (!*name)
        return &usable_isas().front();
    std::string names;
    for (const Isa& candidate : usable_isas()) {
        if (!std::strcmp(candidate.name, name))
            return &candidate;
        names += std::string(names.empty() ? "" : ", ") + candidate.name;
    }
    throw std::invalid_argument("instruction set '" + std::string(name) + "' is not usable here; usable: " + names);
}

std::atomic<const Isa*>& chosen_isa() {
    static std::atomic<const Isa*> chosen = [] {
        const char* name = std::getenv("LOWRANK_OPS_ISA");
        return find_isa(name ? name : "");
    }();
    return chosen;
}

} // namespace

const Isa& isa() {
    return *chosen_isa().load(std::memory_order_relaxed);
}

const Isa* usable_isa(int i) {
    return i < int(usable_isas().size()) ? &usable_isas()[i] : nullptr;
}

void set_isa(const char* name) {
    chosen_isa() = find_isa(name);
}

} // namespace lowrank::cpu
