// The adapted linear map on a CPU: y = W x + bias + s U C h, h = D drop(x), and its gradients.
// Compiled once per instruction set.
#include "cpu/core.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Room for M rows of R floats that are read as Product says.
float* low_rank_rows(int slot, int64_t M, int64_t R) {
    return scratch<float>(slot, round_up(M, kLanes) * R + kLanes);
}

void forward(const AdaptedLinear& a) {
    const Dropout dropout(a.dropout, a.seed);
    float* c = nullptr; // s C h
    if (a.R > 0) {
        if (a.many)
            project(a.threads, a.x, a.M, a.K, a.down, false, a.R, &dropout, dropout.inverse, a.h);
        else
            multiply_few({a.threads,
                          a.M,
                          a.R,
                          a.K,
                          0,
                          a.x,
                          a.down,
                          &dropout,
                          nullptr,
                          {},
                          nullptr,
                          0,
                          dropout.inverse,
                          a.h,
                          kFloat32});
        c = low_rank_rows(kSharedC, a.M, a.R);
        apply_core(a.threads, a.core, false, {a.h, kFloat32, a.R}, a.M, a.R, a.scale, c, kFloat32, a.R);
    }
    multiply(
        {a.threads, a.M, a.N, a.K, a.R, a.x, a.weight, nullptr, c, a.up, a.bias, a.bias_dtype, 1.0f, a.y, a.x.dtype},
        a.many);
}

void backward(const AdaptedLinearBackward& a) {
    const Dropout dropout(a.dropout, a.seed);
    const float *gh = nullptr, *gd = nullptr; // s g U [M, R], and with the core transposed
    if (a.R > 0 && (a.dx || a.ddown || a.dcore)) {
        float* projected = low_rank_rows(kSharedGh, a.M, a.R);
        project(a.threads, a.g, a.M, a.N, a.up, true, a.R, nullptr, a.scale, projected);
        gh = gd = projected;
    }
    if (a.core.kind != kNoCore && (a.dx || a.ddown)) {
        float* cored = low_rank_rows(kSharedGd, a.M, a.R);
        apply_core(a.threads, a.core, true, {gh, kFloat32, a.R}, a.M, a.R, 1.0f, cored, kFloat32, a.R);
        gd = cored;
    }
    if (a.dx)
        multiply_transposed({a.threads, a.M, a.N, a.K, a.R, a.g, a.weight, gd, a.down, &dropout, a.dx, a.g.dtype});
    if (a.ddown)
        outer(a.threads, gd, a.R, a.x, a.M, a.K, &dropout, dropout.inverse, a.ddown, a.down.dtype, false);
    if (a.dup) {
        const float* c = a.h;
        if (a.core.kind != kNoCore) {
            float* cored = low_rank_rows(kSharedC, a.M, a.R);
            apply_core(a.threads, a.core, false, {a.h, kFloat32, a.R}, a.M, a.R, 1.0f, cored, kFloat32, a.R);
            c = cored;
        }
        outer(a.threads, c, a.R, a.g, a.M, a.N, nullptr, a.scale, a.dup, a.up.dtype, true);
    }
    if (a.dcore)
        core_gradient(a.threads, a.core, gh, {a.h, kFloat32, a.R}, a.M, a.R, a.dcore, a.core.dtype);
}

} // namespace

extern const AdaptedLinearKernels adapted_linear_kernels = {forward, backward};

} // namespace lowrank::cpu::LOWRANK_ISA
