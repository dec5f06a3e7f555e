// Products of a frozen matrix with many tokens: a piece of W is decoded into the caches and multiplied by all tokens,
// which are packed. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/product/pack.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kStrip = 96; // rows of W whose results are stored at a time; a multiple of kLanes

// y[m + i, n + r] = C[r][i] + bias[n + r], rounded to its dtype.
void store_strip(const Product& a, int64_t m, int64_t tokens, int64_t n, int64_t rows, int64_t strip, const float* c,
                 int64_t c_stride) {
    // What is added is prepared for all tokens of a call together.
    const int64_t at_once = a.add ? kMostAdded : kLanes;
    const Scratch scratch;
    float* transposed = scratch.take<float>(at_once * strip);
    float added[kStrip] = {};
    if (a.bias)
        load_row({a.bias, a.bias_dtype, a.N}, 0, n, rows, added, rows);
    for (int64_t first = 0; first < tokens; first += at_once) {
        const int64_t now = min(at_once, tokens - first);
        for (int64_t i = 0; i < now; i += kLanes)
            transpose(c + first + i, c_stride, strip, kLanes, transposed + i * strip, strip);
        if (a.add)
            a.add(a.adder, m + first, now, n, rows, transposed, strip);
        for (int64_t j = 0; j < now; ++j) {
            for (int64_t r = 0; r < strip; ++r)
                transposed[j * strip + r] += added[r];
            store_row(transposed + j * strip, rows, a.y, a.y_dtype, (m + first + j) * a.N + n);
        }
    }
}

// Units of K that are packed and multiplied at a time. For the matrix unit there are few, so that decoded weights stay
// in the first-level cache.
template <class Units>
constexpr int64_t kDepth = kSplits<Units> ? 128 : kChunkUnits;

// How a product of many tokens is divided: rows of W decoded at a time, and rows per task. The sums of a matrix-unit
// task over all tokens stay in the second-level cache.
struct Cut {
    int64_t rows, task_rows;
};

template <class Units>
Cut cut_for(int64_t N, int64_t K, int64_t tokens, int threads) {
    if (!kSplits<Units>) // a multiple of the tile's rows for every width
        return {24, 24};
    if (N <= 16) // D at a usual rank
        return {16, 16};
    if (tokens <= 16)
        return {48, 48};
    // Fewer rows per task touch fewer pages, but every task reads the packed x once, from the third-level cache if the
    // second cannot hold it.
    const int64_t most = tokens * K <= int64_t(512) << 10 ? 64 : 256;
    return {32, max(32, min(most, round_up(ceil_div(N, 2 * threads), 32)))};
}

// The rows m … m + tokens of x as the right operand: chunks of kDepth units of K one after the other, each as panels of
// tokens. A chunk's units are padded to a multiple of kLanes. `fours`: columns are in the order of Pairs::order_fours.
struct Packed {
    const float* units;
    int64_t m, tokens;
    bool fours;
};

template <class Units>
Packed pack_block(const Scratch& scratch, int threads, const Rows& x, int64_t m, int64_t tokens, int64_t K,
                  const Dropout* dropout, bool fours) {
    constexpr int64_t kColumnsAtOnce = kDepth<Units> * Units::kPerUnit;
    const int64_t lanes = round_up(tokens, kLanes), chunks = ceil_div(K, kColumnsAtOnce);
    float* packed = scratch.take<float>(chunks * kDepth<Units> * lanes);
    parallel_for(threads, lanes / kLanes * chunks, [&](int64_t task) {
        const int64_t i = task / chunks * kLanes, k = task % chunks * kColumnsAtOnce, panel = i / kPanel;
        float* to = packed + task % chunks * kDepth<Units> * lanes + panel * kPanel * kDepth<Units> + i % kPanel;
        pack_tokens<Units>(x, m + i, tokens - i, k, min(kColumnsAtOnce, K - k), dropout, to,
                           panel_vectors(tokens, panel) * kLanes, fours);
    });
    return {packed, m, tokens, fours};
}

// A row of the left operand: W[n, k … k + count), then zeros up to `padded`; all zeros if the row is not `there`. An
// exact product takes three parts, `part_stride` units apart. `scales` holds one for every 64 columns and is read if
// `fours`.
template <class Units>
LOWRANK_INLINE void left_row(const Product& a, bool fours, bool there, int64_t n, int64_t k, int64_t count,
                             const float* scales, float* to, int64_t part_stride, int64_t padded) {
    auto* row = reinterpret_cast<typename Units::Element*>(to);
    if (!there) {
        for (int part = 0; part < (kSplits<Units> && a.exact ? 3 : 1); ++part)
            std::memset(to + part * part_stride, 0, size_t(padded) * sizeof(*row));
        return;
    }
    if constexpr (kSplits<Units>) {
        if (a.exact) {
            const Scratch scratch;
            float* whole = scratch.take<float>(2 * padded);
            float* ordered = fours ? whole + padded : whole;
            weight_row_padded(a.weight, a.K, n, k, count, whole, padded);
            if (fours)
                Units::order_fours(whole, padded / Units::kFours, ordered);
            for (int64_t i = 0; i < padded; i += kLanes)
                Units::split(load(ordered + i), kLanes, kParts, row + i, 2 * part_stride);
            return;
        }
    }
    if constexpr (Units::kPerUnit == 2)
        if (fours) {
            Units::decode_fours(levels_of(a.weight), bytes_at(a.weight, n * a.K + k), scales, count / Units::kFours,
                                row);
            return;
        }
    weight_row(a.weight, a.K, n, k, count, row);
    std::memset(row + count, 0, size_t(padded - count) * sizeof(*row));
}

// The c of a product for tokens m … m + tokens, packed as the right operands of its low-rank part.
template <class Units>
class PackedLowRank {
public:
    PackedLowRank(const Scratch& scratch, const Product& a, int64_t m, int64_t tokens) {
        for (int i = 0; i < 2; ++i) {
            const LowRank& l = a.low_rank[i];
            stride_[i] = round_up(low_rank_units<Units>(min(l.R, kLowRank<Units>)), kLanes) * round_up(tokens, kLanes);
            packed_[i] = scratch.take<float>(ceil_div(l.R, kLowRank<Units>) * stride_[i]);
            for (int64_t r = 0; r < l.R; r += kLowRank<Units>)
                pack_low_rank<Units>(a.threads, {l.rows, kFloat32, l.R}, m, tokens, r, min(l.R - r, kLowRank<Units>),
                                     packed_[i] + r / kLowRank<Units> * stride_[i]);
        }
    }
    // Of term i, from column r on.
    const float* from(int i, int64_t r) const { return packed_[i] + r / kLowRank<Units> * stride_[i]; }

private:
    int64_t stride_[2];
    float* packed_[2];
};

// A part of a product: rows of W, panels of tokens.
struct Part {
    int64_t first, rows, first_panel, end_panel;
};

// Calls body(part) for all parts. Each thread's share of the rows is divided into tasks separately, so that all threads
// have equally many. If rows are few, tasks divide the tokens too.
template <class Units, class Body>
LOWRANK_INLINE void each_part(const Product& a, const Cut& cut, int64_t tokens, const Body& body) {
    const int64_t N = a.end - a.begin;
    const int64_t share = round_up(ceil_div(N, a.threads), kSplits<Units> ? cut.rows : kLanes);
    const int64_t tasks_of_share = ceil_div(share, cut.task_rows);
    const int64_t panels = ceil_div(tokens, kPanel), row_tasks = ceil_div(N, share) * tasks_of_share;
    const int64_t groups = min(panels, ceil_div(2 * a.threads, row_tasks)), panels_of_task = ceil_div(panels, groups);
    parallel_for(a.threads, row_tasks * groups, [&](int64_t task) {
        const int64_t begin = a.begin + task / groups / tasks_of_share * share, end = min(a.end, begin + share);
        const int64_t first = begin + task / groups % tasks_of_share * cut.task_rows;
        const int64_t rows = min(cut.task_rows, end - first);
        const int64_t first_panel = task % groups * panels_of_task;
        const int64_t end_panel = min(panels, first_panel + panels_of_task);
        if (first_panel < end_panel && rows > 0)
            body(Part{first, rows, first_panel, end_panel});
    });
}

// Prefetches what a task decodes after columns k … k + depth of row n: the next columns, or the first ones of the row
// that the next task decodes here.
LOWRANK_INLINE void prefetch_next(const Product& a, int64_t n, int64_t task_rows, int64_t k, int64_t depth) {
    const bool last = k + depth >= a.K;
    const int64_t next = last ? n + task_rows : n, next_k = last ? 0 : k + depth;
    if (next < a.end)
        prefetch_weight(a.weight, a.K, next, next_k, min(depth, a.K - next_k));
}

// Scales the sums c of a part, adds its low-rank part, and stores it. `left` is memory for cut.rows rows, `stride`
// floats apart.
template <class Units>
void finish_part(const Product& a, const Cut& cut, const Part& part, int64_t m, int64_t tokens,
                 const PackedLowRank<Units>& low_rank, float* left, int64_t stride, float* c, int64_t c_stride) {
    const auto [first, rows, first_panel, end_panel] = part;
    const int64_t lanes = round_up(tokens, kLanes);
    if (a.scale != 1.0f)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = first_panel * kPanel; i < min(lanes, end_panel * kPanel); ++i)
                c[r * c_stride + i] *= a.scale;
    using LowRankUnits = std::conditional_t<kSplits<Units>, Units, Floats>;
    for (int i = 0; i < 2; ++i) {
        const LowRank& l = a.low_rank[i];
        for (int64_t r = 0; r < l.R; r += kLowRank<Units>) {
            const int64_t count = min(kLowRank<Units>, l.R - r), units = low_rank_units<Units>(count);
            for (int64_t strip = 0; strip < rows; strip += cut.rows) {
                for (int64_t j = 0; j < cut.rows; ++j) {
                    float row[kLowRank<Units>];
                    if (strip + j < rows)
                        weight_row(l.factor, l.R, first + strip + j, r, count, row);
                    else
                        std::memset(row, 0, size_t(count) * 4);
                    low_rank_row<Units, true>(row, count, left + j * stride, units);
                }
                for (int64_t panel = first_panel; panel < end_panel; ++panel)
                    tall<LowRankUnits>(cut.rows, panel_vectors(tokens, panel), units, left, stride,
                                       low_rank.from(i, r) + panel * kPanel * round_up(units, kLanes),
                                       c + strip * c_stride + panel * kPanel, c_stride, false);
            }
        }
    }
    const int64_t first_token = first_panel * kPanel, end_token = min(tokens, end_panel * kPanel);
    for (int64_t strip = 0; strip < rows; strip += kStrip) {
        const int64_t now = min(kStrip, rows - strip);
        store_strip(a, m + first_token, end_token - first_token, first + strip, now, round_up(now, kLanes),
                    c + strip * c_stride + first_token, c_stride);
    }
}

// The product for packed tokens. The rows of W are decoded in fours if the tokens are packed in fours.
template <class Units>
void multiply_packed(const Product& a, const Packed& x) {
    constexpr int64_t kDepthAtOnce = (Units::kPerUnit == 2 ? kUnitsAtOnce : 1) * Units::kPerUnit;
    constexpr int64_t depth = kDepth<Units> * Units::kPerUnit, stride = kDepth<Units> + kSkew;
    const int64_t K = a.K, chunks = ceil_div(K, depth);
    const int64_t tokens = x.tokens, lanes = round_up(tokens, kLanes), c_stride = lanes + kSkew;
    const Cut cut = cut_for<Units>(a.end - a.begin, K, tokens, a.threads);
    const int parts = kSplits<Units> && a.exact ? 3 : 1;
    const Scratch scratch;
    const PackedLowRank<Units> low_rank(scratch, a, x.m, tokens);
    each_part<Units>(a, cut, tokens, [&](const Part& part) {
        const auto [first, rows, first_panel, end_panel] = part;
        const MatrixUnit unit(16);
        const Scratch scratch;
        float* left = scratch.take<float>(parts * cut.rows * stride);
        float* c = scratch.take<float>(round_up(cut.task_rows, 48) * c_stride);
        float* scales = scratch.take<float>(rows * K / 64 + kLanes);
        if (x.fours && !a.exact)
            scales_of(a.weight, first * K, rows * K / 64, 64, scales);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t k = chunk * depth, count = min(depth, K - k), padded = round_up(count, kDepthAtOnce);
            for (int64_t strip = 0; strip < rows; strip += cut.rows) {
                const int64_t there = min(cut.rows, rows - strip);
                for (int64_t r = 0; r < cut.rows; ++r) {
                    const int64_t n = first + strip + r;
                    if (r < there)
                        prefetch_next(a, n, cut.task_rows, k, depth);
                    const float* scale = scales + ((strip + r) * K + k) / 64;
                    left_row<Units>(a, x.fours, r < there, n, k, count, scale, left + r * stride, cut.rows * stride,
                                    padded);
                }
                for (int64_t panel = first_panel; panel < end_panel; ++panel) {
                    const int vectors = panel_vectors(tokens, panel);
                    const float* p = x.units + chunk * kDepth<Units> * lanes + panel * kPanel * kDepth<Units>;
                    float* sums = c + strip * c_stride + panel * kPanel;
                    for (int part = 0; part < parts; ++part)
                        tall<Units>(kSplits<Units> ? cut.rows : there, vectors, padded / Units::kPerUnit,
                                    left + part * cut.rows * stride, stride, p, sums, c_stride,
                                    chunk == 0 && part == 0);
                }
            }
        }
        finish_part<Units>(a, cut, part, x.m, tokens, low_rank, left, stride, c, c_stride);
    });
}

// Calls body(packed) for each block of tokens of a product.
template <class Units, class Body>
void each_block(const Product& a, const Body& body) {
    const bool fours = !a.exact && in_fours<Units>(a.weight, a.K);
    const int64_t block = tokens_at_once(ceil_div(a.K, Units::kPerUnit));
    for (int64_t m = 0; m < a.M; m += block) {
        const Scratch scratch;
        body(pack_block<Units>(scratch, a.threads, a.x, m, min(block, a.M - m), a.K, a.dropout, fours));
    }
}

template <class Units>
void multiply_many(const Product& a) {
    each_block<Units>(a, [&](const Packed& x) { multiply_packed<Units>(a, x); });
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
