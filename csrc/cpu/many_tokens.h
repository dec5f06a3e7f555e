// Products of a frozen matrix with many tokens, as products.h says: a piece of W is decoded into the caches and
// multiplied by all tokens, which are packed. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/few_tokens.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Lanes of tokens in panels of kPanel, the last one as wide as it must be: panel p begins at unit row p * kPanel *
// units.
LOWRANK_INLINE int panel_vectors(int64_t tokens, int64_t panel) {
    return int(min(kWidest, ceil_div(tokens - panel * kPanel, kLanes)));
}

// Whether products of pairs take a matrix of float32 in three parts, as Pairs::split makes them, which is exact and
// faster than float32 where there is a matrix unit.
template <class Units>
constexpr bool kSplits = Units::kPerUnit == 2 && kHasMatrixUnit;

// Packs units of kLanes rows m, m + 1, … of x, columns k … k + count, as to[unit][lane].
template <class Units>
void pack_tokens(const Rows& x, int64_t m, int64_t rows, int64_t k, int64_t count, const Dropout* dropout, float* to,
                 int64_t to_stride, bool fours = false) {
    float* part = scratch<float>(kPart, kLanes * kTallStride<Units>);
    const int64_t units = ceil_div(count, Units::kPerUnit), padded = round_up(units, kLanes);
    for (int64_t i = 0; i < kLanes; ++i) {
        float* row = part + i * kTallStride<Units>;
        if (i >= rows)
            std::memset(row, 0, size_t(padded) * 4);
        else if constexpr (Units::kPerUnit == 2) {
            const auto* from = static_cast<const BFloat16*>(at(x, m + i, k));
            std::memset(row + count / 2, 0, size_t(padded - count / 2) * 4);
            if (dropout && dropout->on) {
                float masked[kChunk<Units>];
                load_row(x, m + i, k, count, masked, count, dropout);
                store_row(masked, count, row, kBFloat16, 0);
            } else if (fours)
                Units::order_fours(from, count / Units::kFours, reinterpret_cast<BFloat16*>(row));
            else
                std::memcpy(row, from, size_t(count) * 2);
        } else
            load_row(x, m + i, k, count, row, padded, dropout);
    }
    transpose(part, kTallStride<Units>, kLanes, padded, to, to_stride);
}

// The low-rank part of a product, sum_r U[n, r] c[m, r], is added as one more piece of K, kLowRank of r at a time.
// Where float32 is split, U = a + b + c times a' + b' + c' is a (a' + b' + c') + b (a' + b') + c a', up to 2^-25 of it.
template <class Units>
constexpr int64_t kLowRank = kSplits<Units> ? 32 : kChunkUnits;
template <class Units>
constexpr int64_t low_rank_units(int64_t R) {
    return kSplits<Units> ? round_up(6 * R, 2 * kUnitsAtOnce) / 2 : R;
}

// Which of the three parts stand side by side: of a factor beside 16-bit numbers, and of U and of c beside each other.
constexpr int kParts[3] = {0, 1, 2}, kLeftParts[6] = {0, 0, 0, 1, 1, 2}, kRightParts[6] = {0, 1, 2, 0, 1, 0};

// Units of one row of kLowRank or fewer numbers, zeros up to `padded` units.
template <class Units, bool kLeft>
LOWRANK_INLINE void low_rank_row(const float* from, int64_t R, float* to, int64_t padded) {
    if constexpr (kSplits<Units>) {
        auto* out = reinterpret_cast<BFloat16*>(to);
        for (int64_t r = 0; r < R; r += kLanes) {
            const int64_t now = min(kLanes, R - r);
            Units::split(load_n(from + r, now), now, kLeft ? kLeftParts : kRightParts, out + r, R);
        }
        for (int64_t i = 6 * R; i < 2 * padded; ++i)
            out[i] = BFloat16{};
    } else {
        std::memcpy(to, from, size_t(R) * 4);
        for (int64_t i = R; i < padded; ++i)
            to[i] = 0;
    }
}

// Packs columns r … r + count of the rows m … m + tokens of c [M, R] as panels [units][tokens].
template <class Units>
void pack_low_rank(int threads, const Rows& c, int64_t m, int64_t tokens, int64_t r, int64_t count, float* to) {
    const int64_t units = round_up(low_rank_units<Units>(count), kLanes);
    parallel_for(threads, ceil_div(tokens, kLanes), [&](int64_t task) {
        const int64_t i = task * kLanes, panel = i / kPanel, width = panel_vectors(tokens, panel) * kLanes;
        float* part = scratch<float>(kPart, kLanes * units);
        for (int64_t j = 0; j < kLanes; ++j) {
            if (i + j < tokens) {
                const float* row = static_cast<const float*>(at(c, m + i + j, r));
                low_rank_row<Units, false>(row, count, part + j * units, units);
            } else
                std::memset(part + j * units, 0, size_t(units) * 4);
        }
        transpose(part, units, kLanes, units, to + panel * kPanel * units + i % kPanel, width);
    });
}

// Tokens of one super-block: as many as fit, packed, into a share of the caches.
LOWRANK_INLINE int64_t tokens_at_once(int64_t units) {
    return max(kPanel, min(512, (int64_t(2) << 20) / max(1, units) / kPanel * kPanel));
}

constexpr int64_t kStrip = 96; // rows of W whose results are stored at a time: a whole number of squares

// y[m + i, n + r] = C[r][i] + bias[n + r], rounded to its dtype.
void store_strip(const Product& a, int64_t m, int64_t tokens, int64_t n, int64_t rows, int64_t strip, const float* c,
                 int64_t c_stride) {
    float added[kStrip] = {}, turned[kLanes * kStrip];
    if (a.bias)
        load_row({a.bias, a.bias_dtype, a.N}, 0, n, rows, added, rows);
    for (int64_t i = 0; i < tokens; i += kLanes) {
        transpose(c + i, c_stride, strip, kLanes, turned, strip);
        if (a.add)
            a.add(a.adder, m + i, min(kLanes, tokens - i), n, rows, turned, strip);
        for (int64_t j = 0; j < min(kLanes, tokens - i); ++j) {
            for (int64_t r = 0; r < strip; ++r)
                turned[j * strip + r] += added[r];
            store_row(turned + j * strip, rows, a.y, a.y_dtype, (m + i + j) * a.N + n);
        }
    }
}

// Units of K that are packed and multiplied at a time: of the matrix unit, what is decoded stays in the first-level
// cache.
template <class Units>
constexpr int64_t kDepth = kSplits<Units> ? 128 : kChunkUnits;

// How a product of many tokens is cut up: rows of W that are decoded at a time, and rows per task. The sums of a task
// of the matrix unit, over all tokens, stay in the second-level cache.
struct Cut {
    int64_t rows, task_rows;
};

template <class Units>
Cut cut_for(int64_t N, int64_t K, int64_t tokens, int threads) {
    if (!kSplits<Units>) // a whole number of tiles of any width
        return {24, 24};
    if (N <= 16) // D of a usual rank
        return {16, 16};
    if (tokens <= 16)
        return {48, 48};
    // Few rows at a time touch few pages; but what is packed of x is read once per task, from the third-level cache
    // where the second does not hold it.
    const int64_t most = tokens * K <= int64_t(512) << 10 ? 64 : 256;
    return {32, max(32, min(most, round_up(ceil_div(N, 2 * threads), 32)))};
}

// The rows m … m + tokens of x as the right operand: chunks of kDepth units of K one after the other, each as panels of
// tokens; a chunk's units are padded to whole squares. `fours`: columns in the order of Pairs::order_fours.
struct Packed {
    const float* units;
    int64_t m, tokens;
    bool fours;
};

template <class Units>
Packed pack_block(int threads, const Rows& x, int64_t m, int64_t tokens, int64_t K, const Dropout* dropout,
                  bool fours) {
    constexpr int64_t kColumnsAtOnce = kDepth<Units> * Units::kPerUnit;
    const int64_t lanes = round_up(tokens, kLanes), chunks = ceil_div(K, kColumnsAtOnce);
    float* packed = scratch<float>(kSharedP, chunks * kDepth<Units> * lanes);
    parallel_for(threads, lanes / kLanes * chunks, [&](int64_t task) {
        const int64_t i = task / chunks * kLanes, k = task % chunks * kColumnsAtOnce, panel = i / kPanel;
        float* to = packed + task % chunks * kDepth<Units> * lanes + panel * kPanel * kDepth<Units> + i % kPanel;
        pack_tokens<Units>(x, m + i, tokens - i, k, min(kColumnsAtOnce, K - k), dropout, to,
                           panel_vectors(tokens, panel) * kLanes, fours);
    });
    return {packed, m, tokens, fours};
}

// The left operand of `padded` columns: W[n, k …) up to `count`, in three parts `part_stride` units apart where it is
// exact; zeros beyond it, and all of it where the row is not `there`. `scales`: of every 64 columns, where `fours`.
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
            float* whole = scratch<float>(kRow, 2 * padded);
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
            const auto* bytes = static_cast<const uint8_t*>(a.weight.data) + (n * a.K + k) / 2;
            Units::decode_fours(bytes, scales, count / Units::kFours, row);
            return;
        }
    weight_row(a.weight, a.K, n, k, count, row);
    std::memset(row + count, 0, size_t(padded - count) * sizeof(*row));
}

// tall_tiles of either kind of units.
template <class Units>
LOWRANK_INLINE void tall(int64_t rows, int vectors, int64_t units, const float* left, int64_t stride, const float* p,
                         float* c, int64_t c_stride, bool first) {
    if constexpr (Units::kPerUnit == 2)
        tall_tiles_of_pairs(rows, vectors, units, {left, stride * 4}, p, c, c_stride, first);
    else
        tall_tiles<Units>(rows, vectors, units, left, p, c, c_stride, first);
}

// The product for the tokens that are packed. Where they are in fours, so are the rows of W.
template <class Units>
void multiply_packed(const Product& a, const Packed& x) {
    constexpr int64_t kDepthAtOnce = (Units::kPerUnit == 2 ? kUnitsAtOnce : 1) * Units::kPerUnit;
    constexpr int64_t depth = kDepth<Units> * Units::kPerUnit, stride = kDepth<Units> + kSkew;
    const int64_t K = a.K, N = a.N, R = a.R, chunks = ceil_div(K, depth);
    const int64_t tokens = x.tokens, lanes = round_up(tokens, kLanes), c_stride = lanes + kSkew;
    const Cut cut = cut_for<Units>(N, K, tokens, a.threads);
    const int parts = kSplits<Units> && a.exact ? 3 : 1;
    const int64_t low_rank_stride = round_up(low_rank_units<Units>(min(R, kLowRank<Units>)), kLanes) * lanes;
    float* low_rank = scratch<float>(kSharedCore, ceil_div(R, kLowRank<Units>) * low_rank_stride);
    for (int64_t r = 0, i = 0; r < R; r += kLowRank<Units>, ++i)
        pack_low_rank<Units>(a.threads, {a.c, kFloat32, R}, x.m, tokens, r, min(R - r, kLowRank<Units>),
                             low_rank + i * low_rank_stride);
    // Every thread's share of the rows is cut by itself, so that none has a task more than another. Where rows are few,
    // tasks share the tokens as well.
    const int64_t share = round_up(ceil_div(N, a.threads), kSplits<Units> ? cut.rows : kLanes);
    const int64_t tasks_of_share = ceil_div(share, cut.task_rows);
    const int64_t panels = ceil_div(tokens, kPanel), row_tasks = ceil_div(N, share) * tasks_of_share;
    const int64_t groups = min(panels, ceil_div(2 * a.threads, row_tasks)), panels_of_task = ceil_div(panels, groups);
    parallel_for(a.threads, row_tasks * groups, [&](int64_t task) {
        const int64_t begin = task / groups / tasks_of_share * share, end = min(N, begin + share);
        const int64_t first = begin + task / groups % tasks_of_share * cut.task_rows;
        const int64_t rows = min(cut.task_rows, end - first);
        const int64_t first_panel = task % groups * panels_of_task;
        const int64_t end_panel = min(panels, first_panel + panels_of_task);
        if (first_panel >= end_panel || rows <= 0)
            return;
        const MatrixUnit unit(16);
        float* left = scratch<float>(kL, parts * cut.rows * stride);
        float* c = scratch<float>(kC, round_up(cut.task_rows, 48) * c_stride);
        float* scales = scratch<float>(kRow2, rows * K / 64 + kLanes);
        if (x.fours && !a.exact)
            scales_of(a.weight.scales, first * K, rows * K / 64, 64, scales);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t k = chunk * depth, count = min(depth, K - k), padded = round_up(count, kDepthAtOnce);
            for (int64_t strip = 0; strip < rows; strip += cut.rows) {
                const int64_t there = min(cut.rows, rows - strip);
                for (int64_t r = 0; r < cut.rows; ++r) {
                    const int64_t n = first + strip + r;
                    // Of the same row, or of the one that follows when this is done.
                    const bool last = chunk == chunks - 1;
                    const int64_t next = last ? n + cut.task_rows : n, next_k = last ? 0 : k + depth;
                    if (r < there && next < N)
                        prefetch_weight(a.weight, K, next, next_k, min(depth, K - next_k));
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
        if (a.scale != 1.0f)
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = first_panel * kPanel; i < min(lanes, end_panel * kPanel); ++i)
                    c[r * c_stride + i] *= a.scale;
        using LowRank = std::conditional_t<kSplits<Units>, Units, Floats>;
        for (int64_t r = 0, i = 0; r < R; r += kLowRank<Units>, ++i) {
            const int64_t count = min(kLowRank<Units>, R - r), units = low_rank_units<Units>(count);
            for (int64_t strip = 0; strip < rows; strip += cut.rows) {
                for (int64_t j = 0; j < cut.rows; ++j) {
                    float row[kLowRank<Units>];
                    if (strip + j < rows)
                        weight_row(a.up, R, first + strip + j, r, count, row);
                    else
                        std::memset(row, 0, size_t(count) * 4);
                    low_rank_row<Units, true>(row, count, left + j * stride, units);
                }
                for (int64_t panel = first_panel; panel < end_panel; ++panel)
                    tall<LowRank>(cut.rows, panel_vectors(tokens, panel), units, left, stride,
                                  low_rank + i * low_rank_stride + panel * kPanel * round_up(units, kLanes),
                                  c + strip * c_stride + panel * kPanel, c_stride, false);
            }
        }
        const int64_t first_token = first_panel * kPanel, end_token = min(tokens, end_panel * kPanel);
        for (int64_t strip = 0; strip < rows; strip += kStrip) {
            const int64_t now = min(kStrip, rows - strip);
            store_strip(a, x.m + first_token, end_token - first_token, first + strip, now, round_up(now, kLanes),
                        c + strip * c_stride + first_token, c_stride);
        }
    });
}

// body(packed) for blocks of tokens of a product, one after the other.
template <class Units, class Body>
void each_block(const Product& a, const Body& body) {
    const bool fours = !a.exact && in_fours<Units>(a.weight, a.K, Units::kFours);
    const int64_t block = tokens_at_once(ceil_div(a.K, Units::kPerUnit));
    for (int64_t m = 0; m < a.M; m += block)
        body(pack_block<Units>(a.threads, a.x, m, min(block, a.M - m), a.K, a.dropout, fours));
}

template <class Units>
void multiply_many(const Product& a) {
    each_block<Units>(a, [&](const Packed& x) { multiply_packed<Units>(a, x); });
}

bool use_pairs(int dtype) {
    return kHasPairs && dtype == kBFloat16;
}

void multiply(const Product& a, bool many) {
    if (!many)
        multiply_few(a);
    else if (use_pairs(a.x.dtype))
        multiply_many<Pairs>(a);
    else
        multiply_many<Floats>(a);
}

// out[m][r] = scale * sum_k x[m, k] D[r, k], D as exact as float32 though x has 16 bits.
Product exact_projection(int threads, const Rows& x, int64_t M, int64_t K, const Weight& down, int64_t R, float scale,
                         float* out) {
    Product product = {threads, M, R, K, 0, x, down, nullptr, nullptr, {}, nullptr, 0, scale, out, kFloat32};
    product.exact = true;
    return product;
}

#if defined(__AVX512BF16__)
// out[m][r] = scale * sum_k x[m, k] D[r, k] for the tokens that are packed, D in float32.
void project_packed(int threads, const Packed& x, int64_t K, const Weight& down, int64_t R, float scale, float* out) {
    constexpr int64_t depth = kChunk<Pairs>, stride = kTallStride<FloatsByPairs>;
    const int64_t lanes = round_up(x.tokens, kLanes), panels = ceil_div(x.tokens, kPanel);
    // Rows per task: tiles that are whole, and few enough of them that every thread has its share.
    const int64_t step = rows_of_tile(panel_vectors(x.tokens, 0));
    const int64_t most = min(kStrip, round_up(ceil_div(R * panels, 2 * threads), step)), groups = ceil_div(R, most);
    parallel_for(threads, panels * groups, [&](int64_t task) {
        const int64_t panel = task / groups, vectors = panel_vectors(x.tokens, panel), width = vectors * kLanes;
        const int64_t first = task % groups * most, rows = min(most, R - first);
        float* left = scratch<float>(kL, kStrip * stride);
        float* row = scratch<float>(kRow, depth);
        float c[kStrip * kPanel];
        for (int64_t k = 0; k < K; k += depth) {
            const int64_t count = min(depth, K - k), units = ceil_div(count, 2);
            for (int64_t r = 0; r < rows; ++r) {
                weight_row_padded(down, K, first + r, k, count, row, 2 * units);
                if (x.fours)
                    Pairs::order_fours(row, count / Pairs::kFours, left + r * stride);
                else
                    std::memcpy(left + r * stride, row, size_t(2 * units) * 4);
            }
            tall_tiles<FloatsByPairs>(rows, int(vectors), units, left,
                                      x.units + k / 2 * lanes + panel * kPanel * kChunkUnits, c, width, k == 0);
        }
        for (int64_t i = 0; i < min(width, x.tokens - panel * kPanel); ++i)
            for (int64_t r = 0; r < rows; ++r)
                out[(x.m + panel * kPanel + i) * R + first + r] = scale * c[r * width + i];
    });
}
#endif

// Units of two rows of bfloat16 as panels of the right operand, `stride` floats apart.
template <class Units>
LOWRANK_INLINE void pack_pair(const BFloat16* row, const BFloat16* next, int64_t columns, int64_t stride, float* to) {
    for (int64_t c = 0; c < columns; c += kLanes)
        Units::units_of(row + c, next + c, to + c / kPanel * stride + c % kPanel);
}

// out[m][r] = scale * sum_n g[m, n] U[n, r]: the rows of g are the left operand as they lie there, U the right one, its
// parts side by side.
template <class Units>
void project_transposed(int threads, const Rows& g, int64_t M, int64_t N, const Weight& up, int64_t R, float scale,
                        float* out) {
    const int64_t units = round_up(ceil_div(N, 2), kUnitsAtOnce), padded = round_up(3 * R, kPanel);
    const int64_t whole = N / 2 & -kUnitsAtOnce,
                  rest = N - 2 * whole; // units that lie there whole; what is left of a row
    float* p = scratch<float>(kSharedP, padded * units);
    parallel_for(threads, units / kUnitsAtOnce, [&](int64_t task) {
        float* row = scratch<float>(kRow, round_up(R, kLanes));
        BFloat16* parts = scratch<BFloat16>(kRow2, 2 * padded);
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
        float* c = scratch<float>(kC, 16 * padded);
        BFloat16* tail = scratch<BFloat16>(kRow, 16 * 2 * kUnitsAtOnce); // the last columns of g, with zeros
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

constexpr int64_t kMostSplit = 512;   // of R, where all of a factor's parts are kept packed
constexpr int64_t kProjectRows = 384; // of D per task: its rows and their sums stay in the second-level cache

// out[m][r] = scale * sum_k x[m, k] D[r, k], with dropout on x. `down` is D [R, K], or its transpose [K, R] where
// `transposed`. Threads share the tokens, and the rows of D where there are many.
void project(int threads, const Rows& x, int64_t M, int64_t K, const Weight& down, bool transposed, int64_t R,
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
        float* left = scratch<float>(kL, padded * kTallStride<Floats>);
        float* p = scratch<float>(kP, kColumns * width); // x, transposed
        float* c = scratch<float>(kC, padded * width);
        for (int64_t k = 0; k < K; k += kColumns) {
            const int64_t count = min(kColumns, K - k);
            for (int64_t i = 0; i < width; i += kLanes)
                pack_tokens<Floats>(x, m + i, tokens - i, k, count, dropout, p + i, width);
            if (transposed) {
                float* columns = scratch<float>(kRow, kColumns * padded);
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
