// The table of contents of the compiled side. Arguments are plain numbers: addresses (0 = absent), sizes in elements,
// element types as in formats/format.h. The caller checks them; index_fault and arena_fault help it.
#include "cpu/runtime/checks.h"
#include "cpu/runtime/isa.h"
#include "cpu/runtime/scratch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
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
using namespace lowrank;
using namespace lowrank::cpu;
using Address = uint64_t;

namespace {

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Scales scales_of(Address absmax, Address absmax2, Address offset, int64_t block_size) {
    return {.absmax = at(absmax),
            .absmax2 = at<const float>(absmax2),
            .offset = at<const float>(offset),
            .block_size = block_size};
}

constexpr int64_t kLarge = int64_t(4) << 20; // elements: the allocator gets arrays of this size from the system

void prefer_huge_pages_for(Address memory, int64_t bytes) {
    if (bytes >= kLarge / 2)
        prefer_huge_pages(at(memory), size_t(bytes));
}

void quantize(int format, Address w, int w_dtype, int64_t numel, int64_t block_size, Address packed, Address scales,
              int threads) {
    if (numel >= kLarge) // every forward will read it
        prefer_huge_pages(at(packed), size_t(numel) / (is_packed(format) ? 2 : 1));
    isa().formats->quantize(format, {at(w), w_dtype, numel}, numel, block_size, at<uint8_t>(packed), at(scales),
                            threads);
}

void absmax_quantize(Address absmax, Address offset, int64_t blocks, Address index, Address absmax2, int threads) {
    isa().formats->absmax_quantize(at<const float>(absmax), at<const float>(offset), blocks, at<uint8_t>(index),
                                   at<float>(absmax2), threads);
}

void dequantize(int format, Address packed, Address absmax, Address absmax2, Address offset, int64_t numel,
                int64_t block_size, Address out, int out_dtype, int threads) {
    if (numel >= kLarge)
        prefer_huge_pages(at(out), size_t(numel) * (out_dtype == kFloat32 ? 4 : 2));
    const Matrix w = {.data = at(packed), .type = format, .scales = scales_of(absmax, absmax2, offset, block_size)};
    isa().formats->dequantize(w, numel, at(out), out_dtype, threads);
}

// A matrix: address, element type, then absmax, absmax2, offset and block size if it is quantised.
using MatrixFields = std::array<int64_t, 6>;
// A core: address, element type, kind, entries, bandwidth, address of the index.
using CoreFields = std::array<int64_t, 6>;

// A branch: its rank, then address and element type of each factor; empty without a branch.
using BranchFields = std::optional<std::array<int64_t, 5>>;

Matrix matrix(const MatrixFields& m) {
    return {.data = at(m[0]), .type = int(m[1]), .scales = scales_of(m[2], m[3], m[4], m[5])};
}

Branch branch_of(const BranchFields& fields) {
    if (!fields)
        return {};
    const auto& b = *fields;
    return {.R = b[0], .down = {.data = at(b[1]), .type = int(b[2])}, .up = {.data = at(b[3]), .type = int(b[4])}};
}

void search_scales(int format, Address w, int64_t N, int64_t K, Address importance, int64_t block_size, Address scales,
                   int threads) {
    isa().rounding->search_scales(format, at<const float>(w), N, K, at<const float>(importance), block_size, at(scales),
                                  threads);
}

void round_nearest(Address w, int64_t numel, const MatrixFields& weight, int threads) {
    isa().rounding->round_nearest(at<const float>(w), numel, matrix(weight), threads);
}

void weighted_errors(int64_t N, int64_t K, Address w, const MatrixFields& weight, Address factor, Address order,
                     Address work, Address errors, int threads) {
    isa().rounding->weighted_errors(N, K, at<const float>(w), matrix(weight), at<const float>(factor),
                                    at<const int32_t>(order), at<float>(work), at<double>(errors), threads);
}

void round_weighted(int64_t N, int64_t K, Address w, const MatrixFields& weight, Address moment, Address factor,
                    Address order, int choose, int64_t passes, Address work, Address errors, int threads) {
    isa().rounding->round_weighted({.N = N,
                                    .K = K,
                                    .w = at<const float>(w),
                                    .matrix = matrix(weight),
                                    .moment = at<const float>(moment),
                                    .factor = at<const float>(factor),
                                    .order = at<const int32_t>(order),
                                    .choose = choose != 0,
                                    .passes = passes,
                                    .work = at<float>(work),
                                    .errors = at<double>(errors),
                                    .threads = threads});
}

Core core_of(const CoreFields& c) {
    return {.values = at(c[0]),
            .dtype = int(c[1]),
            .kind = int(c[2]),
            .entries = c[3],
            .bandwidth = c[4],
            .index = at<const int32_t>(c[5])};
}

void adapted_linear(int form, int64_t M, int64_t N, int64_t K, int64_t R, Address x, int dtype, int64_t x_stride,
                    const MatrixFields& weight, const BranchFields& branch, const MatrixFields& down,
                    const MatrixFields& up, const CoreFields& core, Address bias, int bias_dtype, double scale,
                    double dropout, int64_t seed, Address y, Address h, int threads) {
    isa().adapted_linear->forward({.many = form == 1,
                                   .M = M,
                                   .N = N,
                                   .K = K,
                                   .R = R,
                                   .x = {at(x), dtype, x_stride},
                                   .weight = matrix(weight),
                                   .branch = branch_of(branch),
                                   .down = matrix(down),
                                   .up = matrix(up),
                                   .core = core_of(core),
                                   .bias = at(bias),
                                   .bias_dtype = bias_dtype,
                                   .scale = float(scale),
                                   .dropout = dropout,
                                   .seed = seed,
                                   .y = at(y),
                                   .h = at<float>(h),
                                   .threads = threads});
}

// The backward has one form: decoding rows into panels is fastest for any number of tokens.
void adapted_linear_backward(int64_t M, int64_t N, int64_t K, int64_t R, Address g, int dtype, int64_t g_stride,
                             Address x, int64_t x_stride, Address h, const MatrixFields& weight,
                             const BranchFields& branch, const MatrixFields& down, const MatrixFields& up,
                             const CoreFields& core, double scale, double dropout, int64_t seed, Address dx,
                             Address ddown, Address dup, Address dcore, int threads) {
    isa().adapted_linear->backward({.M = M,
                                    .N = N,
                                    .K = K,
                                    .R = R,
                                    .g = {at(g), dtype, g_stride},
                                    .x = {at(x), dtype, x_stride},
                                    .h = at<const float>(h),
                                    .weight = matrix(weight),
                                    .branch = branch_of(branch),
                                    .down = matrix(down),
                                    .up = matrix(up),
                                    .core = core_of(core),
                                    .scale = float(scale),
                                    .dropout = dropout,
                                    .seed = seed,
                                    .dx = at(dx),
                                    .ddown = at(ddown),
                                    .dup = at(dup),
                                    .dcore = at(dcore),
                                    .threads = threads});
}

// Offsets must rise from 0 and not pass P.
void experts_linear(int64_t few, int64_t P, int64_t N, int64_t K, int64_t R, int64_t E, Address x, int dtype,
                    int64_t x_stride, Address offsets, const MatrixFields& weight, const BranchFields& branch,
                    const MatrixFields& down, const MatrixFields& up, const CoreFields& core, Address bias,
                    int bias_dtype, double scale, double dropout, int64_t seed, Address y, Address h, int threads) {
    isa().experts_linear->forward({.few = few,
                                   .P = P,
                                   .N = N,
                                   .K = K,
                                   .R = R,
                                   .E = E,
                                   .x = {at(x), dtype, x_stride},
                                   .offsets = at<const int32_t>(offsets),
                                   .weight = matrix(weight),
                                   .branch = branch_of(branch),
                                   .down = matrix(down),
                                   .up = matrix(up),
                                   .core = core_of(core),
                                   .bias = at(bias),
                                   .bias_dtype = bias_dtype,
                                   .scale = float(scale),
                                   .dropout = dropout,
                                   .seed = seed,
                                   .y = at(y),
                                   .h = at<float>(h),
                                   .threads = threads});
}

void experts_linear_backward(int64_t P, int64_t N, int64_t K, int64_t R, int64_t E, Address g, int dtype,
                             int64_t g_stride, Address x, int64_t x_stride, Address h, Address offsets,
                             const MatrixFields& weight, const BranchFields& branch, const MatrixFields& down,
                             const MatrixFields& up, const CoreFields& core, double scale, double dropout, int64_t seed,
                             Address dx, Address ddown, Address dup, Address dcore, int threads) {
    isa().experts_linear->backward({.P = P,
                                    .N = N,
                                    .K = K,
                                    .R = R,
                                    .E = E,
                                    .g = {at(g), dtype, g_stride},
                                    .x = {at(x), dtype, x_stride},
                                    .h = at<const float>(h),
                                    .offsets = at<const int32_t>(offsets),
                                    .weight = matrix(weight),
                                    .branch = branch_of(branch),
                                    .down = matrix(down),
                                    .up = matrix(up),
                                    .core = core_of(core),
                                    .scale = float(scale),
                                    .dropout = dropout,
                                    .seed = seed,
                                    .dx = at(dx),
                                    .ddown = at(ddown),
                                    .dup = at(dup),
                                    .dcore = at(dcore),
                                    .threads = threads});
}

void svd_linear(int form, int64_t M, int64_t N, int64_t K, int64_t R, Address x, int dtype, int64_t x_stride,
                const MatrixFields& u, const CoreFields& core, const MatrixFields& vt, Address bias, int bias_dtype,
                Address y, Address h, int threads) {
    isa().svd_linear->forward({.many = form == 1,
                               .M = M,
                               .N = N,
                               .K = K,
                               .R = R,
                               .x = {at(x), dtype, x_stride},
                               .u = matrix(u),
                               .vt = matrix(vt),
                               .core = core_of(core),
                               .bias = at(bias),
                               .bias_dtype = bias_dtype,
                               .y = at(y),
                               .h = at(h),
                               .threads = threads});
}

void svd_linear_backward(int64_t M, int64_t N, int64_t K, int64_t R, Address g, int dtype, int64_t g_stride, Address h,
                         const MatrixFields& u, const CoreFields& core, const MatrixFields& vt, Address b, Address dx,
                         Address dcore, int threads) {
    isa().svd_linear->backward({.M = M,
                                .N = N,
                                .K = K,
                                .R = R,
                                .g = {at(g), dtype, g_stride},
                                .h = at(h),
                                .u = matrix(u),
                                .vt = matrix(vt),
                                .core = core_of(core),
                                .b = at<float>(b),
                                .dx = at(dx),
                                .dcore = at(dcore),
                                .threads = threads});
}

void routed_linear(int form, int64_t few, int64_t M, int64_t N, int64_t K, int64_t E, Address offsets, Address x,
                   int dtype, int64_t x_stride, const MatrixFields& weight, const BranchFields& branch, Address bias,
                   int bias_dtype, Address arena, Address table, int64_t S, Address slots, Address strengths, Address y,
                   int threads) {
    isa().routed_linear->forward({.many = form == 1,
                                  .few = few,
                                  .M = M,
                                  .N = N,
                                  .K = K,
                                  .E = E,
                                  .offsets = at<const int32_t>(offsets),
                                  .x = {at(x), dtype, x_stride},
                                  .weight = matrix(weight),
                                  .branch = branch_of(branch),
                                  .bias = at(bias),
                                  .bias_dtype = bias_dtype,
                                  .arena = at<const char>(arena),
                                  .table = at<const ArenaRow>(table),
                                  .S = S,
                                  .slots = at<const int32_t>(slots),
                                  .strengths = at<const float>(strengths),
                                  .y = at(y),
                                  .threads = threads});
}

void bradley_terry_loss(int64_t n, Address chosen, Address rejected, int dtype, Address margin, Address labels,
                        double center, Address loss, int threads) {
    isa().preference->forward({.n = n,
                               .chosen = at(chosen),
                               .rejected = at(rejected),
                               .dtype = dtype,
                               .margin = at(margin),
                               .labels = at(labels),
                               .center = center,
                               .loss = at(loss),
                               .threads = threads});
}

void bradley_terry_loss_backward(int64_t n, Address g, Address chosen, Address rejected, int dtype, Address margin,
                                 Address labels, double center, Address dchosen, Address drejected, int threads) {
    isa().preference->backward({.n = n,
                                .chosen = at(chosen),
                                .rejected = at(rejected),
                                .dtype = dtype,
                                .margin = at(margin),
                                .labels = at(labels),
                                .center = center,
                                .g = at(g),
                                .dchosen = at(dchosen),
                                .drejected = at(drejected),
                                .threads = threads});
}

std::string fault_of_index(Address index, int64_t R, int64_t entries) {
    return index_fault(at<const int32_t>(index), R, entries);
}

std::string fault_of_arena(Address arena, int64_t bytes, Address table, int64_t table_rows, Address slots, int64_t M,
                           int64_t N, int64_t K, int64_t E) {
    return arena_fault(at<const char>(arena), bytes, at<const ArenaRow>(table), table_rows, at<const int32_t>(slots), M,
                       N, K, E);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; const Isa* usable = usable_isa(i); ++i)
        names.push_back(usable->name);
    return names;
}

#ifdef LOWRANK_OPS_CUDA
void dequantize_cuda(int format, Address packed, Address absmax, Address absmax2, Address offset, int64_t numel,
                     int64_t block_size, Address out, int out_dtype, Address stream) {
    lowrank::cuda::dequantize(format, at<const uint8_t>(packed), at(absmax), at<const float>(absmax2),
                              at<const float>(offset), numel, block_size, at(out), out_dtype, at(stream));
}

void routed_update_cuda(int64_t M, int64_t N, int64_t K, Address x, int dtype, int64_t x_stride, Address arena,
                        Address table, int64_t slot_count, int64_t S, Address slots, Address strengths, Address h,
                        int64_t capacity, Address y, Address stream) {
    lowrank::cuda::routed_update({.M = M,
                                  .N = N,
                                  .K = K,
                                  .x = at(x),
                                  .dtype = dtype,
                                  .x_stride = x_stride,
                                  .arena = at<const uint8_t>(arena),
                                  .table = at<const ArenaRow>(table),
                                  .slot_count = slot_count,
                                  .S = S,
                                  .slots = at<const int32_t>(slots),
                                  .strengths = at<const float>(strengths),
                                  .h = at<float>(h),
                                  .capacity = capacity,
                                  .y = at(y)},
                                 at(stream));
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

    // The build and the machine.
    m.attr("version") = LOWRANK_OPS_VERSION;
    m.attr("compiler") = __VERSION__;
    m.def("cuda_targets", [] { return LOWRANK_OPS_CUDA_TARGETS; }, "Compute capabilities of the CUDA side, or ''.");
    m.def("isa", [] { return isa().name; }, "The CPU instruction set in use.");
    m.def("isas", isas, "The CPU instruction sets of this build that this machine has, best first.");
    m.def(
        "set_isa", [](const std::string& name) { set_isa(name.c_str()); },
        "Chooses the CPU instruction set; '' is automatic. ValueError where it is not usable.");

    // What is wrong with operands that hold positions.
    m.def("index_fault", fault_of_index, no_gil, "Of a sparse core; '' if nothing.");
    m.def("arena_fault", fault_of_arena, no_gil, "Of slots and their table; '' if nothing.");

    // The formats.
    m.def("prefer_huge_pages", prefer_huge_pages_for, "Call it before the memory is first written.");
    m.def("quantize", quantize, no_gil);
    m.def("absmax_quantize", absmax_quantize, no_gil);
    m.def("dequantize", dequantize, no_gil);

    // Rounding by a second moment of the inputs.
    m.def("search_scales", search_scales, no_gil);
    m.def("round_nearest", round_nearest, no_gil);
    m.def("weighted_errors", weighted_errors, no_gil);
    m.def("round_weighted", round_weighted, no_gil);

    // The adapted linear map, the same over a stack of experts, and the linear map in the singular basis of its weight.
    m.def("adapted_linear", adapted_linear, no_gil);
    m.def("adapted_linear_backward", adapted_linear_backward, no_gil);
    m.def("experts_linear", experts_linear, no_gil);
    m.def("experts_linear_backward", experts_linear_backward, no_gil);
    m.def("svd_linear", svd_linear, no_gil);
    m.def("svd_linear_backward", svd_linear_backward, no_gil);

    // The linear map in which every row has its own update, read from a slot of an arena.
    m.attr("arena_fields") =
        py::tuple(py::cast(std::vector<std::string>(std::begin(kArenaFields), std::end(kArenaFields))));
    m.def("routed_linear", routed_linear, no_gil);

    // Preferences.
    m.def("bradley_terry_loss", bradley_terry_loss, no_gil);
    m.def("bradley_terry_loss_backward", bradley_terry_loss_backward, no_gil);

#ifdef LOWRANK_OPS_CUDA
    m.def("dequantize_cuda", dequantize_cuda, no_gil);

    // Adds every token's own update to the product with the shared weight.
    m.def("routed_update_cuda", routed_update_cuda, no_gil);

    // The small problems of a truncated SVD.
    m.def("inverse_cholesky_cuda", inverse_cholesky_cuda, no_gil);
    m.def("eigenvectors_cuda", eigenvectors_cuda, no_gil);
#endif
}
