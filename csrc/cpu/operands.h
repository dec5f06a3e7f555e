// Operands of the CPU's kernels: element types, matrices, cores, the arguments of every op, and the families of ops.
// This header holds plain data only; runtime/isa.h says why.
#pragma once

#include "formats/arena.h"
#include "formats/format.h"

#include <cstdint>

namespace lowrank::cpu {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// A matrix of floats with unit inner stride; `stride` counts elements.
struct Rows {
    const void* data;
    int dtype;
    int64_t stride;
};

// Block scales. `absmax` is float32, or uint8 indices when absmax2 and offset are given (double quantisation), or uint8
// exponents for MXFP4.
struct Scales {
    const void* absmax;
    const float* absmax2;
    const float* offset;
    int64_t block_size;
};

// A frozen matrix or a factor [rows, columns]: packed nibbles or signed bytes with scales, or dense and contiguous.
struct Matrix {
    const void* data;
    int type;
    Scales scales;
};

// C [R, R] of an update U C D. Its kind says what `values` holds: a dense matrix, the diagonals of a band of half-width
// `bandwidth` one after the other, or the entries of a sparse matrix row by row with its index (lowrank_ops/cores.py).
enum CoreKind : int { kNoCore = 0, kBanded = 1, kSparse = 2, kDense = 3 };

struct Core {
    const void* values;
    int dtype;
    int kind;
    int64_t entries, bandwidth;
    const int32_t* index;
};

// U_b D_b, a frozen low-rank part of the base beside W; none if R is 0. Its factors are dense.
struct Branch {
    int64_t R;
    Matrix down, up; // [R, K], [N, R]
};

// y = W x + U_b (D_b x) + bias + scale * U C h, h = D drop(x), and its gradients. Null pointers are absent operands or
// unwanted results.
struct AdaptedLinear {
    bool many; // true: decode a piece of W into the caches for all tokens; false: decode in registers
    int64_t M, N, K, R;
    Rows x;
    Matrix weight;
    Branch branch;
    Matrix down, up; // D [R, K], U [N, R]
    Core core;
    const void* bias;
    int bias_dtype;
    float scale;
    double dropout;
    int64_t seed;
    void* y;  // [M, N], dtype of x
    float* h; // [M, R]
    int threads;
};

struct AdaptedLinearBackward {
    int64_t M, N, K, R;
    Rows g, x;
    const float* h; // [M, R]
    Matrix weight;
    Branch branch;
    Matrix down, up;
    Core core;
    float scale;
    double dropout;
    int64_t seed;
    void* dx;    // [M, K], dtype of g
    void* ddown; // [R, K], dtype of down
    void* dup;   // [N, R], dtype of up
    void* dcore; // as core.values
    int threads;
};

// y[p] = W_e x[p] + U_be (D_be x[p]) + b_e + scale * U_e C_e h[p], h[p] = D_e drop(x[p]), for the rows offsets[e] <= p
// < offsets[e + 1] of expert e; y and h of rows past the last expert are 0. W, the branch, D, U, C and the bias are
// stacks: expert e is part e of E equal parts of their memory, and all cores share one index.
struct ExpertsLinear {
    int64_t few; // up to this many rows of an expert decode in registers; more decode a piece of W into the caches
    int64_t P, N, K, R, E;
    Rows x;
    const int32_t* offsets;
    Matrix weight;
    Branch branch;
    Matrix down, up;
    Core core;
    const void* bias; // [E, N]
    int bias_dtype;
    float scale;
    double dropout;
    int64_t seed;
    void* y;  // [P, N], dtype of x
    float* h; // [P, R]
    int threads;
};

struct ExpertsLinearBackward {
    int64_t P, N, K, R, E;
    Rows g, x;
    const float* h; // [P, R]
    const int32_t* offsets;
    Matrix weight;
    Branch branch;
    Matrix down, up;
    Core core;
    float scale;
    double dropout;
    int64_t seed;
    void* dx;    // [P, K], dtype of g
    void* ddown; // [E, R, K], dtype of down
    void* dup;   // [E, N, R], dtype of up
    void* dcore; // as core.values
    int threads;
};

// y = U C h + bias, h = Vt x, and its gradients.
struct SvdLinear {
    bool many;
    int64_t M, N, K, R;
    Rows x;
    Matrix u, vt; // U [N, R], Vt [R, K]
    Core core;
    const void* bias;
    int bias_dtype;
    void* y; // [M, N], dtype of x
    void* h; // [M, R], dtype of x
    int threads;
};

struct SvdLinearBackward {
    int64_t M, N, K, R;
    Rows g;
    const void* h; // [M, R], dtype of g
    Matrix u, vt;
    Core core;
    float* b;    // [M, R], scratch
    void* dx;    // [M, K], dtype of g
    void* dcore; // as core.values
    int threads;
};

// y[t] = W x[t] + U_b (D_b x[t]) + bias + sum_j strengths[t][j] s U C (D x[t]). Row slots[t][j] of the table holds
// update j of token t; -1 means no update. With offsets the rows are sorted by expert, and W, the branch, the bias and
// every D, U and C are stacks, as in ExpertsLinear.
struct RoutedLinear {
    bool many;   // without offsets
    int64_t few; // with offsets
    int64_t M, N, K, E;
    const int32_t* offsets;
    Rows x;
    Matrix weight;
    Branch branch;
    const void* bias;
    int bias_dtype;
    const char* arena;
    const ArenaRow* table;
    int64_t S;              // the most updates of a token
    const int32_t* slots;   // [M, S]
    const float* strengths; // [M, S]; null: 1
    void* y;                // [M, N], dtype of x
    int threads;
};

// The Bradley-Terry loss of n pairs and its gradients. margin, labels, loss and g are float64 where dtype is, else
// float32.
struct Preference {
    int64_t n;
    const void *chosen, *rejected;
    int dtype;
    const void *margin, *labels; // null: 0 and 1
    double center;
    void* loss = nullptr;
    const void* g = nullptr; // of the loss
    void *dchosen = nullptr, *drejected = nullptr;
    int threads;
};

// Makes tr(E H E^T) of a rounded W smaller, E = W - W_rounded: feeds errors back, then descends. The matrix is
// rewritten.
struct RoundWeighted {
    int64_t N, K;
    const float* w; // [N, K]
    Matrix matrix;
    const float* moment;  // H [K, K]
    const float* factor;  // R [K, K], upper triangular: R R^T = H with rows and columns in `order`
    const int32_t* order; // [K]
    bool choose;          // let the descent choose scales
    int64_t passes;       // of the descent
    float* work;          // 2 * K * K, K rounded up to a multiple of 4
    double* errors;       // [3, N]: E H E^T of each row before (given), after the errors were fed back, and at the end
    int threads;
};

// ---- families -------------------------------------------------------------------------------------------------------

// Kernels of the formats; `format` is an element type.
struct FormatKernels {
    void (*quantize)(int format, Rows w, int64_t numel, int64_t block_size, uint8_t* packed, void* scales, int threads);
    void (*absmax_quantize)(const float* absmax, const float* offset, int64_t blocks, uint8_t* index, float* absmax2,
                            int threads);
    void (*dequantize)(Matrix w, int64_t numel, void* out, int out_dtype, int threads);
};

// Rounding by a second moment. `importance` [K] weighs the squared errors of the columns.
struct RoundingKernels {
    void (*search_scales)(int format, const float* w, int64_t N, int64_t K, const float* importance, int64_t block_size,
                          void* scales, int threads);
    void (*round_nearest)(const float* w, int64_t numel, Matrix matrix, int threads);
    void (*weighted_errors)(int64_t N, int64_t K, const float* w, Matrix matrix, const float* factor,
                            const int32_t* order, float* work, double* errors, int threads);
    void (*round_weighted)(const RoundWeighted&);
};

struct AdaptedLinearKernels {
    void (*forward)(const AdaptedLinear&);
    void (*backward)(const AdaptedLinearBackward&);
};

struct ExpertsLinearKernels {
    void (*forward)(const ExpertsLinear&);
    void (*backward)(const ExpertsLinearBackward&);
};

struct SvdLinearKernels {
    void (*forward)(const SvdLinear&);
    void (*backward)(const SvdLinearBackward&);
};

struct RoutedLinearKernels {
    void (*forward)(const RoutedLinear&);
};

struct PreferenceKernels {
    void (*forward)(const Preference&);
    void (*backward)(const Preference&);
};

// Every family: its kernels, its name. <family>.cpp defines <name>_kernels, and bindings.cpp calls isa().<name>.
#define LOWRANK_FAMILIES(APPLY)                                                                                        \
    APPLY(FormatKernels, formats)                                                                                      \
    APPLY(RoundingKernels, rounding)                                                                                   \
    APPLY(AdaptedLinearKernels, adapted_linear)                                                                        \
    APPLY(ExpertsLinearKernels, experts_linear)                                                                        \
    APPLY(SvdLinearKernels, svd_linear)                                                                                \
    APPLY(RoutedLinearKernels, routed_linear)                                                                          \
    APPLY(PreferenceKernels, preference)

} // namespace lowrank::cpu
