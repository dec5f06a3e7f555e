// Products of a frozen matrix with a batch, the parts that the op families are made of. Included by files that are
// compiled once per instruction set.
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

#include "cpu/tiles.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// ---- W --------------------------------------------------------------------------------------------------------------

// to[0 … count) = W[n, k …) rounded once to T.
template <class T>
inline void weight_row(const Weight& w, int64_t K, int64_t n, int64_t k, int64_t count, T* to) {
    if (w.dtype == kNf4) {
        nf4_decode(static_cast<const uint8_t*>(w.data), w.scales, n * K + k, count, to);
        return;
    }
    with_type(w.dtype, [&](auto t) {
        const auto* from = static_cast<const decltype(t)*>(w.data) + n * K + k;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
            store(to + i, load(from + i));
        if (i < count)
            store_n(to + i, load_n(from + i, count - i), count - i);
    });
}

// The same in float32, with zeros up to `padded`.
inline void weight_row_padded(const Weight& w, int64_t K, int64_t n, int64_t k, int64_t count, float* to,
                              int64_t padded) {
    weight_row(w, K, n, k, count, to);
    for (int64_t j = count; j < padded; ++j)
        to[j] = 0;
}

// Brings the bytes of W[n, k … k + count) closer before they are needed.
LOWRANK_INLINE void prefetch_weight(const Weight& w, int64_t K, int64_t n, int64_t k, int64_t count) {
    const int64_t first = n * K + k;
    const char* data = static_cast<const char*>(w.data);
    const int64_t begin = w.dtype == kNf4 ? first / 2 : first * size_of(w.dtype);
    const int64_t bytes = w.dtype == kNf4 ? count / 2 : count * size_of(w.dtype);
    for (int64_t b = 0; b < bytes; b += 64)
        __builtin_prefetch(data + begin + b);
}

// ---- few tokens: decode next to the multiply ------------------------------------------------------------------------

constexpr int kFewTokens = 4;   // at a time
constexpr int kFewBlock = 32;   // tokens whose inputs are converted at a time
constexpr int kFewRows = 64;    // rows of W per task
constexpr int kFewChunk = 1024; // columns whose products are summed in registers before the sum is added to the rest
constexpr int kMostPieces = kFewChunk / 32;
constexpr int kGroup = 8 * kLanes; // weights in a vector of bytes

constexpr int few_rows_at_once(int tokens) {
    return kRegisters == 32 ? (tokens == 1 ? 8 : 4) : 2;
}

// What a group of tokens is multiplied by: rows in float32, and the same with every kGroup columns in the order in
// which the nibbles of a vector of 32-bit words come: 1, 9, 17, …, 0, 8, …, 3, 11, …. `stride` apart, zero up to it.
struct FewInputs {
    const float* rows;
    const float* split;
    int64_t stride;
};

template <int kTokens, int kRows>
struct FewSums {
    V v[kRows][kTokens];

    LOWRANK_INLINE void clear() {
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                v[r][t] = zero();
    }
};

// Dot products of kRows rows of NF4 over `count` columns, a multiple of kGroup, with a scale for every kPiece: codes
// are looked up and multiplied, and what a lane adds up over its eight is scaled.
template <int kPiece, int kTokens, int kRows>
LOWRANK_INLINE void few_nf4(const uint8_t* bytes, int64_t row_bytes, int64_t count, const float (*scales)[kMostPieces],
                            const float* split, int64_t stride, FewSums<kTokens, kRows>& sums) {
    const Table codes = load_table(kCode);
    for (int64_t k = 0; k < count; k += kGroup) {
        I words[kRows];
        FewSums<kTokens, kRows> part;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            words[r] = load_words(bytes + r * row_bytes + k / 2);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            if (j < kRows)
                __builtin_prefetch(bytes + (j + 4 * kRows) * row_bytes + k / 2, 0, 2),
                    __builtin_prefetch(bytes + (j + kRows) * row_bytes + k / 2);
            V in[kTokens];
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t)
                in[t] = load(split + t * stride + k + j * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const V code = lookup(codes, shift_right(words[r], 4 * j));
#pragma GCC unroll 4
                for (int t = 0; t < kTokens; ++t)
                    part.v[r][t] = j == 0 ? mul(code, in[t]) : fma(code, in[t], part.v[r][t]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const V scale = spread<kPiece>(scales[r] + k / kPiece);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t)
                sums.v[r][t] = fma(part.v[r][t], scale, sums.v[r][t]);
        }
    }
}

// The same with rows of plain floats, `stride_w` elements apart.
template <int kTokens, int kRows, class T>
LOWRANK_INLINE void few_dense(const T* w, int64_t stride_w, int64_t count, const float* x, int64_t stride,
                              FewSums<kTokens, kRows>& sums) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        V in[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
            in[t] = load(x + t * stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const V weight = load(w + r * stride_w + k);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t)
                sums.v[r][t] = fma(weight, in[t], sums.v[r][t]);
        }
    }
    if (k < count)
        for (int r = 0; r < kRows; ++r) {
            const V weight = load_n(w + r * stride_w + k, count - k);
            for (int t = 0; t < kTokens; ++t)
                sums.v[r][t] = fma(weight, load(x + t * stride + k), sums.v[r][t]);
        }
}

// total[r][t] += the rows n, n + 1, … of W [N, K] times kTokens tokens.
template <int kTokens, int kRows>
LOWRANK_INLINE void few_accumulate(const Weight& w, int64_t K, int64_t n, const FewInputs& in,
                                   FewSums<kTokens, kRows>& total) {
    const bool whole_groups = w.dtype == kNf4 && K % kGroup == 0 && K % w.scales.block_size == 0;
    FewSums<kTokens, kRows> sums;
    for (int64_t k = 0; k < K; k += kFewChunk) {
        const int64_t count = min(kFewChunk, K - k);
        sums.clear();
        if (w.dtype != kNf4) {
            with_type(w.dtype, [&](auto e) {
                few_dense(static_cast<const decltype(e)*>(w.data) + n * K + k, K, count, in.rows + k, in.stride, sums);
            });
        } else if (whole_groups) {
            const auto* bytes = static_cast<const uint8_t*>(w.data) + (n * K + k) / 2;
            const int64_t piece = min(w.scales.block_size, 64), pieces = count / piece;
            float scales[kRows][kMostPieces];
            for (int r = 0; r < kRows; ++r)
                scales_of(w.scales, (n + r) * K + k, pieces, piece, scales[r]);
            if (piece == 64)
                few_nf4<64>(bytes, K / 2, count, scales, in.split + k, in.stride, sums);
            else
                few_nf4<32>(bytes, K / 2, count, scales, in.split + k, in.stride, sums);
        } else {
            float decoded[kRows][kFewChunk];
            for (int r = 0; r < kRows; ++r)
                weight_row(w, K, n + r, k, count, decoded[r]);
            few_dense(static_cast<const float*>(decoded[0]), kFewChunk, count, in.rows + k, in.stride, sums);
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                total.v[r][t] = add(total.v[r][t], sums.v[r][t]);
    }
}

// A frozen W [N, K] times rows x [M, K], plus U [N, R] times the rows of c [M, R], plus a bias: y [M, N].
struct Product {
    int threads;
    int64_t M, N, K, R;
    Rows x;
    Weight weight;
    const Dropout* dropout; // on x, unless null; what it keeps is not scaled up
    const float* c;         // R > 0: scaled rows
    Weight up;
    const void* bias;
    int bias_dtype;
    float scale; // of W x
    void* y;
    int y_dtype;
    // What else is added before rounding, unless null: to[i * stride + r] += … for tokens m + i, rows n + r of W.
    void (*add)(const void* adder, int64_t m, int64_t tokens, int64_t n, int64_t rows, float* to, int64_t stride);
    const void* adder;
    bool exact; // W is not rounded to the 16 bits that x has
};

template <int kTokens, int kRows>
void few_tile(const Product& a, int64_t n, const FewInputs& x, const FewInputs& c, float* out, int64_t out_stride) {
    FewSums<kTokens, kRows> total;
    total.clear();
    few_accumulate(a.weight, a.K, n, x, total);
    if (a.scale != 1.0f)
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                total.v[r][t] = mul(total.v[r][t], set1(a.scale));
    if (a.R > 0)
        few_accumulate(a.up, a.R, n, c, total);
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r)
            out[t * out_stride + r] = reduce_add(total.v[r][t]);
}

template <int kTokens>
void few_rows(const Product& a, int64_t n, int64_t rows, const FewInputs& x, const FewInputs& c, float* out,
              int64_t out_stride) {
    constexpr int kRows = few_rows_at_once(kTokens);
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        few_tile<kTokens, kRows>(a, n + r, x, c, out + r, out_stride);
    for (; r < rows; ++r)
        few_tile<kTokens, 1>(a, n + r, x, c, out + r, out_stride);
}

// Rows m, m + 1, …, or those that `order` names there, as few_accumulate wants them; the split copy only where W is
// NF4.
inline FewInputs few_inputs(const Rows& from, int64_t m, int64_t tokens, int64_t columns, const Dropout* dropout,
                            bool nf4, int slot, int split_slot, const int32_t* order = nullptr) {
    const int64_t stride = round_up(columns, kGroup);
    float* rows = scratch<float>(slot, kFewBlock * stride);
    float* split = nf4 ? scratch<float>(split_slot, kFewBlock * stride) : nullptr;
    for (int64_t t = 0; t < tokens; ++t) {
        float* row = rows + t * stride;
        load_row(from, order ? order[m + t] : m + t, 0, columns, row, stride, dropout);
        for (int64_t k = 0; nf4 && k < stride; k += kGroup)
            for (int j = 0; j < 8; ++j)
                for (int i = 0; i < kLanes; ++i)
                    split[t * stride + k + j * kLanes + i] = row[k + 8 * i + (j ^ 1)];
    }
    return {rows, split, stride};
}

inline void few_rows_of(int tokens, const Product& a, int64_t n, int64_t rows, const FewInputs& x, const FewInputs& c,
                        float* out, int64_t out_stride) {
    static_assert(kFewTokens == 4);
    constexpr decltype(&few_rows<1>) kRows[] = {few_rows<1>, few_rows<2>, few_rows<3>, few_rows<4>};
    kRows[tokens - 1](a, n, rows, x, c, out, out_stride);
}

LOWRANK_INLINE FewInputs from_token(const FewInputs& in, int64_t t) {
    return {in.rows + t * in.stride, in.split ? in.split + t * in.stride : nullptr, in.stride};
}

void multiply_few(const Product& a) {
    for (int64_t first = 0; first < a.M; first += kFewBlock) {
        const int64_t tokens = min(kFewBlock, a.M - first);
        const FewInputs x = few_inputs(a.x, first, tokens, a.K, a.dropout, a.weight.dtype == kNf4, kSharedP, kSharedL);
        FewInputs c{};
        if (a.R > 0)
            c = few_inputs({a.c, kFloat32, a.R}, first, tokens, a.R, nullptr, a.up.dtype == kNf4, kSharedCore,
                           kSharedCore2);
        parallel_for(a.threads, ceil_div(a.N, kFewRows), [&](int64_t task) {
            const int64_t n = task * kFewRows, rows = min(kFewRows, a.N - n);
            float sums[kFewTokens][kFewRows], added[kFewRows] = {};
            if (a.bias)
                load_row({a.bias, a.bias_dtype, a.N}, 0, n, rows, added, rows);
            for (int64_t m = 0; m < tokens; m += kFewTokens) {
                const FewInputs some = from_token(x, m), low_rank = from_token(c, m);
                const int64_t now = min(kFewTokens, tokens - m);
                few_rows_of(int(now), a, n, rows, some, low_rank, sums[0], kFewRows);
                if (a.add)
                    a.add(a.adder, first + m, now, n, rows, sums[0], kFewRows);
                for (int64_t t = 0; t < now; ++t) {
                    for (int64_t r = 0; r < rows; ++r)
                        sums[t][r] += added[r];
                    store_row(sums[t], rows, a.y, a.y_dtype, (first + m + t) * a.N + n);
                }
            }
        });
    }
}

// ---- many tokens ----------------------------------------------------------------------------------------------------

// Lanes of tokens in panels of kPanel, the last one as wide as it must be: panel p begins at unit row p * kPanel *
// units.
LOWRANK_INLINE int panel_vectors(int64_t tokens, int64_t panel) {
    return int(min(kWidest, ceil_div(tokens - panel * kPanel, kLanes)));
}

// Whether a product of pairs takes the columns of W [., K] in the order of Pairs::decode_fours.
// Whether products of pairs take a matrix of float32 in three parts, as Pairs::split makes them, which is exact and
// faster than float32 where there is a matrix unit.
template <class Units>
constexpr bool kSplits = Units::kPerUnit == 2 && kHasMatrixUnit;

template <class Units>
bool in_fours(const Weight& w, int64_t K) {
    if constexpr (Units::kPerUnit == 2)
        return w.dtype == kNf4 && w.scales.block_size >= 64 && K % Units::kFours == 0;
    return false;
}

// Packs units of kLanes rows m, m + 1, … of x, columns k … k + count, as to[unit][lane].
template <class Units>
void pack_tokens(const Rows& x, int64_t m, int64_t rows, int64_t k, int64_t count, const Dropout* dropout, float* to,
                 int64_t to_stride, bool fours = false) {
    float* part = scratch<float>(kPart, kLanes * kTallStride);
    const int64_t units = ceil_div(count, Units::kPerUnit), padded = round_up(units, kLanes);
    for (int64_t i = 0; i < kLanes; ++i) {
        float* row = part + i * kTallStride;
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
    transpose(part, kTallStride, kLanes, padded, to, to_stride);
}

// The low-rank part of a product, sum_r U[n, r] c[m, r], is added as one more piece of K, kLowRank of r at a time.
// Where float32 is split, U = a + b + c times a' + b' + c' is a (a' + b' + c') + b (a' + b') + c a', up to 2^-25 of it.
template <class Units>
constexpr int64_t kLowRank = kSplits<Units> ? 32 : kChunkUnits;
template <class Units>
constexpr int64_t low_rank_units(int64_t R) {
    return kSplits<Units> ? round_up(6 * R, 2 * kUnitsAtOnce) / 2 : R;
}

// Units of one row of kLowRank or fewer numbers, zeros up to `padded` units.
template <class Units, bool kLeft>
LOWRANK_INLINE void low_rank_row(const float* from, int64_t R, float* to, int64_t padded) {
    if constexpr (kSplits<Units>) {
        constexpr int kLeftParts[6] = {0, 0, 0, 1, 1, 2}, kRightParts[6] = {0, 1, 2, 0, 1, 0};
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

constexpr int64_t kStrip = 96; // rows of W per task: a whole number of tiles and of squares

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
    if (!kSplits<Units>) {
        const int64_t rows = tokens > 16 ? kStrip : kStrip / 2;
        return {rows, rows};
    }
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
// exact; zeros beyond it and beyond the last row. `scales`: of every 64 columns, where `fours`.
template <class Units>
LOWRANK_INLINE void left_row(const Product& a, bool fours, int64_t n, int64_t k, int64_t count, const float* scales,
                             float* to, int64_t part_stride, int64_t padded) {
    auto* row = reinterpret_cast<typename Units::Element*>(to);
    if (n >= a.N) {
        for (int part = 0; part < (kSplits<Units> && a.exact ? 3 : 1); ++part)
            std::memset(to + part * part_stride, 0, size_t(padded) * sizeof(*row));
        return;
    }
    if constexpr (kSplits<Units>) {
        if (a.exact) {
            float* whole = scratch<float>(kRow, padded);
            weight_row_padded(a.weight, a.K, n, k, count, whole, padded);
            constexpr int kAll[3] = {0, 1, 2};
            for (int64_t i = 0; i < padded; i += kLanes)
                Units::split(load(whole + i), kLanes, kAll, row + i, 2 * part_stride);
            BFloat16 straight[2 * kDepth<Units>];
            for (int part = 0; fours && part < 3; ++part) {
                BFloat16* some = row + 2 * part * part_stride;
                std::memcpy(straight, some, size_t(padded) * 2);
                Units::order_fours(straight, padded / Units::kFours, some);
            }
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
    // Where rows are few, tasks share the tokens as well.
    const int64_t panels = ceil_div(tokens, kPanel), row_tasks = ceil_div(N, cut.task_rows);
    const int64_t groups = min(panels, ceil_div(2 * a.threads, row_tasks)), panels_of_task = ceil_div(panels, groups);
    parallel_for(a.threads, row_tasks * groups, [&](int64_t task) {
        const int64_t first = task / groups * cut.task_rows, rows = min(cut.task_rows, N - first);
        const int64_t first_panel = task % groups * panels_of_task;
        const int64_t end_panel = min(panels, first_panel + panels_of_task);
        if (first_panel >= end_panel)
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
                for (int64_t r = 0; r < cut.rows; ++r) {
                    const int64_t n = first + strip + r;
                    // Of the same row, or of the one that follows when this is done.
                    const bool last = chunk == chunks - 1;
                    const int64_t next = last ? n + cut.task_rows : n, next_k = last ? 0 : k + depth;
                    if (next < N)
                        prefetch_weight(a.weight, K, next, next_k, min(depth, K - next_k));
                    const float* scale = scales + ((strip + r) * K + k) / 64;
                    left_row<Units>(a, x.fours, n, k, count, scale, left + r * stride, cut.rows * stride, padded);
                }
                for (int64_t panel = first_panel; panel < end_panel; ++panel) {
                    const int vectors = panel_vectors(tokens, panel);
                    const float* p = x.units + chunk * kDepth<Units> * lanes + panel * kPanel * kDepth<Units>;
                    float* sums = c + strip * c_stride + panel * kPanel;
                    for (int part = 0; part < parts; ++part)
                        tall<Units>(cut.rows, vectors, padded / Units::kPerUnit, left + part * cut.rows * stride,
                                    stride, p, sums, c_stride, chunk == 0 && part == 0);
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
                    float row[kLowRank<Units>] = {};
                    if (first + strip + j < N)
                        weight_row(a.up, R, first + strip + j, r, count, row);
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
    const bool fours = !a.exact && in_fours<Units>(a.weight, a.K);
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

// Units of two rows of bfloat16 as panels of the right operand, `stride` floats apart.
template <class Units>
LOWRANK_INLINE void pack_pair(const BFloat16* row, const BFloat16* next, int64_t columns, int64_t stride, float* to) {
    for (int64_t c = 0; c < columns; c += kLanes)
        Units::units_of(row + c, next + c, to + c / kPanel * stride + c % kPanel);
}

constexpr int kParts[3] = {0, 1, 2};

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
        float* left = scratch<float>(kL, padded * kTallStride);
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
                transpose(columns, padded, round_up(count, kLanes), padded, left, kTallStride);
            } else {
                for (int64_t r = 0; r < padded; ++r)
                    if (r < rows)
                        weight_row(down, K, first + r, k, count, left + r * kTallStride);
                    else
                        std::memset(left + r * kTallStride, 0, size_t(count) * 4);
            }
            tall_tiles<Floats>(rows, vectors, count, left, p, c, width, k == 0);
        }
        for (int64_t i = 0; i < tokens; ++i)
            for (int64_t r = 0; r < rows; ++r)
                out[(m + i) * R + first + r] = scale * c[r * width + i];
    });
}

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
        constexpr int kRightParts[6] = {0, 1, 2, 0, 1, 0};
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
    const bool fours = in_fours<Units>(a.weight, K);
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
