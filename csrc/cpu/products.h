// Products of a frozen matrix with a batch, the parts that the op families are made of: few_tokens.h, many_tokens.h,
// and here those along the other axis. Included by files that are compiled once per instruction set.
//
// Everything but the product of a few tokens goes through one register-blocked tile, C[i][lane] += sum_t L[i][t]
// P[t][lane], whose left operand is read row by row and whose right one is packed so that lanes are contiguous:
//   multiply             L = decoded rows of W        P = x transposed        t over K
//   project              L = D, or U transposed       P = x, g transposed     t over K, N
//   multiply_transposed  L = g                        P = decoded rows of W   t over N
//   outer                L = gd, c transposed         P = x, g                t over M
// t runs in chunks of fixed length whose sums are added up in order, whatever the tiling: a token's result depends
// neither on the other tokens nor on the number of threads.
#pragma once

#include "cpu/many_tokens.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// ---- along the other axis -------------------------------------------------------------------------------------------

constexpr int64_t kColumns = 4 * kPanel;     // columns of dD and dU per task
constexpr int64_t kMostColumns = 8 * kPanel; // and of dx, less where there are many tokens: C stays in the caches

// to[panel][t][lane]: `units` of the rows n, n + 1, … of W, columns k … k + columns, as the packed operand; zero beyond
// them. `fours`: columns in the order of Pairs::pack_fours.
template <class Units>
void pack_weight(const Weight& w, int64_t K, int64_t n, int64_t rows, int64_t units, int64_t k, int64_t columns,
                 int64_t padded, bool fours, float* to) {
    using T = typename Units::Element;
    constexpr int64_t kAhead = 16; // rows, as they lie far apart
    if constexpr (Units::kPerUnit == 2)
        if (fours) {
            const int64_t length = columns / 64 + kLanes;
            float* scales[2] = {scratch<float>(kRow, length), scratch<float>(kRow2, length)};
            for (int64_t t = 0; t < units; ++t) {
                const uint8_t* bytes[2];
                for (int64_t i = 0; i < 2; ++i) {
                    const int64_t row = n + min(2 * t + i, rows - 1), f = row * K + k;
                    prefetch_weight(w, K, row + kAhead, k, columns);
                    bytes[i] = static_cast<const uint8_t*>(w.data) + f / 2;
                    if (2 * t + i < rows)
                        scales_of(w.scales, f, columns / 64, 64, scales[i]);
                    else
                        std::memset(scales[i], 0, size_t(length) * 4);
                }
                Units::pack_fours(bytes[0], bytes[1], scales[0], scales[1], columns / Units::kFours, kPanel * units,
                                  to + t * kPanel);
            }
            return;
        }
    T* decoded[2] = {scratch<T>(kRow, padded), scratch<T>(kRow2, padded)};
    std::memset(decoded[0], 0, size_t(padded) * sizeof(T));
    std::memset(decoded[1], 0, size_t(padded) * sizeof(T));
    for (int64_t t = 0; t < units; ++t) {
        for (int64_t i = 0; i < Units::kPerUnit; ++i) {
            const int64_t row = t * Units::kPerUnit + i;
            prefetch_weight(w, K, n + row + kAhead, k, columns);
            if (row < rows)
                weight_row(w, K, n + row, k, columns, decoded[i]);
            else
                std::memset(decoded[i], 0, size_t(padded) * sizeof(T));
        }
        for (int64_t c = 0; c < padded; c += kPanel)
            for (int64_t lane = 0; lane < kPanel; lane += kLanes)
                Units::units_of(decoded[0] + c + lane, decoded[1] + c + lane, to + c * units + t * kPanel + lane);
    }
}

// W transposed times rows g [M, N], plus dropout of D [R, K] transposed times the rows of gd [M, R]: dx [M, K].
struct TransposedProduct {
    int threads;
    int64_t M, N, K, R;
    Rows g;
    Weight weight;
    const float* gd; // R > 0
    Weight down;
    const Dropout* dropout;
    void* dx;
    int dx_dtype;
};

// How it is cut up: columns per task, whose sums over all tokens the second-level cache holds, and rows and columns of
// W that are packed at a time.
struct TransposedCut {
    int64_t columns, rows, piece;
};

template <class Units>
TransposedCut transposed_cut_for(int64_t K, int64_t tokens, int threads) {
    if (Units::kPerUnit == 1 || !kHasMatrixUnit)
        return tokens > 128 ? TransposedCut{kColumns, 256, kColumns} : TransposedCut{kMostColumns, 256, kMostColumns};
    // Few tokens: what is packed stays in the first-level cache, and tasks are wide, as the rows of W lie far apart.
    if (tokens <= 128)
        return {round_up(ceil_div(K, threads * ceil_div(K, 2048 * threads)), 256), 256, 256};
    return {512, 256, 512};
}

// wide_tiles of either kind of units.
template <class Units>
LOWRANK_INLINE void wide(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                         bool first) {
    if constexpr (Units::kPerUnit == 2)
        wide_tiles_of_pairs(rows, units, left, p, c, c_stride, first);
    else
        wide_tiles<Units>(rows, units, left, p, c, c_stride, first);
}

// A panel of kLowRank or fewer rows r, r + 1, … of D, columns k … k + columns, beside what low_rank_row makes.
template <class Units>
void low_rank_columns(const Weight& down, int64_t K, int64_t r, int64_t rows, int64_t k, int64_t columns, float* to) {
    if constexpr (kSplits<Units>) {
        const int64_t units = low_rank_units<Units>(rows);
        float row[kPanel];
        BFloat16* parts = scratch<BFloat16>(kRow, 2 * units * kPanel);
        std::memset(parts + 6 * rows * kPanel, 0, size_t(2 * units - 6 * rows) * kPanel * 2);
        for (int64_t i = 0; i < rows; ++i) {
            weight_row_padded(down, K, r + i, k, columns, row, kPanel);
            for (int64_t c = 0; c < kPanel; c += kLanes)
                Units::split(load(row + c), kLanes, kRightParts, parts + i * kPanel + c, rows * kPanel);
        }
        for (int64_t t = 0; t < units; ++t)
            pack_pair<Units>(parts + 2 * t * kPanel, parts + (2 * t + 1) * kPanel, kPanel, kPanel, to + t * kPanel);
    } else {
        for (int64_t i = 0; i < rows; ++i)
            weight_row_padded(down, K, r + i, k, columns, to + i * kPanel, kPanel);
    }
}

template <class Units>
void multiply_transposed_as(const TransposedProduct& a) {
    using LowRank = std::conditional_t<kSplits<Units>, Units, Floats>;
    constexpr int64_t kUnitsInOne = Units::kPerUnit == 2 ? kUnitsAtOnce : 1;
    const int64_t N = a.N, K = a.K, R = a.R, units = ceil_div(N, Units::kPerUnit);
    const bool fours = in_fours<Units>(a.weight, K, Units::kFours);
    // The matrix unit reads 16 rows at a time, which must not fall on the same lines of the caches.
    const bool in_place = Units::kPerUnit == 2 ? N % 2 == 0 && !kHasMatrixUnit : a.g.dtype == kFloat32;
    const int64_t block = min(tokens_at_once(units), a.M);
    const TransposedCut cut = transposed_cut_for<Units>(K, block, a.threads);
    for (int64_t m = 0; m < a.M; m += block) {
        const int64_t tokens = min(block, a.M - m);
        Left left = {at(a.g, m, 0), a.g.stride * size_of(a.g.dtype)};
        if (!in_place) {
            const int64_t stride = round_up(units, kUnitsInOne) + kSkew;
            float* rows = scratch<float>(kSharedL, tokens * stride);
            parallel_for(a.threads, tokens, [&](int64_t i) {
                float* row = rows + i * stride;
                if constexpr (Units::kPerUnit == 2) {
                    std::memset(row + N / 2, 0, size_t(stride - N / 2) * 4);
                    std::memcpy(row, at(a.g, m + i, 0), size_t(N) * 2);
                } else
                    load_row(a.g, m + i, 0, N, row, N);
            });
            left = {rows, stride * 4};
        }
        // The rows of gd for kLowRank of R at a time.
        const int64_t gd_stride = low_rank_units<Units>(min(R, kLowRank<Units>));
        float* gd = scratch<float>(kSharedCore, ceil_div(R, kLowRank<Units>) * gd_stride * tokens);
        for (int64_t r = 0; r < R; r += kLowRank<Units>)
            for (int64_t i = 0; i < tokens; ++i)
                low_rank_row<Units, true>(a.gd + (m + i) * R + r, min(R - r, kLowRank<Units>),
                                          gd + (r / kLowRank<Units> * tokens + i) * gd_stride, gd_stride);
        parallel_for(a.threads, ceil_div(K, cut.columns), [&](int64_t task) {
            const int64_t k = task * cut.columns, columns = min(cut.columns, K - k);
            const int64_t padded = round_up(columns, kPanel), stride = padded + kSkew;
            const int64_t low_rank_size = low_rank_units<Units>(min(R, kLowRank<Units>)) * kPanel;
            float* p = scratch<float>(kP, max(cut.rows / Units::kPerUnit * cut.piece, low_rank_size));
            float* c = scratch<float>(kC, tokens * stride);
            for (int64_t n = 0; n < N; n += cut.rows) {
                const int64_t rows = min(cut.rows, N - n);
                const int64_t steps = round_up(ceil_div(rows, Units::kPerUnit), kUnitsInOne);
                const Left g = {left.row(0) + n / Units::kPerUnit * 4, left.stride};
                for (int64_t first = 0; first < columns; first += cut.piece) {
                    const int64_t now = min(cut.piece, columns - first);
                    pack_weight<Units>(a.weight, K, n, rows, steps, k + first, now, round_up(now, kPanel), fours, p);
                    for (int64_t panel = 0; panel < now; panel += kPanel)
                        wide<Units>(tokens, steps, g, p + panel * steps, c + first + panel, stride, n == 0);
                }
            }
            if constexpr (Units::kPerUnit == 2)
                for (int64_t i = 0; fours && i < tokens; ++i)
                    Units::unpack_fours(c + i * stride, columns / Units::kFours);
            for (int64_t panel = 0; R > 0 && panel < columns; panel += kPanel) {
                const int64_t count = min(kPanel, columns - panel);
                float* through = scratch<float>(kRow2, tokens * kPanel);
                const bool masked = a.dropout->on;
                float* sums = masked ? through : c + panel;
                const int64_t sums_stride = masked ? kPanel : stride;
                for (int64_t r = 0, i = 0; r < R; r += kLowRank<Units>, ++i) {
                    const int64_t now = min(kLowRank<Units>, R - r);
                    low_rank_columns<Units>(a.down, K, r, now, k + panel, count, p);
                    const Left low_rank = {gd + i * gd_stride * tokens, gd_stride * 4};
                    wide<LowRank>(tokens, low_rank_units<Units>(now), low_rank, p, sums, sums_stride, masked && r == 0);
                }
                if (!masked)
                    continue;
                for (int64_t i = 0; i < tokens; ++i) {
                    a.dropout->apply(m + i, k + panel, count, through + i * kPanel);
                    for (int64_t j = 0; j < count; ++j)
                        c[i * stride + panel + j] += through[i * kPanel + j] * a.dropout->inverse;
                }
            }
            for (int64_t i = 0; i < tokens; ++i)
                store_row(c + i * stride, columns, a.dx, a.dx_dtype, (m + i) * K + k);
        });
    }
}

void multiply_transposed(const TransposedProduct& a) {
    if (use_pairs(a.g.dtype))
        multiply_transposed_as<Pairs>(a);
    else
        multiply_transposed_as<Floats>(a);
}

// ---- sums over tokens -----------------------------------------------------------------------------------------------

// The left operand's rows in three parts, and pairs of rows of x as they are.
template <class Units>
void outer_tiles(const float* rows, int64_t stride, int64_t R, const Rows& x, int64_t m, int64_t tokens, int64_t k,
                 int64_t count, int64_t padded, const Dropout* dropout, float* p, float* c, int64_t c_stride) {
    // Of 256 tokens or fewer.
    const int64_t units = round_up(ceil_div(tokens, 2), kUnitsAtOnce);
    BFloat16* pair = scratch<BFloat16>(kRow2, 2 * padded);
    for (int64_t t = 0; t < units; ++t) {
        for (int64_t i = 0; i < 2; ++i) {
            BFloat16* row = pair + i * padded;
            std::memset(row + count, 0, size_t(padded - count) * 2);
            if (2 * t + i >= tokens)
                std::memset(row, 0, size_t(count) * 2);
            else if (dropout && dropout->on) {
                float masked[kColumns];
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

// Rows [R][stride] of M floats as rows [3 R] of M / 2 units.
template <class Units>
const float* split_rows(int threads, const float* rows, int64_t stride, int64_t R, int64_t M, int64_t units) {
    float* to = scratch<float>(kSharedP, 3 * R * units);
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

// out[r][k] = scale * sum_m left[m][r] x[m, k], with dropout on x; [columns][R] where `transposed`.
void outer(int threads, const float* left, int64_t R, const Rows& x, int64_t M, int64_t columns, const Dropout* dropout,
           float scale, void* out, int dtype, bool transposed) {
    constexpr int64_t kTokens = 256, kStride = kColumns + kSkew;
    const int64_t r_padded = round_up(R, kLanes), left_stride = round_up(M, kLanes) + kSkew;
    float* rows = scratch<float>(kSharedL, r_padded * left_stride); // left transposed
    parallel_for(threads, ceil_div(M, kTokens), [&](int64_t task) {
        const int64_t m = task * kTokens, tokens = min(kTokens, M - m), padded = round_up(tokens, kLanes);
        float* part = scratch<float>(kRow, padded * r_padded);
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
            parts = split_rows<Pairs>(threads, rows, left_stride, R, M, units);
    parallel_for(threads, ceil_div(columns, kColumns), [&](int64_t task) {
        const int64_t k = task * kColumns, count = min(kColumns, columns - k), padded = round_up(count, kPanel);
        float* p = scratch<float>(kP, kTokens * padded);
        float* c = scratch<float>(kC, max(r_padded, pairs ? 3 * R : 0) * kStride);
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
        float* turned = scratch<float>(kRow, kColumns * r_padded);
        transpose(c, kStride, r_padded, round_up(count, kLanes), turned, r_padded);
        for (int64_t i = 0; i < count; ++i)
            store_row(turned + i * r_padded, R, out, dtype, (k + i) * R);
    });
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
