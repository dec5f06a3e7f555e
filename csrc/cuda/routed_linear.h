// Serving on CUDA: adds every token's own low-rank update to the product with the shared weight. All pointers are
// device pointers; no torch, no Python.
#pragma once

#include "formats/arena.h"

#include <cstdint>

namespace lowrank::cuda {

// For every token t and every a = slots[t][j] in [0, slot_count) with a rank R > 0 in that row of the table:
//
//   h[t][j] = D_a x[t],   y[t] = y[t] + sum_j strengths[t][j] s_a U_a (C_a h[t][j]), in the order of j
//
// Rows of other tokens are not touched.
struct RoutedUpdate {
    int64_t M, N, K;
    const void* x; // [M, K] of dtype, unit stride within a row
    int dtype;     // of x and y: 0 float32, 1 bfloat16, 2 float16
    int64_t x_stride;
    const uint8_t* arena;
    const ArenaRow* table; // [slot_count]
    int64_t slot_count;
    int64_t S;              // the most updates of a token
    const int32_t* slots;   // [M, S]
    const float* strengths; // [M, S]; null: 1
    float* h;               // workspace [M, S, capacity]
    int64_t capacity;       // columns of h; a token whose slot has a larger rank gets NaN
    void* y;                // [M, N] of dtype, contiguous
};

// Queues two kernels on a cudaStream_t. Their grids depend on M, S and N alone and the kernels read everything else on
// the device, so a captured graph can be replayed with another table, other slots and other strengths.
//
// Throws std::invalid_argument for sizes below one or an unknown dtype, std::runtime_error if a launch fails. Numerics:
// factors and cores are read as they are (packed ones decoded to float32), all sums are float32, and y is rounded once
// more from the float32 sum. There are no atomics: the bits are the same every time, and a token's bits do not depend
// on other tokens.
void routed_update(const RoutedUpdate& update, void* stream);

} // namespace lowrank::cuda
