// The adapted linear map on a CPU: y = W x + U_b (D_b x) + bias + s U C h, h = D drop(x), and its gradients.
// Compiled once per instruction set.
#include "cpu/product/core.h"
#include "cpu/product/project.h"
#include "cpu/product/transposed_words.h"
#include "cpu/runtime/isa.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

void forward(const AdaptedLinear& a) {
    const Dropout dropout(a.dropout, a.seed);
    const Scratch scratch;
    float* through = scratch.take<float>(a.M * a.branch.R); // D_b x
    float* c = scratch.take<float>(a.M * a.R);              // s C h
    const Projection projections[2] = {{a.branch.down, a.branch.R, through},
                                       {a.down, a.R, a.h, dropout.inverse, &dropout}};
    const Product product = {.threads = a.threads,
                             .M = a.M,
                             .N = a.N,
                             .K = a.K,
                             .x = a.x,
                             .weight = a.weight,
                             .low_rank = {{a.branch.R, through, a.branch.up}, {a.R, c, a.up}},
                             .bias = a.bias,
                             .bias_dtype = a.bias_dtype,
                             .y = a.y,
                             .y_dtype = a.x.dtype};
    project_and_multiply(product, a.many, projections, [&](int64_t m, int64_t tokens) {
        if (a.R > 0)
            apply_core(a.threads, a.core, false, {a.h + m * a.R, kFloat32, a.R}, tokens, a.R, a.scale, c + m * a.R,
                       kFloat32, a.R);
    });
}

void backward(const AdaptedLinearBackward& a) {
    const Dropout dropout(a.dropout, a.seed);
    const Scratch scratch;
    const int64_t ranks = a.dx || a.ddown || a.dcore ? a.R : 0, branch_ranks = a.dx ? a.branch.R : 0;
    float* through = scratch.take<float>(a.M * branch_ranks); // g U_b
    float* gh = scratch.take<float>(a.M * ranks);             // s g U
    const float* gd = gh;                                     // and with the core transposed
    if (ranks + branch_ranks > 0)
        project(a.threads, a.g, a.M, a.N, true, {{a.branch.up, branch_ranks, through}, {a.up, ranks, gh, a.scale}});
    if (a.core.kind != kNoCore && (a.dx || a.ddown)) {
        float* cored = scratch.take<float>(a.M * a.R);
        apply_core(a.threads, a.core, true, {gh, kFloat32, a.R}, a.M, a.R, 1.0f, cored, kFloat32, a.R);
        gd = cored;
    }
    if (a.dx)
        multiply_transposed({.threads = a.threads,
                             .M = a.M,
                             .N = a.N,
                             .K = a.K,
                             .g = a.g,
                             .weight = a.weight,
                             .low_rank = {{a.branch.R, through, a.branch.down}, {a.R, gd, a.down}},
                             .dropout = &dropout,
                             .dx = a.dx,
                             .dx_dtype = a.g.dtype});
    if (a.ddown)
        outer(a.threads, gd, a.R, a.x, a.M, a.K, &dropout, dropout.inverse, a.ddown, a.down.type, false);
    if (a.dup) {
        const float* c = a.h;
        if (a.core.kind != kNoCore) {
            float* cored = scratch.take<float>(a.M * a.R);
            apply_core(a.threads, a.core, false, {a.h, kFloat32, a.R}, a.M, a.R, 1.0f, cored, kFloat32, a.R);
            c = cored;
        }
        outer(a.threads, c, a.R, a.g, a.M, a.N, nullptr, a.scale, a.dup, a.up.type, true);
    }
    if (a.dcore)
        core_gradient(a.threads, a.core, gh, {a.h, kFloat32, a.R}, a.M, a.R, a.dcore, a.core.dtype);
}

} // namespace

extern const AdaptedLinearKernels adapted_linear_kernels = {forward, backward};

} // namespace lowrank::cpu::LOWRANK_ISA
