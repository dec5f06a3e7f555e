// The formats on a CPU: encode, quantise the block scales, decode. Compiled once per instruction set; the bytes
// are the same.
#include "cpu/product/decode.h"
#include "cpu/runtime/isa.h"
#if defined(__AVX2__)
#include "cpu/vector/nibbles.h"
#endif

#include <cfloat>
#include <cmath>
#include <cstdlib>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Nibbles per iteration of the search and per task of a thread.
constexpr int kGroup = 32;
constexpr int64_t kTask = 1 << 15;

// ---- formats whose scale is an absmax
// --------------------------------------------------------------------------------

// The rank of a scaled weight's level is the number of thresholds below the weight; `nibble` maps a rank to its nibble.
// NaN is above all thresholds, as in torch.bucketize.
struct Nf4Codes {
    static constexpr float kThresholds[15] = {LOWRANK_NF4_THRESHOLDS};
    static constexpr int kAscending[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

    LOWRANK_INLINE I nibble(I rank) const { return rank; }
    static int nibble(int rank) { return rank; }
};

struct Fp4Codes {
    static constexpr int kAscending[16] = {LOWRANK_FP4_ASCENDING};
    struct Midpoints {
        float of[15];
    };
    static constexpr Midpoints kMidpoints = [] {
        constexpr float levels[16] = {LOWRANK_FP4_LEVELS};
        Midpoints midpoints{};
        for (int i = 0; i < 15; ++i)
            midpoints.of[i] = (levels[kAscending[i]] + levels[kAscending[i + 1]]) / 2;
        return midpoints;
    }();
    static constexpr const float (&kThresholds)[15] = kMidpoints.of;

    Table ascending; // nibbles by rank, stored as the bits of floats

    Fp4Codes() {
        float entries[16];
        std::memcpy(entries, kAscending, sizeof entries);
        ascending = load_table(entries);
    }
    LOWRANK_INLINE I nibble(I rank) const { return bits_abs(lookup(ascending, rank)); }
    static int nibble(int rank) { return kAscending[rank]; }
};

// Finds the rank by bisection.
LOWRANK_INLINE I rank_of(const Table& thresholds, float middle, V v) {
    I i = step_where_below(zero_int(), 8, set1(middle), v);
    i = step_where_below(i, 4, lookup(thresholds, plus(i, 3)), v);
    i = step_where_below(i, 2, lookup(thresholds, plus(i, 1)), v);
    return step_where_below(i, 1, lookup(thresholds, i), v);
}

template <class Codes>
int rank_of(float v) {
    int rank = 0;
    for (float t : Codes::kThresholds)
        rank += !(t >= v);
    return rank;
}

#if !defined(__AVX2__)
// Nibbles by a table in memory, for processors without the byte shuffles of nibbles.h. The loops are plain, so that the
// compiler makes vectors of them. The table has the nibble of every cell of scaled weights, or kUnsure where a
// threshold lies in the cell. The cell of a number never falls where the number rises, so all other cells lie on one
// side of every threshold.
template <class Codes>
class CellTable {
public:
    CellTable() {
        for (int cell = 0; cell < kCells; ++cell) {
            int rank = 0;
            bool sure = true;
            for (float t : Codes::kThresholds)
                rank += cell_of(t) < cell, sure &= cell_of(t) != cell;
            nibbles_[cell] = uint8_t(sure ? Codes::nibble(rank) : kUnsure);
        }
    }

    // Writes the nibbles of w[0 ... 31] times `reciprocal`, which are finite and at most 1 in magnitude but for
    // rounding.
    template <class T>
    LOWRANK_INLINE void store(const T* w, float reciprocal, uint8_t* packed) const {
        float scaled[32];
        int32_t cells[32];
        for (int i = 0; i < 32; i += kLanes)
            LOWRANK_ISA::store(scaled + i, mul(load(w + i), set1(reciprocal)));
        for (int i = 0; i < 32; ++i)
            cells[i] = cell_of(scaled[i]);
        uint8_t nibbles[32], all = 0;
        for (int i = 0; i < 32; ++i)
            all |= nibbles[i] = nibbles_[cells[i]];
        if (all & kUnsure)
            for (int i = 0; i < 32; ++i)
                if (nibbles[i] == kUnsure)
                    nibbles[i] = uint8_t(Codes::nibble(rank_of<Codes>(scaled[i])));
        for (int i = 0; i < 16; ++i)
            packed[i] = uint8_t(nibbles[2 * i] << 4 | nibbles[2 * i + 1]);
    }

private:
    static constexpr float kHalf = 4096; // cells for numbers from 0 to 1
    static constexpr int kCells = 2 * int(kHalf) + 1, kUnsure = 128;
    LOWRANK_INLINE static int32_t cell_of(float scaled) { return int32_t(scaled * kHalf + kHalf); }

    uint8_t nibbles_[kCells];
};

// The bits of the largest magnitude of w[0 ... count).
LOWRANK_INLINE int32_t largest_bits(const BFloat16* w, int64_t count) {
    int16_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto bits = int16_t(w[i].bits & 0x7fff);
        most = bits > most ? bits : most;
    }
    return int32_t(most) << 16;
}
template <class T>
LOWRANK_INLINE int32_t largest_bits(const T* w, int64_t count) {
    I most = zero_int();
    for (int64_t i = 0; i < count; i += kLanes)
        most = max(most, bits_abs(load(w + i)));
    return reduce_max(most);
}
#endif

// The largest magnitude, or NaN if there is one. Magnitudes are compared as integers, which puts NaN above infinity.
template <class T>
LOWRANK_INLINE float largest(const T* w, int64_t count) {
    int64_t i = count / kGroup * kGroup;
    int32_t bits = largest_bits(w, i);
    if (i < count) {
        I most = zero_int();
        for (; i + kLanes <= count; i += kLanes)
            most = max(most, bits_abs(load(w + i)));
        if (i < count)
            most = max(most, bits_abs(load_n(w + i, count - i)));
        bits = int32_t(max(bits, reduce_max(most)));
    }
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class Codes, class T>
void quantize_blocks(const T* w, int64_t count, int64_t block_size, uint8_t* packed, float* absmax) {
    float entries[16] = {};
    std::memcpy(entries, Codes::kThresholds, sizeof Codes::kThresholds);
    const Table thresholds = load_table(entries);
    const float middle = entries[7];
    const Codes codes;
#if defined(__AVX2__)
    static const NibbleTables tables(Codes::kThresholds, Codes::kAscending);
    const NibbleFinder finder(tables);
#else
    static const CellTable<Codes> cells;
#endif
#if defined(__AVX512BW__)
    const WideNibbleFinder wide(tables);
#endif
    for (; count >= block_size; count -= block_size, w += block_size, packed += block_size / 2) {
        const float most = *absmax++ = largest(w, block_size);
        const float reciprocal = 1.0f / (most < 1e-38f ? 1e-38f : most);
        for (int64_t i = 0; i < block_size; i += kGroup) {
#if defined(__AVX512BW__)
            if (block_size - i >= 2 * kGroup && NibbleFinder::takes(most) &&
                wide.store(w + i, reciprocal, packed + i / 2)) {
                i += kGroup;
                continue;
            }
#endif
#if defined(__AVX2__)
            if (NibbleFinder::takes(most) && finder.store(w + i, reciprocal, packed + i / 2))
                continue;
#else
            if (most <= FLT_MAX) {
                cells.store(w + i, reciprocal, packed + i / 2);
                continue;
            }
#endif
            I nibbles[kGroup / kLanes];
            for (int j = 0; j < kGroup / kLanes; ++j) {
                const V scaled = clamp1(mul(load(w + i + j * kLanes), set1(reciprocal)));
                nibbles[j] = codes.nibble(rank_of(thresholds, middle, scaled));
            }
            store_nibbles(packed + i / 2, nibbles);
        }
    }
    if (count == 0)
        return;
    // The short last block is divided by its scale, and the scale is stored after clamping.
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
        const int high = Codes::nibble(rank_of<Codes>(pair[0]));
        packed[i / 2] = uint8_t(high << 4 | Codes::nibble(rank_of<Codes>(i + 1 < count ? pair[1] : 0.0f)));
    }
}

// ---- MXFP4 ----------------------------------------------------------------------------------------------------------

// The exponent of a block is the exponent of its largest magnitude minus the exponent of the largest level; larger
// scaled numbers become the largest level. A block that holds an infinity or NaN decodes to NaN throughout; a block of
// zeros has the least exponent.
LOWRANK_INLINE int shared_exponent(float most) {
    if (!(most <= FLT_MAX))
        return kExponentNaN;
    int32_t bits;
    std::memcpy(&bits, &most, sizeof bits);
    return int(max(0, (bits >> 23) - kLargestExponent)); // subnormal numbers too have the least
}

// Encodes 32 numbers: each becomes the level nearest to w / 2^(byte - 127), a tie goes to the even nibble, and the sign
// is kept, on zeros too.
template <class T>
LOWRANK_INLINE void quantize_mx_block(const T* w, const Table& thresholds, float middle, uint8_t* packed,
                                      uint8_t* exponent) {
    const int byte = *exponent = uint8_t(shared_exponent(largest(w, kGroup)));
    // 2^(127 - byte), which is subnormal only for 255.
    const int32_t bits = byte == kExponentNaN ? 0x00200000 : (2 * kExponentBias - byte) << 23;
    float reciprocal;
    std::memcpy(&reciprocal, &bits, sizeof reciprocal);
    I nibbles[kGroup / kLanes];
    for (int j = 0; j < kGroup / kLanes; ++j) {
        const V scaled = mul(load(w + j * kLanes), set1(reciprocal)), size = magnitude(scaled);
        I i = step_where_below(zero_int(), 4, set1(middle), size);
        i = step_where_below(i, 2, lookup(thresholds, plus(i, 1)), size);
        nibbles[j] = with_sign(step_where_below(i, 1, lookup(thresholds, i), size), scaled);
    }
    store_nibbles(packed, nibbles);
}

template <class T>
void quantize_mx_blocks(const T* w, int64_t count, uint8_t* packed, uint8_t* exponents) {
    constexpr float entries[16] = {LOWRANK_MXFP4_THRESHOLDS};
    const Table thresholds = load_table(entries);
    for (; count >= kGroup; count -= kGroup, w += kGroup, packed += kGroup / 2)
        quantize_mx_block(w, thresholds, entries[3], packed, exponents++);
    if (count > 0) { // the short last block, padded with zeros
        T whole[kGroup] = {};
        uint8_t bytes[kGroup / 2];
        std::memcpy(whole, w, size_t(count) * sizeof(T));
        quantize_mx_block(whole, thresholds, entries[3], bytes, exponents);
        std::memcpy(packed, bytes, size_t(count + 1) / 2);
    }
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

template <class T>
void quantize_bytes(const T* w, int64_t count, int64_t block_size, uint8_t* bytes, float* scales) {
    constexpr float kLargest = LOWRANK_INT8_LARGEST, kLeast = LOWRANK_INT8_LEAST_ABSMAX;
    for (; count > 0; count -= block_size, w += block_size, bytes += block_size) {
        const int64_t now = min(count, block_size);
        float most = largest(w, now);
        most = most < kLeast ? kLeast : most; // NaN stays
        *scales++ = most / kLargest;
        const float factor = kLargest / most;
        for (int64_t i = 0; i < now; i += kLanes) {
            const int64_t lanes = min(kLanes, now - i);
            float rounded[kLanes];
            const V scaled = mul(lanes == kLanes ? load(w + i) : load_n(w + i, lanes), set1(factor));
            store(rounded, add(scaled, set1(LOWRANK_INT8_ROUNDER)));
            for (int64_t j = 0; j < lanes; ++j) {
                uint32_t bits;
                std::memcpy(&bits, rounded + j, sizeof bits);
                bytes[i + j] = uint8_t(bits);
            }
        }
    }
}

void quantize(int format, Rows w, int64_t numel, int64_t block_size, uint8_t* packed, void* scales, int threads) {
    // Tasks are whole blocks, hence whole bytes.
    parallel_for(threads, ceil_div(numel, kTask), [&](int64_t task) {
        const int64_t f = task * kTask, count = min(kTask, numel - f);
        with_type(w.dtype, [&](auto t) {
            const auto* from = static_cast<const decltype(t)*>(w.data) + f;
            if (has_exponents(format))
                return quantize_mx_blocks(from, count, packed + f / 2, static_cast<uint8_t*>(scales) + f / block_size);
            float* absmax = static_cast<float*>(scales) + f / block_size;
            if (format == kInt8)
                quantize_bytes(from, count, block_size, packed + f, absmax);
            else if (format == kFp4)
                quantize_blocks<Fp4Codes>(from, count, block_size, packed + f / 2, absmax);
            else
                quantize_blocks<Nf4Codes>(from, count, block_size, packed + f / 2, absmax);
        });
    });
}

// ---- block scales ---------------------------------------------------------------------------------------------------

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

// ---- all formats ----------------------------------------------------------------------------------------------------

void dequantize(Matrix w, int64_t numel, void* out, int out_dtype, int threads) {
    parallel_for(threads, ceil_div(numel, kTask), [&](int64_t task) {
        const int64_t f = task * kTask;
        with_type(out_dtype, [&](auto t) {
            auto* to = static_cast<decltype(t)*>(out) + f;
            weight_row(w, 0, 0, f, min(kTask, numel - f), to);
        });
    });
}

} // namespace

extern const FormatKernels formats_kernels = {quantize, absmax_quantize, dequantize};

} // namespace lowrank::cpu::LOWRANK_ISA
