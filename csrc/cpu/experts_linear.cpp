// The adapted linear map of a mixture of experts, whose rows are sorted by expert: y[p] = W_e x[p] + U_be (D_be x[p]) +
// b_e + s U_e C_e h[p], h[p] = D_e drop(x[p]), and its gradients. Compiled once per instruction set.
//
// A task is the product of some rows of one expert with some rows (or columns) of its W, on one thread. Tasks of all
// experts go into one queue, so that threads are busy however the rows are spread over the experts.
#include "cpu/product/core.h"
#include "cpu/product/experts.h"
#include "cpu/product/project.h"
#include "cpu/product/transposed_words.h"
#include "cpu/runtime/isa.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

Dropout mask_from(const Dropout& dropout, int64_t first) {
    Dropout from = dropout;
    from.first = first;
    return from;
}

void* part_of(void* gradients, int64_t expert, int64_t numel, int dtype) {
    return static_cast<char*>(gradients) + expert * numel * size_of(dtype);
}

// Zeroes the gradients, unless null, of experts without rows.
void zero_unused(const int32_t* offsets, int64_t E, int64_t numel, int dtype, void* gradients) {
    for (int64_t e = 0; gradients && e < E; ++e)
        if (offsets[e] == offsets[e + 1])
            std::memset(part_of(gradients, e, numel, dtype), 0, size_t(numel * size_of(dtype)));
}

void forward(const ExpertsLinear& a) {
    const int64_t N = a.N, K = a.K, R = a.R, branch_R = a.branch.R;
    const Dropout dropout(a.dropout, a.seed);
    const Scratch scratch;
    float* through = scratch.take<float>(a.P * branch_R); // D_b x
    float* c = scratch.take<float>(a.P * R);              // s C h
    const auto is_few = [&](const Task& t) { return a.offsets[t.expert + 1] - a.offsets[t.expert] <= a.few; };
    if (R + branch_R > 0)
        run(a.threads, divide_rows(a.offsets, a.E), [&](const Task& t) {
            const Dropout mask = mask_from(dropout, t.first);
            const Rows x = rows_from(a.x, t.first);
            float* h = a.h + t.first * R;
            const Projection projections[2] = {
                {of_expert(a.branch.down, t.expert, branch_R * K), branch_R, through + t.first * branch_R},
                {of_expert(a.down, t.expert, R * K), R, h, mask.inverse, &mask}};
            if (is_few(t))
                project_few(1, x, t.rows, K, projections);
            else
                project(1, x, t.rows, K, false, projections);
            if (R > 0)
                apply_core(1, of_expert(a.core, t.expert), false, {h, kFloat32, R}, t.rows, R, a.scale, c + t.first * R,
                           kFloat32, R);
        });
    run(a.threads, divide(a.offsets, a.E, N, kStrip, a.threads), [&](const Task& t) {
        const int64_t y_size = size_of(a.x.dtype), bias_size = size_of(a.bias_dtype);
        multiply({.threads = 1,
                  .M = t.rows,
                  .N = N,
                  .K = K,
                  .begin = t.begin,
                  .end = t.end,
                  .x = rows_from(a.x, t.first),
                  .weight = of_expert(a.weight, t.expert, N * K),
                  .low_rank = {{branch_R, through + t.first * branch_R, of_expert(a.branch.up, t.expert, N * branch_R)},
                               {R, c + t.first * R, of_expert(a.up, t.expert, N * R)}},
                  .bias = a.bias ? static_cast<const char*>(a.bias) + t.expert * N * bias_size : nullptr,
                  .bias_dtype = a.bias_dtype,
                  .y = static_cast<char*>(a.y) + t.first * N * y_size,
                  .y_dtype = a.x.dtype},
                 !is_few(t));
    });
    zero_rest(a.offsets, a.E, a.P, N, a.x.dtype, a.y);
    zero_rest(a.offsets, a.E, a.P, R, kFloat32, a.h);
}

void backward(const ExpertsLinearBackward& a) {
    const int64_t N = a.N, K = a.K, R = a.R;
    const Dropout dropout(a.dropout, a.seed);
    const bool cored = a.core.kind != kNoCore;
    const int64_t branch_R = a.dx ? a.branch.R : 0;
    const Scratch scratch;
    float* through = scratch.take<float>(a.P * branch_R); // g U_b [P, R_b]
    float* gh = scratch.take<float>(a.P * R);             // s g U [P, R]
    float* gd = gh;                                       // and with the core transposed
    const float* c = a.h;                                 // C h
    if (cored) {
        gd = scratch.take<float>(a.P * R);
        c = scratch.take<float>(a.P * R);
    }
    if (branch_R > 0 || (R > 0 && (a.dx || a.ddown || a.dup || a.dcore)))
        run(a.threads, divide_rows(a.offsets, a.E), [&](const Task& t) {
            const int64_t at = t.first * R;
            const Core core = of_expert(a.core, t.expert);
            if (a.dx || a.ddown || a.dcore)
                project(1, rows_from(a.g, t.first), t.rows, N, true,
                        {{of_expert(a.branch.up, t.expert, N * branch_R), branch_R, through + t.first * branch_R},
                         {of_expert(a.up, t.expert, N * R), R, gh + at, a.scale}});
            if (cored && (a.dx || a.ddown))
                apply_core(1, core, true, {gh + at, kFloat32, R}, t.rows, R, 1.0f, gd + at, kFloat32, R);
            if (cored && a.dup)
                apply_core(1, core, false, {a.h + at, kFloat32, R}, t.rows, R, 1.0f, const_cast<float*>(c) + at,
                           kFloat32, R);
        });
    if (a.dx) {
        run(a.threads, divide(a.offsets, a.E, K, kColumns, a.threads), [&](const Task& t) {
            const Dropout mask = mask_from(dropout, t.first);
            multiply_transposed({.threads = 1,
                                 .M = t.rows,
                                 .N = N,
                                 .K = K,
                                 .begin = t.begin,
                                 .end = t.end,
                                 .g = rows_from(a.g, t.first),
                                 .weight = of_expert(a.weight, t.expert, N * K),
                                 .low_rank = {{branch_R, through + t.first * branch_R,
                                               of_expert(a.branch.down, t.expert, branch_R * K)},
                                              {R, gd + t.first * R, of_expert(a.down, t.expert, R * K)}},
                                 .dropout = &mask,
                                 .dx = static_cast<char*>(a.dx) + t.first * K * size_of(a.g.dtype),
                                 .dx_dtype = a.g.dtype});
        });
        zero_rest(a.offsets, a.E, a.P, K, a.g.dtype, a.dx);
    }
    if (a.ddown)
        run(a.threads, divide(a.offsets, a.E, K, kOuterColumns, a.threads), [&](const Task& t) {
            const Dropout mask = mask_from(dropout, t.first);
            outer(1, gd + t.first * R, R, rows_from(a.x, t.first), t.rows, K, &mask, mask.inverse,
                  part_of(a.ddown, t.expert, R * K, a.down.type), a.down.type, false, t.begin, t.end);
        });
    if (a.dup)
        run(a.threads, divide(a.offsets, a.E, N, kOuterColumns, a.threads), [&](const Task& t) {
            outer(1, c + t.first * R, R, rows_from(a.g, t.first), t.rows, N, nullptr, a.scale,
                  part_of(a.dup, t.expert, N * R, a.up.type), a.up.type, true, t.begin, t.end);
        });
    if (a.dcore)
        run(a.threads, divide(a.offsets, a.E, 1, 1, a.threads), [&](const Task& t) {
            core_gradient(1, of_expert(a.core, t.expert), gh + t.first * R, {a.h + t.first * R, kFloat32, R}, t.rows, R,
                          part_of(a.dcore, t.expert, a.core.entries, a.core.dtype), a.core.dtype);
        });
    zero_unused(a.offsets, a.E, R * K, a.down.type, a.ddown);
    zero_unused(a.offsets, a.E, N * R, a.up.type, a.dup);
    zero_unused(a.offsets, a.E, a.core.entries, a.core.dtype, a.dcore);
}

} // namespace

extern const ExpertsLinearKernels experts_linear_kernels = {forward, backward};

} // namespace lowrank::cpu::LOWRANK_ISA
