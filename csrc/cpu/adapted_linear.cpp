// The adapted linear map on a CPU: y = W x + bias + s U C h, h = D drop(x), and its gradients.
// Compiled once per instruction set.
#include "cpu/product/core.h"
#include "cpu/product/multiply.h"
#include "cpu/product/project.h"
#include "cpu/product/transposed.h"
#include "cpu/runtime/isa.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// h = D drop(x) / (1 - p), rows m … m + tokens of c = s C h.
void apply_core(const AdaptedLinear& a, int64_t m, int64_t tokens, float* c) {
    lowrank::cpu::LOWRANK_ISA::apply_core(a.threads, a.core, false, {a.h + m * a.R, kFloat32, a.R}, tokens, a.R,
                                          a.scale, c + m * a.R, kFloat32, a.R);
}

// Packs x once for both products.
template <class Units>
void forward_packed_once(const AdaptedLinear& a, const Product& product, float* c) {
    each_block<Units>(product, [&](const Packed& x) {
        if constexpr (kSplits<Units>)
            multiply_packed<Units>(exact_projection(a.threads, a.x, a.M, a.K, a.down, a.R, 1.0f, a.h), x);
        else if constexpr (Units::kPerUnit == 2)
            project_packed<Units>(a.threads, x, a.K, a.down, a.R, 1.0f, a.h);
        apply_core(a, x.m, x.tokens, c);
        multiply_packed<Units>(product, x);
    });
}

void forward(const AdaptedLinear& a) {
    const Dropout dropout(a.dropout, a.seed);
    const Scratch scratch;
    float* c = scratch.take<float>(a.M * a.R); // s C h
    const Product product = {.threads = a.threads,
                             .M = a.M,
                             .N = a.N,
                             .K = a.K,
                             .R = a.R,
                             .x = a.x,
                             .weight = a.weight,
                             .c = c,
                             .up = a.up,
                             .bias = a.bias,
                             .bias_dtype = a.bias_dtype,
                             .y = a.y,
                             .y_dtype = a.x.dtype};
    if (a.R > 0 && a.many && use_pairs(a.x.dtype) && !dropout.on)
        return forward_packed_once<Pairs>(a, product, c);
    if (a.R > 0) {
        if (a.many)
            project(a.threads, a.x, a.M, a.K, a.down, false, a.R, &dropout, dropout.inverse, a.h);
        else {
            Product exact = exact_projection(a.threads, a.x, a.M, a.K, a.down, a.R, dropout.inverse, a.h);
            exact.dropout = &dropout;
            multiply_few(exact);
        }
        apply_core(a, 0, a.M, c);
    }
    multiply(product, a.many);
}

void backward(const AdaptedLinearBackward& a) {
    const Dropout dropout(a.dropout, a.seed);
    const Scratch scratch;
    const float *gh = nullptr, *gd = nullptr; // s g U [M, R], and with the core transposed
    if (a.R > 0 && (a.dx || a.ddown || a.dcore)) {
        float* projected = scratch.take<float>(a.M * a.R);
        project(a.threads, a.g, a.M, a.N, a.up, true, a.R, nullptr, a.scale, projected);
        gh = gd = projected;
    }
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
                             .R = a.R,
                             .g = a.g,
                             .weight = a.weight,
                             .gd = gd,
                             .down = a.down,
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
