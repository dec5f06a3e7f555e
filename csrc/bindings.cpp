// The table of contents of the compiled side. Arguments are plain numbers: addresses (0 = absent), sizes in elements,
// element types as in cpu/operands.h (float32 0, bfloat16 1, float16 2, nf4 3, float64 4). Nothing is checked here; the
// caller does.
#include "cpu/runtime/isa.h"
#include "cpu/runtime/scratch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#ifdef LOWRANK_OPS_CUDA
#include "cuda/nf4.h"
#include "cuda/routed_linear.h"
#include "cuda/svd.h"
#else
#define LOWRANK_OPS_CUDA_TARGETS ""
#endif

#ifndef LOWRANK_OPS_VERSION
#define LOWRANK_OPS_VERSION ""
#endif

namespace py = pybind11;
using py::arg;
using namespace lowrank::cpu;
using Address = uint64_t;

namespace {

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Scales scales(Address absmax, Address absmax2, Address offset, int64_t block_size) {
    return {at(absmax), at<const float>(absmax2), at<const float>(offset), block_size};
}

constexpr int64_t kLarge = int64_t(4) << 20; // elements: memory that the allocator has to get from the system

void nf4_quantize(Address w, int w_dtype, int64_t numel, int64_t block_size, Address packed, Address absmax,
                  int threads) {
    if (numel >= kLarge) // read in every forward from then on
        prefer_huge_pages(at(packed), size_t(numel) / 2);
    isa().nf4->quantize({at(w), w_dtype, numel}, numel, block_size, at<uint8_t>(packed), at<float>(absmax), threads);
}

void absmax_quantize(Address absmax, Address offset, int64_t blocks, Address index, Address absmax2, int threads) {
    isa().nf4->absmax_quantize(at<const float>(absmax), at<const float>(offset), blocks, at<uint8_t>(index),
                               at<float>(absmax2), threads);
}

void nf4_dequantize(Address packed, Address absmax, Address absmax2, Address offset, int64_t numel, int64_t block_size,
                    Address out, int out_dtype, int threads) {
    if (numel >= kLarge)
        prefer_huge_pages(at(out), size_t(numel) * (out_dtype == kFloat32 ? 4 : 2));
    isa().nf4->dequantize(at<const uint8_t>(packed), scales(absmax, absmax2, offset, block_size), numel, at(out),
                          out_dtype, threads);
}

// A matrix: address, element type, then absmax, absmax2, offset and block size where it is NF4.
using Matrix = std::array<int64_t, 6>;
// A core: address, element type, kind, entries, bandwidth, address of the index.
using CoreArguments = std::array<int64_t, 6>;

Weight matrix(const Matrix& m) {
    return {at(m[0]), int(m[1]), scales(m[2], m[3], m[4], m[5])};
}

Core core(const CoreArguments& c) {
    return {at(c[0]), int(c[1]), int(c[2]), c[3], c[4], at<const int32_t>(c[5])};
}

void adapted_linear(int form, int64_t M, int64_t N, int64_t K, int64_t R, Address x, int dtype, int64_t x_stride,
                    const Matrix& weight, const Matrix& down, const Matrix& up, const CoreArguments& core_,
                    Address bias, int bias_dtype, double scale, double dropout, int64_t seed, Address y, Address h,
                    int threads) {
    AdaptedLinear a{};
    a.many = form == 1;
    a.M = M, a.N = N, a.K = K, a.R = R;
    a.x = {at(x), dtype, x_stride};
    a.weight = matrix(weight), a.down = matrix(down), a.up = matrix(up), a.core = core(core_);
    a.bias = at(bias), a.bias_dtype = bias_dtype;
    a.scale = float(scale), a.dropout = dropout, a.seed = seed;
    a.y = at(y), a.h = at<float>(h), a.threads = threads;
    isa().adapted_linear->forward(a);
}

// The backward has one form: decoding rows into packed panels is best for any number of tokens.
void adapted_linear_backward(int64_t M, int64_t N, int64_t K, int64_t R, Address g, int dtype, int64_t g_stride,
                             Address x, int64_t x_stride, Address h, const Matrix& weight, const Matrix& down,
                             const Matrix& up, const CoreArguments& core_, double scale, double dropout, int64_t seed,
                             Address dx, Address ddown, Address dup, Address dcore, int threads) {
    AdaptedLinearBackward a{};
    a.M = M, a.N = N, a.K = K, a.R = R;
    a.g = {at(g), dtype, g_stride};
    a.x = {at(x), dtype, x_stride};
    a.h = at<const float>(h);
    a.weight = matrix(weight), a.down = matrix(down), a.up = matrix(up), a.core = core(core_);
    a.scale = float(scale), a.dropout = dropout, a.seed = seed;
    a.dx = at(dx), a.ddown = at(ddown), a.dup = at(dup), a.dcore = at(dcore), a.threads = threads;
    isa().adapted_linear->backward(a);
}

void svd_linear(int form, int64_t M, int64_t N, int64_t K, int64_t R, Address x, int dtype, int64_t x_stride,
                const Matrix& u, const CoreArguments& core_, const Matrix& vt, Address bias, int bias_dtype, Address y,
                Address h, int threads) {
    SvdLinear a{};
    a.many = form == 1;
    a.M = M, a.N = N, a.K = K, a.R = R;
    a.x = {at(x), dtype, x_stride};
    a.u = matrix(u), a.vt = matrix(vt), a.core = core(core_);
    a.bias = at(bias), a.bias_dtype = bias_dtype;
    a.y = at(y), a.h = at(h), a.threads = threads;
    isa().svd_linear->forward(a);
}

void svd_linear_backward(int64_t M, int64_t N, int64_t K, int64_t R, Address g, int dtype, int64_t g_stride, Address h,
                         const Matrix& u, const CoreArguments& core_, const Matrix& vt, Address b, Address dx,
                         Address dcore, int threads) {
    SvdLinearBackward a{};
    a.M = M, a.N = N, a.K = K, a.R = R;
    a.g = {at(g), dtype, g_stride};
    a.h = at(h);
    a.u = matrix(u), a.vt = matrix(vt), a.core = core(core_);
    a.b = at<float>(b), a.dx = at(dx), a.dcore = at(dcore), a.threads = threads;
    isa().svd_linear->backward(a);
}

void routed_linear(int form, int64_t M, int64_t N, int64_t K, Address x, int dtype, int64_t x_stride,
                   const Matrix& weight, Address bias, int bias_dtype, Address arena, Address table, Address slots,
                   Address y, int threads) {
    RoutedLinear a{};
    a.many = form == 1;
    a.M = M, a.N = N, a.K = K;
    a.x = {at(x), dtype, x_stride};
    a.weight = matrix(weight);
    a.bias = at(bias), a.bias_dtype = bias_dtype;
    a.arena = at<const char>(arena), a.table = at<const int64_t>(table), a.slots = at<const int32_t>(slots);
    a.y = at(y), a.threads = threads;
    isa().routed_linear->forward(a);
}

Preference preference(int64_t n, Address chosen, Address rejected, int dtype, Address margin, Address labels,
                      double center, int threads) {
    Preference a{};
    a.n = n, a.chosen = at(chosen), a.rejected = at(rejected), a.dtype = dtype;
    a.margin = at(margin), a.labels = at(labels), a.center = center, a.threads = threads;
    return a;
}

void bradley_terry_loss(int64_t n, Address chosen, Address rejected, int dtype, Address margin, Address labels,
                        double center, Address loss, int threads) {
    Preference a = preference(n, chosen, rejected, dtype, margin, labels, center, threads);
    a.loss = at(loss);
    isa().preference->forward(a);
}

void bradley_terry_loss_backward(int64_t n, Address g, Address chosen, Address rejected, int dtype, Address margin,
                                 Address labels, double center, Address dchosen, Address drejected, int threads) {
    Preference a = preference(n, chosen, rejected, dtype, margin, labels, center, threads);
    a.g = at(g), a.dchosen = at(dchosen), a.drejected = at(drejected);
    isa().preference->backward(a);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; const Isa* usable = usable_isa(i); ++i)
        names.push_back(usable->name);
    return names;
}

#ifdef LOWRANK_OPS_CUDA
void nf4_dequantize_cuda(Address packed, Address absmax, Address absmax2, Address offset, int64_t numel,
                         int64_t block_size, Address out, int out_dtype, Address stream) {
    lowrank::cuda::nf4_dequantize(at<const uint8_t>(packed), at(absmax), at<const float>(absmax2),
                                  at<const float>(offset), numel, block_size, at(out), out_dtype, at(stream));
}

void routed_update_cuda(int64_t M, int64_t N, int64_t K, Address x, int dtype, int64_t x_stride, Address arena,
                        Address table, int64_t slot_count, Address slots, Address h, int64_t capacity, Address y,
                        Address stream) {
    lowrank::cuda::RoutedUpdate u{};
    u.M = M, u.N = N, u.K = K;
    u.x = at(x), u.dtype = dtype, u.x_stride = x_stride;
    u.arena = at<const uint8_t>(arena), u.table = at<const int64_t>(table), u.slot_count = slot_count;
    u.slots = at<const int32_t>(slots);
    u.h = at<float>(h), u.capacity = capacity, u.y = at(y);
    lowrank::cuda::routed_update(u, at(stream));
}

void inverse_cholesky_cuda(Address gram, int64_t batch, int64_t q, Address inverse, Address failed, Address stream) {
    lowrank::cuda::inverse_cholesky(at<const double>(gram), batch, q, at<double>(inverse), at<int32_t>(failed),
                                    at(stream));
}

void eigenvectors_cuda(Address gram, int64_t batch, int64_t q, Address work, Address values, Address vectors,
                       Address failed, Address stream) {
    lowrank::cuda::eigenvectors(at<const double>(gram), batch, q, at<double>(work), at<double>(values),
                                at<double>(vectors), at<int32_t>(failed), at(stream));
}
#endif

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of lowrank_ops: addresses, sizes and strides in, no checks.";
    const py::call_guard<py::gil_scoped_release> no_gil;

    // What this build is and runs on.
    m.attr("version") = LOWRANK_OPS_VERSION;
    m.attr("compiler") = __VERSION__;
    m.def("cuda_targets", [] { return LOWRANK_OPS_CUDA_TARGETS; }, "Compute capabilities of the CUDA side, or ''.");
    m.def("isa", [] { return isa().name; }, "The CPU instruction set in use.");
    m.def("isas", isas, "The CPU instruction sets of this build that this machine has, best first.");
    m.def(
        "set_isa", [](const std::string& name) { set_isa(name.c_str()); }, arg("name"),
        "Chooses the CPU instruction set; '' is automatic. ValueError where it is not usable.");

    // NF4.
    m.def("nf4_quantize", nf4_quantize, no_gil, arg("w"), arg("w_dtype"), arg("numel"), arg("block_size"),
          arg("packed"), arg("absmax"), arg("threads"));
    m.def("absmax_quantize", absmax_quantize, no_gil, arg("absmax"), arg("offset"), arg("blocks"), arg("index"),
          arg("absmax2"), arg("threads"));
    m.def("nf4_dequantize", nf4_dequantize, no_gil, arg("packed"), arg("absmax"), arg("absmax2"), arg("offset"),
          arg("numel"), arg("block_size"), arg("out"), arg("out_dtype"), arg("threads"));

    // The adapted linear map, and the linear map in the singular basis of its weight.
    m.def("adapted_linear", adapted_linear, no_gil, arg("form"), arg("M"), arg("N"), arg("K"), arg("R"), arg("x"),
          arg("dtype"), arg("x_stride"), arg("weight"), arg("down"), arg("up"), arg("core"), arg("bias"),
          arg("bias_dtype"), arg("scale"), arg("dropout"), arg("seed"), arg("y"), arg("h"), arg("threads"));
    m.def("adapted_linear_backward", adapted_linear_backward, no_gil, arg("M"), arg("N"), arg("K"), arg("R"), arg("g"),
          arg("dtype"), arg("g_stride"), arg("x"), arg("x_stride"), arg("h"), arg("weight"), arg("down"), arg("up"),
          arg("core"), arg("scale"), arg("dropout"), arg("seed"), arg("dx"), arg("ddown"), arg("dup"), arg("dcore"),
          arg("threads"));
    m.def("svd_linear", svd_linear, no_gil, arg("form"), arg("M"), arg("N"), arg("K"), arg("R"), arg("x"), arg("dtype"),
          arg("x_stride"), arg("u"), arg("core"), arg("vt"), arg("bias"), arg("bias_dtype"), arg("y"), arg("h"),
          arg("threads"));
    m.def("svd_linear_backward", svd_linear_backward, no_gil, arg("M"), arg("N"), arg("K"), arg("R"), arg("g"),
          arg("dtype"), arg("g_stride"), arg("h"), arg("u"), arg("core"), arg("vt"), arg("b"), arg("dx"), arg("dcore"),
          arg("threads"));

    // Every row with an update of its own.
    m.def("routed_linear", routed_linear, no_gil, arg("form"), arg("M"), arg("N"), arg("K"), arg("x"), arg("dtype"),
          arg("x_stride"), arg("weight"), arg("bias"), arg("bias_dtype"), arg("arena"), arg("table"), arg("slots"),
          arg("y"), arg("threads"));

    // Preferences.
    m.def("bradley_terry_loss", bradley_terry_loss, no_gil, arg("n"), arg("chosen"), arg("rejected"), arg("dtype"),
          arg("margin"), arg("labels"), arg("center"), arg("loss"), arg("threads"));
    m.def("bradley_terry_loss_backward", bradley_terry_loss_backward, no_gil, arg("n"), arg("g"), arg("chosen"),
          arg("rejected"), arg("dtype"), arg("margin"), arg("labels"), arg("center"), arg("dchosen"), arg("drejected"),
          arg("threads"));

#ifdef LOWRANK_OPS_CUDA
    m.def("nf4_dequantize_cuda", nf4_dequantize_cuda, no_gil, arg("packed"), arg("absmax"), arg("absmax2"),
          arg("offset"), arg("numel"), arg("block_size"), arg("out"), arg("out_dtype"), arg("stream"));

    // Serving: every token's own update, added onto the product with the shared weight.
    m.def("routed_update_cuda", routed_update_cuda, no_gil, arg("M"), arg("N"), arg("K"), arg("x"), arg("dtype"),
          arg("x_stride"), arg("arena"), arg("table"), arg("slot_count"), arg("slots"), arg("h"), arg("capacity"),
          arg("y"), arg("stream"));

    // The small problems of a truncated SVD.
    m.def("inverse_cholesky_cuda", inverse_cholesky_cuda, no_gil, arg("gram"), arg("batch"), arg("q"), arg("inverse"),
          arg("failed"), arg("stream"));
    m.def("eigenvectors_cuda", eigenvectors_cuda, no_gil, arg("gram"), arg("batch"), arg("q"), arg("work"),
          arg("values"), arg("vectors"), arg("failed"), arg("stream"));
#endif
}
