// What must not depend on an instruction set: choosing one, threads, scratch memory. Compiled with baseline flags.
#include "cpu/isa.h"
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>
#if defined(LOWRANK_OPS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace lowrank::cpu {

// ---- instruction sets -----------------------------------------------------------------------------------------------

namespace {

#if defined(LOWRANK_OPS_AMX)
// Whether the processor has tiles of bfloat16 and Linux lets this process and its threads use them.
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

bool machine_has(const char* name) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!std::strcmp(name, "avx2"))
        return avx2;
    if (!std::strcmp(name, "avx512"))
        return avx512;
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (!std::strcmp(name, "avx512_bf16"))
        return bf16;
#if defined(LOWRANK_OPS_AMX)
    if (!std::strcmp(name, "amx"))
        return bf16 && matrix_unit_granted();
#endif
#endif
    return !std::strcmp(name, "portable");
}

const std::vector<Isa>& usable_isas() {
    static const std::vector<Isa> usable = [] {
        std::vector<Isa> found;
#define LOWRANK_FIND(isa)                                                                                              \
    if (machine_has(#isa))                                                                                             \
        found.push_back({#isa, &isa::nf4_kernels, &isa::adapted_linear_kernels, &isa::svd_linear_kernels,              \
                         &isa::routed_linear_kernels, &isa::preference_kernels});
        LOWRANK_ISAS(LOWRANK_FIND)
#undef LOWRANK_FIND
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

// ---- threads --------------------------------------------------------------------------------------------------------

namespace {

struct Region {
    void (*task)(void*, int64_t, int);
    void* context;
    std::atomic<int> threads{0};

    // A thread's share of the tasks, neighbours in memory, so that what is prefetched beyond one task is of use for the
    // next. A thread that has done its own goes on with those of others.
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Share> shares;

    Region(void (*task)(void*, int64_t, int), void* context, int64_t tasks, int threads)
        : task(task), context(context), shares(size_t(threads)) {
        for (int i = 0; i < threads; ++i) {
            shares[size_t(i)].next = tasks * i / threads;
            shares[size_t(i)].end = tasks * (i + 1) / threads;
        }
    }

    static void work(void* region) {
        auto& self = *static_cast<Region*>(region);
        const size_t first = size_t(self.threads.fetch_add(1, std::memory_order_relaxed)), count = self.shares.size();
        for (size_t i = 0; i < count; ++i) {
            Share& share = self.shares[(first + i) % count];
            for (int64_t t; (t = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                self.task(self.context, t, int(first));
        }
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// libgomp's entry point for a parallel region. PyTorch loads its OpenMP runtime with global symbols, so the first
// look-up finds that one; linking a runtime of our own would make a second pool that competes for the same cores.
GompParallel gomp_parallel() {
    static const GompParallel found = [] {
        void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
        if (!symbol)
            if (void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL))
                symbol = dlsym(library, "GOMP_parallel");
        return reinterpret_cast<GompParallel>(symbol);
    }();
    return found;
}

} // namespace

void run_tasks(int threads, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
    if (threads > tasks)
        threads = int(tasks);
    if (threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i)
            task(context, i, 0);
        return;
    }
    Region region(task, context, tasks, threads);
    if (GompParallel parallel = gomp_parallel()) {
        parallel(Region::work, &region, unsigned(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i)
        others.emplace_back(Region::work, &region);
    Region::work(&region);
    for (std::thread& other : others)
        other.join();
}

// ---- scratch memory -------------------------------------------------------------------------------------------------

void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
    if (first < last)
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // a wish: an error changes nothing
#endif
}

void* scratch_memory(int slot, size_t bytes) {
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    struct Buffer {
        std::unique_ptr<void, Free> memory;
        size_t bytes = 0;
    };
    constexpr int kSlots = 16;
    constexpr size_t kPage = 4096;
    thread_local Buffer buffers[kSlots];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
        buffer = {};
        buffer.memory.reset(std::aligned_alloc(kPage, rounded));
        if (!buffer.memory)
            throw std::bad_alloc();
        buffer.bytes = rounded;
    }
    return buffer.memory.get();
}

} // namespace lowrank::cpu
