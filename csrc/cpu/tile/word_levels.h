// Whole numbers of 16 bits, for tokens of 16 bits: the roundings that all instruction sets make alike. tile/words.h
// (x86) and tile/neon_words.h multiply them.
//
// A weight is level * scale and a token's number is q * step, with a step for every 64 columns of the token. Two
// roundings are made: a level to 2^-16 of the largest level (FP4 and MXFP4 levels are exact), and a number of the token
// to 2^-14 of the largest of its 64 columns. Columns for which the second would be too coarse are multiplied in
// float32: see quantise_words.
//
// The sum of a transposed product runs over rows of W, whose scales differ. There 64 numbers of a token that are
// multiplied by 64 rows share a step, and the scales of these rows are multiples of 1/8190 of the largest; a level
// times such a multiple is rounded to 2^-14 of the largest weight that the 64 rows could have in 32 columns. Rows whose
// scale is too small for that are multiplied in float32: see scale_words.
#pragma once

#include "cpu/vector/vector.h"

#include <algorithm>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kWordColumns = 64; // of a token, which share a step
constexpr int kLargestWord = 8190;   // of a token

// Levels times a factor, rounded. With kFine, eight products with a token's numbers fit 32 bits, 8 * 32767 * 8190 <
// 2^31; with kCoarse 32 products do, 32 * 8192 * 8190 < 2^31, for levels to 2^-14 of the largest.
enum WordLevels : int { kFine, kCoarse };
// FP4's levels are multiples of 1/192 of the largest and MXFP4's of 1/2, so these factors make them whole. With NF4's,
// the error of a sum of weights is at most 1e-6 and 4e-6 of the sum of their magnitudes, for normal, uniform and
// Laplace weights (test_levels_of_words).
constexpr float kWordFactors[2][kFormats] = {{31381, 170 * 192, 4096}, {7140, 42 * 192, 1364}};
struct WordTables {
    alignas(32) int16_t of[2][kFormats][16];
};
constexpr WordTables kWordTables = [] {
    constexpr float levels[kFormats][16] = LOWRANK_LEVELS;
    WordTables words{};
    for (int fine = 0; fine < 2; ++fine)
        for (int format = 0; format < kFormats; ++format)
            for (int i = 0; i < 16; ++i) {
                const float level = levels[format][i] * kWordFactors[fine][format];
                words.of[fine][format][i] = int16_t(level + (level < 0 ? -0.5f : 0.5f));
            }
    return words;
}();

LOWRANK_INLINE float word_unit(WordLevels which, int type) { // a level is its word times this
    return 1 / kWordFactors[which][format_index(type)];
}

// Rounds kWordColumns numbers of a token of `dtype` to multiples of the returned step: to[i] = row[i] / step.
//
// Returns 0 if they must be multiplied in float32 instead: if one is infinite or NaN, if the largest is so large or
// small that a product with the step could overflow or underflow, or if there are numbers so far below the largest
// that the rounding, of at most half a step, would exceed the roundings that the result of a product in 16 bits has
// anyway, should W be 0 where the token is large: if they are more than three quarters of those that are not 0, or the
// others fewer than eight.
inline float quantise_words(const float* row, int dtype, int16_t* to) {
    constexpr int32_t kMost = 0x5f800000, kLeast = 0x1f800000; // 2^64, 2^-64
    int32_t bits[kWordColumns], q[kWordColumns];
    std::memcpy(bits, row, sizeof bits);
    int32_t largest = 0;
    for (int32_t& b : bits) {
        b &= 0x7fffffff;
        largest = b > largest ? b : largest;
    }
    if (largest == 0)
        return 1;
    if (largest > kMost || largest < kLeast)
        return 0;
    const int32_t small = largest - ((dtype == kBFloat16 ? 6 : 4) << 23); // a 64th or 16th of the largest
    int32_t below = 0, zeros = 0;
    for (const int32_t b : bits)
        below += b < small, zeros += b == 0;
    const int32_t coarse = below - zeros;
    if (4 * coarse > 3 * (kWordColumns - zeros) || (coarse > 0 && kWordColumns - below < kWordColumns / 8))
        return 0;
    float most;
    std::memcpy(&most, &largest, 4);
    const V scale = set1(kLargestWord / most);
    for (int64_t i = 0; i < kWordColumns; i += kLanes)
        store_int(q + i, to_nearest(mul(load(row + i), scale)));
    for (int64_t i = 0; i < kWordColumns; ++i)
        to[i] = int16_t(q[i]);
    return most / kLargestWord;
}

// Makes ratios[2 * i] = scales[i] / returned scale * kLargestWord, for the scales of kWordColumns rows of W that are
// multiplied by tokens of `dtype`, and sets bit i of `in_floats` if row i must be multiplied in float32 instead: if its
// scale is not finite or beyond 2^64, or so much smaller than the returned one that the rounding would be coarser
// than a weight in 16 bits. The returned scale is the largest, unless more rows are near the median.
inline float scale_words(const float* scales, int dtype, int16_t* ratios, uint64_t* in_floats) {
    constexpr int32_t kMost = 0x5f800000, kLeast = 0x1f800000; // 2^64, 2^-64
    const int32_t apart = (dtype == kBFloat16 ? 4 : 2) << 23;  // a 16th or a quarter
    int32_t bits[kWordColumns], q[kWordColumns];
    std::memcpy(bits, scales, sizeof bits);
    int32_t largest = 0, least = kMost;
    for (int32_t& b : bits) {
        b &= 0x7fffffff;
        largest = b > largest && b <= kMost ? b : largest;
    }
    const auto outside = [&](int32_t b) { return b != 0 && (b > largest || b < least); };
    const auto count_outside = [&] {
        int count = 0;
        for (const int32_t b : bits)
            count += outside(b);
        return count;
    };
    least = largest - apart;
    if (count_outside() > kWordColumns / 4) {
        int32_t sorted[kWordColumns];
        const auto end = std::copy_if(bits, bits + kWordColumns, sorted, [](int32_t b) { return b != 0; });
        const auto median = sorted + (end - sorted) / 2;
        std::nth_element(sorted, median, end);
        largest = *median < largest - apart / 2 ? *median + apart / 2 : largest; // the median may be NaN
        least = largest - apart;
    }
    if (largest < kLeast + apart)
        least = largest + 1;
    float most;
    std::memcpy(&most, &largest, 4);
    const float scale = largest < kLeast + apart ? 0 : kLargestWord / most;
    for (int64_t i = 0; i < kWordColumns; i += kLanes)
        store_int(q + i, to_nearest(mul(load(scales + i), set1(scale))));
    for (int64_t i = 0; i < kWordColumns; ++i) {
        const bool in_float = outside(bits[i]);
        ratios[2 * i] = in_float ? 0 : int16_t(q[i]);
        *in_floats |= uint64_t(in_float) << i;
    }
    return most;
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
