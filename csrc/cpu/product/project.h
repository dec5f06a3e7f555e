// Projections onto the rank of an update. The factor keeps float32 precision. Included by files that are compiled once
// per instruction set.
#pragma once

#include "cpu/product/multiply.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// out[m][r] = scale * sum_k drop(x[m, k]) D[r, k]; nothing if R is 0.
struct Projection {
    Matrix factor = {}; // D [R, K], or its transpose [K, R]
    int64_t R = 0;
    float* out = nullptr; // [M, R]
    float scale = 1.0f;
    const Dropout* dropout = nullptr; // no dropout if null
};

// Projections of the same x, onto the ranks of a branch and of an update.
using Projections = const Projection (&)[2];

LOWRANK_INLINE bool has_dropout(Projections p) {
    return (p[0].dropout && p[0].dropout->on) || (p[1].dropout && p[1].dropout->on);
}

Product exact_projection(int threads, const Rows& x, int64_t M, int64_t K, const Projection& p) {
    Product exact = exact_projection(threads, x, M, K, p.factor, p.R, p.scale, p.out);
    exact.dropout = p.dropout;
    return exact;
}

// A projection of packed tokens, D in float32.
template <class Units>
void project_packed(int threads, const Packed& x, int64_t K, const Projection& p) {
    const int64_t R = p.R;
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
                weight_row_padded(p.factor, K, first + r, k, count, row, 2 * units);
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
                p.out[(x.m + panel * kPanel + i) * R + first + r] = p.scale * c[r * width + i];
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

// Projections in float32. Tasks divide the tokens, and the rows of the factors if there are many.
void project_floats(int threads, const Rows& x, int64_t M, int64_t K, bool transposed, Projections p) {
    const int vectors = int(min(kWidest, max(1, ceil_div(M, int64_t(threads) * kLanes))));
    const int64_t width = vectors * kLanes, R = p[0].R + p[1].R, groups = ceil_div(R, kProjectRows);
    const Dropout* dropout = p[p[0].R == 0].dropout; // of both
    parallel_for(threads, ceil_div(M, width) * groups, [&](int64_t task) {
        const int64_t m = task / groups * width, tokens = min(width, M - m);
        const int64_t first = task % groups * kProjectRows, rows = min(kProjectRows, R - first);
        const int64_t padded = round_up(rows, 48);
        // The rows of D of each projection: `count` from `row` on, at place `at` among all.
        struct Part {
            int64_t at, row, count;
        } parts[2];
        for (int64_t i = 0, begin = 0; i < 2; begin += p[i++].R) {
            const int64_t from = max(first, begin), to = min(first + rows, begin + p[i].R);
            parts[i] = {from - first, from - begin, max(0, to - from)};
        }
        constexpr int64_t kColumns = kChunk<Floats>;
        const Scratch scratch;
        float* left = scratch.take<float>(padded * kTallStride<Floats>);
        float* packed = scratch.take<float>(kColumns * width); // x, transposed
        float* c = scratch.take<float>(padded * width);
        for (int64_t k = 0; k < K; k += kColumns) {
            const int64_t count = min(kColumns, K - k);
            for (int64_t i = 0; i < width; i += kLanes)
                pack_tokens<Floats>(x, m + i, tokens - i, k, count, dropout, packed + i, width);
            if (transposed) {
                const Scratch scratch;
                float* columns = scratch.take<float>(kColumns * padded);
                std::memset(columns, 0, size_t(round_up(count, kLanes) * padded) * 4);
                for (int64_t i = 0; i < count; ++i)
                    for (int j = 0; j < 2; ++j)
                        if (const Part& part = parts[j]; part.count > 0)
                            weight_row(p[j].factor, p[j].R, k + i, part.row, part.count,
                                       columns + i * padded + part.at);
                transpose(columns, padded, round_up(count, kLanes), padded, left, kTallStride<Floats>);
            } else {
                for (int j = 0; j < 2; ++j)
                    for (int64_t r = 0; r < parts[j].count; ++r)
                        weight_row(p[j].factor, K, parts[j].row + r, k, count,
                                   left + (parts[j].at + r) * kTallStride<Floats>);
                for (int64_t r = rows; r < padded; ++r)
                    std::memset(left + r * kTallStride<Floats>, 0, size_t(count) * 4);
            }
            tall_tiles<Floats>(rows, vectors, count, left, packed, c, width, k == 0);
        }
        for (int j = 0; j < 2; ++j)
            for (int64_t i = 0; i < tokens; ++i)
                for (int64_t r = 0; r < parts[j].count; ++r)
                    p[j].out[(m + i) * p[j].R + parts[j].row + r] = p[j].scale * c[(parts[j].at + r) * width + i];
    });
}

// Both projections; factors are transposed [K, R] if `transposed`. x is packed once for both if none has dropout.
void project(int threads, const Rows& x, int64_t M, int64_t K, bool transposed, Projections p) {
    if (p[0].R > 0 && p[1].R > 0 && has_dropout(p)) {
        project(threads, x, M, K, transposed, {p[0], {}});
        project(threads, x, M, K, transposed, {{}, p[1]});
        return;
    }
    if constexpr (kSplits<Pairs>)
        if (use_pairs(x.dtype)) {
            if (!transposed) {
                const Product exact[2] = {exact_projection(threads, x, M, K, p[0]),
                                          exact_projection(threads, x, M, K, p[1])};
                each_block<Pairs>(exact[p[0].R == 0], [&](const Packed& packed) {
                    for (int i = 0; i < 2; ++i)
                        if (p[i].R > 0)
                            multiply_packed<Pairs>(exact[i], packed);
                });
                return;
            }
            if (max(p[0].R, p[1].R) <= kMostSplit) {
                for (const Projection& one : p)
                    if (one.R > 0)
                        project_transposed<Pairs>(threads, x, M, K, one.factor, one.R, one.scale, one.out);
                return;
            }
        }
    project_floats(threads, x, M, K, transposed, p);
}

// Both projections of few tokens; tasks divide the rows of the factors.
void project_few(int threads, const Rows& x, int64_t M, int64_t K, Projections p) {
    const int64_t share =
        min(kFewRows, round_up(ceil_div(p[0].R + p[1].R, threads), few_rows_at_once(1, FewLayout::kEights)));
    const int64_t tasks_of_first = ceil_div(p[0].R, share);
    parallel_for(threads, tasks_of_first + ceil_div(p[1].R, share), [&](int64_t task) {
        const bool second = task >= tasks_of_first;
        const int64_t r = (second ? task - tasks_of_first : task) * share;
        Product exact = exact_projection(1, x, M, K, p[second]);
        exact.begin = r, exact.end = min(p[second].R, r + share);
        multiply_few(exact);
    });
}

// The projections of a product's x, then the product, whose low-rank terms read them. between(m, tokens) runs when they
// are known for the rows m, m + 1, ….
template <class Between>
void project_and_multiply(const Product& a, bool many, Projections p, const Between& between) {
    if (p[0].R + p[1].R == 0)
        return multiply(a, many);
    if constexpr (kHasPairs)
        if (many && use_pairs(a.x.dtype) && !has_dropout(p)) { // packs x once for all products
            each_block<Pairs>(a, [&](const Packed& x) {
                for (const Projection& one : p) {
                    if (one.R == 0)
                        continue;
                    if constexpr (kSplits<Pairs>)
                        multiply_packed<Pairs>(exact_projection(a.threads, a.x, a.M, a.K, one), x);
                    else
                        project_packed<Pairs>(a.threads, x, a.K, one);
                }
                between(x.m, x.tokens);
                multiply_packed<Pairs>(a, x);
            });
            return;
        }
    if (many)
        project(a.threads, a.x, a.M, a.K, false, p);
    else
        project_few(a.threads, a.x, a.M, a.K, p);
    between(0, a.M);
    multiply(a, many);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
