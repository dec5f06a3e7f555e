// The unit of whole numbers of 16 bits on ARM, for few tokens (tile/word_levels.h has the roundings): SMLAL multiplies
// four and adds them to four sums in 32 bits, as FMLA does with float32, but TBL and ZIP find the levels in half the
// instructions.
#pragma once

#include "cpu/tile/word_levels.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

struct Words {
    static constexpr int64_t kColumns = kWordColumns;

    // The column, within a group of 8 * kLanes, of word i of the four vectors that the group is decoded to: even
    // columns are in high nibbles.
    static constexpr int column_of(int i) { return 2 * (i % 16) + i / 16; }

    struct Levels {
        WordTable table;
        float unit; // a level is its word times this

        LOWRANK_INLINE explicit Levels(int type)
            : table(words(type, 0), words(type, 8)), unit(word_unit(kFine, type)) {}
        // The weights of a group, which has no half, as four vectors.
        template <bool>
        LOWRANK_INLINE void decode(const uint8_t* bytes, I* to) const {
            const Nibbles nibbles(vld1q_u8(bytes));
            uint16x8_t v[4];
            table.lookup(nibbles.high, v);
            table.lookup(nibbles.low, v + 2);
            for (int i = 0; i < 4; ++i)
                to[i] = vreinterpretq_s32_u16(v[i]);
        }

    private:
        static LOWRANK_INLINE uint16x8_t words(int type, int first) {
            return vreinterpretq_u16_s16(vld1q_s16(kWordTables.of[kFine][format_index(type)] + first));
        }
    };

    // The sums of eight products in each lane, four columns apart within each of the four vectors.
    static LOWRANK_INLINE V dot(const I* weights, const int16_t* x) {
        I sum = zero_int();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int16x8_t w = vreinterpretq_s16_s32(weights[j]), in = vld1q_s16(x + 8 * j);
            sum = vmlal_s16(sum, vget_low_s16(w), vget_low_s16(in));
            sum = vmlal_high_s16(sum, w, in);
        }
        return to_float(sum);
    }

    static LOWRANK_INLINE float quantise(const float* row, int dtype, int16_t* to) {
        return quantise_words(row, dtype, to);
    }
};

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
