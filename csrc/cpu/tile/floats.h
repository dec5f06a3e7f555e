// The unit of one float.
#pragma once

#include "cpu/vector/vector.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

struct Floats {
    using Element = float;
    static constexpr int kPerUnit = 1;
    static constexpr int kLeft = 1;
    static LOWRANK_INLINE V lanes(const float* p, int) { return load(p); }
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return fma(l, p, c); }
    static LOWRANK_INLINE void units_of(const float* row, const float*, float* to) { store(to, load(row)); }
};

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
