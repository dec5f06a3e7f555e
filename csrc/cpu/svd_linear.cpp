// The linear map in the singular basis of its weight on a CPU: y = U C h + bias, h = Vt x, and its gradients.
// Compiled once per instruction set.
#include "cpu/product/core.h"
#include "cpu/product/multiply.h"
#include "cpu/product/transposed_words.h"
#include "cpu/runtime/isa.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// C h is computed for one block of tokens at a time, so that it stays in the caches.
constexpr int64_t kBlock = 512;

void forward(const SvdLinear& a) {
    const int64_t M = a.M, R = a.R;
    const int dtype = a.x.dtype;
    const bool pairs = use_pairs(dtype) && (a.many || few_layout(a.u, R, dtype, false) == FewLayout::kFours);
    const int c_dtype = pairs ? kBFloat16 : kFloat32;
    multiply({.threads = a.threads, .M = M, .N = R, .K = a.K, .x = a.x, .weight = a.vt, .y = a.h, .y_dtype = dtype},
             a.many);
    const Scratch scratch;
    void* c = scratch.take<float>(min(M, kBlock) * R);
    for (int64_t m = 0; m < M; m += kBlock) {
        const int64_t tokens = min(kBlock, M - m);
        apply_core(a.threads, a.core, false, {at({a.h, dtype, R}, m, 0), dtype, R}, tokens, R, 1.0f, c, c_dtype, R);
        multiply({.threads = a.threads,
                  .M = tokens,
                  .N = a.N,
                  .K = R,
                  .x = {c, c_dtype, R},
                  .x_as = dtype,
                  .weight = a.u,
                  .bias = a.bias,
                  .bias_dtype = a.bias_dtype,
                  .y = static_cast<char*>(a.y) + m * a.N * size_of(dtype),
                  .y_dtype = dtype},
                 a.many);
    }
}

void backward(const SvdLinearBackward& a) {
    const int64_t M = a.M, R = a.R;
    const int dtype = a.g.dtype, c_dtype = use_pairs(dtype) ? kBFloat16 : kFloat32;
    multiply_transposed(
        {.threads = a.threads, .M = M, .N = a.N, .K = R, .g = a.g, .weight = a.u, .dx = a.b, .dx_dtype = kFloat32});
    const Scratch scratch;
    void* cored = scratch.take<float>(min(M, kBlock) * R);
    for (int64_t m = 0; a.dx && m < M; m += kBlock) {
        const int64_t tokens = min(kBlock, M - m);
        apply_core(a.threads, a.core, true, {a.b + m * R, kFloat32, R}, tokens, R, 1.0f, cored, c_dtype, R);
        multiply_transposed({.threads = a.threads,
                             .M = tokens,
                             .N = R,
                             .K = a.K,
                             .g = {cored, c_dtype, R},
                             .g_as = dtype,
                             .weight = a.vt,
                             .dx = static_cast<char*>(a.dx) + m * a.K * size_of(dtype),
                             .dx_dtype = dtype});
    }
    if (a.dcore)
        core_gradient(a.threads, a.core, a.b, {a.h, dtype, R}, M, R, a.dcore, a.core.dtype);
}

} // namespace

extern const SvdLinearKernels svd_linear_kernels = {forward, backward};

} // namespace lowrank::cpu::LOWRANK_ISA
