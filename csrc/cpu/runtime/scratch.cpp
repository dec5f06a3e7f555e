// Scratch memory. Compiled with baseline flags.
#include "cpu/runtime/scratch.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace lowrank::cpu {

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
