// Scratch memory. Compiled with baseline flags.
#include "cpu/runtime/scratch.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace lowrank::cpu {

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
    if (first < last)
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // only a hint, so an error is ignored
#endif
}

namespace {

constexpr size_t kPage = 4096, kLeastChunk = size_t(1) << 20;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

struct Chunk {
    std::unique_ptr<char, Free> memory;
    size_t bytes;
};

// The arrays of a thread lie one after the other in chunks, so that no array moves when another is added. When a stack
// of several chunks becomes empty, one chunk of their total size replaces them.
struct Stack {
    std::vector<Chunk> chunks;
    size_t chunk = 0, used = 0; // the top
    size_t next = kLeastChunk;  // least size of the next chunk, in bytes
};

thread_local Stack stack;

// Tell the address sanitizer what a thread may touch: an array up to its last byte, and nothing above the stack's top.
// Without the sanitizer they do nothing.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = kPage; // between arrays
void allow(const void* memory, size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
}
void forbid(const void* memory, size_t bytes) {
    ASAN_POISON_MEMORY_REGION(memory, bytes);
}
#else
constexpr size_t kGap = 0;
void allow(const void*, size_t) {}
void forbid(const void*, size_t) {}
#endif

} // namespace

ScratchMark scratch_mark() {
    return {stack.chunk, stack.used};
}

void* scratch_take(size_t asked) {
    const size_t bytes = (asked + kGap + kPage - 1) / kPage * kPage;
    for (size_t chunk = stack.chunk, used = stack.used; chunk < stack.chunks.size(); ++chunk, used = 0)
        if (stack.chunks[chunk].bytes - used >= bytes) {
            stack.chunk = chunk, stack.used = used + bytes;
            allow(stack.chunks[chunk].memory.get() + used, asked);
            return stack.chunks[chunk].memory.get() + used;
        }
    const size_t size = bytes > stack.next ? bytes : stack.next;
    Chunk chunk{std::unique_ptr<char, Free>(static_cast<char*>(std::aligned_alloc(kPage, size))), size};
    if (!chunk.memory)
        throw std::bad_alloc();
    forbid(chunk.memory.get() + asked, size - asked);
    stack.chunks.push_back(std::move(chunk));
    stack.chunk = stack.chunks.size() - 1, stack.used = bytes, stack.next = kLeastChunk;
    return stack.chunks.back().memory.get();
}

void scratch_release(ScratchMark mark) {
    stack.chunk = mark.chunk, stack.used = mark.used;
    for (size_t chunk = mark.chunk, used = mark.used; chunk < stack.chunks.size(); ++chunk, used = 0)
        forbid(stack.chunks[chunk].memory.get() + used, stack.chunks[chunk].bytes - used);
    if (stack.chunk > 0 || stack.used > 0 || stack.chunks.size() < 2)
        return;
    stack.next = 0;
    for (const Chunk& chunk : stack.chunks)
        stack.next += chunk.bytes;
    stack.chunks.clear();
}

} // namespace lowrank::cpu
