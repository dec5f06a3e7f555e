// The rows of products with a few tokens. They are compiled apart from the ops that use them, because their many sizes
// take the compiler longer than all else. Compiled once per instruction set.
#include "cpu/product/few_tokens.h"
#include "cpu/product/few_words.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int kFewChunk =
    1024; // columns of rows that are not packed whose products are summed before they join the total

// Dot products of kRows packed rows over `count` columns, a multiple of kGroup, with a scale for every kPiece columns.
// A lane multiplies eight levels by their inputs, sums them, and scales the sum.
template <int kPiece, int kTokens, int kRows>
LOWRANK_INLINE void few_packed(const float* levels, const uint8_t* bytes, int64_t row_bytes, int64_t count,
                               const float (*scales)[kMostPieces], const float* eights, int64_t stride,
                               FewSums<kTokens, kRows>& sums) {
    const WordLookup table(load_table(levels));
    for (int64_t k = 0; k < count; k += kGroup) {
        FewSums<kTokens, kRows> part;
        if constexpr (kLooksUpWords) {
            I words[kRows];
#pragma GCC unroll 2
            for (int r = 0; r < kRows; ++r) {
                const uint8_t* row = bytes + r * row_bytes + k / 2;
                __builtin_prefetch(row + 4 * kRows * row_bytes, 0, 2);
                __builtin_prefetch(row + kRows * row_bytes);
                words[r] = load_words(row);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                V codes[kRows][4];
#pragma GCC unroll 2
                for (int r = 0; r < kRows; ++r)
                    lookup_words(table, words[r], half, codes[r]);
#pragma GCC unroll 4
                for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) {
                        const V in = load(eights + t * stride + k + (4 * half + j) * kLanes);
#pragma GCC unroll 2
                        for (int r = 0; r < kRows; ++r)
                            part.v[r][t] = half + j == 0 ? mul(codes[r][j], in) : fma(codes[r][j], in, part.v[r][t]);
                    }
            }
        } else {
            I words[kRows];
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
                    in[t] = load(eights + t * stride + k + j * kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const V code = lookup(table, shift_right(words[r], 4 * j));
#pragma GCC unroll 4
                    for (int t = 0; t < kTokens; ++t)
                        part.v[r][t] = j == 0 ? mul(code, in[t]) : fma(code, in[t], part.v[r][t]);
                }
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

// Dot products of kRows packed rows in units of two over kFours columns, or the first half of them. Levels are rounded
// to bfloat16; a lane scales its sum of eight products.
template <class Units, bool kHalf, int kPiece, int kTokens, int kRows>
LOWRANK_INLINE void few_fours(const typename Units::Levels& levels, const uint8_t* bytes, int64_t row_bytes,
                              const float (*scales)[kMostPieces], int64_t piece, const BFloat16* x, int64_t stride,
                              FewSums<kTokens, kRows>& sums) {
    V weights[kRows][4], scale[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const uint8_t* row = bytes + r * row_bytes;
        __builtin_prefetch(row + 4 * kRows * row_bytes, 0, 2);
        __builtin_prefetch(row + kRows * row_bytes);
        // kHalf is a template argument because a mask in every load would cost a tenth of the time.
        const I words = Units::template load_words<kHalf>(row);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            weights[r][j] = levels.at(words, j);
        scale[r] = spread<kPiece>(scales[r] + piece);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
        V part[kRows];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const V in = load(reinterpret_cast<const float*>(x + t * stride + 2 * kLanes * j));
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
                part[r] = Units::multiply_add(weights[r][j], in, j == 0 ? zero() : part[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            sums.v[r][t] = fma(part[r], scale[r], sums.v[r][t]);
    }
}

// Dot products of kRows rows of signed bytes, `stride_w` apart, over `pieces` of kPiece columns with a scale each. A
// lane sums its products of a piece and scales the sum.
template <int kPiece, int kTokens, int kRows>
LOWRANK_INLINE void few_bytes(const int8_t* w, int64_t stride_w, int64_t pieces, const float (*scales)[kMostPieces],
                              const float* x, int64_t stride, FewSums<kTokens, kRows>& sums) {
    for (int64_t i = 0; i < pieces; ++i, w += kPiece, x += kPiece) {
        FewSums<kTokens, kRows> part;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
            __builtin_prefetch(w + (4 * kRows + r) * stride_w, 0, 2);
#pragma GCC unroll 16
        for (int k = 0; k < kPiece; k += kLanes) {
            V in[kTokens];
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t)
                in[t] = load(x + t * stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const V weight = load(w + r * stride_w + k);
#pragma GCC unroll 8
                for (int t = 0; t < kTokens; ++t)
                    part.v[r][t] = k == 0 ? mul(weight, in[t]) : fma(weight, in[t], part.v[r][t]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const V scale = set1(scales[r][i]);
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t)
                sums.v[r][t] = fma(part.v[r][t], scale, sums.v[r][t]);
        }
    }
}

// Dot products of kRows dense rows, `stride_w` elements apart.
template <int kTokens, int kRows, class T>
LOWRANK_INLINE void few_dense(const T* w, int64_t stride_w, int64_t count, const float* x, int64_t stride,
                              FewSums<kTokens, kRows>& sums) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        V in[kTokens];
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
            in[t] = load(x + t * stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const V weight = load(w + r * stride_w + k);
#pragma GCC unroll 8
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

// total[r][t] += the rows n, n + 1, … of W [N, K] times kTokens tokens. It is not inlined, so that the compiler
// allocates registers for it alone.
template <int kTokens, int kRows>
__attribute__((noinline)) void few_accumulate(const Matrix& w, int64_t K, int64_t n, const FewInputs& in,
                                              FewSums<kTokens, kRows>& total) {
    const bool quantized = is_quantized(w.type);
    if (!quantized && K <= kFewChunk) { // U of a usual rank
        with_type(w.type, [&](auto e) {
            few_dense(static_cast<const decltype(e)*>(w.data) + n * K, K, K, in.rows, in.stride, total);
        });
        return;
    }
    const bool whole_groups =
        quantized && K % w.scales.block_size == 0 && (w.type == kInt8 || K % kGroup == 0); // of whole blocks
    const int64_t chunk = whole_groups ? kFewPackedChunk : kFewChunk;
    FewSums<kTokens, kRows> sums;
    for (int64_t k = 0; k < K; k += chunk) {
        const int64_t count = min(chunk, K - k);
        sums.clear();
        if (!quantized) {
            with_type(w.type, [&](auto e) {
                few_dense(static_cast<const decltype(e)*>(w.data) + n * K + k, K, count, in.rows + k, in.stride, sums);
            });
        } else if (whole_groups) {
            const auto* bytes = static_cast<const uint8_t*>(w.data) + (n * K + k) / 2;
            const int64_t piece = min(w.scales.block_size, 64), pieces = count / piece;
            float scales[kRows][kMostPieces];
            for (int r = 0; r < kRows; ++r)
                scales_of(w, (n + r) * K + k, pieces, piece, scales[r]);
            if (w.type == kInt8) {
                const int8_t* row = static_cast<const int8_t*>(w.data) + n * K + k;
                if (piece == 64)
                    few_bytes<64>(row, K, pieces, scales, in.rows + k, in.stride, sums);
                else
                    few_bytes<32>(row, K, pieces, scales, in.rows + k, in.stride, sums);
            } else if (piece == 64)
                few_packed<64>(levels_of(w), bytes, K / 2, count, scales, in.eights + k, in.stride, sums);
            else
                few_packed<32>(levels_of(w), bytes, K / 2, count, scales, in.eights + k, in.stride, sums);
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

template <class Units, int kPiece, int kTokens, int kRows>
__attribute__((noinline)) void few_accumulate_fours(const Matrix& w, int64_t K, int64_t n, const FewInputs& in,
                                                    FewSums<kTokens, kRows>& total) {
    const typename Units::Levels levels(w.type, levels_of(w));
    const V unstretch = set1(levels.unstretch);
    for (int64_t k = 0; k < K; k += kFewPackedChunk) {
        const int64_t count = min(kFewPackedChunk, K - k), pieces = count / kPiece;
        const uint8_t* bytes = bytes_at(w, n * K + k);
        FewSums<kTokens, kRows> sums;
        sums.clear();
        float scales[kRows][kMostPieces];
        for (int r = 0; r < kRows; ++r) {
            scales_of(w, (n + r) * K + k, pieces, kPiece, scales[r]);
            for (int i = 0; i < 64 / kPiece; ++i) // read with the first half of a group
                scales[r][pieces + i] = 0;
        }
        const auto group = [&](auto half, int64_t i) {
            few_fours<Units, half, kPiece>(levels, bytes + i / 2, K / 2, scales, i / kPiece, in.fours + k + i,
                                           in.stride, sums);
        };
        int64_t i = 0;
        for (; i + Units::kFours <= count; i += Units::kFours)
            group(std::false_type{}, i);
        if (i < count)
            group(std::true_type{}, i);
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                total.v[r][t] = fma(sums.v[r][t], unstretch, total.v[r][t]);
    }
}

template <int kTokens, int kRows, FewLayout kLayout>
void few_tile(const Product& a, int64_t n, const FewInputs& x, const FewInputs* c, float* out, int64_t out_stride) {
    FewSums<kTokens, kRows> total;
    total.clear();
    for (const LowRank& l : a.low_rank) // its loads come last: nothing would hide their latency
        for (int r = 0; r < kRows && l.R > 0; ++r)
            prefetch_weight(l.factor, l.R, n + r, 0, l.R);
    for (int64_t i = 0; i < a.added_count; ++i)
        prefetch_weight(a.added[i].factor, a.added[i].R, n, 0, kRows * a.added[i].R);
    const bool whole = a.weight.scales.block_size >= 64;
    if constexpr (kLayout == FewLayout::kFours) {
        if (whole)
            few_accumulate_fours<Pairs, 64>(a.weight, a.K, n, x, total);
        else
            few_accumulate_fours<Pairs, 32>(a.weight, a.K, n, x, total);
    } else if constexpr (kLayout == FewLayout::kWords) {
        if (whole)
            few_accumulate_words<Words, 64>(a.weight, a.K, n, x, total);
        else
            few_accumulate_words<Words, 32>(a.weight, a.K, n, x, total);
    } else
        few_accumulate(a.weight, a.K, n, x, total);
    if (a.scale != 1.0f)
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                total.v[r][t] = mul(total.v[r][t], set1(a.scale));
    for (int i = 0; i < 2; ++i)
        if (const LowRank& l = a.low_rank[i]; l.R > 0)
            few_accumulate(l.factor, l.R, n, c[i], total);
    for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r)
            out[t * out_stride + r] = reduce_add(total.v[r][t]);
}

template <int kTokens, FewLayout kLayout>
void few_rows(const Product& a, int64_t n, int64_t rows, const FewInputs& x, const FewInputs* c, float* out,
              int64_t out_stride) {
    constexpr int kRows = few_rows_at_once(kTokens, kLayout);
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        few_tile<kTokens, kRows, kLayout>(a, n + r, x, c, out + r, out_stride);
    for (; r < rows; ++r)
        few_tile<kTokens, 1, kLayout>(a, n + r, x, c, out + r, out_stride);
}

// The rows n, n + 1, … of the product for at most most_tokens(kLayout) tokens.
template <FewLayout kLayout>
void few_rows_of(int tokens, const Product& a, int64_t n, int64_t rows, const FewInputs& x, const FewInputs* c,
                 float* out, int64_t out_stride) {
    constexpr int kMost = most_tokens(kLayout), k5 = kMost < 5 ? kMost : 5, k6 = kMost < 6 ? kMost : 6,
                  k7 = kMost < 7 ? kMost : 7;
    constexpr decltype(&few_rows<1, kLayout>) kRows[] = {
        few_rows<1, kLayout>,  few_rows<2, kLayout>,  few_rows<3, kLayout>,  few_rows<4, kLayout>,
        few_rows<k5, kLayout>, few_rows<k6, kLayout>, few_rows<k7, kLayout>, few_rows<kMost, kLayout>};
    kRows[tokens - 1](a, n, rows, x, c, out, out_stride);
}

} // namespace

void few_rows_of(int tokens, const Product& a, int64_t n, int64_t rows, const FewInputs& x, const FewInputs* c,
                 float* out, int64_t out_stride) {
    if (kFewInPairs && x.fours)
        few_rows_of<kFewInPairs ? FewLayout::kFours : FewLayout::kEights>(tokens, a, n, rows, x, c, out, out_stride);
    else if (kHasWords && x.words)
        few_rows_of<kHasWords ? FewLayout::kWords : FewLayout::kEights>(tokens, a, n, rows, x, c, out, out_stride);
    else
        few_rows_of<FewLayout::kEights>(tokens, a, n, rows, x, c, out, out_stride);
}

void multiply_few(const Product& a) {
    const FewLayout layout = few_layout(a.weight, a.K, a.x_as, a.exact);
    const int64_t N = a.end - a.begin;
    const int64_t at_once = most_tokens(layout);
    for (int64_t first = 0; first < a.M; first += kFewBlock) {
        const int64_t tokens = min(kFewBlock, a.M - first);
        const int64_t share = min(kFewRows, round_up(ceil_div(N, a.threads), few_rows_at_once(1, FewLayout::kEights)));
        // Every thread makes its own inputs, because reading what another core has just written is slow.
        struct Inputs {
            bool made = false;
            FewInputs x, c[2];
        };
        const Scratch scratch;
        auto* inputs = scratch.take<Inputs>(a.threads);
        for (int i = 0; i < a.threads; ++i)
            inputs[i] = {};
        const int64_t x_size = round_up(few_inputs_size(a.K), 1024);
        int64_t size = x_size, c_size[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t R = a.low_rank[i].R;
            size += c_size[i] = R > 0 ? round_up(few_inputs_size(R), 1024) : 0;
        }
        float* memory = scratch.take<float>(a.threads * size);
        parallel_for(a.threads, ceil_div(N, share), [&](int64_t task, int thread) {
            const int64_t n = a.begin + task * share, rows = min(share, a.end - n);
            Inputs& mine = inputs[thread];
            if (!mine.made) {
                mine.made = true;
                float* to = memory + thread * size;
                mine.x = few_inputs(a.x, first, tokens, a.K, a.dropout, layout, to);
                to += x_size;
                for (int i = 0; i < 2; to += c_size[i++])
                    if (const LowRank& l = a.low_rank[i]; l.R > 0)
                        mine.c[i] = few_inputs({l.rows, kFloat32, l.R}, first, tokens, l.R, nullptr,
                                               few_layout(l.factor, l.R, kFloat32, true), to);
            }
            float sums[kMostFewTokens][kFewRows], added[kFewRows] = {};
            if (a.bias)
                load_row({a.bias, a.bias_dtype, a.N}, 0, n, rows, added, rows);
            for (int64_t m = 0; m < tokens; m += at_once) {
                const FewInputs x = from_token(mine.x, m);
                const FewInputs c[2] = {from_token(mine.c[0], m), from_token(mine.c[1], m)};
                const int64_t now = min(at_once, tokens - m);
                few_rows_of(int(now), a, n, rows, x, c, sums[0], kFewRows);
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

} // namespace lowrank::cpu::LOWRANK_ISA
