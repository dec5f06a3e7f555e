// FP4 of bitsandbytes: a sign, two bits of exponent and one of mantissa, with bitsandbytes' own assignment of nibbles,
// divided by the largest level. Scales: absmax.h.
#pragma once

// The index is the nibble: 0, 1/16, 8, 12, 4, 6, 2 and 3 twelfths, and their negatives; nibble 8 is +0.
#define LOWRANK_FP4_LEVELS                                                                                             \
    0.0f, 0.0052083335f, 0.6666667f, 1.0f, 0.33333334f, 0.5f, 0.16666667f, 0.25f, 0.0f, -0.0052083335f, -0.6666667f,   \
        -1.0f, -0.33333334f, -0.5f, -0.16666667f, -0.25f

// The nibbles by ascending level; the two zeros are ordered negative first.
#define LOWRANK_FP4_ASCENDING 11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3
