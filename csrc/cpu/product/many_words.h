// Products of packed rows with many tokens in words (tile/words.h). Included by files that are compiled once per
// instruction set.
#pragma once

#include "cpu/product/few_inputs.h"
#include "cpu/product/many_tokens.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kWordScales = kChunkUnits / 16 + kLanes; // scales of a row of a chunk, in whole vectors

// True if the product of many tokens goes in words.
LOWRANK_INLINE bool in_many_words(const Product& a) {
    return kManyWords && !a.exact && !use_pairs(a.x_as) &&
           few_layout(a.weight, a.K, a.x_as, false) == FewLayout::kWords;
}

// The rows m … m + tokens of x: chunks of kChunkUnits units one after the other, each as panels of tokens, with
// steps[k / 64 * lanes + i]. Where a step is 0, the columns of the token are in rows[i * K + k], and
// `in_floats` is true for the 64 columns.
struct PackedWords {
    const float* units;
    const float* steps;
    const float* rows;
    const bool* in_floats;
    int64_t m, tokens;
};

template <class Units>
PackedWords pack_words(const Scratch& scratch, const Product& a, int64_t m, int64_t tokens) {
    const int64_t lanes = round_up(tokens, kLanes), blocks = a.K / Units::kColumns;
    const int64_t chunks = ceil_div(a.K, 2 * kChunkUnits), groups = lanes / kLanes;
    float* packed = scratch.take<float>(chunks * kChunkUnits * lanes);
    float* steps = scratch.take<float>(blocks * lanes);
    float* rows = scratch.take<float>(tokens * a.K);
    bool* found = scratch.take<bool>(blocks * groups);
    parallel_for(a.threads, groups, [&](int64_t task) {
        const int64_t i = task * kLanes, panel = i / kPanel, stride = kChunkUnits + kSkew;
        const Scratch scratch;
        float* part = scratch.take<float>(kLanes * stride);
        std::memset(found + task * blocks, 0, size_t(blocks));
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t first = chunk * 2 * kChunkUnits, count = min(2 * kChunkUnits, a.K - first);
            for (int64_t j = 0; j < kLanes; ++j) {
                std::memset(part + j * stride, 0, size_t(count) * 2);
                for (int64_t k = 0; k < count; k += Units::kColumns) {
                    const int64_t block = (first + k) / Units::kColumns;
                    float step = 1; // of a lane without a token
                    if (i + j < tokens) {
                        auto* words = reinterpret_cast<int16_t*>(part + j * stride) + k;
                        step = word_columns<Units>(a.x, m + i + j, first + k, words, rows + (i + j) * a.K + first + k);
                    }
                    steps[block * lanes + i + j] = step;
                    found[task * blocks + block] |= step == 0;
                }
            }
            transpose(part, stride, kLanes, count / 2,
                      packed + chunk * kChunkUnits * lanes + panel * kPanel * kChunkUnits + i % kPanel,
                      panel_vectors(tokens, panel) * kLanes);
        }
    });
    bool* in_floats = scratch.take<bool>(blocks);
    std::memset(in_floats, 0, size_t(blocks));
    for (int64_t i = 0; i < groups * blocks; ++i)
        in_floats[i % blocks] |= found[i];
    return {packed, steps, rows, in_floats, m, tokens};
}

// Adds the products of the columns that are not in words.
template <class Units>
void add_in_floats(const Product& a, const PackedWords& x, const Part& part, float* c, int64_t c_stride) {
    constexpr int64_t kColumns = Units::kColumns;
    const int64_t lanes = round_up(x.tokens, kLanes), padded = round_up(part.rows, kLanes);
    const Scratch scratch;
    float* weights = scratch.take<float>(padded * kColumns);
    float* columns = scratch.take<float>(padded * kColumns);
    float* sums = scratch.take<float>(padded);
    for (int64_t k = 0; k < a.K; k += kColumns) {
        if (!x.in_floats[k / kColumns])
            continue;
        for (int64_t r = 0; r < padded; ++r)
            if (r < part.rows)
                weight_row(a.weight, a.K, part.first + r, k, kColumns, weights + r * kColumns);
            else
                std::memset(weights + r * kColumns, 0, size_t(kColumns) * 4);
        transpose(weights, kColumns, padded, kColumns, columns, padded);
        for (int64_t i = part.first_panel * kPanel; i < min(x.tokens, part.end_panel * kPanel); ++i) {
            if (x.steps[k / kColumns * lanes + i] != 0)
                continue;
            const float* token = x.rows + i * a.K + k;
            for (int64_t r = 0; r < padded; r += kLanes) {
                V sum[2] = {zero(), zero()};
                for (int64_t j = 0; j < kColumns; j += 2)
                    for (int64_t h = 0; h < 2; ++h)
                        sum[h] = fma(set1(token[j + h]), load(columns + (j + h) * padded + r), sum[h]);
                store(sums + r, add(sum[0], sum[1]));
            }
            for (int64_t r = 0; r < part.rows; ++r)
                c[r * c_stride + i] += sums[r];
        }
    }
}

template <class Units, int kVectors>
void word_tiles(int64_t rows, int64_t pieces, const float* left, const float* p, const float* scales,
                const float* steps, int64_t steps_stride, float* c, int64_t c_stride) {
    constexpr int kRows = rows_of_tile(kVectors);
    constexpr int64_t kStride = kTallStride<Floats>;
    for (int64_t i = 0; i < rows; i += kRows)
        Units::template tile<kRows, kVectors, kWordScales>(pieces, left + i * kStride, kStride, p,
                                                           scales + i * kWordScales, steps, steps_stride,
                                                           c + i * c_stride, c_stride);
}

template <class Units>
void multiply_packed_words(const Product& a, const PackedWords& x) {
    constexpr int64_t depth = 2 * kChunkUnits, stride = kTallStride<Floats>, kPiece = 2 * Units::kSummed;
    constexpr int k3 = kWidest < 3 ? kWidest : 3;
    constexpr decltype(&word_tiles<Units, 1>) kTiles[] = {word_tiles<Units, 1>, word_tiles<Units, 2>,
                                                          word_tiles<Units, k3>, word_tiles<Units, kWidest>};
    const int64_t tokens = x.tokens, lanes = round_up(tokens, kLanes), c_stride = lanes + kSkew;
    const Cut cut = cut_for<Floats>(a.end - a.begin, a.K, tokens, a.threads);
    const typename Units::Coarse levels(a.weight.type);
    const Scratch scratch;
    const PackedLowRank<Floats> low_rank(scratch, a, x.m, tokens);
    each_part<Floats>(a, cut, tokens, [&](const Part& part) {
        const Scratch scratch;
        float* left = scratch.take<float>(cut.rows * stride);
        // finish_part transposes whole squares of lanes.
        float* c = scratch.take<float>(round_up(cut.rows, kLanes) * c_stride);
        float* scales = scratch.take<float>(cut.rows * kWordScales);
        std::memset(c, 0, size_t(cut.rows * c_stride) * 4);
        for (int64_t k = 0; k < a.K; k += depth) {
            const int64_t count = min(depth, a.K - k);
            for (int64_t r = 0; r < cut.rows; ++r) {
                auto* row = reinterpret_cast<int16_t*>(left + r * stride);
                float* of_row = scales + r * kWordScales;
                if (r >= part.rows) {
                    std::memset(row, 0, size_t(count) * 2);
                    std::memset(of_row, 0, kWordScales * 4);
                    continue;
                }
                const int64_t n = part.first + r;
                prefetch_next(a, n, cut.task_rows, k, depth);
                scales_of(a.weight, n * a.K + k, count / kPiece, kPiece, of_row);
                for (int64_t i = 0; i < count / kPiece; ++i)
                    of_row[i] *= levels.unit;
                const uint8_t* bytes = bytes_at(a.weight, n * a.K + k);
                for (int64_t i = 0; i < count; i += Units::kColumns)
                    levels.decode(bytes + i / 2, row + i);
            }
            for (int64_t panel = part.first_panel; panel < part.end_panel; ++panel)
                kTiles[panel_vectors(tokens, panel) - 1](
                    part.rows, count / kPiece, left, x.units + k / 2 * lanes + panel * kPanel * kChunkUnits, scales,
                    x.steps + k / Units::kColumns * lanes + panel * kPanel, lanes, c + panel * kPanel, c_stride);
        }
        add_in_floats<Units>(a, x, part, c, c_stride);
        finish_part<Floats>(a, cut, part, x.m, tokens, low_rank, left, stride, c, c_stride);
    });
}

template <class Units>
void multiply_many_words(const Product& a) {
    if constexpr (kManyWords) {
        const int64_t block = tokens_at_once(a.K / 2);
        for (int64_t m = 0; m < a.M; m += block) {
            const Scratch scratch;
            multiply_packed_words<Units>(a, pack_words<Units>(scratch, a, m, min(block, a.M - m)));
        }
    }
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
