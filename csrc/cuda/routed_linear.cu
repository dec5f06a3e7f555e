#include "cuda/routed_linear.h"

#include <cmath>
#include <cstring>

#include "cuda/decode.h"
#include "cuda/launch.h"

namespace lowrank::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 8;         // blocks per multiprocessor: more would leave a thread too few registers
constexpr int kVector = 8;           // elements that a thread takes at a time: 16 bytes of a 16-bit type
constexpr int kTile = 64;            // rows of U in a block of the expand kernel
constexpr int kChunk = 512;          // entries of C h that such a block holds at a time
constexpr int kBlocksPerUpdate = 64; // they share the rows of D
enum Kind { kNone, kBanded, kSparse, kDense };

// ---- reading matrices

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}

__device__ __forceinline__ float2 unpack(unsigned pair, const __nv_bfloat16*) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack(unsigned pair, const __half*) {
    __half2 halves;
    memcpy(&halves, &pair, sizeof(pair));
    return __half22float2(halves);
}

// Readers of a row-major matrix by flat index, in float32: one element, or kVector from a multiple of kVector on.
template <typename T>
struct DenseReader {
    const T* data;

    __device__ __forceinline__ float one(int64_t at) const { return to_float(data[at]); }
    __device__ __forceinline__ void vector(int64_t at, float (&v)[kVector]) const {
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(data + at));
        const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack(words[i], data);
            v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
        }
    }
};

template <>
__device__ __forceinline__ void DenseReader<float>::vector(int64_t at, float (&v)[kVector]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float4 w = __ldg(reinterpret_cast<const float4*>(data + at) + i);
        v[4 * i] = w.x, v[4 * i + 1] = w.y, v[4 * i + 2] = w.z, v[4 * i + 3] = w.w;
    }
}

struct PackedReader {
    const uint8_t* packed;
    Scales scales;
    int shift;           // log2 of the block size
    const float* levels; // in shared memory

    __device__ __forceinline__ float one(int64_t at) const {
        return levels[nibble_at(packed, at)] * block_scale(scales, at >> shift);
    }
    __device__ __forceinline__ void vector(int64_t at, float (&v)[kVector]) const {
        const unsigned word = __ldg(reinterpret_cast<const unsigned*>(packed + at / 2));
        const float scale = block_scale(scales, at >> shift); // of all: blocks are multiples of 32
#pragma unroll
        for (int e = 0; e < kVector; ++e)
            v[e] = levels[word >> (4 * (e ^ 1)) & 15] * scale;
    }
};

template <typename Reader>
__device__ __forceinline__ void read(const Reader& reader, int64_t at, int count, bool vectors, float (&v)[kVector]) {
    if (vectors) {
        reader.vector(at, v);
        return;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e)
        v[e] = e < count ? reader.one(at + e) : 0.0f;
}

// Calls f with the reader of a dense part of the arena.
template <typename F>
__device__ __forceinline__ float with_dense(const uint8_t* data, int64_t dtype, const F& f) {
    if (dtype == kFloat32)
        return f(DenseReader<float>{reinterpret_cast<const float*>(data)});
    if (dtype == kBFloat16)
        return f(DenseReader<__nv_bfloat16>{reinterpret_cast<const __nv_bfloat16*>(data)});
    return f(DenseReader<__half>{reinterpret_cast<const __half*>(data)});
}

// Calls f with the reader of D or U; `levels` holds the levels of its format if it is packed.
template <typename F>
__device__ __forceinline__ float with_factor(const uint8_t* arena, const ArenaMatrix& factor, const float* levels,
                                             const F& f) {
    const uint8_t* const data = arena + factor.data;
    if (!is_packed(factor.type))
        return with_dense(data, factor.type, f);
    const bool twice = factor.absmax2 >= 0;
    const Scales scales{arena + factor.absmax, twice ? reinterpret_cast<const float*>(arena + factor.absmax2) : nullptr,
                        twice ? reinterpret_cast<const float*>(arena + factor.offset) : nullptr,
                        has_exponents(factor.type)};
    return f(PackedReader{data, scales, __popc(static_cast<unsigned>(factor.block) - 1), levels});
}

// The table's row for an entry of slots, or null if it names no update.
__device__ __forceinline__ const ArenaRow* row_of(const RoutedUpdate& u, int64_t entry) {
    const int64_t slot = u.slots[entry];
    if (slot < 0 || slot >= u.slot_count)
        return nullptr;
    const ArenaRow* const row = u.table + slot;
    return row->rank > 0 ? row : nullptr;
}

__device__ __forceinline__ float lane_sum(float value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2)
        value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

// ---- h = D x

// A block computes every kBlocksPerUpdate'th number of h of one update of a token. All its threads share one row of D
// at a time, because rows are few and long.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) shrink_kernel(RoutedUpdate u, bool vectors) {
    LOWRANK_SHARED(float, levels, [16]);
    LOWRANK_SHARED(float, sums, [kWarps]);
    const int64_t entry = blockIdx.x;
    const ArenaRow* const slot = row_of(u, entry);
    if (slot == nullptr || slot->rank > u.capacity)
        return;
    const int t = threadIdx.x, K = static_cast<int>(u.K), R = static_cast<int>(slot->rank);
    if (t < 16)
        levels[t] = kLevels[format_index(slot->down.type)][t];
    __syncthreads();
    const DenseReader<T> x{static_cast<const T*>(u.x) + entry / u.S * u.x_stride};
    for (int r = blockIdx.y; r < R; r += gridDim.y) {
        const int64_t first = static_cast<int64_t>(r) * K;
        const float part = with_factor(u.arena, slot->down, levels, [&](const auto& down) {
            float sum = 0;
#pragma unroll 2
            for (int k = kVector * t; k < K; k += kVector * kThreads) {
                float a[kVector], b[kVector];
                read(down, first + k, K - k, vectors, a);
                read(x, k, K - k, vectors, b);
#pragma unroll
                for (int e = 0; e < kVector; ++e)
                    sum = fmaf(a[e], b[e], sum);
            }
            return sum;
        });
        const float sum = lane_sum(part, kWarp);
        if (t % kWarp == 0)
            sums[t / kWarp] = sum;
        __syncthreads();
        if (t == 0) {
            float total = 0;
            for (int warp = 0; warp < kWarps; ++warp)
                total += sums[warp];
            u.h[entry * u.capacity + r] = total;
        }
        __syncthreads();
    }
}

// ---- y += s U (C h)

// c[i] = (C h)[first + i] for i < count.
__device__ __forceinline__ void apply_core(const uint8_t* arena, const ArenaCore& core, const float* h, int R,
                                           int first, int count, float* c) {
    const uint8_t* const values = arena + core.values;
    const int64_t kind = core.kind;
    const int t = threadIdx.x;
    if (kind == kDense) { // a warp to a row
        for (int i = t / kWarp; i < count; i += kWarps) {
            const int64_t row = static_cast<int64_t>(first + i) * R;
            const float part = with_dense(values, core.type, [&](const auto& entries) {
                float sum = 0;
                for (int j = t % kWarp; j < R; j += kWarp)
                    sum = fmaf(entries.one(row + j), h[j], sum);
                return sum;
            });
            const float sum = lane_sum(part, kWarp);
            if (t % kWarp == 0)
                c[i] = sum;
        }
        return;
    }
    for (int i = t; i < count; i += kThreads) {
        const int row = first + i;
        if (kind == kNone) {
            c[i] = h[row];
        } else if (kind == kBanded) {
            const int width = static_cast<int>(core.bandwidth);
            c[i] = with_dense(values, core.type, [&](const auto& entries) {
                float sum = 0;
                int64_t start = 0; // index of the diagonal's first entry
                for (int o = -width; o <= width; ++o) {
                    if (row + o >= 0 && row + o < R)
                        sum = fmaf(entries.one(start + min(o, 0) + row), h[row + o], sum);
                    start += R - (o < 0 ? -o : o);
                }
                return sum;
            });
        } else {
            const int32_t* const starts = reinterpret_cast<const int32_t*>(arena + core.index);
            const int32_t* const columns = starts + R + 1;
            c[i] = with_dense(values, core.type, [&](const auto& entries) {
                float sum = 0;
                for (int e = starts[row]; e < starts[row + 1]; ++e)
                    sum = fmaf(entries.one(e), h[columns[e]], sum);
                return sum;
            });
        }
    }
}

// total[i] = (U C h)[first_row + i] for i < kTile. As many lanes share a row of U as it has vectors, 32 at most. A rank
// above kChunk takes several rounds.
__device__ __forceinline__ void expand(const RoutedUpdate& u, const ArenaRow* slot, int64_t entry, int64_t first_row,
                                       bool aligned, float* levels, float* c, float* total) {
    const int t = threadIdx.x, R = static_cast<int>(slot->rank);
    if (t < 16)
        levels[t] = kLevels[format_index(slot->up.type)][t];
    if (t < kTile)
        total[t] = 0;
    int lanes = 1;
    while (lanes < kWarp && lanes * kVector < R)
        lanes *= 2;
    const bool vectors = aligned && R % kVector == 0;
    for (int r0 = 0; r0 < R; r0 += kChunk) {
        const int count = min(kChunk, R - r0);
        apply_core(u.arena, slot->core, u.h + entry * u.capacity, R, r0, count, c);
        if (t < kVector)
            c[count + t] = 0; // a vector reads past the last elements if they do not fill it
        __syncthreads();
        for (int i = t / lanes; i < kTile; i += kThreads / lanes) {
            const int64_t row = first_row + i;
            float part = 0;
            if (row < u.N)
                part = with_factor(u.arena, slot->up, levels, [&](const auto& up) {
                    float sum = 0;
                    for (int r = kVector * (t % lanes); r < count; r += kVector * lanes) {
                        float a[kVector];
                        read(up, row * R + r0 + r, count - r, vectors, a);
#pragma unroll
                        for (int e = 0; e < kVector; ++e)
                            sum = fmaf(a[e], c[r + e], sum);
                    }
                    return sum;
                });
            const float added = lane_sum(part, lanes);
            if (t % lanes == 0)
                total[i] += added;
        }
        __syncthreads();
    }
}

__device__ __forceinline__ float scale_of(const RoutedUpdate& u, const ArenaRow* slot, int64_t entry) {
    return (u.strengths ? u.strengths[entry] : 1.0f) * __int_as_float(static_cast<int>(slot->scale));
}

// A block computes kTile elements of y of one token, which has at most one update.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) expand_kernel(RoutedUpdate u, bool aligned) {
    LOWRANK_SHARED(float, levels, [16]);
    LOWRANK_SHARED(float, c, [kChunk + kVector]);
    LOWRANK_SHARED(float, total, [kTile]);
    const int64_t token = blockIdx.x, first_row = static_cast<int64_t>(blockIdx.y) * kTile;
    const ArenaRow* const slot = row_of(u, token);
    if (slot == nullptr)
        return;
    if (slot->rank > u.capacity) { // h was not computed
        for (int64_t n = first_row + threadIdx.x; n < min(u.N, first_row + kTile); n += kThreads)
            convert(NAN, static_cast<T*>(u.y) + token * u.N + n);
        return;
    }
    expand(u, slot, token, first_row, aligned, levels, c, total);
    const int t = threadIdx.x;
    if (t < kTile && first_row + t < u.N) {
        T* const y = static_cast<T*>(u.y) + token * u.N + first_row + t;
        convert(fmaf(scale_of(u, slot, token), total[t], to_float(*y)), y);
    }
}

// The same for several updates a token, in the order of their entries. The loop needs twice the registers.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident / 2) expand_several_kernel(RoutedUpdate u, bool aligned) {
    LOWRANK_SHARED(float, levels, [16]);
    LOWRANK_SHARED(float, c, [kChunk + kVector]);
    LOWRANK_SHARED(float, total, [kTile]);
    const int64_t token = blockIdx.x, first_row = static_cast<int64_t>(blockIdx.y) * kTile;
    const int t = threadIdx.x;
    const bool mine = t < kTile && first_row + t < u.N;
    T* const y = static_cast<T*>(u.y) + token * u.N + first_row + t;
    float result = mine ? to_float(*y) : 0.0f;
    bool any = false;
    for (int64_t entry = token * u.S; entry < (token + 1) * u.S; ++entry) {
        const ArenaRow* const slot = row_of(u, entry);
        if (slot == nullptr)
            continue;
        any = true;
        const bool fits = slot->rank <= u.capacity; // else h was not computed
        if (fits)
            expand(u, slot, entry, first_row, aligned, levels, c, total);
        if (mine)
            result = fits ? fmaf(scale_of(u, slot, entry), total[t], result) : NAN;
    }
    if (mine && any)
        convert(result, y);
}

template <typename T>
void launch(const RoutedUpdate& u, cudaStream_t stream) {
    const auto multiple = [](const void* pointer, size_t bytes) {
        return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    };
    const bool aligned = multiple(u.arena, 16); // parts of the arena begin at multiples of 64
    const bool vectors = aligned && u.K % kVector == 0 && multiple(u.x, 16) && u.x_stride * sizeof(T) % 16 == 0;
    const auto tokens = static_cast<unsigned>(u.M), entries = static_cast<unsigned>(u.M * u.S);
    LOWRANK_LAUNCH((shrink_kernel<T>), dim3(entries, kBlocksPerUpdate), dim3(kThreads), 0, stream, u, vectors);
    check_launch("routed_update");
    const auto tiles = static_cast<unsigned>((u.N + kTile - 1) / kTile);
    if (u.S == 1)
        LOWRANK_LAUNCH((expand_kernel<T>), dim3(tokens, tiles), dim3(kThreads), 0, stream, u, aligned);
    else
        LOWRANK_LAUNCH((expand_several_kernel<T>), dim3(tokens, tiles), dim3(kThreads), 0, stream, u, aligned);
    check_launch("routed_update");
}

void check(const char* name, int64_t size, int64_t most) {
    if (size < 1 || size > most)
        throw std::invalid_argument(std::string("routed_update: ") + name + " must be in [1, " + std::to_string(most) +
                                    "], got " + std::to_string(size));
}

} // namespace

void routed_update(const RoutedUpdate& update, void* stream) {
    check("M", update.M, 0x7fffffff);
    check("S", update.S, 0x7fffffff / update.M);  // of the first dimension of a grid
    check("N", update.N, int64_t{kTile} * 65535); // of the second dimension of a grid
    check("K", update.K, 0x7fffffff - kVector * kThreads);
    if (update.dtype < 0 || update.dtype > 2)
        throw std::invalid_argument("routed_update: dtype must be 0, 1 or 2, got " + std::to_string(update.dtype));
    const auto queue = static_cast<cudaStream_t>(stream);
    if (update.dtype == 0)
        launch<float>(update, queue);
    else if (update.dtype == 1)
        launch<__nv_bfloat16>(update, queue);
    else
        launch<__half>(update, queue);
}

} // namespace lowrank::cuda
