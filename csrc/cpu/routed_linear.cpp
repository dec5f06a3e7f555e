// The linear map in which every row has its own updates: y[t] = W x[t] + U_b (D_b x[t]) + bias + sum w s U C (D x[t]),
// w the strength of an update of the row, also with the W, the branch and the part of the update that belong to the
// row's expert. Compiled once per instruction set.
//
// The unit is an entry: a row and one of its updates. D x is computed for groups of entries that share D, and C h for
// groups that share the whole update. U c is added to the sums of W x before they are rounded, strip by strip, while
// they are in the caches, to each row in the order of its entries. A row's result does not depend on its groups.
#include "cpu/product/core.h"
#include "cpu/product/experts.h"
#include "cpu/product/project.h"
#include "cpu/runtime/isa.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

struct Update {
    int64_t R;
    Matrix down, up;
    Core core;
    float scale;
};

Update update_of(const RoutedLinear& a, int32_t slot, int64_t expert) {
    const char* arena = a.arena;
    const ArenaRow& row = a.table[slot];
    const auto part = [&](int64_t begin) { return begin < 0 ? nullptr : arena + begin; };
    const auto floats = [&](int64_t begin) { return reinterpret_cast<const float*>(part(begin)); };
    const auto matrix = [&](const ArenaMatrix& m) {
        return Matrix{.data = part(m.data),
                      .type = int(m.type),
                      .scales = {.absmax = part(m.absmax),
                                 .absmax2 = floats(m.absmax2),
                                 .offset = floats(m.offset),
                                 .block_size = m.block}};
    };
    const ArenaCore& core = row.core;
    Update update = {.R = row.rank,
                     .down = matrix(row.down),
                     .up = matrix(row.up),
                     .core = {.values = part(core.values),
                              .dtype = int(core.type),
                              .kind = int(core.kind),
                              .entries = core.entries,
                              .bandwidth = core.bandwidth,
                              .index = reinterpret_cast<const int32_t*>(part(core.index))},
                     .scale = 0};
    const auto bits = int32_t(row.scale);
    std::memcpy(&update.scale, &bits, 4);
    update.down = of_expert(update.down, expert, update.R * a.K);
    update.up = of_expert(update.up, expert, a.N * update.R);
    update.core = of_expert(update.core, expert);
    return update;
}

// Entries grouped by the operands they share, and C D x of each. Row m of x has the entries m S to m S + S - 1.
struct Routed {
    int64_t S = 1;
    std::vector<Update> updates; // of the slots in use
    std::vector<int32_t> update; // of each entry; -1: none
    std::vector<int32_t> order;  // entries with an update, sorted by D, then by update
    std::vector<const float*> c; // w s C D x of each entry

    const Update& of(int64_t place) const { return updates[size_t(update[size_t(order[size_t(place)])])]; }

    // The first place after `begin` whose update is not the `same`, or `begin + most` if that comes first.
    template <class Same>
    int64_t end_of(int64_t begin, int64_t most, Same same) const {
        const int64_t last = min(int64_t(order.size()), begin + most);
        int64_t end = begin + 1;
        while (end < last && same(of(begin), of(end)))
            ++end;
        return end;
    }
};

struct Span {
    int64_t begin, end, first_row; // places in the order; rows of D
};

void project_routed(const Scratch& scratch, const RoutedLinear& a, Routed& routed) {
    constexpr auto everything = [](const Update& l, const Update& r) { return &l == &r; };
    constexpr auto down = [](const Update& l, const Update& r) { return l.down.data == r.down.data; };
    const auto places = int64_t(routed.order.size());
    std::vector<int64_t> begin(size_t(places) + 1);        // of the h of each place
    std::vector<int32_t> row(static_cast<size_t>(places)); // of x
    std::vector<Span> projections, cores;
    for (int64_t i = 0; i < places; ++i) {
        begin[size_t(i) + 1] = begin[size_t(i)] + routed.of(i).R;
        row[size_t(i)] = int32_t(routed.order[size_t(i)] / a.S);
    }
    float* h = scratch.take<float>(begin.back());
    float* c = scratch.take<float>(begin.back());
    for (int64_t i = 0, end; i < places; i = end) {
        const Update& u = routed.of(i);
        if (u.core.kind != kNoCore) {
            // The factors of a family of adapters: many rows may share them.
            end = routed.end_of(i, places, down);
            const int64_t bytes = a.K * size_of(a.x.dtype);
            const Scratch scratch;
            char* x = scratch.take<char>((end - i) * bytes);
            for (int64_t j = i; j < end; ++j)
                std::memcpy(x + (j - i) * bytes, at(a.x, row[size_t(j)], 0), size_t(bytes));
            project(a.threads, {x, a.x.dtype, a.K}, end - i, a.K, false, {{}, {u.down, u.R, h + begin[size_t(i)]}});
            continue;
        }
        end = routed.end_of(i, kFewTokens, down);
        for (int64_t r = 0; r < routed.of(i).R; r += kFewRows)
            projections.push_back({i, end, r});
    }
    for (int64_t i = 0, end; i < places; i = end) {
        end = routed.end_of(i, kLanes, everything);
        cores.push_back({i, end, 0});
    }
    parallel_for(a.threads, int64_t(projections.size()), [&](int64_t task) {
        const Span& span = projections[size_t(task)];
        const Update& u = routed.of(span.begin);
        const int tokens = int(span.end - span.begin);
        Product product{}; // few_rows_of reads these two, the scale and the low-rank terms
        product.weight = u.down, product.K = a.K;
        const Scratch scratch;
        const FewInputs x = few_inputs(a.x, span.begin, tokens, a.K, nullptr, few_layout(u.down, a.K, a.x.dtype, true),
                                       scratch.take<float>(few_inputs_size(a.K)), row.data());
        float sums[kFewTokens][kFewRows];
        const int64_t rows = min(kFewRows, u.R - span.first_row);
        few_rows_of(tokens, product, span.first_row, rows, x, nullptr, sums[0], kFewRows);
        for (int t = 0; t < tokens; ++t)
            std::memcpy(h + begin[size_t(span.begin + t)] + span.first_row, sums[t], size_t(rows) * 4);
    });
    parallel_for(a.threads, int64_t(cores.size()), [&](int64_t task) {
        const Span& span = cores[size_t(task)];
        const Update& u = routed.of(span.begin);
        const int64_t first = begin[size_t(span.begin)];
        apply_core(1, u.core, false, {h + first, kFloat32, u.R}, span.end - span.begin, u.R, u.scale, c + first,
                   kFloat32, u.R);
        for (int64_t i = span.begin; a.strengths && i < span.end; ++i)
            for (int64_t r = begin[size_t(i)]; r < begin[size_t(i) + 1]; ++r)
                c[r] *= a.strengths[routed.order[size_t(i)]];
    });
    routed.c.resize(size_t(a.M * a.S));
    for (int64_t i = 0; i < places; ++i)
        routed.c[size_t(routed.order[size_t(i)])] = c + begin[size_t(i)];
}

constexpr int64_t kRanks = 64; // summed before they are added

// The sum over lanes of each of kLanes vectors, in pairs of neighbours, then of pairs, and so on.
LOWRANK_INLINE V sum_lanes(V (&of)[kLanes]) {
    const auto halve = [&](auto step) {
        constexpr int kStep = decltype(step)::value;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i += 2 * kStep) {
            exchange<kStep>(of[i], of[i + kStep]);
            of[i] = add(of[i], of[i + kStep]);
        }
    };
    halve(std::integral_constant<int, 1>{});
    halve(std::integral_constant<int, 2>{});
    if constexpr (kLanes > 4)
        halve(std::integral_constant<int, 4>{});
    if constexpr (kLanes > 8)
        halve(std::integral_constant<int, 8>{});
    return of[0];
}

// The same of the transposed square: the sum of its vectors.
LOWRANK_INLINE V sum_vectors(V (&of)[kLanes]) {
#pragma GCC unroll 4
    for (int step = 1; step < kLanes; step *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i += 2 * step)
            of[i] = add(of[i], of[i + step]);
    return of[0];
}

// to[j] += sum_k c[k] up[j * stride + k], k < ranks, j < rows. Whole vectors of `to` are written.
template <class T>
void expand(const float* c, int64_t ranks, const T* up, int64_t stride, int64_t rows, float* to) {
    for (int64_t j = 0; j < rows; j += kLanes) {
        const int64_t here = min(kLanes, rows - j);
        V sums[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            sums[i] = zero();
        for (int64_t k = 0; k < ranks; k += kLanes) {
            const T* from = up + j * stride + k;
            const int64_t n = min(kLanes, ranks - k);
            if (n == kLanes && here == kLanes) {
                const V in = load(c + k);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    sums[i] = fma(load(from + i * stride), in, sums[i]);
            } else {
                const V in = load_n(c + k, n);
                for (int64_t i = 0; i < here; ++i)
                    sums[i] = fma(load_n(from + i * stride, n), in, sums[i]);
            }
        }
        store(to + j, add(load(to + j), sum_lanes(sums)));
    }
}

// The same in the same order, with U transposed: row k is at transposed + k * stride.
void expand_transposed(const float* c, int64_t ranks, const float* transposed, int64_t stride, int64_t rows,
                       float* to) {
    for (int64_t j = 0; j < rows; j += kLanes) {
        V sums[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            sums[i] = zero();
        for (int64_t k = 0; k < ranks; k += kLanes) {
            const float* from = transposed + k * stride + j;
            const int64_t n = min(kLanes, ranks - k);
            if (n == kLanes)
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    sums[i] = fma(load(from + i * stride), set1(c[k + i]), sums[i]);
            else
                for (int64_t i = 0; i < n; ++i)
                    sums[i] = fma(load(from + i * stride), set1(c[k + i]), sums[i]);
        }
        store(to + j, add(load(to + j), sum_vectors(sums)));
    }
}

// The rows of a product, from row `first` of x on.
struct Adder {
    const Routed& routed;
    int64_t first;
};

// to[i][r] += U c for entry `column` of tokens m + i; U is read once for the tokens that share it.
void add_column(const Routed& routed, int64_t column, int64_t m, int64_t tokens, int64_t n, int64_t rows, float* to,
                int64_t stride) {
    constexpr int64_t kFewSharing = 2; // so few need no transposed U
    const int64_t padded = round_up(rows, kLanes);
    const auto entry = [&](int64_t i) { return size_t((m + i) * routed.S + column); };
    bool done[kMostAdded] = {};
    for (int64_t i = 0; i < tokens; ++i) {
        const int32_t update = routed.update[entry(i)];
        if (done[i] || update < 0)
            continue;
        const Update& u = routed.updates[size_t(update)];
        int64_t with[kMostAdded], count = 0;
        for (int64_t j = i; j < tokens; ++j) {
            const int32_t other = routed.update[entry(j)];
            if (other >= 0 && routed.updates[size_t(other)].up.data == u.up.data)
                with[count++] = j, done[j] = true;
        }
        for (int64_t r = 0; r < u.R; r += kRanks) {
            const int64_t ranks = min(kRanks, u.R - r);
            const auto add_all = [&](const auto* up, int64_t apart) {
                for (int64_t t = 0; t < count; ++t)
                    expand(routed.c[entry(with[t])] + r, ranks, up, apart, rows, to + with[t] * stride);
            };
            if (count <= kFewSharing && !is_packed(u.up.type)) {
                with_type(u.up.type,
                          [&](auto e) { add_all(static_cast<const decltype(e)*>(u.up.data) + n * u.R + r, u.R); });
                continue;
            }
            // Whole rows are contiguous and are decoded as one. A vector may read past the end of a row; those lanes
            // are not used.
            const int64_t apart = ranks == u.R ? u.R : kRanks;
            const Scratch scratch;
            float* up = scratch.take<float>(padded * kRanks + kLanes);
            if (ranks == u.R)
                weight_row(u.up, u.R, n, 0, rows * u.R, up);
            for (int64_t j = 0; j < rows && ranks < u.R; ++j)
                weight_row(u.up, u.R, n + j, r, ranks, up + j * apart);
            if (count <= kFewSharing) {
                add_all(up, apart);
                continue;
            }
            float* transposed = scratch.take<float>(kRanks * padded);
            transpose(up, apart, padded, round_up(ranks, kLanes), transposed, padded);
            for (int64_t t = 0; t < count; ++t)
                expand_transposed(routed.c[entry(with[t])] + r, ranks, transposed, padded, padded,
                                  to + with[t] * stride);
        }
    }
}

// to[i][r] += the sum of U c over the entries of tokens m + i, in their order.
void add_updates(const void* adder, int64_t m, int64_t tokens, int64_t n, int64_t rows, float* to, int64_t stride) {
    const auto& [routed, first] = *static_cast<const Adder*>(adder);
    for (int64_t column = 0; column < routed.S; ++column)
        add_column(routed, column, first + m, tokens, n, rows, to, stride);
}

void forward(const RoutedLinear& a) {
    const Scratch scratch;
    Routed routed;
    routed.S = a.S;
    const int32_t all[] = {0, int32_t(a.M)};
    const int32_t* offsets = a.offsets ? a.offsets : all;
    routed.update.assign(size_t(a.M * a.S), -1);
    std::vector<std::pair<int32_t, int32_t>> seen; // of one expert: slot, its update
    for (int64_t e = 0; e < a.E; ++e, seen.clear())
        for (int64_t entry = offsets[e] * a.S; entry < offsets[e + 1] * a.S; ++entry) {
            const int32_t slot = a.slots[entry];
            if (slot < 0 || a.table[slot].rank == 0)
                continue;
            auto known = std::find_if(seen.begin(), seen.end(), [&](const auto& pair) { return pair.first == slot; });
            if (known == seen.end()) {
                known = seen.insert(seen.end(), {slot, int32_t(routed.updates.size())});
                routed.updates.push_back(update_of(a, slot, e));
            }
            routed.update[size_t(entry)] = known->second;
            routed.order.push_back(int32_t(entry));
        }
    std::stable_sort(routed.order.begin(), routed.order.end(), [&](int32_t l, int32_t r) {
        const Update &left = routed.updates[size_t(routed.update[size_t(l)])],
                     &right = routed.updates[size_t(routed.update[size_t(r)])];
        return left.down.data != right.down.data ? left.down.data < right.down.data : &left < &right;
    });
    if (!routed.order.empty())
        project_routed(scratch, a, routed);
    const int64_t branch_R = a.branch.R;
    float* through = scratch.take<float>(a.M * branch_R); // D_b x
    const auto projection_of = [&](int64_t expert, int64_t first) {
        return Projection{of_expert(a.branch.down, expert, branch_R * a.K), branch_R, through + first * branch_R};
    };
    // The product of rows from `first` on with W of an expert.
    const auto product = [&](int64_t expert, int64_t first, int64_t rows, const Adder& adder) {
        const bool updates = !routed.order.empty();
        const char* bias = static_cast<const char*>(a.bias);
        return Product{
            .threads = a.threads,
            .M = rows,
            .N = a.N,
            .K = a.K,
            .x = rows_from(a.x, first),
            .weight = of_expert(a.weight, expert, a.N * a.K),
            .low_rank = {{branch_R, through + first * branch_R, of_expert(a.branch.up, expert, a.N * branch_R)}},
            .bias = bias ? bias + expert * a.N * size_of(a.bias_dtype) : nullptr,
            .bias_dtype = a.bias_dtype,
            .y = static_cast<char*>(a.y) + first * a.N * size_of(a.x.dtype),
            .y_dtype = a.x.dtype,
            .add = updates ? add_updates : nullptr,
            .adder = &adder};
    };
    if (!a.offsets) {
        const Adder adder{routed, 0};
        Product whole = product(0, 0, a.M, adder);
        std::vector<LowRank> added;
        for (const Update& u : routed.updates)
            added.push_back({u.R, nullptr, u.up});
        whole.added = added.data(), whole.added_count = int64_t(added.size());
        project_and_multiply(whole, a.many, {projection_of(0, 0), {}}, [](int64_t, int64_t) {});
        return;
    }
    if (branch_R > 0)
        run(a.threads, divide_rows(offsets, a.E), [&](const Task& t) {
            const Projection projections[2] = {projection_of(t.expert, t.first), {}};
            if (offsets[t.expert + 1] - offsets[t.expert] <= a.few)
                project_few(1, rows_from(a.x, t.first), t.rows, a.K, projections);
            else
                project(1, rows_from(a.x, t.first), t.rows, a.K, false, projections);
        });
    run(a.threads, divide(offsets, a.E, a.N, kStrip, a.threads), [&](const Task& t) {
        const Adder adder{routed, t.first};
        Product part = product(t.expert, t.first, t.rows, adder);
        part.threads = 1, part.begin = t.begin, part.end = t.end;
        multiply(part, t.rows > a.few);
    });
    zero_rest(offsets, a.E, a.M, a.N, a.x.dtype, a.y);
}

} // namespace

extern const RoutedLinearKernels routed_linear_kernels = {forward};

} // namespace lowrank::cpu::LOWRANK_ISA
