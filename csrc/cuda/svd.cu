#include "cuda/svd.h"

#include <cfloat>
#include <cmath>
#include <string>

#include "cuda/launch.h"

namespace lowrank::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512; // with one block per SM, so that the compiler uses all registers
constexpr int kSweeps = 40;      // ten are usual; twenty-two is the most seen (unordered eigenvalues from 1 to 1e-14)
// The smallest target lets a block have 99 KiB.
constexpr size_t kSharedBytes = 96 * 1024;

__device__ __forceinline__ bool finite(double x) {
    return fabs(x) <= DBL_MAX;
}

// Gauss-Jordan on [G | I], which yields [L^T | L^-1]. At step j the left half's columns up to j are done and the right
// half's columns after j still equal I, so one lower triangle holds the rest of both: columns k < j belong to the right
// half, columns k >= j to the left half. The triangle is kept in shared memory, without the zeros above it, if it fits,
// else in the output.
template <bool kInShared>
__global__ void __launch_bounds__(kMaxThreads, 1)
    inverse_cholesky_kernel(const double* gram, int q, double* inverse, int32_t* failed) {
    LOWRANK_DYNAMIC_SHARED(double, shared);
    const int t = threadIdx.x, lane = t % kWarp, warp = t / kWarp, threads = blockDim.x, warps = threads / kWarp;
    gram += static_cast<int64_t>(blockIdx.x) * q * q;
    inverse += static_cast<int64_t>(blockIdx.x) * q * q;
    double* const step = shared; // row j of the right half, 1 / L[j][j], then column j of L
    double* const triangle = kInShared ? shared + q : inverse;
    const auto row = [&](int i) { return triangle + (kInShared ? i * (i + 1) / 2 : i * q); };

    for (int i = warp; i < q; i += warps)
        for (int k = lane; k <= i; k += kWarp)
            row(i)[k] = gram[i * q + k];
    __syncthreads();
    bool positive = true;
    for (int j = 0; j < q; ++j) {
        const double pivot = row(j)[j]; // every thread reads the same number, so all break together
        positive = pivot > 0 && finite(pivot);
        if (!positive)
            break;
        const double d = 1 / sqrt(pivot);
        for (int k = t; k < q; k += threads)
            step[k] = k < j ? row(j)[k] * d : k > j ? row(k)[j] * d : d;
        __syncthreads();
        for (int i = j + warp; i < q; i += warps) {
            const double l = step[i];
            for (int k = lane; k <= i; k += kWarp)
                row(i)[k] = i == j ? step[k] : k == j ? -l * d : row(i)[k] - l * step[k];
        }
        __syncthreads();
    }
    for (int i = warp; i < q; i += warps)
        for (int k = lane; k < q; k += kWarp)
            inverse[i * q + k] = positive && k <= i ? row(i)[k] : 0;
    if (t == 0)
        failed[blockIdx.x] = !positive;
}

// Two-sided Jacobi on A = V G V^T. In a round of the tournament every row is in one pair, so all the rotations of the
// round are found first and then applied to the rows of A and V and to the columns of A.
__global__ void __launch_bounds__(kMaxThreads, 1)
    eigenvectors_kernel(const double* gram, int q, double* work, double* values, double* vectors, int32_t* failed) {
    LOWRANK_SHARED(double, cosine, [kSvdMaxSize / 2]);
    LOWRANK_SHARED(double, sine, [kSvdMaxSize / 2]); // 0: no rotation
    LOWRANK_SHARED(int, lower, [kSvdMaxSize / 2]);   // the rows of a pair
    LOWRANK_SHARED(int, upper, [kSvdMaxSize / 2]);
    LOWRANK_SHARED(double, value, [kSvdMaxSize]);
    LOWRANK_SHARED(int, place, [kSvdMaxSize]);
    LOWRANK_SHARED(int, rotated, [1]);
    const int t = threadIdx.x, lane = t % kWarp, warp = t / kWarp, threads = blockDim.x, warps = threads / kWarp;
    gram += static_cast<int64_t>(blockIdx.x) * q * q;
    double* const a = work + static_cast<int64_t>(blockIdx.x) * 2 * q * q;
    double* const v = a + q * q;
    double trace = 0;
    for (int i = 0; i < q; ++i) // by every thread, in the same order
        trace += gram[i * q + i];
    const double negligible = DBL_EPSILON * trace, unit = 1 / trace; // no square over- or underflows near 1
    bool sound = finite(trace);
    for (int i = warp; i < q; i += warps)
        for (int k = lane; k < q; k += kWarp) {
            a[i * q + k] = gram[max(i, k) * q + min(i, k)];
            v[i * q + k] = i == k;
            sound = sound && finite(a[i * q + k]);
        }
    if (t == 0)
        rotated[0] = 0;
    __syncthreads();
    if (!sound)
        rotated[0] = 1;
    __syncthreads();
    sound = rotated[0] == 0;
    __syncthreads();

    // The circle method: n - 1 rounds of n / 2 disjoint pairs meet every pair once; if q is odd, one row pauses in each
    // round.
    const int n = q + q % 2;
    bool converged = false;
    for (int sweep = 0; sweep < kSweeps && sound && !converged; ++sweep) {
        if (t == 0)
            rotated[0] = 0;
        __syncthreads();
        for (int round = 0; round < n - 1; ++round) {
            if (t < n / 2) { // there are at least as many threads
                const int i = (round + t) % (n - 1);
                const int j = t == 0 ? n - 1 : (round - t + n - 1) % (n - 1);
                const int x = min(i, j), y = max(i, j);
                lower[t] = x, upper[t] = y;
                cosine[t] = 1, sine[t] = 0;
                if (y < q && fabs(a[x * q + y]) > negligible) {
                    const double d = (a[y * q + y] - a[x * q + x]) * unit, o = 2 * a[x * q + y] * unit;
                    const double tangent = (d < 0 ? -o : o) / (fabs(d) + sqrt(d * d + o * o)); // of the smaller angle
                    cosine[t] = 1 / sqrt(1 + tangent * tangent);
                    sine[t] = cosine[t] * tangent;
                    rotated[0] = 1;
                }
            }
            __syncthreads();
            for (int pair = warp; pair < n / 2; pair += warps) {
                const double c = cosine[pair], s = sine[pair];
                if (s == 0)
                    continue;
                const int x = lower[pair] * q, y = upper[pair] * q;
#pragma unroll 2
                for (int k = lane; k < q; k += kWarp) {
                    const double ax = a[x + k], ay = a[y + k], vx = v[x + k], vy = v[y + k];
                    a[x + k] = c * ax - s * ay, a[y + k] = s * ax + c * ay;
                    v[x + k] = c * vx - s * vy, v[y + k] = s * vx + c * vy;
                }
            }
            __syncthreads();
            for (int row = warp; row < q; row += warps)
#pragma unroll 2
                for (int pair = lane; pair < n / 2; pair += kWarp) {
                    const double c = cosine[pair], s = sine[pair];
                    if (s == 0)
                        continue;
                    double &x = a[row * q + lower[pair]], &y = a[row * q + upper[pair]];
                    const double ax = x, ay = y;
                    x = c * ax - s * ay, y = s * ax + c * ay;
                }
            __syncthreads();
        }
        converged = rotated[0] == 0;
        __syncthreads();
    }

    for (int i = t; i < q; i += threads)
        value[i] = sound ? a[i * q + i] : 0;
    __syncthreads();
    for (int i = t; i < q; i += threads) {
        int before = 0;
        for (int j = 0; j < q; ++j)
            before += value[j] > value[i] || (value[j] == value[i] && j < i);
        place[i] = before;
        values[static_cast<int64_t>(blockIdx.x) * q + before] = value[i];
    }
    __syncthreads();
    vectors += static_cast<int64_t>(blockIdx.x) * q * q;
    for (int i = warp; i < q; i += warps)
        for (int k = lane; k < q; k += kWarp)
            vectors[place[i] * q + k] = v[i * q + k];
    if (t == 0)
        failed[blockIdx.x] = !converged;
}

void check(const char* name, int64_t batch, int64_t q) {
    if (q < 1 || q > kSvdMaxSize)
        throw std::invalid_argument(std::string(name) + ": q must be in [1, " + std::to_string(kSvdMaxSize) +
                                    "], got " + std::to_string(q));
    if (batch < 0 || batch > 0x7fffffff)
        throw std::invalid_argument(std::string(name) + ": batch must be in [0, 2^31), got " + std::to_string(batch));
}

dim3 threads_for(int64_t useful) {
    const int64_t warps = (useful + kWarp - 1) / kWarp;
    return dim3(static_cast<unsigned>(kWarp * max(int64_t{1}, min(warps, int64_t{kMaxThreads / kWarp}))));
}

template <bool kInShared>
void launch_inverse_cholesky(const double* gram, int64_t batch, int q, size_t shared_bytes, double* inverse,
                             int32_t* failed, cudaStream_t stream) {
    if (shared_bytes > 48 * 1024) { // the default limit; if CUDA refuses more, the launch fails
        cudaFuncSetAttribute(inverse_cholesky_kernel<kInShared>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    }
    LOWRANK_LAUNCH((inverse_cholesky_kernel<kInShared>), dim3(static_cast<unsigned>(batch)), threads_for(kWarp * q),
                   shared_bytes, stream, gram, q, inverse, failed);
    check_launch("inverse_cholesky");
}

} // namespace

void inverse_cholesky(const double* gram, int64_t batch, int64_t q, double* inverse, int32_t* failed, void* stream) {
    check("inverse_cholesky", batch, q);
    if (batch == 0)
        return;
    const auto queue = static_cast<cudaStream_t>(stream);
    const size_t triangle = (q * (q + 1) / 2 + q) * sizeof(double);
    if (triangle <= kSharedBytes)
        launch_inverse_cholesky<true>(gram, batch, static_cast<int>(q), triangle, inverse, failed, queue);
    else
        launch_inverse_cholesky<false>(gram, batch, static_cast<int>(q), q * sizeof(double), inverse, failed, queue);
}

void eigenvectors(const double* gram, int64_t batch, int64_t q, double* work, double* values, double* vectors,
                  int32_t* failed, void* stream) {
    check("eigenvectors", batch, q);
    if (batch == 0)
        return;
    LOWRANK_LAUNCH(eigenvectors_kernel, dim3(static_cast<unsigned>(batch)), threads_for(kWarp * q / 2), 0,
                   static_cast<cudaStream_t>(stream), gram, static_cast<int>(q), work, values, vectors, failed);
    check_launch("eigenvectors");
}

} // namespace lowrank::cuda
