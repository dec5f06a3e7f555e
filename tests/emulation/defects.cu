// Small kernels with one known defect each, to show that cuda_emulation.h catches it; without the defect they show that
// it computes the same as a GPU. They have no other use.
#include "defects.h"

#include <cstring>
#include <iterator>
#include <vector>

#include "cuda/launch.h"

namespace {

enum Defect {
    kNone,
    kMissingBarrier,
    kMissingTrailingBarrier,
    kDivergentBarrier,
    kDivergentShuffle,
    kLaneOutsideMask,
    kUninitialised,
    kGlobalBounds,
    kSharedBounds,
    kStackBounds,
    kMisaligned,
    kContracted,
    kTooManyThreads,
    kTooMuchShared,
};
constexpr const char* kNames[] = {
    "none",
    "missing_barrier",
    "missing_trailing_barrier",
    "divergent_barrier",
    "divergent_shuffle",
    "outside_mask",
    "uninitialised",
    "global_bounds",
    "shared_bounds",
    "stack_bounds",
    "misaligned",
    "contracted",
    "too_many_threads",
    "too_much_shared",
};

constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// total[b] = sum of row b of x [gridDim.x, n], by a tree in shared memory and one in a warp.
template <typename T>
__global__ void row_sum(int defect, const T* x, int n, T* total) {
    LOWRANK_SHARED(T, partial, [kThreads]);
    const int t = threadIdx.x;
    const T* row = x + blockIdx.x * n;
    T sum = 0;
    for (int i = t; i < n + (defect == kGlobalBounds); i += kThreads)
        sum += row[i];
    if (defect != kUninitialised || t < n)
        partial[t] = sum;
    if (defect != kMissingBarrier)
        __syncthreads();
    for (int stride = kThreads / 2; stride >= 32; stride /= 2) {
        if (t < stride) {
            partial[t] += partial[t + stride + (defect == kSharedBounds)];
            if (defect == kDivergentBarrier)
                __syncthreads();
        }
        if (defect != kDivergentBarrier)
            __syncthreads();
    }
    if (t >= 32)
        return;
    sum = partial[t];
    for (int lanes = 16; lanes > 0; lanes /= 2)
        if (defect != kDivergentShuffle || t < lanes)
            sum += __shfl_xor_sync(defect == kLaneOutsideMask ? 0xffffu : kAllLanes, sum, lanes);
    if (t == 0)
        total[blockIdx.x] = sum;
}

// out[t] = sum over tiles of x[tile * blockDim.x + (t + 33) % blockDim.x], through a tile of shared memory.
__global__ void tile_sum(int defect, const float* x, int tiles, float* out) {
    LOWRANK_DYNAMIC_SHARED(float, tile);
    const int t = threadIdx.x, n = blockDim.x;
    float sum = 0.0f;
    for (int i = 0; i < tiles; ++i) {
        tile[t] = x[i * n + t];
        __syncthreads();
        sum += tile[(t + 33) % n];
        if (defect != kMissingTrailingBarrier)
            __syncthreads();
    }
    out[t] = sum;
}

__global__ void copy4(int defect, const float* x, float* out) {
    const float* from = x + 4 * threadIdx.x + (defect == kMisaligned);
    float local[4];
    float* volatile first = local; // hides the array's size from the compiler
    for (int i = 0; i < 4; ++i)
        local[i] = from[i];
    __syncthreads(); // the array outlives a switch of threads
    if (defect == kStackBounds)
        first[4] = 0.0f;
    *reinterpret_cast<float4*>(out + 4 * threadIdx.x) = *reinterpret_cast<const float4*>(from);
}

__global__ void multiply_add(int defect, const float* a, const float* b, const float* c, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = defect == kContracted ? a[i] * b[i] + c[i] : __fadd_rn(__fmul_rn(a[i], b[i]), c[i]);
}

// One row of 32 per operation; `counters` = {threads counted, largest, smallest}.
__global__ void warp_values(int* out, int* counters) {
    const int lane = threadIdx.x % 32, value = 100 + lane;
    int row = 0;
    const auto put = [&](int result) { out[32 * row++ + lane] = result; };
    put(__shfl_sync(kAllLanes, value, lane * 3));
    put(__shfl_sync(kAllLanes, value, 11, 8));
    put(__shfl_up_sync(kAllLanes, value, 3));
    put(__shfl_up_sync(kAllLanes, value, 3, 8));
    put(__shfl_down_sync(kAllLanes, value, 3));
    put(__shfl_down_sync(kAllLanes, value, 3, 8));
    put(__shfl_xor_sync(kAllLanes, value, 5));
    put(__shfl_xor_sync(kAllLanes, value, 12, 8));
    put(static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0)));
    put(__any_sync(kAllLanes, lane == 7));
    put(__all_sync(kAllLanes, lane != 7));
    if (lane % 2) // half a warp on its own
        put(__shfl_sync(0xaaaaaaaau, value, 1, 2));
    else
        put(-1);
    __syncwarp();
    atomicAdd(&counters[0], 1);
    atomicMax(&counters[1], value);
    atomicMin(&counters[2], value);
}

bool check(int defect) {
    using lowrank::cuda::check_launch;
    const auto number = [](size_t i) { return static_cast<float>((i * 37) % 64); }; // their sums are exact
    bool right = true;
    {
        const int rows = 3, n = defect == kUninitialised ? 100 : 300;
        std::vector<float> x(rows * n), total(rows, -1.0f);
        for (size_t i = 0; i < x.size(); ++i)
            x[i] = number(i);
        LOWRANK_LAUNCH(row_sum<float>, dim3(rows), dim3(defect == kTooManyThreads ? 2048 : kThreads), 0, nullptr,
                       defect, x.data(), n, total.data());
        check_launch("row_sum");
        for (int row = 0; row < rows; ++row) {
            float expected = 0.0f;
            for (int i = 0; i < n; ++i)
                expected += x[row * n + i];
            right = right && total[row] == expected;
        }
    }
    {
        const int n = 96, tiles = 4;
        const size_t bytes = defect == kTooMuchShared ? 49 * 1024 : n * sizeof(float);
        std::vector<float> x(tiles * n), out(n, -1.0f);
        for (size_t i = 0; i < x.size(); ++i)
            x[i] = number(i);
        LOWRANK_LAUNCH(tile_sum, dim3(1), dim3(n), bytes, nullptr, defect, x.data(), tiles, out.data());
        check_launch("tile_sum");
        for (int t = 0; t < n; ++t) {
            float expected = 0.0f;
            for (int i = 0; i < tiles; ++i)
                expected += x[i * n + (t + 33) % n];
            right = right && out[t] == expected;
        }
    }
    {
        const int n = 40; // more than a warp, and not a multiple of it
        struct alignas(16) Four {
            float values[4];
        };
        std::vector<Four> x(n + 1), out(n);
        for (int i = 0; i < 4 * (n + 1); ++i)
            x[i / 4].values[i % 4] = number(i);
        LOWRANK_LAUNCH(copy4, dim3(1), dim3(n), 0, nullptr, defect, x[0].values, out[0].values);
        check_launch("copy4");
        right = right && std::memcmp(x.data(), out.data(), n * sizeof(Four)) == 0;
    }
    {
        const int n = 256;
        std::vector<float> a(n), b(n), c(n), out(n);
        for (int i = 0; i < n; ++i)
            a[i] = 1.0f + number(i) / 4099, b[i] = 1.0f + number(i + 7) / 4099, c[i] = -a[i] * b[i];
        LOWRANK_LAUNCH(multiply_add, dim3(n / 32), dim3(32), 0, nullptr, defect, a.data(), b.data(), c.data(),
                       out.data());
        check_launch("multiply_add");
        for (int i = 0; i < n; ++i)
            right = right && out[i] == 0.0f; // the rounded product minus itself; if contracted, its rounding error
    }
    return right;
}

} // namespace

bool run_defect(const std::string& name) {
    for (int defect = 0; defect < static_cast<int>(std::size(kNames)); ++defect)
        if (name == kNames[defect])
            return check(defect);
    throw std::invalid_argument("no defect named " + name);
}

void run_warp_values(int threads, int* out, int* counters) {
    LOWRANK_LAUNCH(warp_values, dim3(1), dim3(threads), 0, nullptr, out, counters);
    lowrank::cuda::check_launch("warp_values");
}
