// The unit of whole numbers of 16 bits on x86 (tile/word_levels.h has their roundings): an instruction multiplies twice
// as many of them as of float32, sums neighbouring products exactly in 32 bits, and a shuffle of bytes looks up 32 or
// 64 codes at once.
#pragma once

#include "cpu/tile/tile.h"
#include "cpu/tile/word_levels.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

#if defined(__AVX512F__)
LOWRANK_INLINE I add_words(I sum, I a, I b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
LOWRANK_INLINE I broadcast(const void* word) {
    int32_t bits;
    std::memcpy(&bits, word, 4);
    return _mm512_set1_epi32(bits);
}
#else
LOWRANK_INLINE I add_words(I sum, I a, I b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
LOWRANK_INLINE I broadcast(const void* word) {
    int32_t bits;
    std::memcpy(&bits, word, 4);
    return _mm256_set1_epi32(bits);
}
#endif

LOWRANK_INLINE __m256i word_levels(WordLevels which, int type) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(kWordTables.of[which][format_index(type)]));
}

// The levels as tables of their low and their high bytes, in each half of a register.
struct WordBytes {
    __m256i low, high;

    LOWRANK_INLINE WordBytes(WordLevels which, int type) {
        const __m256i words = word_levels(which, type);
        const __m256i lows = _mm256_and_si256(words, _mm256_set1_epi16(255)), highs = _mm256_srli_epi16(words, 8);
        low = _mm256_permute4x64_epi64(_mm256_packus_epi16(lows, lows), 0x88);
        high = _mm256_permute4x64_epi64(_mm256_packus_epi16(highs, highs), 0x88);
    }
    // The levels of 32 codes: of the first and of the last eight in each half.
    LOWRANK_INLINE void look_up(__m256i codes, __m256i* first, __m256i* last) const {
        const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
        *first = _mm256_unpacklo_epi8(lows, highs), *last = _mm256_unpackhi_epi8(lows, highs);
    }
    static LOWRANK_INLINE void split(const uint8_t* bytes, __m256i* even, __m256i* odd) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)),
                      nibble = _mm256_set1_epi8(15);
        *even = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), *odd = _mm256_and_si256(codes, nibble);
    }
};

struct Words {
    static constexpr int64_t kColumns = kWordColumns;

#if defined(__AVX512F__)
    // The column, within a group of 8 * kLanes, of word i of the four vectors that the group is decoded to: a word has
    // the codes of four columns.
    static constexpr int column_of(int i) { return i % 32 * 4 + i / 32; }

    struct Levels {
        I table;    // twice the levels, because an index has five bits
        float unit; // a level is its word times this

        LOWRANK_INLINE explicit Levels(int type)
            : table(_mm512_broadcast_i64x4(word_levels(kFine, type))), unit(word_unit(kFine, type)) {}
        // The weights of a group, or of the first half of it, as four vectors.
        template <bool kHalf>
        LOWRANK_INLINE void decode(const uint8_t* bytes, I* to) const {
            const I codes = kHalf ? _mm512_maskz_loadu_epi64(0x0f, bytes) : _mm512_loadu_si512(bytes);
            to[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
            to[1] = _mm512_permutexvar_epi16(codes, table);
            to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
            to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        }
    };
#else
    // The column, within a group of 8 * kLanes, of word i of the four vectors that the group is decoded to: even
    // columns are in high nibbles, and shuffles stay within 128 bits, which hold 32 columns.
    static constexpr int column_of(int i) { return 32 * (i % 16 / 8) + 16 * (i / 16 & 1) + 2 * (i % 8) + i / 32; }

    struct Levels : WordBytes {
        float unit; // a level is its word times this

        LOWRANK_INLINE explicit Levels(int type) : WordBytes(kFine, type), unit(word_unit(kFine, type)) {}
        // The weights of a group, which has no half, as four vectors.
        template <bool>
        LOWRANK_INLINE void decode(const uint8_t* bytes, I* to) const {
            I even, odd;
            split(bytes, &even, &odd);
            look_up(even, to, to + 1);
            look_up(odd, to + 2, to + 3);
        }
    };
#endif

    // Coarse levels of kColumns codes, in the order of columns.
    struct Coarse : WordBytes {
        float unit;

        LOWRANK_INLINE explicit Coarse(int type) : WordBytes(kCoarse, type), unit(word_unit(kCoarse, type)) {}
        LOWRANK_INLINE void decode(const uint8_t* bytes, int16_t* to) const {
            __m256i even, odd, levels[4]; // each half of a register has the levels of eight columns of 32
            split(bytes, &even, &odd);
            look_up(_mm256_unpacklo_epi8(even, odd), levels, levels + 1);
            look_up(_mm256_unpackhi_epi8(even, odd), levels + 2, levels + 3);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), _mm256_castsi256_si128(levels[i]));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32 + 8 * i), _mm256_extracti128_si256(levels[i], 1));
            }
        }
    };

    // Levels of two rows of kColumns codes, each times the ratio of its row and half of the columns, which is a
    // multiple of 2^-15: a product is rounded to a word. `pack` writes them as units, kPanel of which are `stride`
    // apart from the next, and `column_of_unit` tells the column of unit i.
    struct Scaled : WordBytes {
        float unit;

        LOWRANK_INLINE explicit Scaled(int type) : WordBytes(kFine, type), unit(word_unit(kFine, type)) {}
        LOWRANK_INLINE void pack(const uint8_t* const (&bytes)[2], const int16_t* const (&ratios)[2], int64_t stride,
                                 float* to) const {
            __m256i words[2][4];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                __m256i even, odd;
                split(bytes[i], &even, &odd);
                look_up(even, words[i], words[i] + 1);
                look_up(odd, words[i] + 2, words[i] + 3);
                const __m256i ratio = _mm256_set_m128i(_mm_set1_epi16(ratios[i][1]), _mm_set1_epi16(ratios[i][0]));
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    words[i][j] = _mm256_mulhrs_epi16(words[i][j], ratio);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const __m256i row = words[0][i / 2], next = words[1][i / 2];
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i / kPanel * stride + 8 * i % kPanel),
                                    i % 2 ? _mm256_unpackhi_epi16(row, next) : _mm256_unpacklo_epi16(row, next));
            }
        }
    };
    static constexpr int column_of_unit(int i) { return 32 * (i / 4 % 2) + 8 * (i / 8 % 4) + 2 * (i % 4) + i / 32; }

    // Units of two words whose products are summed in 32 bits by `tile`.
    static constexpr int64_t kSummed = 16;

    // C[i][lane] += sum_t L[i][t] P[t][lane] over `pieces` times 2 * kSummed columns. `scales` has one for each row and
    // piece, kScales rows apart, and `steps` one for every kColumns and lane, steps_stride apart.
    template <int kRows, int kVectors, int64_t kScales>
    static LOWRANK_INLINE void tile(int64_t pieces, const float* left, int64_t stride, const float* p,
                                    const float* scales, const float* steps, int64_t steps_stride, float* c,
                                    int64_t c_stride) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
            I sum[kRows][kVectors];
#pragma GCC unroll 32
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j)
                    sum[i][j] = zero_int();
            for (int64_t t = piece * kSummed; t < (piece + 1) * kSummed; ++t) {
                I lanes[kVectors];
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j)
                    lanes[j] = load_words(reinterpret_cast<const uint8_t*>(p + (t * kVectors + j) * kLanes));
#pragma GCC unroll 32
                for (int i = 0; i < kRows; ++i) {
                    const I l = broadcast(left + i * stride + t);
#pragma GCC unroll 4
                    for (int j = 0; j < kVectors; ++j) {
                        sum[i][j] = add_words(sum[i][j], l, lanes[j]);
                        asm("" : "+v"(sum[i][j])); // keeps a sum in one register: GCC copied every one of them
                    }
                }
            }
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                const V step = load(steps + piece * 2 * kSummed / kColumns * steps_stride + j * kLanes);
#pragma GCC unroll 32
                for (int i = 0; i < kRows; ++i) {
                    float* to = c + i * c_stride + j * kLanes;
                    store(to, fma(mul(to_float(sum[i][j]), step), set1(scales[i * kScales + piece]), load(to)));
                }
            }
        }
    }

    // The sums over the four vectors of two neighbouring products in each lane.
    static LOWRANK_INLINE V dot(const I* weights, const int16_t* x) {
        I sum = zero_int();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            sum = add_words(sum, weights[j], load_words(reinterpret_cast<const uint8_t*>(x + 2 * kLanes * j)));
        return to_float(sum);
    }

    static LOWRANK_INLINE float quantise(const float* row, int dtype, int16_t* to) {
        return quantise_words(row, dtype, to);
    }
};

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
