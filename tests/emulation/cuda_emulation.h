// Runs CUDA kernels on the host, so that ordinary tests execute them. It has the part of CUDA C++ that this project
// uses.
//
// Compile a .cu file with `g++ -x c++ -std=c++17 -DLOWRANK_EMULATE`, best with -fsanitize=address,undefined. Blocks run
// one after another, in random order. The threads of a block are fibers that switch only where they synchronise, and
// the next ready one is drawn from `emulation::seed`: if a barrier is missing, some seeds give another result. It
// catches:
//   - a barrier or warp operation that not all the threads it names reach, from the same line: message and exit(70)
//   - reading shared memory before it was written, or a lane outside the mask: all bits set, a NaN
//   - out-of-bounds in shared and global memory, misaligned vector accesses: the sanitizers
//   - refused launches: cudaGetLastError, as on a device
// It does not show speed, nor races in which two threads interleave between the same two synchronisation points. It is
// stricter than a GPU in one point: a thread that has returned does not count as having reached a barrier. It has no
// floating-point atomics, because their sums depend on the order. Kernels write LOWRANK_SHARED for __shared__
// (csrc/cuda/launch.h). Types and arithmetic are in cuda_arithmetic.h.
#pragma once

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_arithmetic.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ==== Language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define LOWRANK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                 \
    ::emulation::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// The static key tells one variable (of one template instance) from another.
#define LOWRANK_SHARED(type, name, dimensions)                                                                         \
    typedef type name##_type dimensions;                                                                               \
    static const char name##_key = 0;                                                                                  \
    name##_type& name = *static_cast<name##_type*>(::emulation::shared(&name##_key, sizeof(name##_type)))
#define LOWRANK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulation::dynamic_shared())

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ==== Runtime API

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

namespace emulation {
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> dynamic_limits; // what cudaFuncSetAttribute granted
} // namespace emulation

inline cudaError_t cudaGetLastError() {
    return std::exchange(emulation::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || bytes > 227 * 1024)
        return emulation::last_error = cudaErrorInvalidValue;
    emulation::dynamic_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
    return cudaSuccess;
}

// ==== Fibers

namespace emulation {

inline uint64_t seed = 0;

struct Site { // the place in the source where a thread waits
    const char* file = "";
    int line = 0;
    bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

enum class State { ready, barrier, warp, returned };
enum class Operation { sync, shuffle, ballot };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr; // the address sanitizer's
    uint3 index;
    unsigned number; // in the block
    State state;
    Site site;
    Operation operation; // the warp operation it waits in, and its contribution
    unsigned mask;
    uint64_t value;
    int source;
};

struct Shared {
    void* data;
    size_t bytes;
};

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kDefaultSharedBytes = 48 * 1024;
inline std::vector<std::unique_ptr<Thread>> pool; // kept from block to block for their stacks
inline unsigned threads;                          // of the block
inline std::array<uint32_t, 32> ready;            // per warp, one bit per lane
inline Thread* current;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline void (*body)(void*); // the kernel with its arguments
inline void* body_data;
inline std::map<const void*, Shared> shared_variables;
inline Shared dynamic;
inline std::mt19937_64 generator;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "cuda emulation: block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
    std::vfprintf(stderr, format, arguments);
    std::fprintf(stderr, "\n");
    va_end(arguments);
    std::fflush(nullptr);
    std::_Exit(70);
}

// The C library's own swapcontext: the address sanitizer's wrapper would unpoison the whole stack at each switch and
// lose track of the arrays on it. The annotations below tell the sanitizer about each switch.
inline int swap(ucontext_t* from, ucontext_t* to) {
    static const auto function =
        reinterpret_cast<int (*)(ucontext_t*, const ucontext_t*)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
    return function(from, to);
}
#ifdef __SANITIZE_ADDRESS__
inline void start_switch(void** save, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(save, stack, bytes);
}
inline void finish_switch(void* saved, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(saved, stack, bytes);
}
inline void unpoison(void* data, size_t bytes) {
    __asan_unpoison_memory_region(data, bytes);
}
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
inline void unpoison(void*, size_t) {}
#endif

inline void enter(Thread& thread) { // scheduler -> thread
    current = &thread;
    threadIdx = thread.index;
    start_switch(&scheduler_fake_stack, thread.stack.get(), kStackBytes);
    swap(&scheduler, &thread.context);
    finish_switch(scheduler_fake_stack, nullptr, nullptr);
}

inline void leave() { // thread -> scheduler, and back when it is this thread's turn again
    Thread& self = *current;
    // A null pointer frees the sanitizer's stack of a thread that does not return here.
    start_switch(self.state == State::returned ? nullptr : &self.fake_stack, scheduler_stack, scheduler_stack_bytes);
    swap(&self.context, &scheduler);
    finish_switch(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

inline void set_ready(Thread& thread, bool on) {
    const uint32_t bit = uint32_t{1} << (thread.number % 32);
    uint32_t& warp = ready[thread.number / 32];
    warp = on ? warp | bit : warp & ~bit;
    if (on)
        thread.state = State::ready;
}

inline void fiber() {
    finish_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    body(body_data);
    current->state = State::returned;
    set_ready(*current, false);
    leave();
}

// ==== Scheduling

inline std::string describe() {
    std::map<std::string, int> groups;
    for (unsigned i = 0; i < threads; ++i) {
        const Thread& thread = *pool[i];
        std::string where = "returned";
        if (thread.state != State::returned)
            where = std::string("in a ") + (thread.state == State::barrier ? "barrier" : "warp operation") + " at " +
                    thread.site.file + ":" + std::to_string(thread.site.line);
        ++groups[where];
    }
    std::string text;
    for (const auto& [where, count] : groups)
        text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + where;
    return text;
}

inline void prepare(Thread& thread, unsigned number) {
    if (!thread.stack)
        thread.stack = std::make_unique<char[]>(kStackBytes);
    unpoison(thread.stack.get(), kStackBytes);
    thread.number = number;
    thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber, 0);
    set_ready(thread, true);
}

// The next thread to run, or null. In half of the blocks one warp runs as far ahead as it can; in the others all warps
// advance equally. A missing barrier shows in one of the two.
inline Thread* next(const std::vector<unsigned>& order, bool ahead) {
    std::array<unsigned, 32> candidates;
    unsigned count = 0;
    for (unsigned warp : order)
        if (ready[warp])
            candidates[count++] = warp;
    if (count == 0)
        return nullptr;
    const unsigned warp = candidates[ahead ? 0 : generator() % count];
    uint32_t lanes = ready[warp];
    for (unsigned skip = generator() % __builtin_popcount(lanes); skip > 0; --skip)
        lanes &= lanes - 1;
    return pool[warp * 32 + __builtin_ctz(lanes)].get();
}

inline void run_block() {
    std::vector<unsigned> order((threads + 31) / 32);
    for (unsigned i = 0; i < order.size(); ++i)
        order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    const bool ahead = generator() % 2;
    for (unsigned i = 0; i < threads; ++i)
        prepare(*pool[i], i);
    for (;;) {
        while (Thread* thread = next(order, ahead))
            enter(*thread);
        unsigned returned = 0, waiting = 0;
        for (unsigned i = 0; i < threads; ++i) {
            returned += pool[i]->state == State::returned;
            waiting += pool[i]->state == State::barrier && pool[i]->site == pool[0]->site;
        }
        if (returned == threads)
            return;
        if (waiting != threads)
            fail("threads diverge: %s", describe().c_str());
        for (unsigned i = 0; i < threads; ++i)
            set_ready(*pool[i], true);
    }
}

inline void wait(State state, Site site) {
    current->state = state;
    current->site = site;
    set_ready(*current, false);
}

// Waits until every lane of `mask` has reached the same operation, then returns the value of lane `source`, or the
// ballot.
inline uint64_t warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site) {
    Thread& self = *current;
    const unsigned lane = self.number % 32, first = self.number - lane;
    if (!(mask >> lane & 1))
        fail("lane %u calls a warp operation at %s:%d whose mask 0x%x leaves it out", lane, site.file, site.line, mask);
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.source = source;
    wait(State::warp, site);

    bool complete = true;
    uint64_t values[32], ballot = 0;
    for (unsigned i = 0; i < 32; ++i) {
        values[i] = ~uint64_t{0}; // the value of a lane outside the mask
        if (!(mask >> i & 1))
            continue;
        const Thread* other = first + i < threads ? pool[first + i].get() : nullptr;
        complete = complete && other && other->state == State::warp && other->operation == operation &&
                   other->mask == mask && other->site == site;
        if (!complete)
            break;
        values[i] = other->value;
        ballot |= uint64_t{other->value != 0} << i;
    }
    if (complete)
        for (unsigned i = 0; i < 32; ++i)
            if (mask >> i & 1) {
                Thread& other = *pool[first + i];
                other.value = operation == Operation::ballot ? ballot : values[other.source];
                set_ready(other, true);
            }
    leave();
    return self.value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = warp_operation(Operation::shuffle, mask, bits, source, site);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

inline int lane() {
    return static_cast<int>(current->number % 32);
}

// ==== Shared memory and launches

inline Shared allocate(size_t bytes) { // of exact size, so that the sanitizer sees its end; full of NaN
    void* data = std::malloc(bytes);
    std::memset(data, 0xff, bytes);
    return {data, bytes};
}

inline void* shared(const void* key, size_t bytes) {
    auto found = shared_variables.find(key);
    if (found == shared_variables.end()) {
        size_t total = bytes;
        for (const auto& [other, variable] : shared_variables)
            total += variable.bytes;
        if (total > kDefaultSharedBytes)
            fail("%zu bytes of static shared memory, CUDA allows %zu", total, kDefaultSharedBytes);
        found = shared_variables.emplace(key, allocate(bytes)).first;
    }
    return found->second.data;
}

inline void* dynamic_shared() {
    return dynamic.data;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... arguments) {
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, size = uint64_t{block.x} * block.y * block.z;
    if (blocks == 0 || size == 0 || size > 1024 || block.z > 64 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    const auto limit = dynamic_limits.find(reinterpret_cast<const void*>(kernel));
    if (shared_bytes > (limit == dynamic_limits.end() ? kDefaultSharedBytes : limit->second)) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    // Evaluates the arguments once; every thread gets its own copy, as of a kernel's parameters.
    auto call = [kernel, parameters = std::tuple<P...>(std::forward<A>(arguments)...)] {
        std::apply(kernel, parameters);
    };
    body = [](void* data) { (*static_cast<decltype(call)*>(data))(); };
    body_data = &call;
    generator.seed(seed);
    gridDim = grid;
    blockDim = block;
    threads = static_cast<unsigned>(size);
    while (pool.size() < threads)
        pool.push_back(std::make_unique<Thread>());
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i)
        order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    for (uint64_t i : order) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        dynamic = allocate(shared_bytes);
        run_block();
        std::free(dynamic.data);
        for (const auto& [key, variable] : shared_variables)
            std::free(variable.data);
        shared_variables.clear();
    }
}

} // namespace emulation

// ==== Synchronisation, shuffles, votes

// The compiler evaluates a default argument at the call, so it yields the kernel's line.
#define LOWRANK_SITE ::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(LOWRANK_SITE) {
    emulation::wait(emulation::State::barrier, site);
    emulation::leave();
}
inline void __syncwarp(unsigned mask = 0xffffffff, LOWRANK_SITE) {
    emulation::warp_operation(emulation::Operation::sync, mask, 0, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, LOWRANK_SITE) {
    const uint64_t vote = predicate != 0;
    return static_cast<unsigned>(emulation::warp_operation(emulation::Operation::ballot, mask, vote, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, LOWRANK_SITE) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LOWRANK_SITE) {
    return __ballot_sync(mask, predicate, site) == mask;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, LOWRANK_SITE) {
    const int first = emulation::lane() & ~(width - 1);
    return emulation::shuffle(mask, value, first + (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LOWRANK_SITE) {
    const int lane = emulation::lane(), source = lane - static_cast<int>(delta);
    return emulation::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LOWRANK_SITE) {
    const int lane = emulation::lane(), source = lane + static_cast<int>(delta);
    return emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, LOWRANK_SITE) {
    const int lane = emulation::lane(), source = lane ^ lanes;
    return emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
#undef LOWRANK_SITE

inline void __threadfence() {}
inline void __threadfence_block() {}

// Plain operations suffice, because threads switch only at synchronisation. Integers only, because sums of floats
// depend on the order.
template <typename T, typename F>
T lowrank_atomic(T* address, F update) {
    static_assert(std::is_integral_v<T>, "atomics on floats are not deterministic");
    const T old = *address;
    *address = update(old);
    return old;
}
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    return lowrank_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
    return lowrank_atomic(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
    return lowrank_atomic(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
    return lowrank_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
    return lowrank_atomic(address, [=](T old) { return old == compare ? value : old; });
}
