#include "cuda/nf4.h"

#include <cstring>
#include <type_traits>

#include "cuda/decode.h"
#include "cuda/launch.h"

namespace lowrank::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kThreadWeights = 32; // never straddle a block: blocks are multiples of 32 and start at one
constexpr int kWarpWeights = kWarp * kThreadWeights;

__device__ __forceinline__ uint32_t convert_pair(float a, float b, const __nv_bfloat16*) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}
__device__ __forceinline__ uint32_t convert_pair(float a, float b, const __half*) {
    const __half2 pair = __floats2half2_rn(a, b);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

// One 16-byte store.
__device__ __forceinline__ void store(const float (&w)[4], float* out) {
    *reinterpret_cast<float4*>(out) = make_float4(w[0], w[1], w[2], w[3]);
}
template <typename T>
__device__ __forceinline__ void store(const float (&w)[8], T* out) {
    *reinterpret_cast<uint4*>(out) = make_uint4(convert_pair(w[0], w[1], out), convert_pair(w[2], w[3], out),
                                                convert_pair(w[4], w[5], out), convert_pair(w[6], w[7], out));
}

// A warp decodes 1024 consecutive weights in rounds; in each, neighbouring lanes write neighbouring 16 bytes, so that
// every store of the warp fills whole sectors (the output is four fifths of the traffic or more). A lane fetches the
// packed bytes of its own stores, 16 bytes in all, before the first use, and computes one scale, for the lane'th 32
// weights; the other lanes get it by shuffle. The table of levels also lives in the warp, lane i holding level i % 16,
// and a nibble is looked up with one shuffle of width 16.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(int format, const uint8_t* packed, Scales scales,
                                                              int64_t numel, int block_shift, bool aligned, T* out) {
    constexpr int kStore = 16 / sizeof(T); // weights of a 16-byte store
    constexpr int kRounds = kThreadWeights / kStore;
    using Word = std::conditional_t<kStore == 8, uint32_t, uint16_t>; // their packed bytes

    const int lane = threadIdx.x % kWarp;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int64_t first = warp * kWarpWeights;
    if (!aligned || first + kWarpWeights > numel) { // the last warp or unaligned pointers: one weight at a time
        for (int64_t f = first + lane; f < numel && f < first + kWarpWeights; f += kWarp)
            convert(kLevels[format][nibble_at(packed, f)] * block_scale(scales, f >> block_shift), out + f);
        return;
    }

    const int64_t chunk = first + lane * kStore; // of round 0; each round is kWarp * kStore weights further
    Word words[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
        words[round] = __ldg(reinterpret_cast<const Word*>(packed + chunk / 2) + round * kWarp);
    const float level = kLevels[format][lane % 16];
    const float scale = block_scale(scales, (first + lane * kThreadWeights) >> block_shift);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const float s = __shfl_sync(kAllLanes, scale, round * kStore + lane * kStore / kThreadWeights);
        float w[kStore];
#pragma unroll
        for (int e = 0; e < kStore; ++e) // the shuffle takes the index modulo 16, which cuts the nibble out
            w[e] = __shfl_sync(kAllLanes, level, words[round] >> (4 * (e ^ 1)), 16) * s;
        store(w, out + chunk + round * kWarp * kStore);
    }
}

// The same for int8: a thread makes one 16-byte store. kStore divides the block size, so a store has one scale.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_bytes_kernel(const int8_t* bytes, Scales scales, int64_t numel, int block_shift, bool aligned, T* out) {
    constexpr int kStore = 16 / sizeof(T);
    using Word = std::conditional_t<kStore == 8, uint2, uint32_t>;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kStore;
    if (!aligned || first + kStore > numel) {
        for (int64_t f = first; f < numel && f < first + kStore; ++f)
            convert(bytes[f] * block_scale(scales, f >> block_shift), out + f);
        return;
    }
    const Word word = __ldg(reinterpret_cast<const Word*>(bytes + first));
    int8_t codes[kStore];
    memcpy(codes, &word, sizeof(word));
    const float scale = block_scale(scales, first >> block_shift);
    float w[kStore];
#pragma unroll
    for (int e = 0; e < kStore; ++e)
        w[e] = codes[e] * scale;
    store(w, out + first);
}

void check_blocks(int64_t blocks, int64_t numel) {
    if (blocks > 0x7fffffff)
        throw std::invalid_argument("dequantize: too many weights: " + std::to_string(numel));
}

template <typename T>
void launch_bytes(const uint8_t* packed, Scales scales, int64_t numel, int block_shift, void* out,
                  cudaStream_t stream) {
    const bool aligned = reinterpret_cast<uintptr_t>(packed) % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    constexpr int64_t kBlockWeights = int64_t{kThreads} * (16 / sizeof(T));
    const int64_t blocks = (numel + kBlockWeights - 1) / kBlockWeights;
    check_blocks(blocks, numel);
    LOWRANK_LAUNCH((dequantize_bytes_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                   reinterpret_cast<const int8_t*>(packed), scales, numel, block_shift, aligned, static_cast<T*>(out));
    check_launch("dequantize");
}

template <typename T>
void launch(int format, const uint8_t* packed, Scales scales, int64_t numel, int block_shift, void* out,
            cudaStream_t stream) {
    if (format == kInt8)
        return launch_bytes<T>(packed, scales, numel, block_shift, out, stream);
    // A word is at most 4 bytes and starts at a multiple of its size from `packed`.
    const bool aligned = reinterpret_cast<uintptr_t>(packed) % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    constexpr int64_t kBlockWeights = int64_t{kThreads} * kThreadWeights;
    const int64_t blocks = (numel + kBlockWeights - 1) / kBlockWeights;
    check_blocks(blocks, numel);
    LOWRANK_LAUNCH((dequantize_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                   format_index(format), packed, scales, numel, block_shift, aligned, static_cast<T*>(out));
    check_launch("dequantize");
}

} // namespace

void dequantize(int format, const uint8_t* packed, const void* absmax, const float* absmax2, const float* offset,
                int64_t numel, int64_t block_size, void* out, int out_dtype, void* stream) {
    if (!is_quantized(format))
        throw std::invalid_argument("dequantize: format must be 3, 5, 6 or 7, got " + std::to_string(format));
    int shift = 0;
    while (shift < 62 && (int64_t{1} << shift) < block_size)
        ++shift;
    if (block_size < kThreadWeights || (int64_t{1} << shift) != block_size)
        throw std::invalid_argument("dequantize: block_size must be a power of two >= 32, got " +
                                    std::to_string(block_size));
    if (out_dtype < 0 || out_dtype > 2)
        throw std::invalid_argument("dequantize: out_dtype must be 0, 1 or 2, got " + std::to_string(out_dtype));
    if (numel <= 0)
        return; // CUDA refuses an empty grid
    const Scales scales{absmax, absmax2, offset, has_exponents(format)};
    const auto queue = static_cast<cudaStream_t>(stream);
    if (out_dtype == 0)
        launch<float>(format, packed, scales, numel, shift, out, queue);
    else if (out_dtype == 1)
        launch<__nv_bfloat16>(format, packed, scales, numel, shift, out, queue);
    else
        launch<__half>(format, packed, scales, numel, shift, out, queue);
}

} // namespace lowrank::cuda
