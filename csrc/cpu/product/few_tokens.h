// Products of a frozen matrix with a few tokens: W is decoded in registers, next to the multiply (few_tokens.cpp).
// Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/product/few_inputs.h"

namespace lowrank::cpu::LOWRANK_ISA {

// The rows n … n + rows of a product with at most most_tokens tokens; c: the inputs of its low-rank terms.
void few_rows_of(int tokens, const Product& a, int64_t n, int64_t rows, const FewInputs& x, const FewInputs* c,
                 float* out, int64_t out_stride);

void multiply_few(const Product& a);

namespace {

constexpr int kFewRows = 64; // rows of W per task at most; fewer if a thread would get none

constexpr int few_rows_at_once(int tokens, FewLayout layout) {
    if (kRegisters < 32 || layout == FewLayout::kWords || (kLooksUpWords && layout != FewLayout::kFours))
        return 2;
    return tokens > (layout == FewLayout::kFours ? 2 : 5) ? 2 : 4;
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
