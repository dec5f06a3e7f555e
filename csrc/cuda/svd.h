// The small dense problems of a truncated SVD on CUDA, batched, in float64, without a synchronisation with the host.
// All pointers are device pointers, matrices are row-major and contiguous; no torch, no Python. One block serves one
// matrix.
#pragma once

#include <cstdint>

namespace lowrank::cuda {

constexpr int kSvdMaxSize = 512; // of q

// inverse = L^-1, lower triangular with zeros above, where L L^T = gram.
//
// gram     float64 [batch, q, q], symmetric; its lower triangle is read
// inverse  float64 [batch, q, q], must not be gram; all zeros if the factorisation fails
// failed   int32 [batch]: 1 if a pivot is not positive or not finite, else 0
// stream   cudaStream_t; the call returns when the kernel is queued
//
// Throws std::invalid_argument for q outside [1, 512] or a negative or too large batch, std::runtime_error if the
// launch fails. Numerics: the operations of the Cholesky factorisation without pivoting. The bits are the same every
// time, and a matrix's bits do not depend on the batch.
void inverse_cholesky(const double* gram, int64_t batch, int64_t q, double* inverse, int32_t* failed, void* stream);

// gram = sum of values[i] v_i v_i^T with v_i the i-th row of vectors, orthonormal, values descending.
//
// gram     float64 [batch, q, q], symmetric positive semidefinite; its lower triangle is read
// work     float64 [batch, 2, q, q]
// values   float64 [batch, q]
// vectors  float64 [batch, q, q], rows
// failed   int32 [batch]: 1 if 40 sweeps were not enough or an entry of gram is not finite, else 0; if 1, values and
//          vectors are undefined
//
// Throws as above. Numerics: two-sided Jacobi with the pairs of a round-robin tournament, until no entry off the
// diagonal of vectors gram vectors^T exceeds 2^-52 trace; the vectors are orthonormal to rounding for any matrix. The
// bits are the same every time, and a matrix's bits do not depend on the batch.
void eigenvectors(const double* gram, int64_t batch, int64_t q, double* work, double* values, double* vectors,
                  int32_t* failed, void* stream);

} // namespace lowrank::cuda
