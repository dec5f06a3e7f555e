// Sums over tokens of outer products: the gradients of the factors. Included by files that are compiled once per
// instruction set.
#pragma once

#include "cpu/product/pack.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kOuterColumns = 4 * kPanel; // columns of dD and dU per task

// The left operand is rows split into three parts; the right one is packed from pairs of rows of x. `tokens` is at most
// 256.
template <class Units>
void outer_tiles(const float* rows, int64_t stride, int64_t R, const Rows& x, int64_t m, int64_t tokens, int64_t k,
                 int64_t count, int64_t padded, const Dropout* dropout, float* p, float* c, int64_t c_stride) {
    const int64_t units = round_up(ceil_div(tokens, 2), kUnitsAtOnce);
    const Scratch scratch;
    BFloat16* pair = scratch.take<BFloat16>(2 * padded);
    for (int64_t t = 0; t < units; ++t) {
        for (int64_t i = 0; i < 2; ++i) {
            BFloat16* row = pair + i * padded;
            std::memset(row + count, 0, size_t(padded - count) * 2);
            if (2 * t + i >= tokens)
                std::memset(row, 0, size_t(count) * 2);
            else if (dropout && dropout->on) {
                float masked[kOuterColumns];
                load_row(x, m + 2 * t + i, k, count, masked, count, dropout);
                store_row(masked, count, row, kBFloat16, 0);
            } else
                std::memcpy(row, at(x, m + 2 * t + i, k), size_t(count) * 2);
        }
        pack_pair<Units>(pair, pair + padded, padded, kPanel * units, p + t * kPanel);
    }
    for (int64_t panel = 0; panel < padded; panel += kPanel)
        wide_tiles_of_pairs(3 * R, units, {rows + m / 2, stride * 4}, p + panel * units, c + panel, c_stride, m == 0);
}

// Splits rows [R][stride] of M floats into rows [3 R] of M / 2 units.
template <class Units>
const float* split_rows(const Scratch& scratch, int threads, const float* rows, int64_t stride, int64_t R, int64_t M,
                        int64_t units) {
    float* to = scratch.take<float>(3 * R * units);
    parallel_for(threads, R, [&](int64_t r) {
        auto* part = reinterpret_cast<BFloat16*>(to + r * units);
        for (int64_t i = 0; i < 2 * units; i += kLanes) {
            const int64_t count = max(0, min(kLanes, M - i));
            Units::split(count ? load_n(rows + r * stride + i, count) : zero(), kLanes, kParts, part + i,
                         2 * R * units);
        }
    });
    return to;
}

// out[r][k] = scale * sum_m left[m][r] x[m, k], with dropout on x, for the columns k from `begin` (a multiple of
// kOuterColumns) to `end` of `columns`, or all of them; [columns][R] where `transposed`.
void outer(int threads, const float* left, int64_t R, const Rows& x, int64_t M, int64_t columns, const Dropout* dropout,
           float scale, void* out, int dtype, bool transposed, int64_t begin = 0, int64_t end = -1) {
    constexpr int64_t kTokens = 256, kStride = kOuterColumns + kSkew;
    const int64_t r_padded = round_up(R, kLanes), left_stride = round_up(M, kLanes) + kSkew;
    const Scratch scratch;
    float* rows = scratch.take<float>(r_padded * left_stride); // left transposed
    parallel_for(threads, ceil_div(M, kTokens), [&](int64_t task) {
        const int64_t m = task * kTokens, tokens = min(kTokens, M - m), padded = round_up(tokens, kLanes);
        const Scratch scratch;
        float* part = scratch.take<float>(padded * r_padded);
        for (int64_t i = 0; i < padded; ++i)
            for (int64_t r = 0; r < r_padded; ++r)
                part[i * r_padded + r] = i < tokens && r < R ? left[(m + i) * R + r] : 0.0f;
        transpose(part, r_padded, padded, r_padded, rows + m, left_stride);
    });
    const bool pairs = kSplits<Pairs> && use_pairs(x.dtype);
    const int64_t units = round_up(ceil_div(M, 2), kUnitsAtOnce) + kSkew;
    const float* parts = nullptr;
    if constexpr (kSplits<Pairs>)
        if (pairs)
            parts = split_rows<Pairs>(scratch, threads, rows, left_stride, R, M, units);
    const int64_t last = end < 0 ? columns : end;
    parallel_for(threads, ceil_div(last - begin, kOuterColumns), [&](int64_t task) {
        const int64_t k = begin + task * kOuterColumns, count = min(kOuterColumns, last - k),
                      padded = round_up(count, kPanel);
        const Scratch scratch;
        float* p = scratch.take<float>(kTokens * padded);
        float* c = scratch.take<float>(max(r_padded, pairs ? 3 * R : 0) * kStride);
        for (int64_t m = 0; m < M; m += kTokens) {
            const int64_t tokens = min(kTokens, M - m);
            if constexpr (kSplits<Pairs>)
                if (pairs) {
                    outer_tiles<Pairs>(parts, units, R, x, m, tokens, k, count, padded, dropout, p, c, kStride);
                    continue;
                }
            for (int64_t i = 0; i < tokens; ++i)
                for (int64_t panel = 0; panel < padded; panel += kPanel)
                    load_row(x, m + i, k + panel, max(0, min(kPanel, count - panel)), p + panel * tokens + i * kPanel,
                             kPanel, dropout);
            for (int64_t panel = 0; panel < padded; panel += kPanel)
                wide_tiles<Floats>(R, tokens, {rows + m, left_stride * 4}, p + panel * tokens, c + panel, kStride,
                                   m == 0);
        }
        for (int64_t r = 0; r < R; ++r)
            for (int64_t i = 0; i < count; ++i) {
                float* sum = c + r * kStride + i;
                if (pairs)
                    *sum += sum[R * kStride] + sum[2 * R * kStride];
                *sum *= scale;
            }
        if (!transposed) {
            for (int64_t r = 0; r < R; ++r)
                store_row(c + r * kStride, count, out, dtype, r * columns + k);
            return;
        }
        float* turned = scratch.take<float>(kOuterColumns * r_padded);
        transpose(c, kStride, r_padded, round_up(count, kLanes), turned, r_padded);
        for (int64_t i = 0; i < count; ++i)
            store_row(turned + i * r_padded, R, out, dtype, (k + i) * R);
    });
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
