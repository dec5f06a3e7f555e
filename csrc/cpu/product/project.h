// Projections onto the rank of an update. The factor keeps float32 precision. Included by files that are compiled once
// per instruction set.
#pragma once

#include "cpu/product/many_tokens.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// out[m][r] = scale * sum_k x[m, k] D[r, k] for packed tokens, D in float32.
template <class Units>
void project_packed(int threads, const Packed& x, int64_t K, const Matrix& down, int64_t R, float scale, float* out) {
    constexpr int64_t depth = kChunk<Units>, stride = kTallStride<typename Units::WithFloats>;
    const int64_t lanes = round_up(x.tokens, kLanes), panels = ceil_div(x.tokens, kPanel);
    // Rows per task: whole tiles, and few enough that every thread has tasks.
    const int64_t step = rows_of_tile(panel_vectors(x.tokens, 0));
    const int64_t most = min(kStrip, round_up(ceil_div(R * panels, 2 * threads), step)), groups = ceil_div(R, most);
    parallel_for(threads, panels * groups, [&](int64_t task) {
        const int64_t panel = task / groups, vectors = panel_vectors(x.tokens, panel), width = vectors * kLanes;
        const int64_t first = task % groups * most, rows = min(most, R - first);
        const Scratch scratch;
        float* left = scratch.take<float>(kStrip * stride);
        float* row = scratch.take<float>(depth);
        float c[kStrip * kPanel];
        for (int64_t k = 0; k < K; k += depth) {
            const int64_t count = min(depth, K - k), units = ceil_div(count, 2);
            for (int64_t r = 0; r < rows; ++r) {
                weight_row_padded(down, K, first + r, k, count, row, 2 * units);
                if (x.fours)
                    Units::order_fours(row, count / Units::kFours, left + r * stride);
                else
                    std::memcpy(left + r * stride, row, size_t(2 * units) * 4);
            }
            tall_tiles<typename Units::WithFloats>(rows, int(vectors), units, left,
                                                   x.units + k / 2 * lanes + panel * kPanel * kChunkUnits, c, width,
                                                   k == 0);
        }
        for (int64_t i = 0; i < min(width, x.tokens - panel * kPanel); ++i)
            for (int64_t r = 0; r < rows; ++r)
                out[(x.m + panel * kPanel + i) * R + first + r] = scale * c[r * width + i];
    });
}

// out[m][r] = scale * sum_n g[m, n] U[n, r]: the left operand is g itself, the right one is U, its three parts in
// neighbouring columns.
template <class Units>
void project_transposed(int threads, const Rows& g, int64_t M, int64_t N, const Matrix& up, int64_t R, float scale,
                        float* out) {
    const int64_t units = round_up(ceil_div(N, 2), kUnitsAtOnce), padded = round_up(3 * R, kPanel);
    const int64_t whole = N / 2 & -kUnitsAtOnce,
                  rest = N - 2 * whole; // units that g holds whole; columns after them
    const Scratch scratch;
    float* p = scratch.take<float>(padded * units);
    parallel_for(threads, units / kUnitsAtOnce, [&](int64_t task) {
        const Scratch scratch;
        float* row = scratch.take<float>(round_up(R, kLanes));
        BFloat16* parts = scratch.take<BFloat16>(2 * padded);
        std::memset(parts, 0, size_t(2 * padded) * 2);
        for (int64_t t = task * kUnitsAtOnce; t < (task + 1) * kUnitsAtOnce; ++t) {
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t n = 2 * t + i;
                if (n < N)
                    weight_row(up, R, n, 0, R, row);
                else
                    std::memset(row, 0, size_t(R) * 4);
                for (int64_t r = 0; r < R; r += kLanes) {
                    const int64_t count = min(kLanes, R - r);
                    Units::split(load_n(row + r, count), count, kParts, parts + i * padded + r, R);
                }
            }
            pack_pair<Units>(parts, parts + padded, padded, kPanel * units, p + t * kPanel);
        }
    });
    parallel_for(threads, ceil_div(M, 16), [&](int64_t task) {
        const int64_t m = task * 16, tokens = min(16, M - m);
        const Scratch scratch;
        float* c = scratch.take<float>(16 * padded);
        BFloat16* tail = scratch.take<BFloat16>(16 * 2 * kUnitsAtOnce); // the last columns of g, padded with zeros
        for (int64_t i = 0; rest && i < tokens; ++i) {
            std::memset(tail + i * 2 * kUnitsAtOnce, 0, size_t(kUnitsAtOnce) * 4);
            std::memcpy(tail + i * 2 * kUnitsAtOnce, at(g, m + i, 2 * whole), size_t(rest) * 2);
        }
        for (int64_t panel = 0; panel < padded; panel += kPanel) {
            const float* lanes = p + panel * units;
            wide_tiles_of_pairs(tokens, whole, {at(g, m, 0), g.stride * 2}, lanes, c + panel, padded, true);
            if (rest)
                wide_tiles_of_pairs(tokens, kUnitsAtOnce, {tail, kUnitsAtOnce * 4}, lanes + whole * kPanel, c + panel,
                                    padded, false);
        }
        for (int64_t i = 0; i < tokens; ++i)
            for (int64_t r = 0; r < R; ++r)
                out[(m + i) * R + r] = scale * (c[i * padded + r] + c[i * padded + R + r] + c[i * padded + 2 * R + r]);
    });
}

constexpr int64_t kMostSplit = 512;   // largest R for which all parts of a factor are packed
constexpr int64_t kProjectRows = 384; // rows of D per task: they and their sums stay in the second-level cache

// out[m][r] = scale * sum_k x[m, k] D[r, k], with dropout on x. `down` is D [R, K], or its transpose [K, R] if
// `transposed`. Tasks divide the tokens, and the rows of D if there are many.
void project(int threads, const Rows& x, int64_t M, int64_t K, const Matrix& down, bool transposed, int64_t R,
             const Dropout* dropout, float scale, float* out) {
    if (kSplits<Pairs> && use_pairs(x.dtype) && !transposed) {
        Product exact = exact_projection(threads, x, M, K, down, R, scale, out);
        exact.dropout = dropout;
        multiply_many<Pairs>(exact);
        return;
    }
    if constexpr (kSplits<Pairs>)
        if (use_pairs(x.dtype) && R <= kMostSplit) {
            project_transposed<Pairs>(threads, x, M, K, down, R, scale, out);
            return;
        }
    const int vectors = int(min(kWidest, max(1, ceil_div(M, int64_t(threads) * kLanes))));
    const int64_t width = vectors * kLanes, groups = ceil_div(R, kProjectRows);
    parallel_for(threads, ceil_div(M, width) * groups, [&](int64_t task) {
        const int64_t m = task / groups * width, tokens = min(width, M - m);
        const int64_t first = task % groups * kProjectRows, rows = min(kProjectRows, R - first);
        const int64_t padded = round_up(rows, 48);
        constexpr int64_t kColumns = kChunk<Floats>;
        const Scratch scratch;
        float* left = scratch.take<float>(padded * kTallStride<Floats>);
        float* p = scratch.take<float>(kColumns * width); // x, transposed
        float* c = scratch.take<float>(padded * width);
        for (int64_t k = 0; k < K; k += kColumns) {
            const int64_t count = min(kColumns, K - k);
            for (int64_t i = 0; i < width; i += kLanes)
                pack_tokens<Floats>(x, m + i, tokens - i, k, count, dropout, p + i, width);
            if (transposed) {
                const Scratch scratch;
                float* columns = scratch.take<float>(kColumns * padded);
                std::memset(columns, 0, size_t(round_up(count, kLanes) * padded) * 4);
                for (int64_t i = 0; i < count; ++i)
                    weight_row(down, R, k + i, first, rows, columns + i * padded);
                transpose(columns, padded, round_up(count, kLanes), padded, left, kTallStride<Floats>);
            } else {
                for (int64_t r = 0; r < padded; ++r)
                    if (r < rows)
                        weight_row(down, K, first + r, k, count, left + r * kTallStride<Floats>);
                    else
                        std::memset(left + r * kTallStride<Floats>, 0, size_t(count) * 4);
            }
            tall_tiles<Floats>(rows, vectors, count, left, p, c, width, k == 0);
        }
        for (int64_t i = 0; i < tokens; ++i)
            for (int64_t r = 0; r < rows; ++r)
                out[(m + i) * R + first + r] = scale * c[r * width + i];
    });
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
