// NF4 on a CPU: encode, quantise the block scales, decode. Compiled once per instruction set; the bytes are the same.
#include "cpu/product/decode.h"
#include "cpu/runtime/isa.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Numbers of nibbles: per iteration of the search, and per thread's turn.
constexpr int kGroup = 32;
constexpr int64_t kTask = 1 << 15;

// nibble = number of thresholds below v, by bisection. NaN counts as above all of them, as in torch.bucketize.
LOWRANK_INLINE I nearest_code(const Table& thresholds, V v) {
    I i = step_where_below(zero_int(), 8, set1(kThresholds[7]), v);
    i = step_where_below(i, 4, lookup(thresholds, plus(i, 3)), v);
    i = step_where_below(i, 2, lookup(thresholds, plus(i, 1)), v);
    return step_where_below(i, 1, lookup(thresholds, i), v);
}

// The same for numbers of about [-1, 1]: which of 32 cells v lies in says all but whether it is above the one threshold
// there.
struct Cells {
    float threshold[32];
    int32_t below[32]; // thresholds of the cells before

    static float at(float v) { return v * 15.999f + 16.0f; } // no threshold is within 1e-3 of a cell's end

    Cells() {
        for (int i = 0; i < 32; ++i)
            threshold[i] = INFINITY, below[i] = 0;
        for (float t : kThresholds) {
            threshold[int(at(t))] = t;
            for (int i = int(at(t)) + 1; i < 32; ++i)
                ++below[i];
        }
    }
};

LOWRANK_INLINE I nearest_code(const Cells& cells, V v) {
    const I cell = to_int(fma(v, set1(15.999f), set1(16.0f)));
    return step_where_below(lookup32(cells.below, cell), 1, lookup32(cells.threshold, cell), v);
}

int nearest_code(float v) {
    int nibble = 0;
    for (float t : kThresholds)
        nibble += !(t >= v);
    return nibble;
}

// The largest magnitude, NaN if there is one: compared as integers, where NaN is above infinity.
template <class T>
LOWRANK_INLINE float largest(const T* w, int64_t count) {
    I most = zero_int();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        most = max(most, bits_abs(load(w + i)));
    if (i < count)
        most = max(most, bits_abs(load_n(w + i, count - i)));
    const int32_t bits = reduce_max(most);
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class T>
void quantize_blocks(const T* w, int64_t count, int64_t block_size, uint8_t* packed, float* absmax) {
    float entries[16] = {LOWRANK_NF4_THRESHOLDS};
    const Table thresholds = load_table(entries);
    static const Cells cells;
    for (; count >= block_size; count -= block_size, w += block_size, packed += block_size / 2) {
        const float most = *absmax++ = largest(w, block_size);
        const V reciprocal = set1(1.0f / (most < 1e-38f ? 1e-38f : most));
        if constexpr (kLooksUp32)
            if (most <= FLT_MAX) {
                for (int64_t i = 0; i < block_size; i += kGroup) {
                    I nibbles[kGroup / kLanes];
                    for (int j = 0; j < kGroup / kLanes; ++j)
                        nibbles[j] = nearest_code(cells, mul(load(w + i + j * kLanes), reciprocal));
                    pack_nibbles(packed + i / 2, nibbles);
                }
                continue;
            }
        for (int64_t i = 0; i < block_size; i += kGroup) {
            I nibbles[kGroup / kLanes];
            for (int j = 0; j < kGroup / kLanes; ++j)
                nibbles[j] = nearest_code(thresholds, clamp1(mul(load(w + i + j * kLanes), reciprocal)));
            pack_nibbles(packed + i / 2, nibbles);
        }
    }
    if (count == 0)
        return;
    // The short last block: divided, and its clamped scale is the one that is stored.
    float most = largest(w, count);
    most = *absmax = most < 1e-38f ? 1e-38f : most;
    for (int64_t i = 0; i < count; i += 2) {
        float pair[kLanes];
        store(pair, load_n(w + i, min(2, count - i)));
        for (int j = 0; j < 2; ++j) {
            const float v = pair[j] / most;
            pair[j] = v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v;
        }
        // An odd count is padded with the nibble of zero.
        packed[i / 2] = uint8_t(nearest_code(pair[0]) << 4 | nearest_code(i + 1 < count ? pair[1] : 0.0f));
    }
}

void quantize(Rows w, int64_t numel, int64_t block_size, uint8_t* packed, float* absmax, int threads) {
    // Tasks are whole blocks, hence whole bytes.
    parallel_for(threads, ceil_div(numel, kTask), [&](int64_t task) {
        const int64_t f = task * kTask;
        with_type(w.dtype, [&](auto t) {
            quantize_blocks(static_cast<const decltype(t)*>(w.data) + f, min(kTask, numel - f), block_size,
                            packed + f / 2, absmax + f / block_size);
        });
    });
}

constexpr int kGrid = 65536;

// Index into kDynamicCode of the level nearest to each of 65,536 points of [-1, 1].
const uint8_t* nearest_level() {
    struct Levels {
        uint8_t at[kGrid];
        Levels() {
            int level = 0;
            for (int i = 0; i < kGrid; ++i) {
                const float point = -1.0f + (2.0f * float(i)) / 65535.0f;
                while (level < 255 && 0.5f * (kDynamicCode[level] + kDynamicCode[level + 1]) < point)
                    ++level;
                at[i] = uint8_t(level);
            }
        }
    };
    static const Levels levels;
    return levels.at;
}

void absmax_quantize_block(const float* absmax, float offset, int64_t count, uint8_t* index, float* absmax2) {
    float centred[kAbsmaxBlock] = {};
    int32_t position[kAbsmaxBlock];
    for (int64_t i = 0; i < count; ++i)
        centred[i] = absmax[i] - offset;
    const float most = *absmax2 = largest(centred, kAbsmaxBlock);
    if (!(most > 0)) {
        std::memset(index, 0, size_t(count));
        return;
    }
    const V reciprocal = set1(1.0f / most), one = set1(1.0f), half = set1(0.5f);
    for (int i = 0; i < kAbsmaxBlock; i += kLanes) {
        const V scaled = clamp1(mul(load(static_cast<const float*>(centred) + i), reciprocal));
        store_int(position + i, to_int(add(mul(mul(add(scaled, one), half), set1(65535.0f)), half)));
    }
    const uint8_t* levels = nearest_level();
    for (int64_t i = 0; i < count; ++i)
        index[i] = levels[min(max(int64_t(position[i]), 0), kGrid - 1)];
}

void absmax_quantize(const float* absmax, const float* offset, int64_t blocks, uint8_t* index, float* absmax2,
                     int threads) {
    parallel_for(blocks < kTask ? 1 : threads, ceil_div(blocks, kAbsmaxBlock), [&](int64_t b) {
        const int64_t first = b * kAbsmaxBlock;
        absmax_quantize_block(absmax + first, *offset, min(kAbsmaxBlock, blocks - first), index + first, absmax2 + b);
    });
}

void dequantize(const uint8_t* packed, Scales scales, int64_t numel, void* out, int out_dtype, int threads) {
    parallel_for(threads, ceil_div(numel, kTask), [&](int64_t task) {
        const int64_t f = task * kTask;
        with_type(out_dtype, [&](auto t) {
            nf4_decode(packed, scales, f, min(kTask, numel - f), static_cast<decltype(t)*>(out) + f);
        });
    });
}

} // namespace

extern const Nf4Kernels nf4_kernels = {quantize, absmax_quantize, dequantize};

} // namespace lowrank::cpu::LOWRANK_ISA
