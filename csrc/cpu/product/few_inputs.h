// The inputs of products with a few tokens. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/product/product.h"

namespace lowrank::cpu::LOWRANK_ISA {

// The inputs of a group of tokens, `stride` elements apart and zero up to it. Where a step of words is 0, these columns
// of the token are in `rows`, and their words are 0; in_floats[t] counts the steps that are 0.
struct FewInputs {
    const float* rows = nullptr;
    const float* eights = nullptr;
    const BFloat16* fours = nullptr;
    const int16_t* words = nullptr;
    const float* steps = nullptr; // few_steps(stride) apart
    const int32_t* in_floats = nullptr;
    int64_t stride = 0;
};

namespace {

constexpr int kFewTokens = 4;     // tokens per tile
constexpr int kFewPairTokens = 8; // tokens per tile of pairs
// Tokens per tile of words; eight would not fit the registers of NEON, counted with g++ 12.
constexpr int kFewWordTokens = kLanes > 4 ? 8 : 4;
constexpr int kMostFewTokens = 8;  // tokens per tile of any of them
constexpr int kFewBlock = 32;      // tokens whose inputs are converted at a time
constexpr int kGroup = 8 * kLanes; // weights in a vector of bytes

// The layout of the inputs that a frozen matrix takes. Packed rows take
//   eights  float32 with every kGroup columns in the order in which the nibbles of a vector of 32-bit words are decoded
//           (column_of);
//   fours   bfloat16 in the order of Pairs::order_fours;
//   words   whole numbers in the order of Words::column_of, with a step for every Words::kColumns.
// All other rows take `rows`, float32 in the order of K.
enum class FewLayout { kRows, kEights, kFours, kWords };

// Processors with a matrix unit multiply pairs of bfloat16 at half the rate of words (runtime/isa.cpp).
constexpr bool kFewInPairs = kHasPairs && !kHasMatrixUnit;

// Tokens per tile at most.
constexpr int most_tokens(FewLayout layout) {
    return layout == FewLayout::kFours ? kFewPairTokens : layout == FewLayout::kWords ? kFewWordTokens : kFewTokens;
}

LOWRANK_INLINE FewLayout few_layout(const Matrix& w, int64_t K, int dtype, bool exact) {
    if (!is_packed(w.type))
        return FewLayout::kRows;
    if (exact || dtype == kFloat32 || K % 64 != 0)
        return FewLayout::kEights;
    if (kFewInPairs && use_pairs(dtype))
        return FewLayout::kFours;
    return kHasWords ? FewLayout::kWords : FewLayout::kEights;
}

// Elements between tokens: one cache line more than the columns, so that tokens do not fall on the same lines.
LOWRANK_INLINE int64_t few_stride(int64_t columns) {
    return round_up(columns, kGroup) + 2 * kSkew;
}

// Steps between tokens; whole vectors may be read.
LOWRANK_INLINE int64_t few_steps(int64_t stride) {
    return stride / 64 + kLanes;
}

// Upper bound of the floats in the inputs of kFewBlock tokens.
LOWRANK_INLINE int64_t few_inputs_size(int64_t columns) {
    return 2 * kFewBlock * (few_stride(columns) + kLanes);
}

// The columns of one token in the order of order_fours, with zeros up to whole kFours.
template <class Units>
LOWRANK_INLINE void order_row(const BFloat16* x, int64_t columns, BFloat16* to) {
    if constexpr (Units::kPerUnit == 2) {
        const int64_t rest = columns % Units::kFours, whole = columns - rest;
        BFloat16 last[Units::kFours] = {};
        std::memcpy(last, x + whole, size_t(rest) * 2);
        Units::order_fours(x, whole / Units::kFours, to);
        Units::order_fours(last, rest > 0, to + whole);
    }
}

// Columns k … k + Units::kColumns of a token as words; returns their step. If it is 0, the columns are in `floats`.
template <class Units>
LOWRANK_INLINE float word_columns(const Rows& from, int64_t row, int64_t k, int16_t* words, float* floats) {
    float numbers[Units::kColumns];
    load_row(from, row, k, Units::kColumns, numbers, Units::kColumns);
    const float step = Units::quantise(numbers, from.dtype, words);
    if (step == 0)
        std::memcpy(floats, numbers, sizeof numbers);
    return step;
}

// The columns of one token as words, in the order of column_of; returns how many steps are 0.
template <class Units>
LOWRANK_INLINE int32_t word_row(const Rows& from, int64_t row, int64_t columns, int16_t* words, float* steps,
                                float* floats) {
    int32_t in_floats = 0;
    if constexpr (Units::kColumns > 0) {
        constexpr int64_t kAtOnce = kGroup > Units::kColumns ? kGroup : Units::kColumns;
        for (int64_t k = 0; k < columns; k += kAtOnce) {
            int16_t in_order[kAtOnce] = {};
            for (int64_t i = k; i < min(columns, k + kAtOnce); i += Units::kColumns) {
                steps[i / Units::kColumns] = word_columns<Units>(from, row, i, in_order + (i - k), floats + i);
                in_floats += steps[i / Units::kColumns] == 0;
            }
            for (int64_t group = 0; group < kAtOnce; group += kGroup)
                for (int i = 0; i < kGroup; ++i)
                    words[k + group + i] = in_order[group + Units::column_of(i)];
        }
    }
    return in_floats;
}

// Makes the inputs of rows m, m + 1, … (or order[m], order[m + 1], …) in `memory`.
inline FewInputs few_inputs(const Rows& from, int64_t m, int64_t tokens, int64_t columns, const Dropout* dropout,
                            FewLayout layout, float* memory, const int32_t* order = nullptr) {
    const int64_t padded = round_up(columns, kGroup), stride = few_stride(columns);
    const auto row_of = [&](int64_t t) { return order ? order[m + t] : m + t; };
    FewInputs inputs;
    inputs.stride = stride;
    if (layout == FewLayout::kFours) {
        auto* fours = reinterpret_cast<BFloat16*>(memory);
        for (int64_t t = 0; t < tokens; ++t)
            order_row<Pairs>(static_cast<const BFloat16*>(at(from, row_of(t), 0)), columns, fours + t * stride);
        inputs.fours = fours;
        return inputs;
    }
    float* rows = memory;
    inputs.rows = rows;
    memory += kFewBlock * stride;
    if (layout == FewLayout::kWords) {
        float* steps = memory;
        auto* in_floats = reinterpret_cast<int32_t*>(steps + kFewBlock * few_steps(stride));
        auto* words = reinterpret_cast<int16_t*>(in_floats + kFewBlock);
        for (int64_t t = 0; t < tokens; ++t)
            in_floats[t] = word_row<Words>(from, row_of(t), columns, words + t * stride, steps + t * few_steps(stride),
                                           rows + t * stride);
        inputs.words = words, inputs.steps = steps, inputs.in_floats = in_floats;
        return inputs;
    }
    float* eights = layout == FewLayout::kEights ? memory : nullptr;
    inputs.eights = eights;
    for (int64_t t = 0; t < tokens; ++t) {
        float* row = rows + t * stride;
        load_row(from, row_of(t), 0, columns, row, padded, dropout);
        for (int64_t k = 0; eights && k < padded; k += kGroup)
            for (int j = 0; j < 8; ++j)
                for (int i = 0; i < kLanes; ++i)
                    eights[t * stride + k + j * kLanes + i] = row[k + column_of(j, i)];
    }
    return inputs;
}

LOWRANK_INLINE FewInputs from_token(const FewInputs& in, int64_t t) {
    const int64_t first = t * in.stride;
    return {.rows = in.rows ? in.rows + first : nullptr,
            .eights = in.eights ? in.eights + first : nullptr,
            .fours = in.fours ? in.fours + first : nullptr,
            .words = in.words ? in.words + first : nullptr,
            .steps = in.steps ? in.steps + t * few_steps(in.stride) : nullptr,
            .in_floats = in.in_floats ? in.in_floats + t : nullptr,
            .stride = in.stride};
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
