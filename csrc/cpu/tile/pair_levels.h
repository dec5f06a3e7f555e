// Levels in bfloat16 for sums that are scaled afterwards, of every unit of two bfloat16. Included by files that are
// compiled once per instruction set.
#pragma once

#include "cpu/vector/vector.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// The levels of even and of odd columns are the format's levels times its stretch. FP4 and MXFP4 levels are exact.
// Rounding an NF4 level shifts every weight of that level, so the stretch and the directions of rounding are chosen
// such that the error of a sum of weights is at most 1.2e-5 of the sum of their magnitudes, for normal, uniform and
// Laplace weights (test_levels_of_pairs). The root mean square error of a weight is 1.2e-3, less than the 1.65e-3 of
// level times scale rounded. The powers of two keep a sum of eight products from overflowing if x is finite.
constexpr float kNf4Stretch = 1.2425f / 16, kFp4Stretch = 12.0f / 128, kMxfp4Stretch = 1.0f / 64;
constexpr float kNf4Levels[2][16] = {
    {-1.2421875f, -0.8671875f, -0.65234375f, -0.490234375f, -0.353515625f, -0.23046875f, -0.11328125f, 0.0f,
     0.09912109375f, 0.2001953125f, 0.306640625f, 0.419921875f, 0.546875f, 0.69921875f, 0.8984375f, 1.2421875f},
    {-1.2421875f, -0.86328125f, -0.65234375f, -0.490234375f, -0.353515625f, -0.23046875f, -0.11328125f, 0.0f,
     0.09912109375f, 0.2001953125f, 0.306640625f, 0.419921875f, 0.546875f, 0.69921875f, 0.8984375f, 1.2421875f}};

LOWRANK_INLINE float unstretch_of(int type) {
    return type == kNf4 ? 1 / kNf4Stretch : type == kFp4 ? 1 / kFp4Stretch : 1 / kMxfp4Stretch;
}

// The levels of even columns (`odd` = 0) or of odd ones.
LOWRANK_INLINE Table pair_levels(int type, const float* levels, int odd) {
    return type == kNf4 ? mul(load_table(kNf4Levels[odd]), 1.0f / 16)
                        : mul(load_table(levels), type == kFp4 ? kFp4Stretch : kMxfp4Stretch);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
