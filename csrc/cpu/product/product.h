// The arguments of a product of a frozen matrix, of either form. Included by files that are compiled once per
// instruction set.
//
// Everything but the product of a few tokens (few_tokens.h) goes through one register-blocked tile, C[i][lane] += sum_t
// L[i][t] P[t][lane], whose left operand is read row by row and whose right operand is packed so that lanes are
// contiguous:
//   multiply             L = decoded rows of W        P = x transposed        t over K
//   project              L = D, or U transposed       P = x, g transposed     t over K, N
//   multiply_transposed  L = g                        P = decoded rows of W   t over N
//   outer                L = gd, c transposed         P = x, g                t over M
// t runs in chunks of fixed length whose sums are added up in order, whatever the tiling: a token's result depends
// neither on the other tokens nor on the number of threads.
#pragma once

#include "cpu/product/decode.h"
#include "cpu/tile/rows.h"

namespace lowrank::cpu::LOWRANK_ISA {

constexpr int64_t kMostAdded = 64; // tokens of a call of Product::add

// A factor times rows [M, R], a term of a product; nothing if R is 0.
struct LowRank {
    int64_t R = 0;
    const float* rows = nullptr;
    Matrix factor = {};
};

// A frozen W [N, K] times rows x [M, K], plus U [N, R] times rows c for each term, plus a bias: y [M, N].
struct Product {
    int threads;
    int64_t M, N, K;
    int64_t begin = 0, end = N; // the rows of W to multiply
    Rows x;
    int x_as = x.dtype; // x need not be multiplied more precisely than numbers of this dtype are
    Matrix weight;
    const Dropout* dropout = nullptr; // on x, unless null; kept elements are not divided by 1 - p
    LowRank low_rank[2] = {};         // terms of a branch and of an update
    const void* bias = nullptr;
    int bias_dtype = kFloat32;
    float scale = 1.0f; // of W x
    void* y;
    int y_dtype;
    // Adds to the sums before they are rounded, unless null: to[i * stride + r] += … for at most kMostAdded tokens m +
    // i, rows n + r of W.
    void (*add)(const void* adder, int64_t m, int64_t tokens, int64_t n, int64_t rows, float* to,
                int64_t stride) = nullptr;
    const void* adder = nullptr;
    // Matrices [N, R] whose rows `add` will read: a few tokens prefetch them beside the rows of W.
    const LowRank* added = nullptr;
    int64_t added_count = 0;
    bool exact = false; // W is not rounded to the 16 bits that x has
};

namespace {

// out[m][r] = scale * sum_k x[m, k] D[r, k], D in float32 precision though x has 16 bits.
Product exact_projection(int threads, const Rows& x, int64_t M, int64_t K, const Matrix& down, int64_t R, float scale,
                         float* out) {
    return {.threads = threads,
            .M = M,
            .N = R,
            .K = K,
            .x = x,
            .weight = down,
            .scale = scale,
            .y = out,
            .y_dtype = kFloat32,
            .exact = true};
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
