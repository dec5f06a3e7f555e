// Basics of every file that is compiled once per instruction set: functions of std, written again in the namespace
// LOWRANK_ISA for the reason that runtime/isa.h gives.
#pragma once

#include "cpu/operands.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/threads.h"

#include <cstring>
#include <type_traits>

#define LOWRANK_INLINE inline __attribute__((always_inline))

namespace lowrank::cpu::LOWRANK_ISA {

LOWRANK_INLINE int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
LOWRANK_INLINE int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
LOWRANK_INLINE int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
LOWRANK_INLINE int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// Calls body(i) or body(i, thread) for every task i.
template <class F>
inline void parallel_for(int threads, int64_t tasks, const F& body) {
    const auto task = [](void* context, int64_t i, int thread) {
        const F& body = *static_cast<const F*>(context);
        if constexpr (std::is_invocable_v<const F&, int64_t, int>)
            body(i, thread);
        else
            body(i);
    };
    run_tasks(threads, tasks, task, const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory of the calling thread until the end of the block. Other threads may read and write it meanwhile.
class Scratch {
public:
    LOWRANK_INLINE Scratch() : mark_(scratch_mark()) {}
    LOWRANK_INLINE ~Scratch() { scratch_release(mark_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    LOWRANK_INLINE T* take(int64_t count) const {
        return static_cast<T*>(scratch_take(size_t(count + 1) * sizeof(T)));
    }

private:
    ScratchMark mark_;
};

// Calls body(T{}) with the element type of `dtype`.
template <class F>
LOWRANK_INLINE void with_type(int dtype, const F& body) {
    if (dtype == kFloat32)
        body(float{});
    else if (dtype == kBFloat16)
        body(BFloat16{});
    else
        body(Float16{});
}

LOWRANK_INLINE int64_t size_of(int dtype) {
    return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2;
}

} // namespace lowrank::cpu::LOWRANK_ISA
