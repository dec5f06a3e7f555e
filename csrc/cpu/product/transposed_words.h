// The product of transposed packed rows with a batch, in words (tile/words.h). Included by files that are compiled once
// per instruction set.
#pragma once

#include "cpu/product/few_inputs.h"
#include "cpu/product/transposed.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kWordRows = 256;                               // rows of W packed at a time
constexpr int64_t kWordBlocks = kWordRows / kWordColumns;        // and their blocks, in which numbers of g share a step
constexpr int64_t kMostWordBlocks = kMostColumns / kWordColumns; // blocks of columns of a task

// True if the product goes in words. The gradient of a head's logits does not: most numbers of it are too small beside
// the largest.
bool in_transposed_words(const TransposedProduct& a) {
    return kManyWords && !use_pairs(a.g_as) && a.N <= kMostUnits &&
           few_layout(a.weight, a.K, a.g_as, false) == FewLayout::kWords;
}

// Rows of g as left operand, zero up to a multiple of kWordRows, with steps[n / kWordRows][token][2 * block + 0, 1].
// Where a step is 0, the words are 0, and in_floats[n / kWordColumns] is true.
struct GradientWords {
    const float* units;
    int64_t stride; // floats between tokens
    const float* steps;
    const bool* in_floats;
    int64_t m, tokens;

    const float* steps_of(int64_t n, int64_t i) const {
        return steps + (n / kWordRows * tokens + i) * 2 * kWordBlocks + n % kWordRows / kWordColumns * 2;
    }
};

template <class Units>
GradientWords gradient_words(const Scratch& scratch, const TransposedProduct& a, int64_t m, int64_t tokens) {
    const int64_t padded = round_up(a.N, kWordRows), stride = padded / 2 + kSkew, blocks = padded / kWordColumns;
    float* units = scratch.take<float>(tokens * stride);
    float* steps = scratch.take<float>(2 * blocks * tokens);
    bool* in_floats = scratch.take<bool>(blocks);
    parallel_for(a.threads, tokens, [&](int64_t i) {
        auto* words = reinterpret_cast<int16_t*>(units + i * stride);
        std::memset(words, 0, size_t(padded) * 2);
        for (int64_t n = 0; n < padded; n += kWordColumns) {
            float numbers[kWordColumns];
            const int64_t count = max(0, min(kWordColumns, a.N - n));
            load_row(a.g, m + i, min(n, a.N), count, numbers, kWordColumns);
            float* step = steps + (n / kWordRows * tokens + i) * 2 * kWordBlocks + n % kWordRows / kWordColumns * 2;
            step[0] = step[1] = Units::quantise(numbers, a.g_as, words + n);
        }
    });
    const GradientWords g = {units, stride, steps, in_floats, m, tokens};
    for (int64_t b = 0; b < blocks; ++b) {
        in_floats[b] = false;
        for (int64_t i = 0; i < tokens; ++i)
            in_floats[b] |= *g.steps_of(b * kWordColumns, i) == 0;
    }
    return g;
}

// Packs the rows n … n + rows of W, columns k … k + columns, as the right operand of kWordRows / 2 units. Writes a
// scale for each block of rows and unit, and for each block of rows and of columns the set of rows that are 0 in the
// operand because they are multiplied in float32.
template <class Units>
void pack_scaled(const TransposedProduct& a, const typename Units::Scaled& levels, int64_t n, int64_t rows, int64_t k,
                 int64_t columns, float* to, float* scales, uint64_t* in_floats) {
    constexpr int64_t kAhead = 16; // rows: they lie too far apart for the hardware's prefetcher
    const Matrix& w = a.weight;
    const int shift = __builtin_ctzll(uint64_t(w.scales.block_size));
    const float unit = levels.unit * float(32768.0 / kLargestWord);
    for (int64_t block = 0; block < rows; block += kWordColumns) {
        const int64_t first = n + block, count = min(kWordColumns, rows - block);
        int16_t ratios[kMostWordBlocks][kWordColumns][2];
        for (int64_t c = 0; c < columns; c += kWordColumns) {
            uint64_t& set = in_floats[block / kWordColumns * kMostWordBlocks + c / kWordColumns];
            set = 0;
            float of_half[2];
            for (int64_t half = 0; half < 2; ++half) {
                auto* ratio = &ratios[c / kWordColumns][0][half];
                if (half == 1 && w.scales.block_size > 32) {
                    for (int64_t i = 0; i < kWordColumns; ++i)
                        ratio[2 * i] = ratio[2 * i - 1];
                    of_half[1] = of_half[0];
                    continue;
                }
                float of_rows[kWordColumns] = {};
                for (int64_t i = 0; i < count; ++i)
                    of_rows[i] = scale_at(w, ((first + i) * a.K + k + c + 32 * half) >> shift);
                of_half[half] = scale_words(of_rows, a.g_as, ratio, &set) * unit;
            }
            for (int i = 0; i < kWordColumns; ++i)
                scales[block / kWordColumns * columns + c + i] = of_half[Units::column_of_unit(i) / 32];
            for (uint64_t rest = set; rest; rest &= rest - 1) { // in both halves
                int16_t* ratio = ratios[c / kWordColumns][__builtin_ctzll(rest)];
                ratio[0] = ratio[1] = 0;
            }
        }
        for (int64_t t = 0; t < kWordColumns / 2; ++t) {
            const int64_t row = first + min(2 * t, count - 1), next = first + min(2 * t + 1, count - 1);
            prefetch_weight(w, a.K, row + kAhead, k, columns);
            prefetch_weight(w, a.K, next + kAhead, k, columns);
            for (int64_t c = 0; c < columns; c += kWordColumns)
                levels.pack({bytes_at(w, row * a.K + k + c), bytes_at(w, next * a.K + k + c)},
                            {ratios[c / kWordColumns][2 * t], ratios[c / kWordColumns][2 * t + 1]},
                            kPanel * kWordRows / 2, to + c * kWordRows / 2 + (block / 2 + t) * kPanel);
        }
    }
}

// Words::tile over a full panel of lanes for any number of tokens. Inlined, GCC would keep no sum in a register.
template <class Units, int kRows = rows_of_tile(kWidest)>
__attribute__((noinline)) void wide_word_tiles(int64_t tokens, int64_t pieces, const float* left, int64_t stride,
                                               const float* p, const float* steps, const float* scales,
                                               int64_t scales_stride, float* c, int64_t c_stride) {
    constexpr int64_t kSteps = 2 * kWordBlocks;
    for (; tokens >= kRows; tokens -= kRows, left += kRows * stride, steps += kRows * kSteps, c += kRows * c_stride)
        Units::template tile<kRows, kWidest, kSteps>(pieces, left, stride, p, steps, scales, scales_stride, c,
                                                     c_stride);
    if constexpr (kRows > 1)
        if (tokens > 0)
            wide_word_tiles<Units, kRows - 1>(tokens, pieces, left, stride, p, steps, scales, scales_stride, c,
                                              c_stride);
}

// Adds the products of a set of kWordColumns rows n … of W, columns k … k + columns, with the tokens that are in words
// there or with those that are not.
void add_rows_in_floats(const TransposedProduct& a, const GradientWords& g, bool words, int64_t n, uint64_t set,
                        int64_t k, int64_t columns, float* c, int64_t stride) {
    const int64_t rows = __builtin_popcountll(set);
    const Scratch scratch;
    auto* tokens = scratch.take<int64_t>(g.tokens);
    float* left = scratch.take<float>(g.tokens * kWordColumns);
    float* p = scratch.take<float>(rows * columns);
    float* row = scratch.take<float>(columns);
    float* sums = scratch.take<float>(g.tokens * kPanel);
    int64_t count = 0;
    for (int64_t i = 0; i < g.tokens; ++i) {
        if ((*g.steps_of(n, i) != 0) != words)
            continue;
        float numbers[kWordColumns];
        load_row(a.g, g.m + i, n, min(kWordColumns, a.N - n), numbers, kWordColumns);
        float* to = left + count * kWordColumns;
        for (uint64_t rest = set; rest; rest &= rest - 1)
            *to++ = numbers[__builtin_ctzll(rest)];
        tokens[count++] = i;
    }
    int64_t r = 0;
    for (uint64_t rest = set; rest; rest &= rest - 1, ++r) {
        weight_row(a.weight, a.K, n + __builtin_ctzll(rest), k, columns, row);
        for (int64_t panel = 0; panel < columns; panel += kPanel)
            std::memcpy(p + panel * rows + r * kPanel, row + panel, kPanel * 4);
    }
    for (int64_t panel = 0; panel < columns; panel += kPanel) {
        wide<Floats>(count, rows, {left, kWordColumns * 4}, p + panel * rows, sums, kPanel, true);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < kPanel; ++j)
                c[tokens[i] * stride + panel + j] += sums[i * kPanel + j];
    }
}

template <class Units>
void multiply_transposed_words(const TransposedProduct& a) {
    if constexpr (kManyWords) {
        constexpr int64_t kUnits = kWordRows / 2;
        const typename Units::Scaled levels(a.weight.type);
        const int64_t block = min(tokens_at_once(a.N / 2), a.M), blocks = ceil_div(a.N, kWordColumns);
        const TransposedCut cut = transposed_cut_for<Floats>(a.end - a.begin, a.N, block, a.threads);
        for (int64_t m = 0; m < a.M; m += block) {
            const int64_t tokens = min(block, a.M - m);
            const Scratch scratch;
            const GradientWords g = gradient_words<Units>(scratch, a, m, tokens);
            const LeftLowRank<Floats> gd(scratch, a, m, tokens);
            parallel_for(a.threads, ceil_div(a.end - a.begin, cut.columns), [&](int64_t task) {
                const int64_t k = a.begin + task * cut.columns, columns = min(cut.columns, a.end - k);
                const int64_t stride = columns + kSkew;
                const Scratch scratch;
                float* p = scratch.take<float>(max(kUnits * columns, gd.panel_size()));
                float* c = scratch.take<float>(tokens * stride);
                float* scales = scratch.take<float>(kWordBlocks * columns);
                auto* in_floats = scratch.take<uint64_t>(round_up(blocks, kWordBlocks) * kMostWordBlocks);
                std::memset(c, 0, size_t(tokens * stride) * 4);
                for (int64_t n = 0; n < a.N; n += kWordRows) {
                    const int64_t rows = min(kWordRows, a.N - n), pieces = 2 * ceil_div(rows, kWordColumns);
                    pack_scaled<Units>(a, levels, n, rows, k, columns, p, scales,
                                       in_floats + n / kWordColumns * kMostWordBlocks);
                    for (int64_t panel = 0; panel < columns; panel += kPanel)
                        wide_word_tiles<Units>(tokens, pieces, g.units + n / 2, g.stride, p + panel * kUnits,
                                               g.steps_of(n, 0), scales + panel, columns, c + panel, stride);
                }
                for (int64_t i = 0; i < tokens; ++i)
                    for (float* to = c + i * stride; to < c + i * stride + columns; to += kWordColumns) {
                        float units[kWordColumns];
                        std::memcpy(units, to, sizeof units);
                        for (int j = 0; j < kWordColumns; ++j)
                            to[Units::column_of_unit(j)] = units[j];
                    }
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t n = b * kWordColumns;
                    if (g.in_floats[b])
                        add_rows_in_floats(a, g, false, n, ~uint64_t(0) >> max(0, n + kWordColumns - a.N), k, columns,
                                           c, stride);
                    for (int64_t i = 0; i < columns; i += kWordColumns)
                        if (const uint64_t set = in_floats[b * kMostWordBlocks + i / kWordColumns])
                            add_rows_in_floats(a, g, true, n, set, k + i, kWordColumns, c + i, stride);
                }
                finish_columns<Floats>(a, m, tokens, gd, k, columns, p, c, stride);
            });
        }
    }
}

void multiply_transposed(const TransposedProduct& a) {
    if (in_transposed_words(a))
        multiply_transposed_words<Words>(a);
    else
        with_units(a.g.dtype, [&](auto units) { multiply_transposed_as<decltype(units)>(a); });
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
