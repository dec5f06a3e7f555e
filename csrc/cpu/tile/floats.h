// The unit of a float.
#pragma once

#include "cpu/vector/vector.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

struct Floats {
    using Element = float;
    static constexpr int kPerUnit = 1;
    static constexpr int kLeft = 1;        // floats of a unit on the left
    static constexpr int64_t kFours = 128; // as of Pairs, but never asked for
    static LOWRANK_INLINE V lanes(const float* p, int) { return load(p); }
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return fma(l, p, c); }
    // kLanes units of one t from rows t * kPerUnit, t * kPerUnit + 1, … of a matrix.
    static LOWRANK_INLINE void units_of(const float* row, const float*, float* to) { store(to, load(row)); }
};

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
