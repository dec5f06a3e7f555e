// The experts of a mixture: the parts of stacks of operands, and the division of their products into tasks. Included by
// files that are compiled once per instruction set.
#pragma once

#include "cpu/product/product.h"

#include <vector>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kTasksOfThread = 4;   // for one expert with all rows; enough for threads that are unlike in speed
constexpr int64_t kProjectTokens = 128; // rows of a task that projects onto the ranks
constexpr int64_t kDecodeCost = 12;     // decoding W costs about as much as multiplying this many tokens by it

// The rows first … first + rows of x, which one expert has, and a part begin … end of its W.
struct Task {
    int64_t expert, first, rows, begin, end;
};

// Matrix `expert` of a stack of matrices with `numel` elements each.
Matrix of_expert(const Matrix& stack, int64_t expert, int64_t numel) {
    Matrix one = stack;
    if (!stack.data)
        return one;
    const int64_t bytes_of_one = is_packed(stack.type) ? ceil_div(numel, 2) : numel * size_of(stack.type);
    one.data = static_cast<const char*>(stack.data) + expert * bytes_of_one;
    if (!is_quantized(stack.type))
        return one;
    const Scales& s = stack.scales;
    const int64_t blocks = ceil_div(numel, s.block_size);
    const bool bytes = s.absmax2 || has_exponents(stack.type);
    one.scales.absmax = static_cast<const char*>(s.absmax) + expert * blocks * (bytes ? 1 : 4);
    if (s.absmax2) {
        one.scales.absmax2 = s.absmax2 + expert * ceil_div(blocks, kAbsmaxBlock);
        one.scales.offset = s.offset + expert;
    }
    return one;
}

Core of_expert(const Core& stack, int64_t expert) {
    Core one = stack;
    if (stack.kind != kNoCore)
        one.values = static_cast<const char*>(stack.values) + expert * stack.entries * size_of(stack.dtype);
    return one;
}

Rows rows_from(const Rows& rows, int64_t first) {
    return {at(rows, first, 0), rows.dtype, rows.stride};
}

// Divides the parts 0 … size of every expert's W, in multiples of `unit`, so that no task takes much more than its
// share of the time.
std::vector<Task> divide(const int32_t* offsets, int64_t E, int64_t size, int64_t unit, int threads) {
    int64_t total = 0;
    for (int64_t e = 0; e < E; ++e)
        if (offsets[e + 1] > offsets[e])
            total += offsets[e + 1] - offsets[e] + kDecodeCost;
    std::vector<Task> tasks;
    for (int64_t e = 0; e < E; ++e) {
        const int64_t rows = offsets[e + 1] - offsets[e];
        if (rows == 0)
            continue;
        const int64_t parts = ceil_div((rows + kDecodeCost) * kTasksOfThread * threads, total);
        const int64_t part = threads == 1 ? size : round_up(ceil_div(size, parts), unit);
        for (int64_t begin = 0; begin < size; begin += part)
            tasks.push_back({e, offsets[e], rows, begin, min(size, begin + part)});
    }
    return tasks;
}

// Divides the rows of every expert.
std::vector<Task> divide_rows(const int32_t* offsets, int64_t E) {
    std::vector<Task> tasks;
    for (int64_t e = 0; e < E; ++e)
        for (int64_t m = offsets[e]; m < offsets[e + 1]; m += kProjectTokens)
            tasks.push_back({e, m, min(kProjectTokens, offsets[e + 1] - m), 0, 0});
    return tasks;
}

template <class F>
void run(int threads, const std::vector<Task>& tasks, const F& body) {
    parallel_for(threads, int64_t(tasks.size()), [&](int64_t i) { body(tasks[size_t(i)]); });
}

// Zeroes the rows past the last expert.
void zero_rest(const int32_t* offsets, int64_t E, int64_t P, int64_t columns, int dtype, void* rows) {
    const int64_t first = offsets[E];
    const int64_t bytes = (P - first) * columns * size_of(dtype);
    if (bytes > 0) // a rank of 0 takes no memory, and the pointer may be null
        std::memset(static_cast<char*>(rows) + first * columns * size_of(dtype), 0, size_t(bytes));
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
