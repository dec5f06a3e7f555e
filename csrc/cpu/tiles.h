// Rows of floats and the register-blocked tile C[i][lane] += sum_t L[i][t] P[t][lane] that the products are made of, on
// the vector unit and, for pairs of bfloat16, on the matrix unit where there is one. Included by files that are
// compiled once per instruction set.
#pragma once

#include "cpu/simd.h"

#include <cmath>

#if defined(__AMX_BF16__) && defined(LOWRANK_OPS_EMULATE_AMX)
#include "amx_emulation.h" // of tests/emulation, see `make test-amx`
#endif

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Scratch slots. The shared ones belong to the calling thread and are read by all, the others to each thread.
enum Slot {
    kSharedP,
    kSharedL,
    kSharedC,
    kSharedGh,
    kSharedGd,
    kSharedCore,
    kSharedCore2, // shared
    kPart,
    kL,
    kP,
    kC,
    kRow,
    kRow2
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif
#if defined(__AMX_BF16__)
constexpr bool kHasMatrixUnit = true;
#else
constexpr bool kHasMatrixUnit = false;
#endif

// ---- rows of float32 ------------------------------------------------------------------------------------------------

struct Dropout {
    bool on;
    uint32_t threshold, key0, key1;
    float inverse; // 1 / (1 - p)

    Dropout(double p, int64_t seed)
        : on(p > 0), threshold(0), key0(uint32_t(uint64_t(seed))), key1(uint32_t(uint64_t(seed) >> 32)),
          inverse(float(1.0 / (1.0 - p))) {
        const double words = std::nearbyint(p * 4294967296.0);
        threshold = words < 4294967295.0 ? uint32_t(words) : 0xffffffffu;
    }

    // Zeroes the dropped elements k, k + 1, … of row m; k is a multiple of 4.
    // Philox-4x32-10: word k % 4 of counter (k / 4, m, 0, 0).
    void apply(int64_t m, int64_t k, int64_t count, float* row) const {
        constexpr int kBatch = 16;
        for (int64_t i = 0; i < count; i += 4 * kBatch) {
            uint32_t c[4][kBatch], keep[kBatch][4];
            for (int j = 0; j < kBatch; ++j) {
                c[0][j] = uint32_t((k + i) / 4 + j);
                c[1][j] = uint32_t(m);
                c[2][j] = c[3][j] = 0;
            }
            uint32_t k0 = key0, k1 = key1;
            for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9, k1 += 0xbb67ae85) {
                for (int j = 0; j < kBatch; ++j) {
                    const uint64_t a = uint64_t(0xd2511f53) * c[0][j], b = uint64_t(0xcd9e8d57) * c[2][j];
                    c[0][j] = uint32_t(b >> 32) ^ c[1][j] ^ k0;
                    c[1][j] = uint32_t(b);
                    c[2][j] = uint32_t(a >> 32) ^ c[3][j] ^ k1;
                    c[3][j] = uint32_t(a);
                }
            }
            for (int j = 0; j < kBatch; ++j)
                for (int word = 0; word < 4; ++word)
                    keep[j][word] = c[word][j] >= threshold;
            const uint32_t* flat = keep[0];
            const int64_t n = min(4 * kBatch, count - i);
            for (int64_t j = 0; j < n; ++j)
                row[i + j] = flat[j] ? row[i + j] : 0.0f;
        }
    }
};

LOWRANK_INLINE const void* at(const Rows& rows, int64_t i, int64_t k) {
    return static_cast<const char*>(rows.data) + (i * rows.stride + k) * size_of(rows.dtype);
}

template <class T>
LOWRANK_INLINE void convert(const T* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(to + i, load(from + i));
    if (i < count)
        store_n(to + i, load_n(from + i, count - i), count - i);
}

// to[0 … count) = row i from column k on, masked; zeros up to `padded`.
inline void load_row(const Rows& rows, int64_t i, int64_t k, int64_t count, float* to, int64_t padded,
                     const Dropout* dropout = nullptr) {
    with_type(rows.dtype, [&](auto t) { convert(static_cast<const decltype(t)*>(at(rows, i, k)), count, to); });
    for (int64_t j = count; j < padded; ++j)
        to[j] = 0;
    if (dropout && dropout->on)
        dropout->apply(i, k, count, to);
}

// to[i] = from[i], rounded to the element type `dtype`, from element `first` of `to` on.
inline void store_row(const float* from, int64_t count, void* to, int dtype, int64_t first) {
    with_type(dtype, [&](auto t) {
        auto* out = static_cast<decltype(t)*>(to) + first;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
            store(out + i, load(from + i));
        if (i < count)
            store_n(out + i, load_n(from + i, count - i), count - i);
    });
}

// to[c][r] = from[r][c] for whole squares of kLanes; both are padded to them.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += kLanes)
        for (int64_t c = 0; c < columns; c += kLanes) {
            V square[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                square[i] = load(from + (r + i) * from_stride + c);
            transpose_square(square);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                store(to + (c + i) * to_stride + r, square[i]);
        }
}

// ---- the tile -------------------------------------------------------------------------------------------------------
// Operands are "units" of 32 bits: a float, or a pair of bfloat16 of neighbouring t.

struct Floats {
    using Element = float;
    static constexpr int kPerUnit = 1;
    static constexpr int kLeft = 1;        // floats of a unit on the left
    static constexpr int64_t kFours = 128; // as of Pairs, but never asked for
    static LOWRANK_INLINE V lanes(const float* p, int) { return load(p); }
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return fma(l, p, c); }
    // kLanes units of one t from rows t * kPerUnit, t * kPerUnit + 1, … of a matrix.
    static LOWRANK_INLINE void units_of(const float* row, const float*, float* to) { store(to, load(row)); }
};

#if defined(__AVX512BF16__)
struct Pairs {
    using Element = BFloat16;
    static constexpr int kPerUnit = 2;
    static constexpr int kLeft = 1;
    static LOWRANK_INLINE V lanes(const float* p, int) { return load(p); }
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return _mm512_dpbf16_ps(c, (__m512bh)l, (__m512bh)p); }
    static LOWRANK_INLINE void units_of(const BFloat16* row, const BFloat16* next, float* to) {
        const __m512i even = _mm512_castps_si512(load(row)),
                      odd = _mm512_castps_si512(load(next)); // bits in the upper half
        _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
    }

    // Within kFours columns the order 0, 4, 8, …, 1, 5, 9, …, 2, …, 3, …: that in which NF4 comes out of 16-bit words
    // without a shuffle. A sum over columns does not mind, as long as both operands have it.
    static constexpr int64_t kFours = 128;

    // Weights of kFours columns, with a scale for each half, as four vectors.
    static LOWRANK_INLINE void decode_four(const uint8_t* bytes, const float* scales, __m512i* to) {
        // Entries 0 to 15 for the block in the lower half of the bytes, 16 to 31 for that in the upper.
        constexpr int kAndThenOr = 0xEA;
        const __m512 codes = load(kCode);
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(mul(codes, set1(scales[1])), mul(codes, set1(scales[0])));
        const __m512i words = _mm512_loadu_si512(bytes), nibble = _mm512_set1_epi8(15);
        const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
        const __m512i entries[2] = {
            _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, second, kAndThenOr),
            _mm512_ternarylogic_epi32(words, nibble, second, kAndThenOr),
        };
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512i entry = entries[j % 2];
            to[j] = _mm512_permutexvar_epi16(j < 2 ? entry : _mm512_srli_epi16(entry, 8), table);
        }
    }

    // Weights of `groups` times kFours columns, scales[i] for every 64 of them.
    static LOWRANK_INLINE void decode_fours(const uint8_t* bytes, const float* scales, int64_t groups, BFloat16* to) {
        for (int64_t i = 0; i < groups; ++i, bytes += kFours / 2, scales += 2, to += kFours) {
            __m512i four[4];
            decode_four(bytes, scales, four);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                _mm512_storeu_si512(to + 32 * j, four[j]);
        }
    }

    // Units of two rows, a panel of half a group after the other, `stride` apart. Their order is that of fours, and
    // then within each of the four first those whose number has bit 2 clear.
    static LOWRANK_INLINE void pack_fours(const uint8_t* row, const uint8_t* next, const float* scales,
                                          const float* next_scales, int64_t groups, int64_t stride, float* to) {
        for (int64_t i = 0; i < groups; ++i) {
            __m512i even[4], odd[4];
            decode_four(row + i * kFours / 2, scales + 2 * i, even);
            decode_four(next + i * kFours / 2, next_scales + 2 * i, odd);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                float* panel = to + (2 * i + j / 2) * stride + j % 2 * 32;
                _mm512_storeu_si512(panel, _mm512_unpacklo_epi16(even[j], odd[j]));
                _mm512_storeu_si512(panel + 16, _mm512_unpackhi_epi16(even[j], odd[j]));
            }
        }
    }

    // Groups of columns in the order of pack_fours, put straight.
    static LOWRANK_INLINE void unpack_fours(float* row, int64_t groups) {
        for (int64_t i = 0; i < groups; ++i, row += kFours) {
            __m512 v[2][4];
            for (int half = 0; half < 2; ++half) {
                // Lane 4 l + t of vector j holds column 32 l + 16 half + 4 t + j.
                const __m512 a = load(row + 16 * half), b = load(row + 32 + 16 * half), c = load(row + 64 + 16 * half),
                             d = load(row + 96 + 16 * half);
                const __m512 ab0 = _mm512_unpacklo_ps(a, b), ab1 = _mm512_unpackhi_ps(a, b);
                const __m512 cd0 = _mm512_unpacklo_ps(c, d), cd1 = _mm512_unpackhi_ps(c, d);
                const auto pairs = [](__m512 x) { return _mm512_castps_pd(x); };
                // Quarter l of vector t holds columns 32 l + 16 half + 4 t to + 3.
                const __m512 t0 = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(ab0), pairs(cd0)));
                const __m512 t1 = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(ab0), pairs(cd0)));
                const __m512 t2 = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(ab1), pairs(cd1)));
                const __m512 t3 = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(ab1), pairs(cd1)));
                const __m512 low01 = _mm512_shuffle_f32x4(t0, t1, 0x44), high01 = _mm512_shuffle_f32x4(t0, t1, 0xee);
                const __m512 low23 = _mm512_shuffle_f32x4(t2, t3, 0x44), high23 = _mm512_shuffle_f32x4(t2, t3, 0xee);
                v[half][0] = _mm512_shuffle_f32x4(low01, low23, 0x88);
                v[half][1] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
                v[half][2] = _mm512_shuffle_f32x4(high01, high23, 0x88);
                v[half][3] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
            }
            for (int l = 0; l < 4; ++l)
                for (int half = 0; half < 2; ++half)
                    store(row + 32 * l + 16 * half, v[half][l]);
        }
    }

    // The levels times kStretch in bfloat16, for sums that are scaled afterwards, for even and odd columns. What
    // rounding does to a level it does to every weight of that level, so stretch and directions are chosen such that
    // the error of a sum of weights is 1.2e-5 of the sum of their magnitudes at most, for normal, uniform and Laplace
    // weights (test_levels_of_pairs). Weights are off by 1.2e-3 in the root mean square, less than level times scale
    // rounded (1.65e-3). A sixteenth keeps a sum of eight from overflowing where x does not.
    static constexpr float kStretch = 1.2425f / 16;
    static constexpr float kLevels[2][16] = {
        {-1.2421875f, -0.8671875f, -0.65234375f, -0.490234375f, -0.353515625f, -0.23046875f, -0.11328125f, 0.0f,
         0.09912109375f, 0.2001953125f, 0.306640625f, 0.419921875f, 0.546875f, 0.69921875f, 0.8984375f, 1.2421875f},
        {-1.2421875f, -0.86328125f, -0.65234375f, -0.490234375f, -0.353515625f, -0.23046875f, -0.11328125f, 0.0f,
         0.09912109375f, 0.2001953125f, 0.306640625f, 0.419921875f, 0.546875f, 0.69921875f, 0.8984375f, 1.2421875f}};
    struct Levels {
        __m512i of[2];

        LOWRANK_INLINE Levels() {
            for (int i = 0; i < 2; ++i) {
                const __m512 sixteenths = mul(load(kLevels[i]), set1(1.0f / 16));
                of[i] = (__m512i)_mm512_cvtne2ps_pbh(sixteenths, sixteenths);
            }
        }
        // Those of the four vectors of kFours columns.
        LOWRANK_INLINE __m512i at(__m512i words, int j) const {
            constexpr unsigned kShift[4] = {4, 0, 12, 8};
            return _mm512_permutexvar_epi16(kShift[j] ? _mm512_srli_epi16(words, kShift[j]) : words, of[j % 2]);
        }
    };

    // v = a + b + c in bfloat16, each what was left, rounded once, and 0 beside an infinity: of these those that
    // `which` names go to `to` and on, `stride` apart.
    template <int kCount>
    static LOWRANK_INLINE void split(V v, int64_t count, const int (&which)[kCount], BFloat16* to, int64_t stride) {
        __m256i parts[3];
#pragma GCC unroll 3
        for (int part = 0; part < 3; ++part) {
            parts[part] = (__m256i)_mm512_cvtneps_pbh(v);
            const V taken = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts[part]), 16));
            constexpr int kInfinity = 0x18;
            v = _mm512_maskz_sub_ps(__mmask16(~_mm512_fpclass_ps_mask(taken, kInfinity)), v, taken);
        }
#pragma GCC unroll 6
        for (int i = 0; i < kCount; ++i)
            _mm256_mask_storeu_epi16(to + i * stride, __mmask16((1 << count) - 1), parts[which[i]]);
    }

    // The same order for numbers as they are.
    static LOWRANK_INLINE void order_fours(const BFloat16* from, int64_t groups, BFloat16* to) {
        alignas(64) uint16_t even[32];
        for (int i = 0; i < 32; ++i)
            even[i] = uint16_t(2 * i);
        const __m512i evens = _mm512_load_si512(even), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
        for (int64_t i = 0; i < groups; ++i, from += kFours, to += kFours) {
            const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32),
                          c = _mm512_loadu_si512(from + 64), d = _mm512_loadu_si512(from + 96);
            const __m512i even0 = _mm512_permutex2var_epi16(a, evens, b), odd0 = _mm512_permutex2var_epi16(a, odds, b);
            const __m512i even1 = _mm512_permutex2var_epi16(c, evens, d), odd1 = _mm512_permutex2var_epi16(c, odds, d);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even0, evens, even1));
            _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(odd0, evens, odd1));
            _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(even0, odds, even1));
            _mm512_storeu_si512(to + 96, _mm512_permutex2var_epi16(odd0, odds, odd1));
        }
    }
    static LOWRANK_INLINE void order_fours(const float* from, int64_t groups, float* to) {
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        for (int64_t i = 0; i < groups; ++i, from += kFours, to += kFours) {
            V even[4], odd[4];
            for (int j = 0; j < 4; ++j) {
                const V a = load(from + 32 * j), b = load(from + 32 * j + 16);
                even[j] = _mm512_permutex2var_ps(a, evens, b), odd[j] = _mm512_permutex2var_ps(a, odds, b);
            }
            for (int j = 0; j < 2; ++j) {
                store(to + 16 * j, _mm512_permutex2var_ps(even[2 * j], evens, even[2 * j + 1]));
                store(to + 32 + 16 * j, _mm512_permutex2var_ps(odd[2 * j], evens, odd[2 * j + 1]));
                store(to + 64 + 16 * j, _mm512_permutex2var_ps(even[2 * j], odds, even[2 * j + 1]));
                store(to + 96 + 16 * j, _mm512_permutex2var_ps(odd[2 * j], odds, odd[2 * j + 1]));
            }
        }
    }
};

// Pairs on the right as they are packed for Pairs, on the left two floats each.
struct FloatsByPairs {
    static constexpr int kLeft = 2;
    static LOWRANK_INLINE V multiply_add(V l, V p, V c) { return fma(l, p, c); }
    static LOWRANK_INLINE V lanes(const float* p, int which) {
        const __m512i pairs = _mm512_loadu_si512(p);
        return _mm512_castsi512_ps(which == 0 ? _mm512_slli_epi32(pairs, 16)
                                              : _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
    }
};
#else
using Pairs = Floats;
#endif

// Rows and vectors of lanes of a tile: accumulators, one row of P and one broadcast fill the registers.
constexpr int kWidest = kRegisters == 32 ? 4 : 2;
constexpr int kPanel = kWidest * kLanes;
constexpr int rows_of_tile(int vectors) {
    return (kRegisters == 32 ? 24 : 12) / vectors;
}

// Units whose products are summed in registers before the sum is added to C.
constexpr int kChunkUnits = 512;
template <class Units>
constexpr int kChunk = kChunkUnits * Units::kPerUnit;
// Between rows of scratch, so that they do not fall on the same few lines of the first-level cache.
constexpr int kSkew = 16;

// The left operand: rows of units, `stride` bytes apart.
struct Left {
    const void* data;
    int64_t stride;
    LOWRANK_INLINE const char* row(int64_t i) const { return static_cast<const char*>(data) + i * stride; }
};

template <class Units, int kRows, int kVectors>
LOWRANK_INLINE void tile(int64_t units, Left left, const float* p, int64_t p_stride, float* c, int64_t c_stride,
                         bool first) {
    V sum[kRows][kVectors];
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j)
            sum[i][j] = zero();
    for (int64_t t = 0; t < units; ++t)
#pragma GCC unroll 2
        for (int which = 0; which < Units::kLeft; ++which) {
            V lanes[kVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j)
                lanes[j] = Units::lanes(p + t * p_stride + j * kLanes, which);
#pragma GCC unroll 32
            for (int i = 0; i < kRows; ++i) {
                float unit;
                std::memcpy(&unit, left.row(i) + (t * Units::kLeft + which) * 4, 4);
                const V l = set1(unit);
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j)
                    sum[i][j] = Units::multiply_add(l, lanes[j], sum[i][j]);
            }
        }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            float* to = c + i * c_stride + j * kLanes;
            store(to, first ? sum[i][j] : add(load(to), sum[i][j]));
        }
}

// Floats between rows of the left operand of tall tiles: known to the compiler, which has no registers for 24
// addresses.
template <class Units>
constexpr int64_t kTallStride = kChunkUnits * Units::kLeft + kSkew;

template <class Units, int kVectors>
void tall_tile(int64_t units, const void* left, const float* p, float* c, int64_t c_stride, bool first) {
    tile<Units, rows_of_tile(kVectors), kVectors>(units, {left, kTallStride<Units> * 4}, p, kVectors * kLanes, c,
                                                  c_stride, first);
}

// C of any number of rows (padded to a whole number of tiles) over `vectors` vectors of lanes.
template <class Units>
void tall_tiles(int64_t rows, int vectors, int64_t units, const void* left, const float* p, float* c, int64_t c_stride,
                bool first) {
    constexpr int k3 = kWidest < 3 ? kWidest : 3; // no wider than the registers allow
    constexpr decltype(&tall_tile<Units, 1>) kTiles[] = {tall_tile<Units, 1>, tall_tile<Units, 2>, tall_tile<Units, k3>,
                                                         tall_tile<Units, kWidest>};
    const int step = rows_of_tile(vectors);
    for (int64_t i = 0; i < rows; i += step)
        kTiles[vectors - 1](units, static_cast<const char*>(left) + i * kTallStride<Units> * 4, p, c + i * c_stride,
                            c_stride, first);
}

// One tile over a full panel of lanes, its left operand anywhere.
template <class Units, int kRows>
void wide_tile(int64_t units, Left left, const float* p, float* c, int64_t c_stride, bool first) {
    tile<Units, kRows, kWidest>(units, left, p, kPanel, c, c_stride, first);
}

// C of exactly `rows` rows over a full panel of lanes.
template <class Units, int kRows = rows_of_tile(kWidest)>
void wide_tiles(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride, bool first) {
    for (; rows >= kRows; rows -= kRows, left.data = left.row(kRows), c += kRows * c_stride)
        wide_tile<Units, kRows>(units, left, p, c, c_stride, first);
    if constexpr (kRows > 1)
        if (rows > 0)
            wide_tiles<Units, kRows - 1>(rows, units, left, p, c, c_stride, first);
}

#if defined(__AMX_BF16__)
// ---- tiles in the matrix unit ---------------------------------------------------------------------------------------
// The same sums of pairs over the same operands, 16 rows and 16 lanes at a time. Accumulators are tiles 0 to 3, rows of
// the left operand 4 and 5 (3 to 5 beside a single tile of lanes), lanes 6 and 7.

constexpr int64_t kUnitsAtOnce = 16;

// Configures the unit for tiles of so many rows on the left, and lets go of it at the end: others configure it too.
class MatrixUnit {
public:
    explicit MatrixUnit(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i)
            config.bytes[i] = 64, config.rows[i] = uint8_t(i < 6 ? rows : 16);
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
};

// C [rows, 2 * 16 lanes], `two`: of two tiles of rows, else of one.
LOWRANK_INLINE void matrix_tiles(bool two, int64_t units, Left left, const float* p, int64_t p_stride, float* c,
                                 int64_t c_stride, bool first) {
    float* below = c + 16 * c_stride;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, c, c_stride * 4);
        _tile_loadd(1, c + 16, c_stride * 4);
        if (two) {
            _tile_loadd(2, below, c_stride * 4);
            _tile_loadd(3, below + 16, c_stride * 4);
        }
    }
    for (int64_t t = 0; t < units; t += kUnitsAtOnce) {
        _tile_loadd(4, left.row(0) + t * 4, left.stride);
        _tile_loadd(6, p + t * p_stride, p_stride * 4);
        _tile_loadd(7, p + t * p_stride + 16, p_stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, left.row(16) + t * 4, left.stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
    if (two) {
        _tile_stored(2, below, c_stride * 4);
        _tile_stored(3, below + 16, c_stride * 4);
    }
}

// C [16 * kTiles rows, 16 lanes].
template <int kTiles>
LOWRANK_INLINE void matrix_column(int64_t units, Left left, const float* p, int64_t p_stride, float* c,
                                  int64_t c_stride, bool first) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
    } else {
        _tile_loadd(0, c, c_stride * 4);
        if (kTiles > 1)
            _tile_loadd(1, c + 16 * c_stride, c_stride * 4);
        if (kTiles > 2)
            _tile_loadd(2, c + 32 * c_stride, c_stride * 4);
    }
    for (int64_t t = 0; t < units; t += kUnitsAtOnce) {
        _tile_loadd(6, p + t * p_stride, p_stride * 4);
        _tile_loadd(3, left.row(0) + t * 4, left.stride);
        _tile_dpbf16ps(0, 3, 6);
        if (kTiles > 1) {
            _tile_loadd(4, left.row(16) + t * 4, left.stride);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (kTiles > 2) {
            _tile_loadd(5, left.row(32) + t * 4, left.stride);
            _tile_dpbf16ps(2, 5, 6);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    if (kTiles > 1)
        _tile_stored(1, c + 16 * c_stride, c_stride * 4);
    if (kTiles > 2)
        _tile_stored(2, c + 32 * c_stride, c_stride * 4);
}

// C of 16, 32 or 48 rows over `vectors` vectors of lanes, operands zero up to a multiple of kUnitsAtOnce; in a
// MatrixUnit.
inline void tall_tiles_of_pairs(int64_t rows, int vectors, int64_t units, Left left, const float* p, float* c,
                                int64_t c_stride, bool first) {
    const int64_t p_stride = vectors * kLanes;
    for (int lane = 0; lane < p_stride; lane += 32)
        if (p_stride - lane >= 32) {
            matrix_tiles(rows > 16, units, left, p + lane, p_stride, c + lane, c_stride, first);
            if (rows > 32)
                matrix_tiles(false, units, {left.row(32), left.stride}, p + lane, p_stride, c + 32 * c_stride + lane,
                             c_stride, first);
        } else if (rows > 32) {
            matrix_column<3>(units, left, p + lane, p_stride, c + lane, c_stride, first);
        } else if (rows > 16) {
            matrix_column<2>(units, left, p + lane, p_stride, c + lane, c_stride, first);
        } else {
            matrix_column<1>(units, left, p + lane, p_stride, c + lane, c_stride, first);
        }
}

// Any number of rows; a whole number of kUnitsAtOnce.
inline void wide_tiles_of_pairs(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                                bool first) {
    const int64_t whole = rows & -16;
    if (whole > 0) {
        const MatrixUnit unit(16);
        for (int lane = 0; lane < kPanel; lane += 32)
            for (int64_t i = 0; i < whole; i += 32)
                matrix_tiles(whole - i >= 32, units, {left.row(i), left.stride}, p + lane, kPanel,
                             c + i * c_stride + lane, c_stride, first);
    }
    if (whole < rows) {
        const MatrixUnit unit(int(rows - whole));
        for (int lane = 0; lane < kPanel; lane += 32)
            matrix_tiles(false, units, {left.row(whole), left.stride}, p + lane, kPanel, c + whole * c_stride + lane,
                         c_stride, first);
    }
}
#else
constexpr int64_t kUnitsAtOnce = 1;

class MatrixUnit {
public:
    explicit MatrixUnit(int) {}
};

inline void tall_tiles_of_pairs(int64_t rows, int vectors, int64_t units, Left left, const float* p, float* c,
                                int64_t c_stride, bool first) {
    tall_tiles<Pairs>(rows, vectors, units, left.data, p, c, c_stride, first);
}

inline void wide_tiles_of_pairs(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                                bool first) {
    wide_tiles<Pairs>(rows, units, left, p, c, c_stride, first);
}
#endif

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
