// The core C [R, R] of an update U C D on a CPU: c = C h row by row, and the gradient of its entries. Included by files
// that are compiled once per instruction set.
#pragma once

#include "cpu/product/outer.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// The index such that entry (i, i + o) of a band of half-width d is at values[index + i].
LOWRANK_INLINE int64_t diagonal_at(int64_t o, int64_t d, int64_t R) {
    const int64_t below = o < 0 ? -o : 0;
    const int64_t start =
        o <= 0 ? (d + o) * R - (d * (d + 1) - o * (o - 1)) / 2 : d * R - d * (d + 1) / 2 + o * R - o * (o - 1) / 2;
    return start - below;
}

// The pattern of a sparse core as cores.sparse_index lays it out.
struct SparseIndex {
    const int32_t *row_start, *columns, *column_start, *rows, *order;

    SparseIndex(const Core& core, int64_t R)
        : row_start(core.index), columns(row_start + R + 1), column_start(columns + core.entries),
          rows(column_start + R + 1), order(rows + core.entries) {}
};

// y[0 … count) += a * x, element by element.
LOWRANK_INLINE void add_product(const float* a, const float* x, int64_t count, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(y + i, fma(load(a + i), load(x + i), load(y + i)));
    if (i < count)
        store_n(y + i, fma(load_n(a + i, count - i), load_n(x + i, count - i), load_n(y + i, count - i)), count - i);
}

// A core prepared for `apply`: values in float32; row j of a dense core holds the weights of input j.
class CoreMap {
public:
    CoreMap(const Core& core, int64_t R, bool transposed) : core_(core), R_(R), transposed_(transposed) {
        if (core.kind == kNoCore)
            return;
        const int64_t padded = round_up(R, kLanes), count = core.kind == kDense ? padded * padded : core.entries;
        float* values = scratch_.take<float>(count);
        if (core.kind != kDense) {
            load_row({core.values, core.dtype, count}, 0, 0, count, values, count);
        } else {
            float* rows = transposed ? values : scratch_.take<float>(count);
            std::memset(rows, 0, size_t(count) * 4);
            for (int64_t i = 0; i < R; ++i)
                load_row({core.values, core.dtype, R}, i, 0, R, rows + i * padded, padded);
            if (!transposed)
                transpose(rows, padded, padded, padded, values, padded);
        }
        values_ = values;
    }

    // out[0 … R) = C h, or C transposed times h; neither h nor out needs padding.
    void apply(const float* h, float* out) const {
        if (core_.kind == kDense)
            return dense(h, out);
        std::memset(out, 0, size_t(R_) * 4);
        if (core_.kind == kBanded) {
            for (int64_t o = -core_.bandwidth; o <= core_.bandwidth; ++o) {
                const float* values = values_ + diagonal_at(o, core_.bandwidth, R_);
                const int64_t first = max(0, -o), last = min(R_, R_ - o), to = transposed_ ? o : 0;
                add_product(values + first, h + first + o - to, last - first, out + first + to);
            }
            return;
        }
        const SparseIndex index(core_, R_);
        const int32_t* start = transposed_ ? index.column_start : index.row_start;
        for (int64_t i = 0; i < R_; ++i) {
            float sum = 0;
            for (int64_t e = start[i]; e < start[i + 1]; ++e)
                sum += transposed_ ? values_[index.order[e]] * h[index.rows[e]] : values_[e] * h[index.columns[e]];
            out[i] = sum;
        }
    }

private:
    // Sums kTerms terms in registers, then adds the sums in order.
    void dense(const float* h, float* out) const {
        constexpr int kVectors = 4;
        constexpr int64_t kTerms = 256;
        const int64_t padded = round_up(R_, kLanes);
        for (int64_t i = 0; i < R_; i += kVectors * kLanes) {
            const int vectors = int(min(kVectors, (padded - i) / kLanes));
            V total[kVectors];
            for (int v = 0; v < kVectors; ++v)
                total[v] = zero();
            for (int64_t first = 0; first < R_; first += kTerms) {
                V sum[kVectors];
                for (int v = 0; v < kVectors; ++v)
                    sum[v] = zero();
                for (int64_t j = first; j < min(R_, first + kTerms); ++j) {
                    const V in = set1(h[j]);
                    const float* row = values_ + j * padded + i;
                    if (vectors == kVectors) {
#pragma GCC unroll 4
                        for (int v = 0; v < kVectors; ++v)
                            sum[v] = fma(in, load(row + v * kLanes), sum[v]);
                    } else {
                        for (int v = 0; v < vectors; ++v)
                            sum[v] = fma(in, load(row + v * kLanes), sum[v]);
                    }
                }
                for (int v = 0; v < kVectors; ++v)
                    total[v] = add(total[v], sum[v]);
            }
            for (int v = 0; v < vectors; ++v)
                store_n(out + i + v * kLanes, total[v], min(kLanes, R_ - i - v * kLanes));
        }
    }

    Scratch scratch_;
    Core core_;
    int64_t R_;
    bool transposed_;
    const float* values_ = nullptr;
};

// to[m] = factor * C h[m] (or C transposed times it), rounded to `dtype`, for M rows, `stride` elements apart.
void apply_core(int threads, const Core& core, bool transposed, const Rows& h, int64_t M, int64_t R, float factor,
                void* to, int dtype, int64_t stride) {
    constexpr int64_t kRowsAtOnce = 4;
    const CoreMap map(core, R, transposed);
    parallel_for(threads, ceil_div(M, kRowsAtOnce), [&](int64_t task) {
        const Scratch scratch;
        float* in = scratch.take<float>(R);
        float* out = scratch.take<float>(R);
        for (int64_t m = task * kRowsAtOnce; m < min(M, (task + 1) * kRowsAtOnce); ++m) {
            const float* row = in;
            if (h.dtype == kFloat32)
                row = static_cast<const float*>(at(h, m, 0));
            else
                load_row(h, m, 0, R, in, R);
            if (core.kind != kNoCore) {
                map.apply(row, out);
                row = out;
            }
            if (factor != 1.0f) {
                for (int64_t r = 0; r < R; ++r)
                    out[r] = row[r] * factor;
                row = out;
            }
            store_row(row, R, to, dtype, m * stride);
        }
    });
}

// out[e] = sum_m b[m][i] h[m, j] for every entry e = (i, j) of the pattern, in its layout and `dtype`.
void core_gradient(int threads, const Core& core, const float* b, const Rows& h, int64_t M, int64_t R, void* out,
                   int dtype) {
    if (core.kind == kDense) {
        outer(threads, b, R, h, M, R, nullptr, 1.0f, out, dtype, false);
        return;
    }
    constexpr int64_t kTokens = 512, kStride = kTokens + kSkew, kRowsAtOnce = 16;
    const int64_t padded = round_up(R, kLanes);
    const Scratch scratch;
    float* sums = scratch.take<float>(core.entries);
    float* left = scratch.take<float>(padded * kStride); // b and h with tokens as lanes
    float* right = scratch.take<float>(padded * kStride);
    for (int64_t m = 0; m < M; m += kTokens) {
        const int64_t tokens = min(kTokens, M - m), lanes = round_up(tokens, kLanes);
        parallel_for(threads, lanes / kLanes, [&](int64_t task) {
            const Scratch scratch;
            float* part = scratch.take<float>(kLanes * padded);
            for (int side = 0; side < 2; ++side) {
                const Rows from = side == 0 ? Rows{b, kFloat32, R} : h;
                for (int64_t i = 0; i < kLanes; ++i) {
                    const int64_t row = task * kLanes + i;
                    if (row < tokens)
                        load_row(from, m + row, 0, R, part + i * padded, padded);
                    else
                        std::memset(part + i * padded, 0, size_t(padded) * 4);
                }
                transpose(part, padded, kLanes, padded, (side == 0 ? left : right) + task * kLanes, kStride);
            }
        });
        const auto add_entry = [&](int64_t e, int64_t i, int64_t j) {
            V sum[2] = {zero(), zero()};
            for (int64_t t = 0; t < lanes; t += kLanes)
                sum[t / kLanes % 2] =
                    fma(load(left + i * kStride + t), load(right + j * kStride + t), sum[t / kLanes % 2]);
            sums[e] = (m == 0 ? 0.0f : sums[e]) + reduce_add(add(sum[0], sum[1]));
        };
        parallel_for(threads, ceil_div(R, kRowsAtOnce), [&](int64_t task) {
            for (int64_t i = task * kRowsAtOnce; i < min(R, (task + 1) * kRowsAtOnce); ++i) {
                if (core.kind == kBanded) {
                    const int64_t d = core.bandwidth;
                    for (int64_t o = max(-d, -i); o <= min(d, R - 1 - i); ++o)
                        add_entry(diagonal_at(o, d, R) + i, i, i + o);
                } else {
                    const SparseIndex index(core, R);
                    for (int64_t e = index.row_start[i]; e < index.row_start[i + 1]; ++e)
                        add_entry(e, i, index.columns[e]);
                }
            }
        });
    }
    store_row(sums, core.entries, out, dtype, 0);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
