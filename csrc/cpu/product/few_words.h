// Products of packed rows with a few tokens in words (tile/words.h). Included by files that are compiled once per
// instruction set.
#pragma once

#include "cpu/product/few_inputs.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int kFewPackedChunk = 2048; // columns of packed rows whose products are summed before they join the total
constexpr int kMostPieces = kFewPackedChunk / 32 + 4;

template <int kTokens, int kRows>
struct FewSums {
    V v[kRows][kTokens];

    LOWRANK_INLINE void clear() {
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                v[r][t] = zero();
    }
};

// Adds the dot products of kRows packed rows over a group of columns, or the first half of it, in units of `unit`.
template <class Units, bool kHalf, int kPiece, int kTokens, int kRows>
LOWRANK_INLINE void few_words(const typename Units::Levels& levels, const uint8_t* bytes, int64_t row_bytes,
                              const float (*scales)[kTokens][kMostPieces], int64_t piece, const int16_t* x,
                              int64_t stride, FewSums<kTokens, kRows>& sums) {
    I weights[kRows][4];
    const auto decode = [&](int r) __attribute__((always_inline)) {
        const uint8_t* row = bytes + r * row_bytes;
        __builtin_prefetch(row + 4 * kRows * row_bytes, 0, 2);
        __builtin_prefetch(row + kRows * row_bytes);
        levels.template decode<kHalf>(row, weights[r]);
    };
    const auto multiply = [&](int r, int t) __attribute__((always_inline)) {
        const V scale = spread<kPiece>(scales[r][t] + piece);
        sums.v[r][t] = fma(Units::dot(weights[r], x + t * stride), scale, sums.v[r][t]);
    };
    if constexpr (kRegisters < 32) { // for the weights of one row
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            decode(r);
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t)
                multiply(r, t);
        }
    } else {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
            decode(r);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
                multiply(r, t);
    }
}

// total[r][t] += the rows n, n + 1, … of W [N, K] times the columns of the tokens that are not in words.
template <class Units, int kTokens, int kRows>
__attribute__((noinline)) void few_in_floats(const Matrix& w, int64_t K, int64_t n, const FewInputs& in,
                                             FewSums<kTokens, kRows>& total) {
    for (int64_t k = 0; k < K; k += Units::kColumns)
        for (int t = 0; t < kTokens; ++t) {
            if (in.steps[t * few_steps(in.stride) + k / Units::kColumns] != 0)
                continue;
            for (int r = 0; r < kRows; ++r) {
                float weights[Units::kColumns];
                weight_row(w, K, n + r, k, Units::kColumns, weights);
                V sum = zero();
                for (int64_t i = 0; i < Units::kColumns; i += kLanes)
                    sum = fma(load(weights + i), load(in.rows + t * in.stride + k + i), sum);
                total.v[r][t] = add(total.v[r][t], sum);
            }
        }
}

// total[r][t] += the rows n, n + 1, … of W [N, K] times kTokens tokens.
template <class Units, int kPiece, int kTokens, int kRows>
__attribute__((noinline)) void few_accumulate_words(const Matrix& w, int64_t K, int64_t n, const FewInputs& in,
                                                    FewSums<kTokens, kRows>& total) {
    const typename Units::Levels levels(w.type);
    const V unit = set1(levels.unit);
    for (int64_t k = 0; k < K; k += kFewPackedChunk) {
        const int64_t count = min(kFewPackedChunk, K - k), pieces = count / kPiece;
        const uint8_t* bytes = bytes_at(w, n * K + k);
        FewSums<kTokens, kRows> sums;
        sums.clear();
        float scales[kRows][kTokens][kMostPieces]; // of a weight times the step of a token
        for (int r = 0; r < kRows; ++r) {
            float of_weights[kMostPieces];
            scales_of(w, (n + r) * K + k, pieces, kPiece, of_weights);
            for (int t = 0; t < kTokens; ++t) {
                const float* steps = in.steps + t * few_steps(in.stride) + k / Units::kColumns;
                for (int64_t i = 0; i < pieces; ++i)
                    scales[r][t][i] = of_weights[i] * steps[i * kPiece / Units::kColumns];
                for (int64_t i = 0; i < kGroup / kPiece; ++i) // read with the first half of a group
                    scales[r][t][pieces + i] = 0;
            }
        }
        const auto group = [&](auto half, int64_t i) {
            few_words<Units, half, kPiece>(levels, bytes + i / 2, K / 2, scales, i / kPiece, in.words + k + i,
                                           in.stride, sums);
        };
        int64_t i = 0;
        for (; i + kGroup <= count; i += kGroup)
            group(std::false_type{}, i);
        if (i < count)
            group(std::true_type{}, i);
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                total.v[r][t] = fma(sums.v[r][t], unit, total.v[r][t]);
    }
    bool in_floats = false;
    for (int t = 0; t < kTokens; ++t)
        in_floats |= in.in_floats[t] > 0;
    if (in_floats)
        few_in_floats<Units>(w, K, n, in, total);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
