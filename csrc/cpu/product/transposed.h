// The product of a transposed frozen matrix with a batch. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/product/pack.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kColumns = 4 * kPanel;     // columns of dx per task for many tokens, so that C stays in the caches
constexpr int64_t kMostColumns = 8 * kPanel; // columns of dx per task for few tokens
constexpr int64_t kMostUnits = 16384;        // of a row of g that is kept whole; a head has many more

// to[panel][t][lane]: `units` of the rows n, n + 1, … of W, columns k … k + columns, packed as the right operand, zero
// beyond them. `fours`: columns are in the order of Pairs::pack_fours.
template <class Units>
void pack_weight(const Matrix& w, int64_t K, int64_t n, int64_t rows, int64_t units, int64_t k, int64_t columns,
                 int64_t padded, bool fours, float* to) {
    using T = typename Units::Element;
    constexpr int64_t kAhead = 16; // rows: they lie too far apart for the hardware's prefetcher
    const Scratch scratch;
    if constexpr (Units::kPerUnit == 2)
        if (fours) {
            const int64_t length = columns / 64 + kLanes;
            float* scales[2] = {scratch.take<float>(length), scratch.take<float>(length)};
            for (int64_t t = 0; t < units; ++t) {
                const uint8_t* bytes[2];
                for (int64_t i = 0; i < 2; ++i) {
                    const int64_t row = n + min(2 * t + i, rows - 1), f = row * K + k;
                    prefetch_weight(w, K, row + kAhead, k, columns);
                    bytes[i] = bytes_at(w, f);
                    if (2 * t + i < rows)
                        scales_of(w, f, columns / 64, 64, scales[i]);
                    else
                        std::memset(scales[i], 0, size_t(length) * 4);
                }
                Units::pack_fours(levels_of(w), bytes[0], bytes[1], scales[0], scales[1], columns / Units::kFours,
                                  kPanel * units, to + t * kPanel);
            }
            return;
        }
    T* decoded[2] = {scratch.take<T>(padded), scratch.take<T>(padded)};
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

// dx [M, K] = W^T g [M, N] + D [R, K]^T gd [M, R] for each term, row by row; there is dropout on the second term.
struct TransposedProduct {
    int threads;
    int64_t M, N, K;
    int64_t begin = 0, end = K; // the columns of W to multiply; begin is a multiple of kColumns
    Rows g;
    int g_as = g.dtype; // g need not be multiplied more precisely than numbers of this dtype are
    Matrix weight;
    LowRank low_rank[2] = {};         // terms of a branch and of an update
    const Dropout* dropout = nullptr; // may be null if there is no update
    void* dx;
    int dx_dtype;
};

// How the product is divided: columns per task, whose sums over all tokens fit the second-level cache, and rows and
// columns of W packed at a time.
struct TransposedCut {
    int64_t columns, rows, packed_columns;
};

template <class Units>
TransposedCut transposed_cut_for(int64_t K, int64_t units, int64_t tokens, int threads) {
    if (units > kMostUnits) // every task copies all pieces of g
        return {round_up(ceil_div(K, threads), kColumns), 256, kColumns};
    if (Units::kPerUnit == 1 || !kHasMatrixUnit)
        return tokens > 128 ? TransposedCut{kColumns, 256, kColumns} : TransposedCut{kMostColumns, 256, kMostColumns};
    // Few tokens: packed weights stay in the first-level cache, and a task has many columns because the rows of W lie
    // far apart.
    if (tokens <= 128)
        return {round_up(ceil_div(K, threads * ceil_div(K, 2048 * threads)), 256), 256, 256};
    return {512, 256, 512};
}

// Packs at most kLowRank rows r, r + 1, … of D, columns k … k + columns, as the panel that low_rank_row's units
// multiply.
template <class Units>
void low_rank_columns(const Matrix& down, int64_t K, int64_t r, int64_t rows, int64_t k, int64_t columns, float* to) {
    if constexpr (kSplits<Units>) {
        const int64_t units = low_rank_units<Units>(rows);
        float row[kPanel];
        const Scratch scratch;
        BFloat16* parts = scratch.take<BFloat16>(2 * units * kPanel);
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

// to[0 … units) = columns n … n + count of a row of g, zero after them.
template <class Units>
void copy_units(const Rows& g, int64_t row, int64_t n, int64_t count, float* to, int64_t units) {
    if constexpr (Units::kPerUnit == 2) {
        std::memset(to + count / 2, 0, size_t(units - count / 2) * 4);
        std::memcpy(to, at(g, row, n), size_t(count) * 2);
    } else
        load_row(g, row, n, count, to, count);
}

// The gd of a product for tokens m … m + tokens as left operands, kLowRank of R at a time.
template <class Units>
class LeftLowRank {
public:
    LeftLowRank(const Scratch& scratch, const TransposedProduct& a, int64_t m, int64_t tokens) : tokens_(tokens) {
        for (int l = 0; l < 2; ++l) {
            const int64_t R = a.low_rank[l].R;
            stride_[l] = low_rank_units<Units>(min(R, kLowRank<Units>));
            rows_[l] = scratch.take<float>(ceil_div(R, kLowRank<Units>) * stride_[l] * tokens);
            for (int64_t r = 0; r < R; r += kLowRank<Units>)
                for (int64_t i = 0; i < tokens; ++i)
                    low_rank_row<Units, true>(a.low_rank[l].rows + (m + i) * R + r, min(R - r, kLowRank<Units>),
                                              rows_[l] + (r / kLowRank<Units> * tokens + i) * stride_[l], stride_[l]);
        }
    }
    // Of term l, from column r on.
    Left from(int l, int64_t r) const {
        return {rows_[l] + r / kLowRank<Units> * tokens_ * stride_[l], stride_[l] * 4};
    }
    int64_t panel_size() const { return max(stride_[0], stride_[1]) * kPanel; }

private:
    int64_t tokens_, stride_[2];
    float* rows_[2];
};

// Adds the low-rank terms to the sums c of columns k … k + columns, and stores them. `p` is memory for a panel.
template <class Units>
void finish_columns(const TransposedProduct& a, int64_t m, int64_t tokens, const LeftLowRank<Units>& gd, int64_t k,
                    int64_t columns, float* p, float* c, int64_t stride) {
    using LowRankUnits = std::conditional_t<kSplits<Units>, Units, Floats>;
    for (int l = 0; l < 2; ++l) {
        const int64_t R = a.low_rank[l].R;
        const bool masked = l == 1 && R > 0 && a.dropout->on;
        for (int64_t panel = 0; R > 0 && panel < columns; panel += kPanel) {
            const int64_t count = min(kPanel, columns - panel);
            const Scratch scratch;
            float* through = scratch.take<float>(tokens * kPanel);
            float* sums = masked ? through : c + panel;
            const int64_t sums_stride = masked ? kPanel : stride;
            for (int64_t r = 0; r < R; r += kLowRank<Units>) {
                const int64_t now = min(kLowRank<Units>, R - r);
                low_rank_columns<Units>(a.low_rank[l].factor, a.K, r, now, k + panel, count, p);
                wide<LowRankUnits>(tokens, low_rank_units<Units>(now), gd.from(l, r), p, sums, sums_stride,
                                   masked && r == 0);
            }
            for (int64_t i = 0; masked && i < tokens; ++i) {
                a.dropout->apply(m + i, k + panel, count, through + i * kPanel);
                for (int64_t j = 0; j < count; ++j)
                    c[i * stride + panel + j] += through[i * kPanel + j] * a.dropout->inverse;
            }
        }
    }
    for (int64_t i = 0; i < tokens; ++i)
        store_row(c + i * stride, columns, a.dx, a.dx_dtype, (m + i) * a.K + k);
}

template <class Units>
void multiply_transposed_as(const TransposedProduct& a) {
    constexpr int64_t kUnitsInOne = Units::kPerUnit == 2 ? kUnitsAtOnce : 1;
    const int64_t N = a.N, K = a.K, units = ceil_div(N, Units::kPerUnit);
    const bool fours = in_fours<Units>(a.weight, K);
    // With long rows, blocks of tokens whose g the caches hold would be small, and W is packed for every block. There a
    // task copies g in pieces of `cut.rows` columns instead.
    const bool pieces = units > kMostUnits;
    // The matrix unit reads 16 rows at a time; a copy spaces them so that they do not fall on the same cache lines.
    const bool in_place =
        pieces || (Units::kPerUnit == 2 ? N % (2 * kUnitsAtOnce) == 0 && !kHasMatrixUnit : a.g.dtype == kFloat32);
    const int64_t block = min(pieces ? 256 : tokens_at_once(units), a.M);
    const TransposedCut cut = transposed_cut_for<Units>(a.end - a.begin, units, block, a.threads);
    for (int64_t m = 0; m < a.M; m += block) {
        const int64_t tokens = min(block, a.M - m);
        const Scratch scratch;
        Left left = {at(a.g, m, 0), a.g.stride * size_of(a.g.dtype)};
        if (!in_place) {
            const int64_t stride = round_up(units, kUnitsInOne) + kSkew;
            float* rows = scratch.take<float>(tokens * stride);
            parallel_for(a.threads, tokens,
                         [&](int64_t i) { copy_units<Units>(a.g, m + i, 0, N, rows + i * stride, stride); });
            left = {rows, stride * 4};
        }
        const LeftLowRank<Units> gd(scratch, a, m, tokens);
        parallel_for(a.threads, ceil_div(a.end - a.begin, cut.columns), [&](int64_t task) {
            const int64_t k = a.begin + task * cut.columns, columns = min(cut.columns, a.end - k);
            const int64_t padded = round_up(columns, kPanel), stride = padded + kSkew;
            const Scratch scratch;
            float* p = scratch.take<float>(max(cut.rows / Units::kPerUnit * cut.packed_columns, gd.panel_size()));
            float* c = scratch.take<float>(tokens * stride);
            const int64_t piece_stride = cut.rows / Units::kPerUnit + kSkew;
            float* piece = scratch.take<float>(pieces ? tokens * piece_stride : 0);
            for (int64_t n = 0; n < N; n += cut.rows) {
                const int64_t rows = min(cut.rows, N - n);
                const int64_t steps = round_up(ceil_div(rows, Units::kPerUnit), kUnitsInOne);
                for (int64_t i = 0; pieces && i < tokens; ++i)
                    copy_units<Units>(a.g, m + i, n, rows, piece + i * piece_stride, steps);
                const Left g =
                    pieces ? Left{piece, piece_stride * 4} : Left{left.row(0) + n / Units::kPerUnit * 4, left.stride};
                for (int64_t first = 0; first < columns; first += cut.packed_columns) {
                    const int64_t now = min(cut.packed_columns, columns - first);
                    pack_weight<Units>(a.weight, K, n, rows, steps, k + first, now, round_up(now, kPanel), fours, p);
                    for (int64_t panel = 0; panel < now; panel += kPanel)
                        wide<Units>(tokens, steps, g, p + panel * steps, c + first + panel, stride, n == 0);
                }
            }
            if constexpr (Units::kPerUnit == 2)
                for (int64_t i = 0; fours && i < tokens; ++i)
                    Units::unpack_fours(c + i * stride, columns / Units::kFours);
            finish_columns<Units>(a, m, tokens, gd, k, columns, p, c, stride);
        });
    }
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
