// MXFP4 (OCP Microscaling formats v1.0): blocks of 32 E2M1 numbers share one E8M0 scale, a power of two.
#pragma once

#include <cstdint>

// The index is the nibble: a sign, two bits of exponent and one of mantissa.
#define LOWRANK_MXFP4_LEVELS                                                                                           \
    0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f

// The nibble of a magnitude is the number of thresholds below it. They are midpoints of neighbouring levels; a tie goes
// to the even nibble, so if the upper nibble is even, the threshold is the float before the midpoint.
#define LOWRANK_MXFP4_THRESHOLDS 0.25f, 0x1.7ffffep-1f, 1.25f, 0x1.bffffep+0f, 2.5f, 0x1.bffffep+1f, 5.0f

namespace lowrank {

constexpr int kExponentBias = 127;
constexpr int kExponentNaN = 255;
constexpr int kLargestExponent = 2; // exponent of the largest level, 6 = 1.5 * 2^2

// The bits of the float32 2^(byte - 127), NaN for 255.
LOWRANK_HD static inline uint32_t exponent_bits(uint8_t byte) {
    return byte == kExponentNaN ? 0x7fc00000u : byte == 0 ? 0x00400000u : uint32_t(byte) << 23;
}

} // namespace lowrank
